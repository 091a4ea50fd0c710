"""From a configuration to everything the loop needs. Nothing is written to disk here, and bad input ends here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quartet.config import Config
from quartet.distributed import ProcessEngine, SingleProcess
from quartet.errors import CheckpointError
from quartet.memory.free import free_memory
from quartet.models.branch import layer_list
from quartet.models.checkpoint_info import CheckpointInfo
from quartet.models.linears import restore_linears
from quartet.models.loading import convert_weights, load_roles, plan_for
from quartet.models.pickled import open_checkpoint
from quartet.models.plan import SharingPlan
from quartet.models.precision import resolve_device
from quartet.models.roles import Roles
from quartet.models.tokenizers import load_tokenizer, refuse_long_sequences, stop_token_id
from quartet.records import Prompts
from quartet.rewards.sources import RewardSource, build_sources
from quartet.rollout.choose import make_engine, make_vllm_engine
from quartet.rollout.engine import RolloutEngine, SamplingSettings
from quartet.rollout.sharded import ShardedRollout
from quartet.run.data import PromptSet, hold_out, load_prompts
from quartet.run.metrics import require_trackers
from quartet.run.samples import evaluation_prompts
from quartet.stages.optimizer import make_optimizer

GATHER_SHARE = 0.5
"""`gather_for_rollout: auto` takes at most this share of the memory that is free after loading."""

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
    decode: Callable[[Tensor], str]


def read_inputs(config: Config, say: Say) -> Inputs:
    """Check checkpoints, tokenizers, prompts and reward sources.

    Raises:
        ConfigError, CheckpointError, DataError, RewardError: one sentence about the first thing that is wrong.
    """
    models, data = config.models, config.data
    require_trackers(config.run.trackers)
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

    def read(source: str) -> PromptSet:
        return load_prompts(
            source,
            column=data.column,
            split=data.split,
            tokenizer=tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            warn=say,
        )

    prompts = read(data.prompts)
    if data.eval_prompts is not None:
        held = read(data.eval_prompts)
        held = held.subset(range(min(len(held), data.eval_count)))
    else:
        prompts, held = hold_out(prompts, data.eval_count, config.run.seed)
    refuse_long_sequences((sft, reward), max(prompts.longest, held.longest), config.rollout.response_length)
    evaluation = evaluation_prompts(held.in_order()) if len(held) else None
    plan = plan_for(models, sft, reward)
    return Inputs(sft, reward, plan, tokenizer, prompts, evaluation, build_sources(config.rewards))


def load_everything(config: Config, inputs: Inputs, say: Say, engine: ProcessEngine | None = None) -> Loaded:
    """Load the plan's models and build what works with them."""
    engine = engine or SingleProcess()
    roles = _load(config, inputs, engine)
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

    optimizer = make_optimizer(roles, config.ppo)
    trained = engine.prepare(roles.trained, optimizer)
    return Loaded(roles, engine, trained, optimizer, _generator(config, inputs, roles, engine, settings, say), decode)


def _generator(
    config: Config, inputs: Inputs, roles: Roles, engine: ProcessEngine, settings: SamplingSettings, say: Say
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
        return make_engine(name, policy, settings, say)
    gather = config.distributed.gather_for_rollout
    if gather == "auto":
        free = free_memory(policy.backbone.device)
        gather = not engine.any(free is not None and policy.backbone.whole_bytes() > GATHER_SHARE * free)
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
        device = resolve_device(models.device)
        for backbone in roles.backbones.values():
            # A layer's weights are there while that layer runs, and a fast LoRA layer reads those of layers within it.
            restore_linears(backbone.model)
            _, layers = layer_list(backbone.transformer, f"distributed.engine={engine.name}")
            backbone.weights = engine.keep(
                backbone, list(layers), entry="hidden", head=backbone.heads(), device=device, dtype=backbone.dtype
            )
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
