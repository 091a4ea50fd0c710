"""The loop: sample responses, score them, turn scores into advantages, update policy and value; again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.config import Config, parse_config
from quartet.distributed import joined
from quartet.errors import Interrupted
from quartet.run.folder import RunFolder
from quartet.run.interrupt import stop_on_signals
from quartet.run.progress import Progress, display_of
from quartet.run.session import Session
from quartet.run.stored_config import read_config
from quartet.stages.advantages import compute_advantages
from quartet.stages.optimizer import set_learning_rate
from quartet.stages.update import Updater


def train(config: Config | Mapping[str, Any], *, progress: Progress | None = None, force: bool = False) -> Path:
    """Run PPO as configured and return the run folder; the trained models are in its `policy/` and `value/`.

    Args:
        progress: where the run is shown; standard output by default.
        force: run even if it is predicted to need more memory than is free.

    Raises:
        QuartetError: a mistake in the configuration or its files (nothing is written then), or a run that cannot go on
            (the last good weights are on disk then).
        Interrupted: the user stopped the run; there is a checkpoint.
    """
    checked = config if isinstance(config, Config) else parse_config(config)
    with joined(checked) as engine, progress or display_of(engine) as display:
        session = Session.start(checked, display, engine, force=force)
        with session.folder.locked(engine):
            return _run(session)


def resume(run: str | Path, *, start: str | None = None, trust: bool = False, progress: Progress | None = None) -> Path:
    """Continue a run from its newest checkpoint, or from the one called `start`, and return the run folder.

    Args:
        start: name of a checkpoint, such as `step-000020`; what the run did after it is removed and done again.
        trust: use the reward functions, reward endpoints and remote code that the run folder's config.yaml names. It may
            come from somebody else, so this has to be said.

    Raises:
        CheckpointError: no run there, another process still writes it, none of its checkpoints is whole, the one to start from
            is damaged, or the checkpoints or prompts that the run was started with have changed.
        ConfigError: its config.yaml was edited where that makes it another run.
        QuartetError, Interrupted: as `train`.
    """
    folder = RunFolder(run)
    config = read_config(folder.path)
    with joined(config) as engine, progress or display_of(engine) as display, folder.locked(engine):
        return _run(Session.resume(config, display, folder, engine, start=start, trust=trust))


def _run(session: Session) -> Path:
    """All iterations that are left, then the export."""
    config, progress = session.config, session.progress
    at_once = session.memory.in_parallel(config, session.inputs.plan, session.loaded.engine, progress.say)
    updater = Updater(
        session.loaded.trained,
        session.loaded.optimizer,
        session.loaded.engine,
        config.ppo,
        temperature=config.rollout.temperature,
        seed=config.run.seed,
        at_once=at_once,
        say=progress.say,
    )
    progress.start(config.ppo.iterations, f"{session.inputs.plan.name} plan, {session.folder.path}")
    with stop_on_signals(progress.say) as stop, session.metrics() as write:
        try:
            session.evaluate_if_due()
            while session.state.iteration < config.ppo.iterations:
                record = _iteration(session, updater)
                write(record)
                progress.iteration(record)
                session.evaluate_if_due()
                asked = session.loaded.engine.any(stop.asked)
                session.checkpoint_if_due(now=asked)
                _leave_if(asked, session)
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at once; go on from the newest checkpoint with: {session.resume_command}"
            ) from None
    session.export()
    return session.folder.path


def _iteration(session: Session, updater: Updater) -> dict[str, float]:
    """One pass of the four stages; returns its metrics."""
    ppo, loaded = session.config.ppo, session.loaded
    with session.keeping_weights():
        # 0. The prompts of this iteration.
        prompts = session.next_prompts()
        # 1. Sample responses with the policy, and keep each token's log-probability as it is sampled. Processes share
        #    the prompts of an iteration, and from the scores on all of them know all episodes.
        with session.timed("rollout"):
            rollout = session.generate(prompts)
        # 2. Reference log-probabilities, values, scores.
        with session.timed("scoring"):
            scored = session.score(rollout)
        # 3. Rewards per token, advantages, returns.
        with session.timed("advantages"):
            advantaged = compute_advantages(scored, ppo, kl_coef=session.state.kl_coef)
        # 4. Clipped policy and value losses over epochs, minibatches and microbatches.
        with session.timed("update"):
            loaded.roles.use("policy", "value")
            learning_rate = set_learning_rate(loaded.optimizer, ppo, session.state.iteration)
            stats = updater.update(advantaged, iteration=session.state.iteration + 1, bad_steps=session.state.bad_steps)
    return session.finish_iteration(advantaged, stats, learning_rate=learning_rate)


def _leave_if(asked: bool, session: Session) -> None:
    if asked and session.state.iteration < session.config.ppo.iterations:
        raise Interrupted(f"stopped after iteration {session.state.iteration}; go on with: {session.resume_command}")
