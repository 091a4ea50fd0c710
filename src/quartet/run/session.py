"""A run while it is open: its inputs, its loaded models, where it stands, and what goes wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from quartet.allocator import return_freed_memory, return_gaps
from quartet.config import Config
from quartet.distributed import ProcessEngine
from quartet.errors import CheckpointError, QuartetError, RewardError, TrainingError
from quartet.ops.kl import adapt_kl_coef
from quartet.records import Advantaged, Prompts, Rollout, Scored, UpdateStats
from quartet.run.advice import Adviser
from quartet.run.checkpoint import RunState
from quartet.run.checkpoint_folder import choose_checkpoint, step_of
from quartet.run.edited import refuse_edited, refuse_fewer_iterations, started_with
from quartet.run.fingerprint import fingerprints, refuse_changed, refuse_different
from quartet.run.folder import RunFolder
from quartet.run.memory_account import MemoryAccount, account_for
from quartet.run.progress import Progress
from quartet.run.setup import Inputs, Loaded, correct_with, load_everything, read_inputs, score_with
from quartet.run.store import Store
from quartet.run.stored_config import CONFIG_FILE
from quartet.run.trust import refuse_untrusted, resume_command
from quartet.stages.bad_steps import are_finite
from quartet.stages.gather import everyones, own_share
from quartet.stages.out_of_memory import is_out_of_memory, lacks_memory


class Session:
    """Everything of one run that is not the algorithm."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        folder: RunFolder,
        inputs: Inputs,
        loaded: Loaded,
        memory: MemoryAccount,
    ) -> None:
        self.config = config
        self.progress = progress
        self.folder = folder
        self.inputs = inputs
        self.loaded = loaded
        self.state = RunState(iteration=0, episodes=0, kl_coef=config.ppo.kl_coef)
        self._store = Store(config, folder, inputs, loaded)
        self.memory = memory
        self._seconds: dict[str, float] = {}
        self._adviser = Adviser(stops=config.rollout.stop is not None)
        self._stage = ""
        self._corrected: dict[str, float] = {}
        """The gap that the last correction closed."""
        self._evaluated = -1
        self._prompts: Prompts | None = None
        """Of all processes, those that responses were last asked for."""

    @staticmethod
    def start(config: Config, progress: Progress, engine: ProcessEngine, *, force: bool = False) -> Session:
        """Check all inputs, show what the run will cost, load the models, then make the run folder.

        Args:
            force: load them even if they are predicted not to fit.

        Raises:
            QuartetError: a mistake in the configuration or its files, or a run that would not fit into the device's memory;
                nothing has been written then.
        """
        folder = RunFolder(config.run.dir)
        engine.agree(folder.refuse_used)
        inputs = engine.agree(lambda: read_inputs(config, progress.say, cut=engine.cuts_weights))
        # One process of each machine looks at what that machine has.
        own = engine.agree(lambda: fingerprints(inputs) if engine.first_here or engine.rank == 0 else {})
        refuse_different(engine.gather(own))
        memory = account_for(config)
        engine.agree(lambda: memory.predict(config, inputs, progress, engine, force=force))
        return_freed_memory(config.run.return_memory, tight=memory.tight, fleeting=memory.fleeting)
        merged = engine.agree(lambda: memory.merges(config, inputs.plan, engine))
        loaded = load_everything(config, inputs, progress.say, engine, memory.measuring, merged=merged)
        memories = {"plan": inputs.plan.as_dict(), "memory": memory.as_dict()}
        engine.agree(lambda: None if engine.rank else folder.create(config, memories, own))
        return Session(config, progress, folder, inputs, loaded, memory)

    @staticmethod
    def resume(
        config: Config,
        progress: Progress,
        folder: RunFolder,
        engine: ProcessEngine,
        *,
        start: str | None = None,
        trust: bool = False,
    ) -> Session:
        """Load the models of a run and one of its checkpoints into them; a run that was stopped before its first checkpoint
        begins again.

        Args:
            config: of the run, from its folder.
            start: the checkpoint's name; later ones are removed, since their metrics are about to be computed again. None
                takes the newest.
            trust: whether reward sources and remote code that the run's config.yaml names may be used.

        Raises:
            CheckpointError: none of its checkpoints is whole, the one to start from is damaged, or what the run was started
                with has changed.
            ConfigError: its config.yaml names code and `trust` is off, or was edited where that makes it another run.
        """
        chosen = engine.agree(lambda: _begin_from(folder, config, start))
        if not trust:
            engine.agree(lambda: refuse_untrusted(config, folder.path))
        engine.agree(lambda: refuse_edited(folder.inputs, config) if engine.first_here else None)
        inputs = engine.agree(lambda: read_inputs(config, progress.say, cut=engine.cuts_weights))
        # One process of each machine compares what that machine has.
        engine.agree(lambda: refuse_changed(folder.inputs, fingerprints(inputs)) if engine.first_here else None)
        memory = account_for(config, folder.read_plan().get("memory"))
        return_freed_memory(config.run.return_memory, tight=memory.tight, fleeting=memory.fleeting)
        merged = engine.agree(lambda: memory.merges(config, inputs.plan, engine))
        loaded = load_everything(config, inputs, progress.say, engine, memory.measuring, merged=merged)
        session = Session(config, progress, folder, inputs, loaded, memory)
        if chosen is not None:
            done = step_of(chosen)
            engine.agree(lambda: refuse_fewer_iterations(config, done))
            session.state = session._store.load(chosen.name)
            if config.ppo.adaptive_kl_target is None:  # what nothing has moved is the configuration's, as all else
                session.state = replace(session.state, kl_coef=config.ppo.kl_coef)
        if session._store.keep_samples(session.state.iteration):
            session._evaluated = session.state.iteration
        return session

    def metrics(self) -> AbstractContextManager[Callable[[Mapping[str, float]], None]]:
        """What writes a line of metrics.jsonl."""
        return self._store.metrics(self.state.iteration)

    def next_prompts(self) -> Prompts:
        """The prompts of the iteration that begins now, of all processes."""
        self.memory.peak.reset()
        return self.inputs.prompts.batch(self.state.episodes, self.config.rollout.batch_size, self.config.run.seed)

    def generate(self, prompts: Prompts) -> Rollout:
        """Responses to this process's share of the prompts."""
        self._prompts = prompts
        self.loaded.roles.use("policy")
        engine = self.loaded.engine
        rollout = self.loaded.rollout.generate(own_share(prompts, engine))
        if self.loaded.merged:
            return_gaps()  # of the copies, which are all alike and would be filled badly
        if self.config.rollout.correct_rollout:
            rollout, gap = correct_with(self.config, self.loaded, rollout)
            total, tokens = engine.sum(gap).tolist()
            self._corrected = {"rollout/logprob_gap": total / tokens}
        return rollout

    def score(self, rollout: Rollout) -> Scored:
        """Scoring with this run's roles and reward sources; gives the episodes of all processes, in the prompts' order."""
        engine = self.loaded.engine
        return everyones(engine.agree(lambda: self._score(rollout)), self._prompts or rollout.prompts, engine)

    def _score(self, rollout: Rollout) -> Scored:
        return score_with(self.config, self.inputs.sources, self.loaded, rollout)

    def finish_iteration(self, batch: Advantaged, stats: UpdateStats, *, learning_rate: float) -> dict[str, float]:
        """Move the run's counters on; returns the iteration's line for metrics.jsonl."""
        rollout = batch.scored.rollout
        for sentence in self._adviser.advice({**batch.metrics, **stats.metrics, **self._corrected}):
            self.progress.say(sentence)
        self.state = RunState(
            iteration=self.state.iteration + 1,
            episodes=self.state.episodes + len(rollout.prompts),
            kl_coef=self._next_kl_coef(batch.metrics),
            bad_steps=stats.bad_steps,
        )
        if self.memory.grown():
            self._store.plan(self.memory.as_dict())
        return {
            "iteration": self.state.iteration,
            "episodes": self.state.episodes,
            **batch.metrics,
            **stats.metrics,
            **self._corrected,
            "lr": learning_rate,
            **{f"time/{stage}": seconds for stage, seconds in self._seconds.items()},
            "tokens/generated": int(rollout.response_mask.sum()),
            "tokens/trained": stats.tokens,
            "memory/peak_bytes": max(self.loaded.engine.gather(self.memory.peak.peak_bytes())),
        }

    def evaluate_if_due(self) -> None:
        """Responses to the fixed prompts into samples.jsonl: before the first iteration, every so often, after the last."""
        iteration, every, last = self.state.iteration, self.config.run.eval_every, self.config.ppo.iterations
        prompts = self.inputs.evaluation
        due = iteration in (0, last) or (every and iteration % every == 0)
        if prompts is None or not due or self._evaluated == iteration:
            return
        self._enter("evaluation")
        with self.keeping_weights():
            scored = self.score(self.generate(prompts))
        self._store.add_samples(iteration, scored)
        self._evaluated = iteration

    def checkpoint_if_due(self, *, now: bool = False) -> None:
        """A checkpoint every so often, after the last iteration, and when the user stops the run."""
        iteration, every, last = self.state.iteration, self.config.run.save_every, self.config.ppo.iterations
        if now or iteration == last or (every and iteration % every == 0):
            self.progress.stage("checkpoint")
            self._store.save(self.state)

    def export(self) -> None:
        """Write `policy/` and `value/`."""
        self._store.export()

    @contextmanager
    def keeping_weights(self) -> Iterator[None]:
        """An error that ends the run leaves the last good weights in the run folder, and what it takes to go on from them.

        Every process raises the same QuartetError. Another error is one process's own, and where there are several, what
        needs all of them cannot be done any more.
        """
        try:
            yield
        except Exception as error:
            together = isinstance(error, QuartetError) or self.loaded.engine.world_size == 1
            kept = self._keep_good_state(error) if together else ""
            if is_out_of_memory(error):
                raise TrainingError(f"{lacks_memory(self._stage)}{kept}") from error
            if isinstance(error, QuartetError):
                raise type(error)(f"{error}{kept}") from error
            raise

    def _keep_good_state(self, error: Exception) -> str:
        """Export, and a checkpoint where nothing has moved since the last iteration and the weights are not what failed;
        returns the end of the sentence that says so. Of weights that the update ruined nothing is left."""
        if self._stage == "update" and not are_finite(self.loaded.optimizer, self.loaded.engine):
            newest = self._store.newest()
            return (
                f"; go on from {newest} with: {self.resume_command}" if newest else "; there is no checkpoint before it"
            )
        try:
            self.export()
            weights_failed = self._stage == "update" or isinstance(error, TrainingError)
            if not weights_failed and not self._store.has(self.state.iteration):
                self.checkpoint_if_due(now=True)
        except CheckpointError as another:
            return f"; and {another}"
        newest = self._store.newest()
        kept = f"; the weights as they were before are in {self.folder.path}"
        if isinstance(error, RewardError) and any(entry.url is not None for entry in self.config.rewards):
            kept += f"; another url or timeout goes into {self.folder.path / CONFIG_FILE}"
        return f"{kept}, go on from {newest} with: {self.resume_command}" if newest else kept

    @property
    def resume_command(self) -> str:
        """What continues the run."""
        return resume_command(self.folder.path)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Show the stage, take its seconds and its peak memory."""
        self._enter(stage)
        start = time.perf_counter()
        with self.memory.measuring(stage):
            yield
        if stage == "update":
            return_gaps()
        self._seconds[stage] = time.perf_counter() - start

    def _enter(self, stage: str) -> None:
        self._stage = stage
        self.progress.stage(stage)

    def _next_kl_coef(self, metrics: Mapping[str, float]) -> float:
        ppo = self.config.ppo
        if ppo.adaptive_kl_target is None:
            return self.state.kl_coef
        observed, episodes = metrics["kl/reference"], self.config.rollout.batch_size
        return adapt_kl_coef(self.state.kl_coef, observed, ppo.adaptive_kl_target, episodes, ppo.adaptive_kl_horizon)


def _begin_from(folder: RunFolder, config: Config, start: str | None) -> Path | None:
    """The checkpoint to go on from; None to begin again."""
    again = start is None and folder.stopped_early(config, started_with(folder.inputs))
    return None if again else choose_checkpoint(folder.checkpoints, start)
