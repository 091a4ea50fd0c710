"""The run folder: where it stays, and which runs begin again."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from quartet.errors import CheckpointError
from quartet.run.progress import Progress
from quartet.run.trust import resume_command
from quartet.trainer import resume, train
from tiny import TinyRun, changed

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


def test_advice_to_resume_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "it's"
    words = shlex.split(resume_command(run))
    assert words == ["quartet", "resume", str(run)]


class Crash(BaseException):
    """Stands for a power cut."""


class CrashingThird(Progress):
    """The run ends in its third iteration."""

    begun = 0

    def stage(self, name: str) -> None:
        self.begun += name == "rollout"
        if self.begun == 3:
            raise Crash


def edit(run: Path, **changes: int) -> None:
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), changes)))


@pytest.mark.parametrize(("first", "then"), [(20, 1), (1, 20)])
def test_a_run_without_a_checkpoint_begins_again_by_the_interval_it_had(
    first: int, then: int, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Two iterations were done: 20 is what they were done under, at the start or after an edit."""
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(tiny_run(**{"ppo.iterations": 4, "run.save_every": 20}), progress=CrashingThird())
    inputs = run / "inputs.json"
    inputs.write_text(inputs.read_text().replace('"save_every": 20', f'"save_every": {first}'))
    edit(run, **{"run.save_every": then})
    assert len((resume(run) / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_lost_its_checkpoints_does_not_begin_again(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(tiny_run(**{"ppo.iterations": 4, "run.save_every": 20}), progress=CrashingThird())
    inputs = run / "inputs.json"
    inputs.write_text(inputs.read_text().replace('"save_every": 20', '"save_every": 1'))
    edit(run, **{"run.save_every": 1})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resume(run)
