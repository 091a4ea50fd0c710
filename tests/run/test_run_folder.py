"""The run folder: where it stays, and which runs begin again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from quartet.trainer import train
from tiny import TinyRun

ELSEWHERE = "QUARTET_TEST_ELSEWHERE"


def leaves_for_elsewhere(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward function that works in a folder of its own, as a judge that runs programs does."""
    os.chdir(os.environ[ELSEWHERE])
    return [0.0] * len(responses)


def test_a_reward_function_that_changes_the_working_directory_does_not_move_the_run(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv(ELSEWHERE, str(elsewhere))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rewards = [{"function": "test_run_folder:leaves_for_elsewhere"}]
    run = train(tiny_run(rewards=rewards, **{"run.dir": "runs/here", "run.save_every": 1, "ppo.iterations": 2}))
    assert run == tmp_path / "runs" / "here"
    assert Path.cwd() == elsewhere
    assert not any(elsewhere.iterdir())
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "checkpoints", "policy", "value"}
