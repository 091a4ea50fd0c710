"""The loop: sample responses, score them, turn scores into advantages, update policy and value; again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from quartet.config import Config, parse_config
from quartet.errors import CheckpointError, QuartetError
from quartet.ops.kl import adapt_kl_coef
from quartet.records import Rollout, Scored
from quartet.rewards.sources import combine
from quartet.run.checkpoint import RunState, list_checkpoints, load_checkpoint, save_checkpoint
from quartet.run.export import export
from quartet.run.folder import RunFolder
from quartet.run.memory_probe import PeakMemory
from quartet.run.metrics import MetricsWriter
from quartet.run.progress import Progress
from quartet.run.samples import Sample, append_samples, evaluate, keep_samples
from quartet.run.setup import load_everything, read_inputs
from quartet.stages.advantages import compute_advantages
from quartet.stages.optimizer import set_learning_rate
from quartet.stages.scoring import score_rollout
from quartet.stages.update import Updater


def train(config: Config | Mapping[str, Any], *, progress: Progress | None = None) -> Path:
    """Run PPO as configured and return the run folder; the trained models are in its `policy/` and `value/`.

    Raises:
        QuartetError: a mistake in the configuration or its files (nothing is written then), or a run that cannot go on
            (the last good weights are on disk then).
    """
    checked = config if isinstance(config, Config) else parse_config(config)
    with progress or Progress() as display:
        return Trainer(checked, display).train()


def resume(run: str | Path, *, progress: Progress | None = None) -> Path:
    """Continue a run from its newest checkpoint and return the run folder.

    Raises:
        CheckpointError: no run there, none of its checkpoints is whole, or the newest is damaged.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    if not list_checkpoints(folder.checkpoints):
        raise CheckpointError(f"{folder.path} has no checkpoint to resume from; start the run again in a new folder")
    with progress or Progress() as display:
        return Trainer(config, display, resume=folder).train()


class Trainer:
    """One run."""

    def __init__(self, config: Config, progress: Progress, *, resume: RunFolder | None = None) -> None:
        self.config = config
        self.progress = progress
        self.folder = resume or RunFolder(config.run.dir)
        if resume is None:
            self.folder.refuse_used()
        self.inputs = read_inputs(config, progress.say)
        self.loaded = load_everything(config, self.inputs, progress.say)
        self.state = RunState(iteration=0, episodes=0, kl_coef=config.ppo.kl_coef)
        if resume is None:
            self.folder.create(config, {"plan": self.inputs.plan.as_dict()})
        else:
            newest = list_checkpoints(self.folder.checkpoints)[-1]
            self.state = load_checkpoint(newest, self.loaded.roles, self.loaded.optimizer)
            keep_samples(self.folder.samples, through=self.state.iteration)
        self.memory = PeakMemory(self.loaded.roles.policy.backbone.device)
        self.times: dict[str, float] = {}

    def train(self) -> Path:
        """All iterations, then the export."""
        config, ppo, run, loaded = self.config, self.config.ppo, self.config.run, self.loaded
        updater = Updater(
            loaded.roles.trained,
            loaded.optimizer,
            loaded.engine,
            ppo,
            temperature=config.rollout.temperature,
            seed=run.seed,
        )
        self.progress.start(ppo.iterations, f"{self.inputs.plan.name} plan, {config.run.dir}")
        with MetricsWriter(self.folder.path, run.trackers, keep_through=self.state.iteration) as metrics:
            if self.state.iteration == 0:
                self._evaluate(0)
            while self.state.iteration < ppo.iterations:
                iteration, state = self.state.iteration + 1, self.state
                self.memory.reset()
                with self._keeping_weights():
                    prompts = self.inputs.prompts.batch(state.episodes, config.rollout.batch_size, run.seed)
                    with self._timed("rollout"):
                        rollout = loaded.rollout.generate(prompts)
                    with self._timed("scoring"):
                        scored = self._score(rollout)
                    with self._timed("advantages"):
                        advantaged = compute_advantages(scored, ppo, kl_coef=state.kl_coef)
                    with self._timed("update"):
                        rate = set_learning_rate(loaded.optimizer, ppo, iteration - 1)
                        stats = updater.update(advantaged, iteration=iteration)
                self.state = RunState(iteration, state.episodes + len(prompts), self._next_kl_coef(advantaged.metrics))
                record = {
                    "iteration": iteration,
                    "episodes": self.state.episodes,
                    **advantaged.metrics,
                    **stats.metrics,
                    "lr": rate,
                    **{f"time/{stage}": seconds for stage, seconds in self.times.items()},
                    "tokens/generated": int(rollout.response_mask.sum()),
                    "tokens/trained": stats.tokens,
                    "memory/peak_bytes": self.memory.peak_bytes(),
                }
                metrics.write(record)
                self.progress.iteration(record)
                self._evaluate(iteration)
                self._checkpoint(iteration)
        self._export()
        return self.folder.path

    def _score(self, rollout: Rollout) -> Scored:
        sources, config = self.inputs.sources, self.config
        return score_rollout(
            rollout,
            self.loaded.roles,
            temperature=config.rollout.temperature,
            placement=config.ppo.score_placement,
            rows=config.rollout.batch_rows,
            extra=(lambda prompts, responses: combine(sources, prompts, responses)) if sources else None,
            decode=self.loaded.decode,
        )

    def _next_kl_coef(self, metrics: Mapping[str, float]) -> float:
        ppo = self.config.ppo
        if ppo.adaptive_kl_target is None:
            return self.state.kl_coef
        observed, episodes = metrics["kl/reference"], self.config.rollout.batch_size
        return adapt_kl_coef(self.state.kl_coef, observed, ppo.adaptive_kl_target, episodes, ppo.adaptive_kl_horizon)

    def _evaluate(self, iteration: int) -> list[Sample]:
        every, last = self.config.run.eval_every, self.config.ppo.iterations
        prompts = self.inputs.evaluation
        if prompts is None or not (iteration in (0, last) or (every and iteration % every == 0)):
            return []
        self.progress.stage("evaluation")
        generate = self.loaded.rollout.generate
        with self._keeping_weights():
            samples = evaluate(iteration, prompts, generate=generate, score=self._score, decode=self.loaded.decode)
        append_samples(self.folder.samples, samples)
        return samples

    def _checkpoint(self, iteration: int) -> None:
        every, last = self.config.run.save_every, self.config.ppo.iterations
        if iteration == last or (every and iteration % every == 0):
            self.progress.stage("checkpoint")
            self._save()

    def _save(self) -> Path:
        folder, keep = self.folder.checkpoints, self.config.run.keep
        return save_checkpoint(folder, self.loaded.roles, self.loaded.optimizer, self.state, keep=keep)

    @contextmanager
    def _keeping_weights(self) -> Iterator[None]:
        """An error that ends the run leaves the last good weights in the run folder."""
        try:
            yield
        except QuartetError as error:
            self._export()
            raise type(error)(f"{error}; weights before this step are in {self.folder.path}") from error

    def _export(self) -> None:
        inputs, roles = self.inputs, self.loaded.roles
        export(roles, self.folder.path, sft=inputs.sft, reward=inputs.reward, tokenizer=inputs.tokenizer)

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        @contextmanager
        def timer() -> Iterator[None]:
            self.progress.stage(stage)
            start = time.perf_counter()
            yield
            self.times[stage] = time.perf_counter() - start

        return timer()
