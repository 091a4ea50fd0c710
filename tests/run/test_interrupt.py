"""Ctrl-C and SIGTERM: the first finishes the iteration and leaves a checkpoint, the second stops at once."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quartet.cli import main
from quartet.errors import Interrupted
from quartet.run.checkpoint_folder import list_checkpoints
from quartet.run.interrupt import stop_on_signals
from quartet.run.metrics import read_metrics
from quartet.run.progress import Progress
from quartet.run.session import Session
from quartet.trainer import resume, train


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_stops(number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with stop_on_signals(said.append) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_the_iteration_is_finished_and_the_run_goes_on_from_it(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Progress(Console(file=io.StringIO()))
    score = Session.score

    def interrupted(session: Session, rollout: Any) -> Any:
        if session.state.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return score(session, rollout)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "score", interrupted)
        with pytest.raises(Interrupted, match=r"stopped after iteration 2; go on with: quartet resume .*run") as caught:
            train(tiny_run("llama", **{"ppo.iterations": 4}), progress=quiet)
    assert caught.value.exit_code == 130
    assert [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    folder = resume(tmp_path / "run", progress=quiet)
    assert [record["iteration"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_command_line_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: Any, **__: Any) -> Path:
        raise Interrupted("stopped after iteration 1; go on with: quartet resume runs/x")

    monkeypatch.setattr("quartet.trainer.resume", stopped)
    assert main(["resume", "runs/x"]) == 130
    assert capsys.readouterr().err == "quartet: stopped after iteration 1; go on with: quartet resume runs/x\n"
