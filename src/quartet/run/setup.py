"""From a configuration to everything the loop needs. Nothing is written to disk here, and bad input ends here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartet.allocator import return_gaps
from quartet.config import Config, DataConfig
from quartet.distributed import BackboneWeights, ProcessEngine, SingleProcess, gathers_for_rollout
from quartet.errors import CheckpointError, ConfigError, shown
from quartet.kernels.library import are_there
from quartet.memory.free import free_memory
from quartet.models.branch import layer_list
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.linears import restore_linears
from quartet.models.loading import convert_weights, load_roles, plan_for
from quartet.models.offload import refuse_unmovable, rests_on_host
from quartet.models.packing import allow_packing
from quartet.models.pickled import open_checkpoint
from quartet.models.plan import SharingPlan
from quartet.models.precision import resolve_device
from quartet.models.roles import Roles
from quartet.models.tokenizers import load_tokenizer, refuse_long_sequences, stop_token_id
from quartet.records import Prompts, Rollout, Scored
from quartet.rewards.sources import RewardSource, build_sources, combine
from quartet.rollout.choose import make_engine, make_vllm_engine
from quartet.rollout.engine import RolloutEngine, SamplingSettings
from quartet.rollout.sharded import ShardedRollout
from quartet.run.data import PromptSet, hold_out, load_prompts
from quartet.run.metrics import require_trackers
from quartet.run.prompt_files import settings_read
from quartet.run.samples import evaluation_prompts
from quartet.stages.batching import scoring_rows
from quartet.stages.correction import corrected
from quartet.stages.optimizer import make_optimizer
from quartet.stages.scoring import score_rollout

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What is known before a weight is read."""

    sft: CheckpointInfo
    reward: CheckpointInfo
    plan: SharingPlan
    tokenizer: Any
    prompts: PromptSet
    evaluation: Prompts | None
    sources: list[RewardSource]


@dataclass(frozen=True)
class Loaded:
    """Models, optimizer and generation engine."""

    roles: Roles
    engine: ProcessEngine
    trained: nn.Module
    """`roles.trained` as the process engine wants it called."""
    optimizer: torch.optim.Optimizer
    rollout: RolloutEngine
    merged: bool
    """Whether it generates with weights that hold the policy's adapter."""
    decode: Callable[[Tensor], str]


def read_inputs(config: Config, say: Say, *, cut: bool = False) -> Inputs:
    """Check checkpoints, tokenizers, prompts and reward sources.

    Raises:
        ConfigError, CheckpointError, DataError, RewardError: one sentence about the first thing that is wrong.
    """
    data = config.data
    require_trackers(config.run.trackers)
    _refuse_unread(data)
    sft, reward, tokenizer = read_models(config, say)

    def read(source: str) -> PromptSet:
        return read_prompts(source, config, tokenizer, say)

    prompts = read(data.prompts)
    if data.eval_prompts is not None:
        held = read(data.eval_prompts)
        held = held.subset(range(min(len(held), data.eval_count)))
    else:
        prompts, held = hold_out(prompts, data.eval_count, config.run.seed)
    refuse_long_sequences((sft, reward), max(prompts.longest, held.longest), config.rollout.response_length)
    evaluation = evaluation_prompts(held.in_order()) if len(held) else None
    plan = plan_for(config.models, sft, reward)
    refuse_unmovable(config.models, plan, resolve_device(config.models.device), cut=cut)
    return Inputs(sft, reward, plan, tokenizer, prompts, evaluation, build_sources(config.rewards))


def _refuse_unread(data: DataConfig) -> None:
    """A setting that nothing reads is a mistake: whoever gave it expects something of it."""
    sources = [data.prompts] + ([] if data.eval_prompts is None else [data.eval_prompts])
    read = frozenset().union(*map(settings_read, sources))
    for key, reason in (("column", "has no columns"), ("split", "has no splits")):
        given = getattr(data, key)
        if key not in read and given != DataConfig.model_fields[key].default:
            raise ConfigError(f"data.{key}={shown(given)} is given, and {' or '.join(sources)} {reason}; leave it out")


def read_models(config: Config, say: Say) -> tuple[CheckpointInfo, CheckpointInfo, Any]:
    """Check SFT and reward checkpoint and the tokenizer of both.

    Raises:
        ConfigError, CheckpointError: as `read_inputs`.
    """
    models = config.models
    if models.trust_remote_code:
        say("models.trust_remote_code is on: code that the checkpoints bring along runs in this process")
    sft, reward = open_checkpoint(models, "sft"), open_checkpoint(models, "reward")
    tokenizer, notices = load_tokenizer(sft, reward)
    for notice in notices:
        say(notice)
    _refuse_small_embedding(sft, reward, tokenizer)
    stop_token_id(config.rollout.stop, tokenizer)
    if config.rollout.top_p < 1.0:
        say(
            f"rollout.top_p={config.rollout.top_p} samples from a truncated policy: its KL to the reference is biased and "
            "may look negative; 1.0 is exact"
        )
    return sft, reward, tokenizer


def read_prompts(source: str, config: Config, tokenizer: Any, say: Say) -> PromptSet:
    """The prompts of a file or data set, read as `data` says; raises DataError."""
    data = config.data
    return load_prompts(
        source,
        column=data.column,
        split=data.split,
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        warn=say,
    )


def score_with(config: Config, sources: Sequence[RewardSource], loaded: Loaded, rollout: Rollout) -> Scored:
    """Scoring as a run is configured; raises as `score_rollout`."""

    def further(rollout: Rollout) -> list[float]:
        lengths = rollout.response_mask.sum(-1).tolist()
        responses = [loaded.decode(tokens[:length]) for tokens, length in zip(rollout.tokens, lengths, strict=True)]
        return combine(sources, rollout.prompts.texts, responses)

    return score_rollout(
        rollout,
        loaded.roles,
        temperature=config.rollout.temperature,
        placement=config.ppo.score_placement,
        rows=_scoring_rows(config, loaded),
        extra=further if sources else None,
    )


