"""What the memory of a run depends on, in a form that a search can vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quartet.config import Config, LoraConfig
from quartet.distributed import CUTTING, engine_name
from quartet.models.precision import resolve_dtype
from quartet.stages.batching import scoring_rows

DtypeName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Choices:
    """The settings that trade memory for speed or precision."""

    sharing: str
    """separate, paired, single or auto."""
    lora: LoraConfig | None
    dtype: DtypeName
    checkpointing: bool
    microbatch_rows: int
    batch_rows: int
    quantization: str | None = None
    """4bit, 8bit, torchao-int8 or None."""
    offload: str = "none"
    """none, or cpu: frozen backbones are in host memory between uses."""
    freeze_layers: int = 0
    world_size: int = 1
    engine: str = "none"
    """none, ddp, zero2, zero3 or fsdp2."""
    gather_for_rollout: bool | Literal["auto"] = False
    """Whether each process holds the whole policy while it generates. An estimate has auto decided."""
    parallel_passes: bool | Literal["auto"] = False
    """Whether policy and value take their passes at the same time. An estimate has auto decided."""
    merge_adapters: bool | Literal["auto"] = False
    """Whether the rollout multiplies with weights that hold the policy's adapter. An estimate has auto decided."""
    rollout_engine: str = "auto"
    optimizer: str = "adamw"
    device: str = "cpu"
    """cpu or cuda."""

    @property
    def scoring_rows(self) -> int:
        """Sequences that scoring computes at once."""
        return scoring_rows(self.batch_rows, self.device, cut=self.engine in CUTTING)


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes of one iteration that the user gave and that no search changes."""

    longest_prompt: int
    """Tokens of the longest prompt."""
    response_length: int
    batch_size: int
    """Episodes per iteration, all processes together."""
    minibatches: int
    epochs: int
    entropy_gradient: bool
    top_p: float
    temperature: float
    evaluated: int = 0
    """Prompts of an evaluation, all processes together."""
    corrects: bool = False
    """Whether the policy computes the log-probabilities of the responses once more in the rollout."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.longest_prompt + self.response_length

    def minibatch_rows(self, world_size: int) -> int:
        """Episodes of one optimizer step in one process."""
        return max(1, self.batch_size // self.minibatches // world_size)

    def process_rows(self, world_size: int) -> int:
        """Episodes of one iteration in one process."""
        return max(1, self.batch_size // world_size)

    def together(self, world_size: int) -> int:
        """Most sequences that one process generates or scores: an iteration's or an evaluation's."""
        return max(self.process_rows(world_size), -(-self.evaluated // world_size))


def plan_device(name: str) -> torch.device:
    """The device that a configuration means; `cuda` is accepted on machines without one, which can still plan."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choices_of(config: Config, device: torch.device, *, world_size: int = 1, engine: str | None = None) -> Choices:
    """The settings of a configuration.

    Args:
        device: decides what `models.dtype: auto` means.
        world_size: processes.
        engine: overrides `distributed.engine`.
    """
    models = config.models
    chosen = engine or engine_name(config, world_size)
    return Choices(
        sharing=models.sharing,
        lora=models.lora,
        dtype=_dtype(models.dtype, device),
        checkpointing=models.gradient_checkpointing,
        microbatch_rows=config.ppo.microbatch_rows,
        batch_rows=config.rollout.batch_rows,
        quantization=models.quantization,
        offload=models.offload,
        freeze_layers=models.freeze_layers,
        world_size=world_size,
        engine=chosen,
        gather_for_rollout=chosen in CUTTING and config.distributed.gather_for_rollout,
        parallel_passes=config.run.parallel_passes,
        merge_adapters=config.rollout.merge_adapters,
        rollout_engine=config.rollout.engine,
        optimizer=config.ppo.optimizer.name,
        device=device.type,
    )


def workload_of(config: Config, longest_prompt: int | None = None, evaluated: int | None = None) -> Workload:
    """The sizes of a configuration's iteration.

    Args:
        longest_prompt: tokens of the longest prompt where the prompts are known; `data.max_prompt_tokens` otherwise.
        evaluated: prompts held out for evaluation where they are known; `data.eval_count` otherwise.
    """
    known = config.data.max_prompt_tokens if longest_prompt is None else longest_prompt
    return Workload(
        longest_prompt=known,
        response_length=config.rollout.response_length,
        batch_size=config.rollout.batch_size,
        minibatches=config.ppo.minibatches,
        epochs=config.ppo.epochs,
        entropy_gradient=config.ppo.entropy_coef > 0,
        top_p=config.rollout.top_p,
        temperature=config.rollout.temperature,
        evaluated=config.data.eval_count if evaluated is None else evaluated,
        corrects=config.rollout.correct_rollout,
    )


def torch_dtype(name: DtypeName) -> torch.dtype:
    """The dtype of a name."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _dtype(name: str, device: torch.device) -> DtypeName:
    if name == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return "bfloat16"  # planned for a GPU elsewhere; every GPU that large models run on computes in it
    return "bfloat16" if resolve_dtype(name, device) == torch.bfloat16 else "float32"
