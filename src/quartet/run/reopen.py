"""A run's checkpoint opened beside the run: to judge it on prompts, or to write it out as models.

Both work while the run goes on. Nothing in the run folder is written or removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev

from quartet.config import Config, DistributedConfig
from quartet.distributed import SingleProcess
from quartet.errors import CheckpointError, ConfigError, DataError
from quartet.models.loading import plan_for
from quartet.models.tokenizers import refuse_long_sequences
from quartet.records import Prompts
from quartet.rewards.sources import build_sources
from quartet.run.checkpoint import RunState, load_weights
from quartet.run.checkpoint_folder import choose_checkpoint, list_checkpoints
from quartet.run.data import PromptSet
from quartet.run.edited import refuse_edited
from quartet.run.export import export
from quartet.run.fingerprint import model_fingerprints, refuse_changed
from quartet.run.folder import RunFolder
from quartet.run.memory_account import account_for
from quartet.run.samples import Sample, evaluation_prompts, samples_of
from quartet.run.setup import (
    Inputs,
    Loaded,
    correct_with,
    load_everything,
    read_inputs,
    read_models,
    read_prompts,
    score_with,
)
from quartet.run.shards import load_any
from quartet.run.stored_config import read_config
from quartet.run.trust import refuse_untrusted

Say = Callable[[str], None]
_MODELS = ("models.",)
_ANSWERS = (*_MODELS, "rollout.", "run.seed", "ppo.score_placement")
"""What decides how a policy answers and is scored; prompts and reward sources may be others, which the user names."""
_TRIES = 3
"""A run that goes on removes old checkpoints; the newest is then asked for again."""


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint's policy answered, and what the run's reward model and reward sources say of it."""

    checkpoint: str
    iteration: int
    samples: tuple[Sample, ...]

    def figures(self) -> dict[str, float]:
        """Means over the samples, named as in metrics.jsonl."""
        scores = [sample.score for sample in self.samples]
        return {
            "episodes": len(self.samples),
            "reward/score": fmean(scores),
            "reward/score_std": pstdev(scores),
            "kl/reference": fmean(sample.kl for sample in self.samples),
            "response/length": fmean(sample.tokens for sample in self.samples),
            "response/stopped_fraction": fmean(sample.stopped for sample in self.samples),
        }


def evaluate(
    run: str | Path,
    *,
    say: Say,
    prompts: str | None = None,
    count: int | None = None,
    start: str | None = None,
    trust: bool = False,
) -> Evaluation:
    """Responses of a checkpoint to prompts, scored; sampled as the run samples its own evaluations.

    Args:
        prompts: file or data set, read as `data` says; None takes the run's own evaluation prompts.
        count: the first so many of them.
        start: name of the checkpoint; None takes the newest.
        trust: use the reward sources and the remote code that the run's config.yaml names.

    Raises:
        QuartetError: no run or checkpoint there, inputs that have changed, no prompts, or a reward source that fails.
    """
    folder = RunFolder(run)
    config = _alone(read_config(folder.path))
    _refuse_without_checkpoint(folder, start)
    if not trust:
        refuse_untrusted(config, folder.path)
    refuse_edited(folder.inputs, config, within=_ANSWERS)
    inputs = read_inputs(config, say) if prompts is None else _with_prompts(config, prompts, say)
    asked = _first(inputs.evaluation, count)
    if asked is None:
        raise ConfigError(f"{folder.path} has no evaluation prompts (data.eval_count=0); give some with --prompts")
    loaded, state, name = _open(folder, config, inputs, say, start)
    loaded.roles.use("policy")
    rollout = loaded.rollout.generate(asked)
    if config.rollout.correct_rollout:
        rollout, _ = correct_with(config, loaded, rollout)
    scored = score_with(config, inputs.sources, loaded, rollout)
    return Evaluation(name, state.iteration, tuple(samples_of(state.iteration, scored, loaded.decode)))


def export_checkpoint(
    run: str | Path, out: str | Path, *, say: Say, start: str | None = None, trust: bool = False
) -> str:
    """Write `policy/` and `value/` of a checkpoint into the new or empty folder `out`; returns the checkpoint's name.

    Args:
        start, trust: as `evaluate`; reward sources are not used.

    Raises:
        QuartetError: as `evaluate`, `out` is a file or holds something, or its disk is full.
    """
    folder, target = RunFolder(run), Path(os.path.expanduser(out))
    config = _alone(read_config(folder.path)).model_copy(update={"rewards": ()})
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {str(target)!r} is a file or not empty; name a new or empty folder")
    _refuse_without_checkpoint(folder, start)
    if not trust:
        refuse_untrusted(config, folder.path)
    refuse_edited(folder.inputs, config, within=_MODELS)
    inputs = _without_prompts(config, say)
    loaded, _, name = _open(folder, config, inputs, say, start)
    remedy = "free some space, or name a folder on another disk with --out"
    export(loaded.roles, target, sft=inputs.sft, reward=inputs.reward, tokenizer=inputs.tokenizer, remedy=remedy)
    return name


def _alone(config: Config) -> Config:
    """Opened by one process, however many the run has."""
    return config.model_copy(update={"distributed": DistributedConfig(engine="none")})


def _refuse_without_checkpoint(folder: RunFolder, start: str | None) -> None:
    if not list_checkpoints(folder.checkpoints):
        raise CheckpointError(f"{folder.path} has no checkpoint yet; wait for the first one (run.save_every)")
    choose_checkpoint(folder.checkpoints, start)


def _without_prompts(config: Config, say: Say) -> Inputs:
    sft, reward, tokenizer = read_models(config, say)
    plan = plan_for(config.models, sft, reward)
    return Inputs(sft, reward, plan, tokenizer, PromptSet.from_tokens([], []), None, [])


def _with_prompts(config: Config, source: str, say: Say) -> Inputs:
    inputs = _without_prompts(config, say)
    try:
        found = read_prompts(source, config, inputs.tokenizer, say)
    except DataError as error:  # the run's data.column is not to be changed for a file that is asked for besides
        raise DataError(str(error).replace("set data.column to", "give that name to")) from error
    refuse_long_sequences((inputs.sft, inputs.reward), found.longest, config.rollout.response_length)
    return replace(inputs, evaluation=evaluation_prompts(found.in_order()), sources=build_sources(config.rewards))


def _first(prompts: Prompts | None, count: int | None) -> Prompts | None:
    if prompts is None or count is None:
        return prompts
    return Prompts(prompts.episodes[:count], prompts.texts[:count], prompts.tokens[:count])


def _open(
    folder: RunFolder, config: Config, inputs: Inputs, say: Say, start: str | None
) -> tuple[Loaded, RunState, str]:
    """Models with a checkpoint's weights in them; the checkpoint's state and name."""
    refuse_changed(folder.inputs, model_fingerprints(inputs), whole=False)
    memory = account_for(config, folder.read_plan().get("memory"))
    loaded = load_everything(config, inputs, say, merged=memory.merges(config, inputs.plan, SingleProcess()))
    for left in reversed(range(_TRIES)):
        chosen = choose_checkpoint(folder.checkpoints, start)
        try:
            return loaded, _read(chosen, loaded), chosen.name
        except CheckpointError:
            if not left or chosen.is_dir():
                raise
    raise AssertionError("the last try returns or raises")


def _read(checkpoint: Path, loaded: Loaded) -> RunState:
    """Weights alone where they lie in files of their own; shards hold the optimizer's state besides."""
    if any(checkpoint.glob("shard-*.safetensors")):
        return load_any(checkpoint, loaded.roles, loaded.optimizer, SingleProcess())
    return load_weights(checkpoint, loaded.roles)
