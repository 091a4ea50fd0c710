"""Writes metrics.jsonl, one line an iteration, and reads it back; passes the same numbers on to trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quartet.errors import CheckpointError, ConfigError, brief, cause_of
from quartet.run.folder import put_on_disk, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def require_trackers(trackers: Sequence[str]) -> None:
    """Check that trackers can be used, before anything is written.

    Raises:
        ConfigError: one is not installed.
    """
    if "tensorboard" in trackers and find_spec("tensorboard") is None:
        raise ConfigError(
            "run.trackers has tensorboard, which is not installed; pip install quartet-rlhf[trackers] or leave it out"
        )


class MetricsWriter:
    """Appends records to `metrics.jsonl` of a run folder, each handed to the system before `write` returns."""

    def __init__(self, folder: str | Path, trackers: Sequence[str] = (), *, keep_through: int | None = None) -> None:
        """Open `folder` (made if absent) for appending.

        `keep_through` is for resuming: records of later iterations, which are about to be computed again, are dropped.
        A last line torn by a crash is always dropped. Raises ConfigError for an unknown tracker or one that is not
        installed, and CheckpointError if the file to resume is damaged or the disk is full.
        """
        self._path = Path(folder) / FILE_NAME
        self._tensorboard: SummaryWriter | None = None
        for tracker in trackers:
            if tracker != "tensorboard":
                raise ConfigError(f"run.trackers has {tracker!r}, which is unknown; take 'tensorboard'")
            self._tensorboard = _open_tensorboard(self._path.parent, keep_through)
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _repair(self._path, keep_through)
            self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Mapping[str, float | int]) -> None:
        """Append one record; it holds `iteration`. A number that is not finite becomes null, which JSON has.

        The disk has it before `write` returns, so that no checkpoint is ahead of its metrics. Raises CheckpointError if the
        disk is full.
        """
        with writing(self._path):
            self._file.write(_line(record))
            put_on_disk(self._file)
        if self._tensorboard is not None:
            with writing(self._path.with_name(TENSORBOARD)):
                for name, value in record.items():
                    if name != "iteration":
                        self._tensorboard.add_scalar(name, value, int(record["iteration"]))
                self._tensorboard.flush()

    def close(self) -> None:
        """Close the file and the trackers; a second call does nothing."""
        tensorboard, self._tensorboard = self._tensorboard, None
        for file in (self._file, tensorboard):
            with suppress(OSError):  # a full disk has been reported by `write`
                if file is not None:
                    file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The records of a metrics file in order; null is read as NaN.

    A last line that is not whole JSON is ignored, because a killed run may leave one. Raises CheckpointError if the
    file is missing or another line is damaged.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({cause_of(error)}); give the folder of a run") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    records = []
    for place, (number, line) in enumerate(filled, start=1):
        try:
            record = json.loads(line)
            records.append({name: math.nan if value is None else value for name, value in record.items()})
        except (ValueError, AttributeError) as error:
            if place == len(filled):
                break
            raise CheckpointError(f"line {number} of {path} is damaged ({brief(error)}); remove that line") from error
    return records


def _line(record: Mapping[str, float | int]) -> str:
    clean = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _repair(path: Path, keep_through: int | None) -> None:
    """Leave only whole lines, and only those of the iterations to keep; the file is replaced in one step."""
    if not path.is_file():
        return
    records = read_metrics(path)
    raw = path.read_bytes()
    if keep_through is not None:
        records = [record for record in records if record.get("iteration", 0) <= keep_through]
    elif not raw or (raw.endswith(b"\n") and raw.count(b"\n") == len(records)):
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(_line(record))
        put_on_disk(file)
    os.replace(temporary, path)


def _open_tensorboard(folder: Path, keep_through: int | None) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "run.trackers asks for tensorboard, which is not installed; pip install quartet-rlhf[trackers]"
        ) from error
    purge = None if keep_through is None else keep_through + 1
    with writing(folder / TENSORBOARD):
        return SummaryWriter(str(folder / TENSORBOARD), purge_step=purge)
