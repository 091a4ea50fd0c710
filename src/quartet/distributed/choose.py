"""Which engine a configuration means, and which settings it cannot have; pure, before any process talks to another."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from quartet.config import Config
from quartet.errors import ConfigError

CUTTING = ("zero3", "fsdp2")
"""Engines under which a process holds only its share of the weights."""
SHARING_STATE = ("zero2", *CUTTING)
"""Engines under which a process holds only its share of the optimizer's state."""
GATHER_SHARE = 0.5
"""`gather_for_rollout: auto` takes at most this share of the memory that is free after loading."""


@dataclass(frozen=True)
class Travel:
    """How much travels at once."""

    bucket: int
    """DeepSpeed: gradients that are summed together, in a buffer that stays; its own default would be 2 GB in float32."""
    ahead: int
    """ZeRO-3: weights that are fetched while others compute."""
    ddp_bucket: int = 25 << 20
    """ddp: bytes of gradients that are summed together."""

    @staticmethod
    def of(*, cuda: bool) -> Travel:
        """On a CPU small buffers do as well, and nothing computes while others travel."""
        return Travel(50_000_000, 50_000_000) if cuda else Travel(4_000_000, 0)


def engine_name(config: Config, world_size: int) -> str:
    """The engine of `distributed.engine`. `auto` is none for one process, ddp for LoRA (the gradients are small and the
    frozen weights need not travel) and for what cannot be cut into shares, fsdp2 for other full fine-tuning (gradients and
    optimizer state are what fills memory)."""
    wanted = config.distributed.engine
    if wanted != "auto":
        return wanted
    if world_size == 1:
        return "none"
    models = config.models
    whole = models.quantization is not None or models.freeze_layers or config.ppo.optimizer.name != "adamw"
    return "ddp" if models.lora is not None or whole else "fsdp2"


def gathers_for_rollout(wanted: str | bool, whole_bytes: float, free: float | None) -> bool:
    """What `distributed.gather_for_rollout` means: whether a process holds the whole policy while it generates.

    Args:
        wanted: auto, True or False.
        whole_bytes: of the policy's backbone in the computation's dtype.
        free: bytes that this process can still take after loading; None where unknown, which counts as enough.
    """
    if wanted == "auto":
        return free is None or whole_bytes <= GATHER_SHARE * free
    return wanted is True


def refuse_not_installed(name: str) -> None:
    """Check that the engine's library is there.

    Raises:
        ConfigError: it is not; says how to install it.
    """
    if name in ("zero2", "zero3") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"distributed.engine={name} needs DeepSpeed, which is not installed; pip install quartet-rlhf[deepspeed], or use "
            "distributed.engine=fsdp2"
        )


def refuse_impossible(config: Config, name: str, world_size: int) -> None:
    """Check the settings that depend on the engine.

    Raises:
        ConfigError: what cannot be had with this engine or this number of processes.
    """
    if name == "none" and world_size > 1:
        raise ConfigError(
            f"distributed.engine=none is for one process, and {world_size} were started; use distributed.engine=auto"
        )
    if config.rollout.engine == "vllm" and name != "none":
        raise ConfigError(
            f"rollout.engine=vllm works with a run of one process, and distributed.engine={name} was chosen for {world_size}; "
            "use rollout.engine=auto without rollout.vllm"
        )
    count, minibatches = config.rollout.batch_size, config.ppo.minibatches
    if count % (minibatches * world_size):
        raise ConfigError(
            f"rollout.batch_size={count} cannot be cut into ppo.minibatches={minibatches} of as many episodes for each of "
            f"{world_size} processes; use a multiple of {minibatches * world_size}"
        )
    if name in CUTTING and config.models.quantization is not None:
        raise ConfigError(
            f"models.quantization={config.models.quantization} cannot be used with distributed.engine={name}, which cuts "
            "weights into shares and would break bitsandbytes' blocks; use distributed.engine=ddp or zero2"
        )
    optimizer = config.ppo.optimizer.name
    if name in SHARING_STATE and optimizer != "adamw":
        raise ConfigError(
            f"ppo.optimizer.name={optimizer} keeps its state in blocks, which distributed.engine={name} cannot cut into "
            "shares; use ppo.optimizer.name=adamw, or distributed.engine=ddp"
        )
    if name in CUTTING and config.models.freeze_layers:
        raise ConfigError(
            f"models.freeze_layers={config.models.freeze_layers} lets two backbones share weights, which "
            f"distributed.engine={name} cannot cut; use distributed.engine=ddp or zero2, or models.freeze_layers=0"
        )
