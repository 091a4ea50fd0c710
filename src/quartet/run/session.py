"""A run while it is open: its inputs, its loaded models, where it stands, and what it leaves on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from quartet.config import Config
from quartet.errors import CheckpointError, QuartetError
from quartet.ops.kl import adapt_kl_coef
from quartet.records import Advantaged, Prompts, Rollout, Scored, UpdateStats
from quartet.rewards.sources import combine
from quartet.run.checkpoint import RunState, list_checkpoints, load_checkpoint, save_checkpoint
from quartet.run.export import export
from quartet.run.folder import RunFolder
from quartet.run.memory_probe import PeakMemory
from quartet.run.progress import Progress
from quartet.run.samples import append_samples, evaluate, keep_samples
from quartet.run.setup import Inputs, Loaded, load_everything, read_inputs
from quartet.stages.scoring import score_rollout

LOGPROB_GAP = 0.05
"""Mean difference of log-probabilities between rollout and trainer that is warned about, nats."""


class Session:
    """Everything of one run that is not the algorithm."""

    def __init__(self, config: Config, progress: Progress, folder: RunFolder, inputs: Inputs, loaded: Loaded) -> None:
        self.config = config
        self.progress = progress
        self.folder = folder
        self.inputs = inputs
        self.loaded = loaded
        self.state = RunState(iteration=0, episodes=0, kl_coef=config.ppo.kl_coef)
        self._memory = PeakMemory(loaded.roles.policy.backbone.device)
        self._seconds: dict[str, float] = {}

    @staticmethod
    def start(config: Config, progress: Progress) -> Session:
        """Check all inputs, load the models, then make the run folder.

        Raises:
            QuartetError: a mistake in the configuration or its files; nothing has been written then.
        """
        folder = RunFolder(config.run.dir)
        folder.refuse_used()
        inputs = read_inputs(config, progress.say)
        session = Session(config, progress, folder, inputs, load_everything(config, inputs, progress.say))
        folder.create(config, {"plan": inputs.plan.as_dict()})
        return session

    @staticmethod
    def resume(run: str | Path, progress: Progress) -> Session:
        """Load the models of a run and its newest checkpoint into them.

        Raises:
            CheckpointError: no run there, none of its checkpoints is whole, or the newest is damaged.
        """
        folder = RunFolder(run)
        config = folder.read_config()
        if not list_checkpoints(folder.checkpoints):
            raise CheckpointError(
                f"{folder.path} has no checkpoint to resume from; start the run again in a new folder"
            )
        inputs = read_inputs(config, progress.say)
        session = Session(config, progress, folder, inputs, load_everything(config, inputs, progress.say))
        newest = list_checkpoints(folder.checkpoints)[-1]
        session.state = load_checkpoint(newest, session.loaded.roles, session.loaded.optimizer)
        keep_samples(folder.samples, through=session.state.iteration)
        return session

    def next_prompts(self) -> Prompts:
        """The prompts of the iteration that begins now."""
        self._memory.reset()
        return self.inputs.prompts.batch(self.state.episodes, self.config.rollout.batch_size, self.config.run.seed)

    def score(self, rollout: Rollout) -> Scored:
        """Scoring with this run's roles and reward sources."""
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

    def finish_iteration(self, batch: Advantaged, stats: UpdateStats, *, learning_rate: float) -> dict[str, float]:
        """Move the run's counters on; returns the iteration's line for metrics.jsonl."""
        rollout, gap = batch.scored.rollout, stats.metrics["rollout/logprob_gap"]
        if gap > LOGPROB_GAP:
            self.progress.say(
                f"rollout and training disagree by {gap:.3f} nats a token (rollout/logprob_gap, over {LOGPROB_GAP}): the "
                "update is off-policy from its first step; models.dtype=float32 removes rounding as a cause"
            )
        self.state = RunState(
            iteration=self.state.iteration + 1,
            episodes=self.state.episodes + len(rollout.prompts),
            kl_coef=self._next_kl_coef(batch.metrics),
        )
        return {
            "iteration": self.state.iteration,
            "episodes": self.state.episodes,
            **batch.metrics,
            **stats.metrics,
            "lr": learning_rate,
            **{f"time/{stage}": seconds for stage, seconds in self._seconds.items()},
            "tokens/generated": int(rollout.response_mask.sum()),
            "tokens/trained": stats.tokens,
            "memory/peak_bytes": self._memory.peak_bytes(),
        }

    def evaluate_if_due(self) -> None:
        """Responses to the fixed prompts into samples.jsonl: before the first iteration, every so often, after the last."""
        iteration, every, last = self.state.iteration, self.config.run.eval_every, self.config.ppo.iterations
        prompts = self.inputs.evaluation
        if prompts is None or not (iteration in (0, last) or (every and iteration % every == 0)):
            return
        self.progress.stage("evaluation")
        generate, decode = self.loaded.rollout.generate, self.loaded.decode
        with self.keeping_weights():
            samples = evaluate(iteration, prompts, generate=generate, score=self.score, decode=decode)
        append_samples(self.folder.samples, samples)

    def checkpoint_if_due(self, *, now: bool = False) -> None:
        """A checkpoint every so often, after the last iteration, and when the user stops the run."""
        iteration, every, last = self.state.iteration, self.config.run.save_every, self.config.ppo.iterations
        if now or iteration == last or (every and iteration % every == 0):
            self.progress.stage("checkpoint")
            loaded, keep = self.loaded, self.config.run.keep
            save_checkpoint(self.folder.checkpoints, loaded.roles, loaded.optimizer, self.state, keep=keep)

    def export(self) -> None:
        """Write `policy/` and `value/`."""
        inputs = self.inputs
        export(self.loaded.roles, self.folder.path, sft=inputs.sft, reward=inputs.reward, tokenizer=inputs.tokenizer)

    @contextmanager
    def keeping_weights(self) -> Iterator[None]:
        """An error that ends the run leaves the last good weights in the run folder."""
        try:
            yield
        except QuartetError as error:
            self.export()
            raise type(error)(f"{error}; the weights as they were before are in {self.folder.path}") from error
        except Exception:
            self.export()
            raise

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Show the stage and take its seconds."""
        self.progress.stage(stage)
        start = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - start

    def _next_kl_coef(self, metrics: Mapping[str, float]) -> float:
        ppo = self.config.ppo
        if ppo.adaptive_kl_target is None:
            return self.state.kl_coef
        observed, episodes = metrics["kl/reference"], self.config.rollout.batch_size
        return adapt_kl_coef(self.state.kl_coef, observed, ppo.adaptive_kl_target, episodes, ppo.adaptive_kl_horizon)
