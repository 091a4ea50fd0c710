"""The loop: sample responses, score them, turn scores into advantages, update policy and value; again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.config import Config, parse_config
from quartet.errors import Interrupted
from quartet.run.interrupt import StopRequest, stop_on_signals
from quartet.run.metrics import MetricsWriter
from quartet.run.progress import Progress
from quartet.run.session import Session
from quartet.stages.advantages import compute_advantages
from quartet.stages.optimizer import set_learning_rate
from quartet.stages.update import Updater


def train(config: Config | Mapping[str, Any], *, progress: Progress | None = None) -> Path:
    """Run PPO as configured and return the run folder; the trained models are in its `policy/` and `value/`.

    Raises:
        QuartetError: a mistake in the configuration or its files (nothing is written then), or a run that cannot go on
            (the last good weights are on disk then).
        Interrupted: the user stopped the run; there is a checkpoint.
    """
    checked = config if isinstance(config, Config) else parse_config(config)
    with progress or Progress() as display:
        return _run(Session.start(checked, display))


def resume(run: str | Path, *, progress: Progress | None = None) -> Path:
    """Continue a run from its newest checkpoint and return the run folder.

    Raises:
        CheckpointError: no run there, none of its checkpoints is whole, or the newest is damaged.
        QuartetError, Interrupted: as `train`.
    """
    with progress or Progress() as display:
        return _run(Session.resume(run, display))


def _run(session: Session) -> Path:
    """All iterations that are left, then the export."""
    config, progress = session.config, session.progress
    updater = Updater(
        session.loaded.roles.trained,
        session.loaded.optimizer,
        session.loaded.engine,
        config.ppo,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
    )
    progress.start(config.ppo.iterations, f"{session.inputs.plan.name} plan, {session.folder.path}")
    through = session.state.iteration
    with (
        stop_on_signals(progress.say) as stop,
        MetricsWriter(session.folder.path, config.run.trackers, keep_through=through) as metrics,
    ):
        if session.state.iteration == 0:
            session.evaluate_if_due()
        try:
            while session.state.iteration < config.ppo.iterations:
                record = _iteration(session, updater)
                metrics.write(record)
                progress.iteration(record)
                session.evaluate_if_due()
                session.checkpoint_if_due(now=stop.asked)
                _leave_if_asked(session, stop)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at once; go on from the newest checkpoint with: quartet resume {session.folder.path}"
            ) from None
    session.export()
    return session.folder.path


def _iteration(session: Session, updater: Updater) -> dict[str, float]:
    """One pass of the four stages; returns its metrics."""
    ppo, loaded = session.config.ppo, session.loaded
    with session.keeping_weights():
        # 0. The prompts of this iteration.
        prompts = session.next_prompts()
        # 1. Sample responses with the policy, and keep each token's log-probability as it is sampled.
        with session.timed("rollout"):
            rollout = loaded.rollout.generate(prompts)
        # 2. Reference log-probabilities, values, scores.
        with session.timed("scoring"):
            scored = session.score(rollout)
        # 3. Rewards per token, advantages, returns.
        with session.timed("advantages"):
            advantaged = compute_advantages(scored, ppo, kl_coef=session.state.kl_coef)
        # 4. Clipped policy and value losses over epochs, minibatches and microbatches.
        with session.timed("update"):
            learning_rate = set_learning_rate(loaded.optimizer, ppo, session.state.iteration)
            stats = updater.update(advantaged, iteration=session.state.iteration + 1)
    return session.finish_iteration(advantaged, stats, learning_rate=learning_rate)


def _leave_if_asked(session: Session, stop: StopRequest) -> None:
    if stop.asked and session.state.iteration < session.config.ppo.iterations:
        raise Interrupted(
            f"stopped after iteration {session.state.iteration}; go on with: quartet resume {session.folder.path}"
        )