def correct_with(config: Config, loaded: Loaded, rollout: Rollout) -> tuple[Rollout, Tensor]:
    """`corrected` as a run is configured."""
    rows = _scoring_rows(config, loaded)
    return corrected(rollout, loaded.roles, temperature=config.rollout.temperature, rows=rows)


def _scoring_rows(config: Config, loaded: Loaded) -> int:
    device = resolve_device(config.models.device)
    return scoring_rows(config.rollout.batch_rows, device.type, cut=loaded.engine.cuts_weights)


def load_everything(
    config: Config,
    inputs: Inputs,
    say: Say,
    engine: ProcessEngine | None = None,
    measuring: Callable[[str], AbstractContextManager[object]] = nullcontext,
    *,
    merged: bool = False,
) -> Loaded:
    """Load the plan's models and build what works with them.

    Args:
        measuring: gives a context that takes the peak memory of a phase, `load` and then `rollout`.
        merged: generate with weights that hold the policy's adapter.
    """
    engine = engine or SingleProcess()
    if resolve_device(config.models.device).type == "cpu" and not are_there():
        say(
            "no compiled kernels here (no C compiler at installation?): training on this CPU takes longer than it has to"
        )
    with measuring("load"):
        roles = _load(config, inputs, engine)
        optimizer = make_optimizer(roles, config.ppo)
        trained = engine.prepare(roles.trained, optimizer)
    return_gaps()  # left by loading
    tokenizer, rollout = inputs.tokenizer, config.rollout
    settings = SamplingSettings(
        response_length=rollout.response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        stop_id=stop_token_id(rollout.stop, tokenizer),
        pad_id=tokenizer.pad_token_id,
        batch_rows=rollout.batch_rows,
        seed=config.run.seed,
    )

    def decode(tokens: Tensor) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    with measuring("rollout"):  # both try a few tokens
        allow_packing(roles)
        generator = _generator(config, inputs, roles, engine, settings, say, merged=merged)
    return Loaded(roles, engine, trained, optimizer, generator, merged, decode)


def _generator(
    config: Config,
    inputs: Inputs,
    roles: Roles,
    engine: ProcessEngine,
    settings: SamplingSettings,
    say: Say,
    *,
    merged: bool,
) -> RolloutEngine:
    name, policy = config.rollout.engine, roles.policy
    if name == "vllm":
        sft, origin = inputs.sft, inputs.sft.origin or inputs.sft.base
        return make_vllm_engine(
            policy,
            settings,
            config.rollout,
            say,
            longest_prompt=config.data.max_prompt_tokens,
            names=(origin, sft.base, str(Path(origin).resolve())),
            trust_remote_code=config.models.trust_remote_code,
        )
    if not engine.cuts_weights:
        return make_engine(name, policy, settings, say, cuda_graphs=config.rollout.cuda_graphs, merged=merged)
    free = free_memory(policy.backbone.device, engine.processes_here)
    wanted = config.distributed.gather_for_rollout
    gather = not engine.any(not gathers_for_rollout(wanted, policy.backbone.whole_bytes(), free))
    say(f"rollout: {'every process holds the whole policy' if gather else 'a layer at a time, in step'}")
    return ShardedRollout(policy, engine, lambda: make_engine(name, policy, settings, say), gather=gather)


def _load(config: Config, inputs: Inputs, engine: ProcessEngine) -> Roles:
    """The roles, each process holding what the engine leaves it."""
    models, plan, sft, reward = config.models, inputs.plan, inputs.sft, inputs.reward
    cut = engine.cuts_weights
    if cut or engine.world_size > 1:
        engine.agree(lambda: convert_weights(models, plan, sft, reward, mapped=cut) if engine.first_here else None)
    roles = engine.agree(lambda: load_roles(models, plan, sft, reward, seed=config.run.seed, mapped=cut))
    if cut:
        for backbone in roles.backbones.values():
            # A layer's weights are there while that layer runs, and a fast LoRA layer reads those of layers within it.
            restore_linears(backbone.model)
            _, layers = layer_list(backbone.transformer, f"distributed.engine={engine.name}")
            on_host = config.models.offload == "cpu" and rests_on_host(backbone.spec)
            weights = BackboneWeights(backbone, list(layers), "hidden", backbone.heads(), backbone.dtype, on_host)
            backbone.weights = engine.keep(weights)
    return roles


def _refuse_small_embedding(sft: CheckpointInfo, reward: CheckpointInfo, tokenizer: Any) -> None:
    highest = max(tokenizer.get_vocab().values(), default=0)
    sizes = {info.key: getattr(info.config.get_text_config(), "vocab_size", None) for info in (sft, reward)}
    for info in (sft, reward):
        size = sizes[info.key]
        if size is not None and highest >= size:
            raise CheckpointError(
                f"the tokenizer has ids up to {highest}, and {info.key}={info.name!r} has embeddings for {size} tokens; "
                "use the tokenizer that the checkpoint was trained with"
            )
    produced, read = sizes[sft.key], sizes[reward.key]
    if produced is not None and read is not None and produced > read:
        raise CheckpointError(
            f"{sft.key}={sft.name!r} can produce {produced} token ids and {reward.key}={reward.name!r} has embeddings for "
            f"{read}; resize the reward checkpoint's embeddings (model.resize_token_embeddings({produced})) and save it"
        )
