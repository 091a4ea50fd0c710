"""`quartet eval` and `quartet export`: what the run itself found and wrote, from outside and without touching the run."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quartet.cli import main
from quartet.run import reopen
from quartet.trainer import train
from tiny import changed

WORDS = ("a", "to be", "why?", "q 12", "one two", "zz", "x-y")


@pytest.fixture(scope="module", params=["separate", "single"])
def run(request: pytest.FixtureRequest, library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations with a checkpoint and an evaluation after each but the first; nothing may change it."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "prompts.txt").write_text("\n".join(WORDS))
    lora = request.param == "single"
    values: dict[str, Any] = {
        "models": {
            "sft": str(library.path("llama", "sft")),
            "reward": str(library.path("llama", "reward-lora" if lora else "reward")),
            "lora": {"r": 4} if lora else None,
            "sharing": request.param,
            "dtype": "float32",
        },
        "data": {"prompts": str(folder / "prompts.txt"), "eval_prompts": str(folder / "prompts.txt"), "eval_count": 3},
        "rollout": {"batch_size": 4, "response_length": 6, "batch_rows": 3},
        "ppo": {"iterations": 3, "epochs": 2, "microbatch_rows": 2, "learning_rate": 1.0e-2},
        "run": {"dir": str(folder / "run"), "seed": 3, "save_every": 2, "eval_every": 1},
    }
    return train(values)


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", str(run), "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    code, said = main([*arguments]), capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    return said


@pytest.mark.parametrize("step", [2, 3])
def test_what_the_run_found_is_found_again(step: int, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same responses, scores and KL as in samples.jsonl, which the run wrote when it stood there."""
    before = content(run)
    found = evaluated(capsys, run, *([] if step == 3 else ["--from", "step-000002"]))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    expected = [sample for sample in samples if sample["iteration"] == step]
    assert len(expected) == 3
    assert found["samples"] == expected
    assert (found["checkpoint"], found["iteration"], found["episodes"]) == (f"step-00000{step}", step, 3)
    for name, key in [("reward/score", "score"), ("kl/reference", "kl"), ("response/length", "tokens")]:
        assert found[name] == pytest.approx(sum(sample[key] for sample in expected) / 3)
    assert found["response/stopped_fraction"] == pytest.approx(sum(sample["stopped"] for sample in expected) / 3)
    assert content(run) == before


def test_other_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own prompts may be gone."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"what {n}"}) + "\n" for n in range(5)))
    found = evaluated(capsys, run, "--prompts", str(file), "--count", "2")
    assert [sample["prompt"] for sample in found["samples"]] == ["what 0", "what 1"]
    assert main(["eval", str(run), "--prompts", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step-000003, 5 prompts\n")
    assert shown.count("\nprompt    what ") == 3


@pytest.mark.parametrize("step", [2, 3])
def test_a_checkpoint_as_models(step: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = content(run), tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), *([] if step == 3 else ["--from", "step-000002"])]) == 0
    assert content(run) == before
    assert {path.name for path in out.iterdir()} == {"policy", "value"}
    for role, kind in (("policy", AutoModelForCausalLM), ("value", AutoModelForSequenceClassification)):
        exported, final = (load_file(next((f / role).glob("*model.safetensors"))) for f in (out, run))
        stored = load_file(run / "checkpoints" / f"step-00000{step}" / f"{role}.safetensors")
        assert exported.keys() == final.keys()
        assert all(torch.equal(exported[name], final[name]) for name in final) == (step == 3)
        if (out / role / "config.json").is_file():
            options = {} if role == "policy" else {"num_labels": 1}
            model = kind.from_pretrained(out / role, **options)
            assert all(torch.equal(dict(model.named_parameters())[name], stored[name]) for name in list(stored)[:5])
    assert "is a file or not empty" in refused(capsys, "export", str(run), "--out", str(out))


