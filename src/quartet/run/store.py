"""What a run leaves on disk. Every process calls these methods; the main one writes, and an error of it is that of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from quartet.config import Config
from quartet.records import Scored
from quartet.run.checkpoint import RunState, save_checkpoint
from quartet.run.checkpoint_folder import list_checkpoints, remove_checkpoint, step_of
from quartet.run.export import export
from quartet.run.folder import RunFolder, writing
from quartet.run.metrics import MetricsWriter
from quartet.run.samples import append_samples, keep_samples, samples_of
from quartet.run.setup import Inputs, Loaded
from quartet.run.shards import load_any, save_shards

T = TypeVar("T")


class Store:
    """Checkpoints, metrics, samples and the result of one run."""

    def __init__(self, config: Config, folder: RunFolder, inputs: Inputs, loaded: Loaded) -> None:
        self._config = config
        self._folder = folder
        self._inputs = inputs
        self._loaded = loaded

    def _by_main(self, act: Callable[[], T]) -> T | None:
        """What `act` gives in the main process, in all of them."""
        engine = self._loaded.engine
        return engine.gather(engine.agree(lambda: act() if engine.rank == 0 else None))[0]

    @contextmanager
    def metrics(self, through: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """What adds a line to metrics.jsonl.

        Args:
            through: the last iteration whose line stays, for resuming.

        Raises:
            CheckpointError: the disk is full or not writable, or the file is damaged.
        """
        engine, trackers = self._loaded.engine, self._config.run.trackers
        path = self._folder.path
        writer = engine.agree(lambda: MetricsWriter(path, trackers, keep_through=through) if engine.rank == 0 else None)
        try:
            yield lambda record: engine.agree(lambda: None if writer is None else writer.write(record))
        finally:
            if writer is not None:
                writer.close()

    def plan(self, memory: dict[str, Any]) -> None:
        """Write plan.json again, with memory as measured up to now; without waiting for the other processes.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._loaded.engine.rank == 0:
            with writing(self._folder.plan):
                self._folder.write_plan({"plan": self._inputs.plan.as_dict(), "memory": memory})

    def add_samples(self, iteration: int, scored: Scored) -> None:
        """Add the scored responses to the evaluation prompts to samples.jsonl.

        Raises:
            CheckpointError: the disk is full.
        """
        decode, file = self._loaded.decode, self._folder.samples
        self._by_main(lambda: append_samples(file, samples_of(iteration, scored, decode)))

    def keep_samples(self, through: int) -> bool:
        """For resuming: drop later samples, and those of iteration `through` where not all of them are there.

        Returns:
            Whether all of them are there.
        """
        file, prompts = self._folder.samples, self._inputs.evaluation

        def keep() -> bool:
            if prompts is not None and keep_samples(file, through=through) == len(prompts):
                return True
            keep_samples(file, through=through - 1)
            return False

        return bool(self._by_main(keep))

    def save(self, state: RunState) -> None:
        """A checkpoint; older ones beyond `run.keep` go.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        loaded, folder, keep = self._loaded, self._folder.checkpoints, self._config.run.keep
        if loaded.engine.shares_state:
            save_shards(folder, loaded.roles, loaded.optimizer, loaded.engine, state, keep=keep)
        else:
            self._by_main(lambda: save_checkpoint(folder, loaded.roles, loaded.optimizer, state, keep=keep))

    def load(self, name: str) -> RunState:
        """Read a checkpoint into models and optimizer, and remove later ones: their metrics are about to be computed again.

        Raises:
            CheckpointError: it is damaged, or does not fit the run's configuration.
        """
        folder, loaded = self._folder.checkpoints, self._loaded
        state = load_any(folder / name, loaded.roles, loaded.optimizer, loaded.engine)

        def remove_later() -> None:
            for later in list_checkpoints(folder):
                if step_of(later) > state.iteration:
                    remove_checkpoint(later)

        self._by_main(remove_later)
        return state

    def newest(self) -> str | None:
        """Name of the newest checkpoint; None where there is none."""

        def find() -> str | None:
            there = list_checkpoints(self._folder.checkpoints)
            return there[-1].name if there else None

        return self._by_main(find)

    def has(self, iteration: int) -> bool:
        """Whether the newest checkpoint is that of this iteration."""
        name = self.newest()
        return name is not None and step_of(self._folder.checkpoints / name) == iteration

    def export(self) -> None:
        """Write `policy/` and `value/`.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        inputs, loaded = self._inputs, self._loaded
        export(
            loaded.roles,
            self._folder.path,
            sft=inputs.sft,
            reward=inputs.reward,
            tokenizer=inputs.tokenizer,
            engine=loaded.engine,
        )
