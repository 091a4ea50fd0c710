"""Predicted beside measured: shown and checked before loading, kept in plan.json as the run goes."""

from __future__ import annotations

import io
import json
import mmap
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from quartet.cli import main
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.memory.trace import NotTraceable
from quartet.run import memory_account
from quartet.run.memory_account import PHASES, MemoryAccount
from quartet.run.memory_probe import PeakMemory
from quartet.run.progress import Progress
from quartet.trainer import resume, train
from tiny import TinyRun

MIB = 2**20
BLOCK = 64 * MIB

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def touched(seconds: float = 0.05) -> None:
    """Hold 64 MiB of written anonymous memory for a while."""
    with mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"\1" * BLOCK)
        time.sleep(seconds)


def log() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, width=80)), text


def plan_of(run: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return plan


@linux
def test_phases_are_measured_over_what_was_there_before_loading() -> None:
    account = MemoryAccount(torch.device("cpu"))
    with mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as before:
        before.write(b"\1" * BLOCK)
        with account.measuring("load"):
            time.sleep(0.05)
        with account.measuring("update"):
            touched()
        with account.measuring("advantages"):
            touched()
    measured = {name: phase["measured"] / BLOCK for name, phase in account.as_dict()["phases"].items()}
    assert sorted(measured) == ["load", "update"]
    assert measured["load"] < 0.5
    # `touched` also holds the bytes that it writes.
    assert 0.9 < measured["update"] < 2.5


@linux
def test_a_file_in_memory_is_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"\1" * BLOCK)
    peak = PeakMemory("cpu")
    with peak.phase() as nothing:
        time.sleep(0.02)
    with (tmp_path / "weights").open("rb") as file, peak.phase() as mapped:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            assert sum(pages[::4096]) == BLOCK // 4096
        time.sleep(0.02)
    assert nothing.peak is not None
    assert mapped.peak is not None
    assert mapped.peak - nothing.peak < BLOCK / 4


def test_only_growth_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    account = MemoryAccount(torch.device("cpu"), {"phases": {"update": {"measured": 100, "peak": 5.0}}})
    assert account.grown()
    assert not account.grown()
    account.as_dict()["phases"]["update"]["measured"] = 103
    assert account.grown()
    assert account.as_dict()["phases"]["update"]["peak"] == 5.0


def test_a_run_shows_its_prediction_and_keeps_it_beside_the_measured_peaks(tiny_run: TinyRun) -> None:
    progress, text = log()
    config = parse_config(tiny_run(**{"models.lora": {"r": 4}, "ppo.iterations": 2, "run.save_every": 1}))
    run = train(config, progress=progress)
    shown = text.getvalue()
    assert shown.index("predicted memory, paired plan") < shown.index("iter")
    assert max(map(len, shown.splitlines()[:12])) <= 80
    memory = plan_of(run)["memory"]
    assert memory["workload"]["longest_prompt"] == len("one two")  # a token a byte
    assert sorted(memory["phases"]) == sorted(PHASES)
    assert memory["free"] is None or memory["free"] > memory["peak"]["bytes"] > 0
    for phase in memory["phases"].values():
        assert phase["peak"] > 0
        assert not sys.platform.startswith("linux") or isinstance(phase["measured"], int)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("predicted again")

    # A run that goes on is neither predicted nor refused again, and keeps what was measured.
    (run / "checkpoints" / "step-000002").rename(run / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_account, "predicted", refuse)
        patch.setattr(memory_account, "free_memory", lambda *_: 1)
        progress, text = log()
        assert resume(run, progress=progress) == run
    assert "predicted" not in text.getvalue()
    after = plan_of(run)["memory"]
    for name, phase in memory["phases"].items():
        assert after["phases"][name]["peak"] == phase["peak"]
        assert (after["phases"][name]["measured"] or 0) >= (phase["measured"] or 0)


def test_what_does_not_fit_is_refused_unless_forced(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_account, "free_memory", lambda *_: MIB)
    values = tiny_run(**{"run.eval_every": 0})
    with pytest.raises(
        ConfigError, match=r"predicted to need .* and cpu has 1\.00 MiB free; .*--memory 1MiB .*--force"
    ):
        train(values, progress=log()[0])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run.yaml"), "--force"]) == 0
    assert "of 1.00 MiB free" in capsys.readouterr().out
    assert plan_of(tmp_path / "run")["memory"]["free"] == MIB


@pytest.mark.parametrize("error", [NotTraceable("asks for data"), RuntimeError("two\nlines")])
def test_a_model_that_cannot_be_predicted_is_trained_all_the_same(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(memory_account, "predicted", fail)
    progress, text = log()
    asked = {"run.parallel_passes": True, "rollout.merge_adapters": True, "models.lora": {"r": 2}}
    run = train(tiny_run(**asked), progress=progress)
    [line] = [line for line in text.getvalue().splitlines() if "not predicted" in line]
    assert "run.parallel_passes=true has no effect" in text.getvalue()  # said, not ignored
    assert "rollout.merge_adapters=true has no effect" in text.getvalue()
    assert str(error).split()[-1] in line
    memory = plan_of(run)["memory"]
    assert memory["not_predicted"] in line
    assert "peak" not in memory["phases"]["update"]


@pytest.mark.parametrize(
    ("weights", "activations", "device", "fleeting"),
    [(40, 80, "cpu", True), (80, 40, "cpu", False), (40, 80, "cuda", False)],
)
def test_fleeting_where_most_of_the_highest_phase_comes_and_goes(
    weights: int, activations: int, device: str, fleeting: bool
) -> None:
    lasting = {"weights": weights - 15, "optimizer": 5, "gradients": 5, "libraries": 5}
    phases = {
        "load": {"weights": 9, "optimizer": 0, "gradients": 0, "libraries": 0, "activations": 0, "peak": 9},
        "update": lasting | {"activations": activations, "peak": weights + activations},
    }
    assert MemoryAccount(torch.device(device), {"phases": phases}).fleeting is fleeting
    assert not MemoryAccount(torch.device(device), {"phases": {"update": {"measured": 3}}}).fleeting


@pytest.mark.parametrize("fleeting", [False, True])
def test_a_run_and_its_resumption_tell_the_allocator(
    fleeting: bool, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[object, bool, bool]] = []
    monkeypatch.setattr(MemoryAccount, "fleeting", fleeting)
    monkeypatch.setattr(MemoryAccount, "tight", not fleeting)
    monkeypatch.setattr(
        "quartet.run.session.return_freed_memory",
        lambda wanted, *, tight, fleeting: told.append((wanted, tight, fleeting)),
    )
    train(tiny_run(**{"run.eval_every": 0, "ppo.iterations": 1, "run.save_every": 1}), progress=log()[0])
    resume(tmp_path / "run", progress=log()[0])
    assert told == [("auto", not fleeting, fleeting)] * 2