def test_a_checkpoint_that_goes_while_it_is_opened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run that goes on removes it: the newest is then another."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    read = reopen._read

    def slow(checkpoint: Path, loaded: Any) -> Any:
        if checkpoint.name == "step-000003":
            shutil.rmtree(checkpoint)
        return read(checkpoint, loaded)

    monkeypatch.setattr(reopen, "_read", slow)
    assert evaluated(capsys, copy)["checkpoint"] == "step-000002"


def test_what_config_yaml_names_is_asked_about(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    values = yaml.safe_load((copy / "config.yaml").read_text())
    rewards = [{"function": "rewards_for_tests:many_a", "weight": 1000.0}]
    (copy / "config.yaml").write_text(yaml.safe_dump(changed(values, {"rewards": rewards})))
    assert "rewards_for_tests:many_a" in refused(capsys, "eval", str(copy))
    plain, trusted = evaluated(capsys, run), evaluated(capsys, copy, "--trust")
    for one, other in zip(plain["samples"], trusted["samples"], strict=True):
        text = one["response"]
        added = 10_000.0 * sum("a" <= c <= "m" or "A" <= c <= "M" for c in text) / max(1, len(text))
        assert other["score"] == pytest.approx(one["score"] + added, rel=1e-4)
    assert main(["export", str(copy), "--out", str(tmp_path / "out")]) == 0  # uses none of them


@pytest.mark.parametrize(
    "change",
    [
        {"rollout.temperature": 5.0},
        {"rollout.response_length": 3},
        {"run.seed": 4},
        {"ppo.score_placement": "after_stop"},
    ],
)
def test_answers_of_another_run_are_not_passed_off_as_this_one_s(
    change: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    values = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(changed(values, change)))
    said = refused(capsys, "eval", str(copy))
    assert f"{next(iter(change))}=" in said
    assert "it would be another run; change it back" in said


def test_prompts_in_another_column(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a"}\n')
    said = refused(capsys, "eval", str(run), "--prompts", str(file))
    assert said.endswith("has no column 'prompt'; give that name to one of those it has: 'question'\n")


def test_mistakes(run: Path, tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval"], ["export", "--out", str(tmp_path / "out")]):
        assert "holds no run" in refused(capsys, *command, str(tmp_path))
        assert "choose one of those it has: step-000002, step-000003" in refused(
            capsys, *command, str(run), "--from", "step-000009"
        )
        copy = Path(shutil.copytree(run, tmp_path / command[0]))
        values = yaml.safe_load((copy / "config.yaml").read_text())
        other = changed(values, {"models.sft": str(library.path("qwen2", "sft"))})
        (copy / "config.yaml").write_text(yaml.safe_dump(other))
        refused(capsys, *command, str(copy))
        without = changed(values, {"data.eval_count": 0, "data.eval_prompts": None})
        (copy / "config.yaml").write_text(yaml.safe_dump(without))
        if command[0] == "eval":
            assert "give some with --prompts" in refused(capsys, *command, str(copy))
        damaged = copy / "checkpoints" / "step-000003" / "policy.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        more = ["--prompts", values["data"]["prompts"]] if command[0] == "eval" else []
        assert "missing, truncated or altered" in refused(capsys, *command, str(copy), *more)
        shutil.rmtree(copy / "checkpoints")
        assert "has no checkpoint yet" in refused(capsys, *command, str(copy), *more)
        assert not (tmp_path / "out").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it the system lets no file grow beyond `size` bytes: libraries meet what they meet on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000, 5000])
def test_a_full_disk_leaves_a_folder_to_export_into_again(
    size: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with largest_file(size):
        said = refused(capsys, "export", str(run), "--out", str(out))
    assert "File too large" in said
    assert said.endswith("; free some space, or name a folder on another disk with --out\n")
    assert list(out.iterdir()) == []
    assert main(["export", str(run), "--out", str(out)]) == 0


def test_a_disk_that_is_full_at_the_tokenizer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers raises Exception itself."""

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    assert "(No space left on device" in refused(capsys, "export", str(run), "--out", str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
