"""A run's config.yaml that was edited before resuming: what may change, and what would make it another run."""

from __future__ import annotations

import re
from pathlib import Path

from quartet.config import Config, by_key, parse_config
from quartet.errors import CheckpointError, ConfigError, shown
from quartet.run.fingerprint import read_inputs_file
from quartet.run.folder import CONFIGURATION

MAY_CHANGE = (
    # Read from elsewhere: the content is compared (`fingerprint.py`).
    *("models.sft", "models.reward", "data.prompts", "data.eval_prompts"),
    # How long, how fast, how close to the reference.
    *("ppo.iterations", "ppo.learning_rate", "ppo.value_learning_rate", "ppo.kl_coef", "ppo.max_bad_steps"),
    "ppo.optimizer.warmup_iterations",
    # What is written, and when.
    *("run.dir", "run.save_every", "run.keep", "run.eval_every", "run.trackers"),
    # Where and in what portions it is computed.
    *("models.device", "models.dtype", "models.offload", "models.gradient_checkpointing", "ppo.microbatch_rows"),
    *("rollout.batch_rows", "rollout.cuda_graphs", "rollout.merge_adapters", "rollout.vllm.*"),
    *("run.return_memory", "run.parallel_passes"),
    "distributed.*",
    # What is trusted, and where rewards are asked for.
    *("models.trust_remote_code", "models.allow_pickle", "rewards.*.url", "rewards.*.timeout"),
)
"""Keys that may change between a run's start and its resumption; `*` is any part of a key."""
_MAY_CHANGE = re.compile("|".join(re.escape(key).replace(r"\*", ".+") for key in MAY_CHANGE))


def refuse_edited(inputs: Path, config: Config, *, within: tuple[str, ...] = ("",)) -> None:
    """Compare the configuration with that which the run was started with.

    Args:
        inputs: inputs.json of the run.
        within: only keys that begin with one of these.

    Raises:
        ConfigError: names the first key that may not change.
        CheckpointError: `inputs` is missing or damaged.
    """
    before = dict(by_key(started_with(inputs).model_dump(mode="json")))
    now = dict(by_key(config.model_dump(mode="json")))
    for key in (*before, *now):
        was, value = before.get(key), now.get(key)
        if was != value and key.startswith(within) and not _MAY_CHANGE.fullmatch(key):
            raise ConfigError(
                f"{key}={shown(value)} in {inputs.with_name('config.yaml')}, and the run was started with {shown(was)}: it "
                "would be another run; change it back, or start a new one"
            )


def started_with(inputs: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
        ConfigError: it is not valid.
        CheckpointError: `inputs`, which holds it, is missing or damaged.
    """
    started = read_inputs_file(inputs).get(CONFIGURATION)
    if not isinstance(started, dict):
        raise CheckpointError(f"{inputs} lacks the configuration that the run was started with; restore it from a copy")
    return parse_config(started, origin=str(inputs))


def refuse_fewer_iterations(config: Config, done: int) -> None:
    """Check that the run is not further than it is to go.

    Raises:
        ConfigError: it is.
    """
    if config.ppo.iterations < done:
        raise ConfigError(
            f"ppo.iterations={config.ppo.iterations}, and {done} iterations are done already; raise it, or go back to "
            "an earlier checkpoint with --from"
        )
