"""What goes wrong in one process, or in starting several, ends all of them with one sentence."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from checkpoints import write_model
from distributed.runs import (
    train_in_folder,
    train_on_machines,
    train_run,
    train_until_killed,
    train_with_own,
    train_without_deepspeed,
)
from processes import free_port, run_processes
from quartet.cli import main
from quartet.config import parse_config
from quartet.distributed.launch import joined
from quartet.errors import ConfigError, QuartetError, TrainingError
from tiny import TinyRun, changed


def said(found: list[Any]) -> list[str]:
    """What each process raised, all of them errors for users."""
    for result in found:
        assert result[0] == "raised", result
        assert isinstance(result[1], QuartetError), result[2]
        assert result[1].exit_code == 2
    return [str(result[1]) for result in found]


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught, joined(parse_config(values)):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distributed.engine": "none"}, "distributed.engine=none is for one process, and 2 were started"),
        ({"rollout.batch_size": 6}, "cannot be cut into ppo.minibatches=2 of as many episodes for each of 2 processes"),
        ({"distributed.backend": "nccl"}, "distributed.backend=nccl needs GPUs, and the models are on the CPU here"),
        (
            {"distributed.engine": "zero3", "models.lora": {}, "models.quantization": "8bit"},
            "models.quantization=8bit cannot be used with distributed.engine=zero3",
        ),
        ({"distributed.engine": "fsdp2", "models.freeze_layers": 1}, "use distributed.engine=ddp or zero2"),
    ],
)
def test_what_cannot_be_had_is_refused_by_all(
    changes: dict[str, Any], words: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    found = said(run_processes(tmp_path / "results", 2, train_run, tiny_run(**changes)))
    assert found[0] == found[1]
    assert words in found[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_all_see_weights_that_became_infinite(engine: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Whole or in shares."""
    huge = {"ppo.learning_rate": 1e30, "ppo.optimizer.weight_decay": 1e30}
    values = tiny_run(**{"distributed.engine": engine, **huge})
    found = said(run_processes(tmp_path / "results", 2, train_run, values))
    assert found[0] == found[1]
    assert "an optimizer step of iteration 1 made weights that are not finite" in found[0]
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize(("lacking", "speaker"), [([0, 1], ""), ([1], "process 1: ")])
def test_deepspeed_not_installed(lacking: list[int], speaker: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """On all machines, or on one, which is named."""
    values = tiny_run(**{"distributed.engine": "zero3"})
    found = said(run_processes(tmp_path / "results", 2, train_without_deepspeed, values, lacking))
    sentence = (
        f"{speaker}distributed.engine=zero3 needs DeepSpeed, which is not installed; pip install quartet-rlhf[deepspeed], or "
        "use distributed.engine=fsdp2"
    )
    assert found == [sentence, sentence]


def test_launcher_variables_are_checked(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "MASTER_ADDR is not; start with torchrun" in refusal(tiny_run())
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two' are to be numbers" in refusal(tiny_run())


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("ppo.kl_coef", [0.05, 0.06]),
        ("ppo.minibatches", [2, 4]),  # which two processes could not have
        ("distributed.engine", ["ddp", "none"]),
    ],
)
def test_different_configurations(key: str, own: list[Any], tiny_run: TinyRun, tmp_path: Path) -> None:
    found = said(run_processes(tmp_path / "results", 2, train_with_own, tiny_run(), key, own))
    sentence = f"process 1 has {key}={own[1]!r} where process 0 has {own[0]!r}; start all processes with the same configuration"
    assert found == [sentence, sentence]
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_is_that_of_all(tiny_run: TinyRun, tmp_path: Path) -> None:
    """A file that only one machine lacks: all processes name it, nothing is written."""
    values = tiny_run()
    folders = [Path(values["data"]["prompts"]).parent, tmp_path / "other machine"]
    folders[1].mkdir()
    values["data"]["prompts"] = "prompts.txt"
    found = said(run_processes(tmp_path / "results", 2, train_in_folder, values, folders))
    assert found[0] == found[1]
    assert "prompts.txt" in found[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["models.reward", "data.prompts", "data.eval_prompts"])
def test_files_that_differ_between_machines_are_named(
    key: str, tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    folders = [tmp_path / "one machine", tmp_path / "other machine"]
    rewards = [library.path("llama", "reward")] * 2
    if key == "models.reward":
        rewards[1] = write_model(tmp_path / "other reward", "llama", task="classifier", seed=9)
    for number, (folder, reward) in enumerate(zip(folders, rewards, strict=True)):
        folder.mkdir()
        (folder / "reward").symlink_to(reward)
        for name in ("prompts", "eval_prompts"):
            last = f"q {number}" if key == f"data.{name}" else "q"
            (folder / f"{name}.txt").write_text(f"a\nto be\nwhy?\n{last}\n")
    files = {"models.reward": "reward", "data.prompts": "prompts.txt", "data.eval_prompts": "eval_prompts.txt"}
    values = changed(tiny_run(**{"distributed.engine": "ddp", "data.eval_count": 4}), files)
    found = said(run_processes(tmp_path / "results", 2, train_on_machines, values, folders))
    sentence = (
        f"{key} has other content on the machine of process 1 than on that of process 0; give all machines the same "
        "files"
    )
    assert found == [sentence, sentence]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("backends", "together"), [("cpu:gloo,cuda:gloo", True), ("cpu:gloo,cuda:nccl", False)])
def test_after_an_error_nothing_is_left_that_needs_the_others(
    backends: str, together: bool, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destroying a group of NCCL waits for all processes."""
    destroyed, destroy = [], dist.destroy_process_group
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(destroy()))
    config = parse_config(tiny_run(**{"distributed.engine": "ddp"}))
    with pytest.raises(TrainingError, match="boom"), joined(config):
        raise TrainingError("boom")
    assert bool(destroyed) is together
    assert not dist.is_initialized()
    with joined(config):  # another run in this process
        pass
    assert destroyed[-1:] == [None]


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_killed_process_ends_the_others(engine: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    values = tiny_run(**{"ppo.iterations": 3, "run.save_every": 1, "distributed.engine": engine})
    when = tmp_path / "when"
    survivor, killed = run_processes(tmp_path / "results", 2, train_until_killed, values, when)
    seconds = time.monotonic() - float(when.read_text())
    assert killed is None
    assert isinstance(survivor[1], TrainingError), survivor
    assert "another process has gone without a word" in str(survivor[1])
    assert seconds < 60
    run = tmp_path / "run"
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert not (run / "policy").exists()


def test_torchrun_on_the_command_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Exit code 0, and one table for the two processes."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changed(tiny_run(), {"distributed.engine": "ddp"})))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*launch, "-m", "quartet", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pol.loss") == 1
    assert "metrics.jsonl" in done.stdout


def test_the_command_line_says_which_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "missing.yaml"]) == 2
    assert capsys.readouterr().err.startswith(
        "quartet (process 1): the configuration file 'missing.yaml' does not exist"
    )
