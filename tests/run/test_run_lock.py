"""Only one process writes a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from quartet import resume, train
from quartet.distributed import SingleProcess
from quartet.errors import CheckpointError
from quartet.run.folder import RunFolder
from quartet.run.progress import Progress
from tiny import TinyRun


class Meddling(Progress):
    """Resumes the run while its third iteration goes on."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run
        self.refusals: list[str] = []

    def iteration(self, record: Any) -> None:
        if record["iteration"] == 3:
            with pytest.raises(CheckpointError) as caught:
                resume(self.run)
            self.refusals.append(str(caught.value))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("again", [False, True], ids=["train", "resume"])
def test_a_run_that_goes_on_is_not_resumed(again: bool, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = tiny_run(**{"ppo.iterations": 3, "run.save_every": 1})
    meddling = Meddling(run)
    if again:
        train(values)
        resume(run, start="step-000002", progress=meddling)
    else:
        train(values, progress=meddling)
    assert meddling.refusals == [
        f"{run} is being written by another process, which trains there; wait until it has ended, or stop it first"
    ]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]
    before = content(run)
    resume(run)  # nobody holds it any more
    assert content(run) == before


def hold(run: Path, pipe: Connection) -> None:
    """Hold the lock until killed."""
    with RunFolder(run).locked(SingleProcess()):
        pipe.send("held")
        signal.pause()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.inputs.write_text("{}")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "held"
    with pytest.raises(CheckpointError, match="is being written by another process"), folder.locked(SingleProcess()):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with folder.locked(SingleProcess()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.json"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_no_hindrance(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = RunFolder(tmp_path)
    folder.inputs.write_text("{}")
    entered = False
    with folder.locked(SingleProcess()):
        entered = True
    assert entered
