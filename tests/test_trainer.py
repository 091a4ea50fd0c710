"""Whole runs: what is on disk, resuming bit by bit, and runs that cannot go on."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

import quartet
from checkpoints import EOS
from quartet import errors
from quartet.config import parse_config
from quartet.errors import CheckpointError, ConfigError, TrainingError
from quartet.memory.skeleton import PlannedSequences
from quartet.models.roles import ScalarView
from quartet.run.progress import Progress
from quartet.trainer import resume, train
from tiny import TinyRun, as_if_started_with, changed

METRICS = {
    *("iteration", "episodes", "reward/score", "reward/total", "kl/reference", "kl/update", "policy/loss"),
    *("policy/clip_fraction", "policy/entropy", "value/loss", "value/clip_fraction", "value/explained_variance"),
    *("ratio/max_log", "response/length", "response/stopped_fraction", "lr", "time/rollout", "time/scoring"),
    *("time/advantages", "time/update", "tokens/generated", "tokens/trained", "memory/peak_bytes"),
}
MEASURED = ("time/", "memory/")
LORA: dict[str, Any] = {"models.lora": {"r": 5}}


def documented_metrics() -> set[str]:
    """The keys in the first column of docs/metrics.md's table."""
    rows = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().splitlines()
    return {key for row in rows if row.startswith("| `") for key in re.findall("`(.+?)`", row.split("|")[1])}


def test_paths_may_be_paths(tiny_run: TinyRun, tmp_path: Path) -> None:
    values = tiny_run()
    for section, key in (("models", "sft"), ("models", "reward"), ("data", "prompts"), ("run", "dir")):
        values[section][key] = Path(values[section][key])
    config = parse_config(changed(values, {"rollout.engine": "vllm", "rollout.vllm": {"folder": tmp_path}}))
    assert config.rollout.vllm.folder == str(tmp_path)
    assert train(values) == tmp_path / "run"


@pytest.mark.parametrize("given", ["run.yaml", Path("run.yaml"), None, ["models"]])
def test_what_is_no_configuration_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"holds no values by name; for a YAML file use load_config\(path\)"):
        train(given)


def test_errors_of_every_kind_can_be_had_from_the_package() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert kinds <= set(quartet.__all__)
    assert all(getattr(quartet, name) is getattr(errors, name) for name in kinds)


class Crash(BaseException):
    """Stands for a power cut."""


class Crashing(Progress):
    """Stops the run where iteration `at` begins stage `stage`."""

    def __init__(self, at: int, stage: str) -> None:
        super().__init__()
        self._at, self._stage, self._seen = at, stage, 0

    def stage(self, name: str) -> None:
        self._seen += name == "rollout"
        if self._seen == self._at and name == self._stage:
            raise Crash


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def computed(run: Path) -> list[dict[str, float]]:
    """Metrics without those that a clock or the system gives."""
    return [{k: v for k, v in record.items() if not k.startswith(MEASURED)} for record in metrics_of(run)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves_on_disk(tiny_run: TinyRun) -> None:
    config = parse_config(
        tiny_run(
            reward="reward-lora",
            **LORA,
            **{"ppo.iterations": 3, "run.save_every": 1, "run.keep": 2, "data.eval_count": 4, "run.eval_every": 2},
        )
    )
    folder = train(config)
    assert folder == Path(config.run.dir)
    files = {"config.yaml", "plan.json", "inputs.json", "metrics.jsonl", "samples.jsonl"}
    expected = files | {"checkpoints", "policy", "value"}
    assert {path.name for path in folder.iterdir()} == expected
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    for step in (folder / "checkpoints").iterdir():
        assert {path.suffix for path in step.iterdir()} == {".safetensors", ".json"}
    records = metrics_of(folder)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert [record["episodes"] for record in records] == [4, 8, 12]
    assert all(record.keys() >= METRICS for record in records)
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert {key for record in records for key in record} == documented_metrics()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["iteration"] for sample in samples] == [0, 2, 3]
    assert len({sample["prompt"] for sample in samples}) == 1
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == config
    assert json.loads((folder / "plan.json").read_text())["plan"]["name"] == "single"


RESUMED = {
    "ppo.iterations": 5,
    "ppo.adaptive_kl_target": 0.5,
    "ppo.adaptive_kl_horizon": 20.0,
    "ppo.optimizer": {"schedule": "cosine", "warmup_iterations": 1},
    "ppo.learning_rate": 1e-2,
    "run.save_every": 2,
    "run.eval_every": 1,
    "data.eval_count": 1,
}
"""Six prompts in batches of four: every second iteration ends in the middle of a pass."""


WAYS: dict[str, dict[str, Any]] = {
    "separate": {"models.sharing": "separate"},
    "separate with LoRA": {"models.sharing": "separate", **LORA},
    "single": {"models.sharing": "single", **LORA},
    "paired": {"models.sharing": "paired", **LORA},
    "frozen layers": {"models.freeze_layers": 1},
    "trunk": {"models.value_model": "trunk", "models.value_head_init": "zero"},
    "at the same time": {
        "models.sharing": "paired",
        **LORA,
        "models.dtype": "bfloat16",
        "run.parallel_passes": True,
        "ppo.microbatch_rows": 1,
    },
}


@pytest.mark.parametrize(
    ("plan", "at", "stage"),
    [
        *[
            ("separate", 4, "update"),
            ("separate", 4, "checkpoint"),
            ("single", 3, "rollout"),
            ("paired", 3, "evaluation"),
        ],
        *[("frozen layers", 4, "update"), ("trunk", 4, "scoring"), ("separate with LoRA", 3, "update")],
        ("at the same time", 4, "update"),
    ],
)
def test_resuming_gives_the_uninterrupted_run(
    plan: str, at: int, stage: str, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**RESUMED, **WAYS[plan]}
    values = tiny_run("llama", "sft", "reward-lora" if plan == "single" else "reward", **changes)
    if plan == "at the same time":
        torch.set_num_threads(2)
    whole = train(values)
    chosen = json.loads((whole / "plan.json").read_text())["memory"]["choices"]
    assert chosen["parallel_passes"] is (plan == "at the same time")
    broken = Path(values["run"]["dir"]).with_name("broken")
    with pytest.raises(Crash):
        train(changed(values, {"run.dir": str(broken)}), progress=Crashing(at, stage))
    assert not (broken / "policy").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resume(broken) == broken
    assert computed(broken) == computed(whole)
    assert len({record["kl/coef"] for record in computed(whole)}) == 5
    assert (broken / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for role in ("policy", "value"):
        assert_same_weights(broken / role, whole / role)
    newest = "checkpoints/step-000005"
    assert_same_weights(broken / newest, whole / newest)
    assert (broken / newest / "state.json").read_text() == (whole / newest / "state.json").read_text()


def test_resuming_on_one_thread_says_that_passes_no_longer_run_at_the_same_time(tiny_run: TinyRun) -> None:
    values = tiny_run(**{**RESUMED, **WAYS["at the same time"]})
    torch.set_num_threads(2)
    with pytest.raises(Crash):
        train(values, progress=Crashing(4, "update"))
    torch.set_num_threads(1)
    progress, said = Progress(), []
    progress.say = said.append
    resume(Path(values["run"]["dir"]), progress=progress)
    assert [line for line in said if "OMP_NUM_THREADS" in line] == [
        "torch has one thread here (OMP_NUM_THREADS): policy and value take their passes one after the other, and no longer at "
        "the same time, so that the last digits of the results may change"
    ]


def test_resuming_a_finished_run_changes_nothing(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(**{"ppo.iterations": 2}))
    metrics, policy = (folder / "metrics.jsonl").read_text(), weights_of(folder / "policy")
    resume(folder)
    assert (folder / "metrics.jsonl").read_text() == metrics
    again = weights_of(folder / "policy")
    assert all(torch.equal(tensor, again[name]) for name, tensor in policy.items())


def test_same_seed_same_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    values = tiny_run(**LORA, **{"ppo.iterations": 2})
    one = train(values)
    same = train(changed(values, {"run.dir": str(tmp_path / "same"), "rollout.batch_rows": 4}))
    other = train(changed(values, {"run.dir": str(tmp_path / "other"), "run.seed": 4}))
    for first, second in zip(computed(one), computed(same), strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5)
    assert computed(one)[0]["reward/score"] != computed(other)[0]["reward/score"]


@pytest.fixture
def finished(tiny_run: TinyRun) -> Path:
    return train(tiny_run(**{"ppo.iterations": 3, "run.save_every": 2}))


@pytest.mark.parametrize("seed", [20260101120000, 2**64 + 1])
def test_a_seed_may_be_any_number(seed: int, tiny_run: TinyRun) -> None:
    """A date, for example, as digits."""
    folder = train(tiny_run(**LORA, **{"run.seed": seed}))
    assert len(metrics_of(folder)) == 1


@pytest.mark.parametrize("name", ["policy.safetensors", "value.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_checkpoint_is_named(name: str, damage: str, finished: Path) -> None:
    path = finished / "checkpoints" / "step-000003" / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "altered":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        resume(finished)
    command = f"quartet resume {finished} --from step-000002"
    reason = f"missing, truncated or altered; go on from the checkpoint before it with: {command}"
    assert str(caught.value) == f"{path} is {reason}"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"state.json": 1}}'])
def test_damaged_manifest_is_named(content: str, finished: Path) -> None:
    path = finished / "checkpoints" / "step-000003" / "manifest.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"step-000003/manifest\.json is missing or damaged"):
        resume(finished)


def test_half_written_checkpoint_is_passed_over(finished: Path) -> None:
    """A crash while writing leaves a folder of another name, or one without a manifest."""
    newest = finished / "checkpoints" / "step-000003"
    policy = weights_of(finished / "policy")
    newest.rename(newest.with_name(".writing-step-000003"))
    resume(finished)
    assert all(torch.equal(tensor, policy[name]) for name, tensor in weights_of(finished / "policy").items())
    assert [record["iteration"] for record in metrics_of(finished)] == [1, 2, 3]
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-000002", "step-000003"]


def test_resuming_with_other_weights_is_refused(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(**LORA))
    as_if_started_with(folder, {"models.lora.r": 6})
    with pytest.raises(CheckpointError, match="holds other weights than this run's configuration trains"):
        resume(folder)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    kind: type[Exception], tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors raises an error of its own, which is no OSError."""
    from quartet.run import checkpoint

    written = []
    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        written.append(path)
        if len(written) == 5:
            raise kind("No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    values = tiny_run(**{"ppo.iterations": 3, "run.save_every": 1})
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(values)
    monkeypatch.undo()
    folder = Path(values["run"]["dir"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    resume(folder)
    assert [record["iteration"] for record in metrics_of(folder)] == [1, 2, 3]


def test_a_score_that_is_not_finite_ends_the_run_with_the_last_good_weights(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_run(**{"rollout.batch_rows": 4})
    good = train(values)
    scores, calls = ScalarView.scores, []

    def spoiled(self: ScalarView, sequences: Any) -> torch.Tensor:
        found = scores(self, sequences)
        if not isinstance(sequences, PlannedSequences):  # the prediction before the run also scores
            calls.append(1)
        return found if len(calls) == 1 else found * math.nan

    monkeypatch.setattr(ScalarView, "scores", spoiled)
    run = tmp_path / "spoiled"
    with pytest.raises(TrainingError, match=r"the reward model gave nan to episode [4-7] ") as caught:
        train(changed(values, {"run.dir": str(run), "ppo.iterations": 3}))
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    for role in ("policy", "value"):
        assert_same_weights(run / role, good / role)
    assert [record["iteration"] for record in metrics_of(run)] == [1]


def test_an_evaluation_that_fails_leaves_the_weights_too(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_run(**{"rollout.batch_rows": 4, "data.eval_count": 1, "run.eval_every": 1})
    good = train(values)
    scores, calls = ScalarView.scores, []

    def spoiled(self: ScalarView, sequences: Any) -> torch.Tensor:
        found = scores(self, sequences)
        if not isinstance(sequences, PlannedSequences):
            calls.append(1)
        return found if len(calls) < 3 else found * math.nan

    monkeypatch.setattr(ScalarView, "scores", spoiled)
    run = tmp_path / "spoiled"
    with pytest.raises(TrainingError):
        train(changed(values, {"run.dir": str(run), "ppo.iterations": 3}))
    for role in ("policy", "value"):
        assert_same_weights(run / role, good / role)


def test_kl_coefficient_moves_towards_its_target(tiny_run: TinyRun) -> None:
    """arXiv 1909.08593: times 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon."""
    adaptive = {"ppo.adaptive_kl_target": 0.05, "ppo.adaptive_kl_horizon": 10.0, "ppo.kl_coef": 0.3}
    folder = train(tiny_run(**adaptive, **{"ppo.iterations": 4, "ppo.learning_rate": 1e-2}))
    records = metrics_of(folder)
    assert records[0]["kl/coef"] == 0.3
    for before, after in pairwise(records):
        error = min(max(before["kl/reference"] / 0.05 - 1.0, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1.0 + error * 4 / 10.0))
    assert len({record["kl/coef"] for record in records}) == 4


def test_without_a_target_the_coefficient_stays(tiny_run: TinyRun) -> None:
    folder = train(tiny_run(**{"ppo.iterations": 2, "ppo.kl_coef": 0.3}))
    assert [record["kl/coef"] for record in metrics_of(folder)] == [0.3, 0.3]


@pytest.mark.parametrize("target", [None, 0.05])
def test_a_coefficient_changed_before_resuming_is_used(target: float | None, tiny_run: TinyRun) -> None:
    """As every other number of config.yaml is; one that is adapted to a target goes on from where it had come to."""
    adaptive = {} if target is None else {"ppo.adaptive_kl_target": target, "ppo.adaptive_kl_horizon": 10.0}
    folder = train(tiny_run(**{"ppo.iterations": 1, "ppo.kl_coef": 0.3, "run.save_every": 1}, **adaptive))
    file = folder / "config.yaml"
    edited = changed(yaml.safe_load(file.read_text()), {"ppo.iterations": 2, "ppo.kl_coef": 0.7})
    file.write_text(yaml.safe_dump(edited))
    resume(folder)
    first, second = metrics_of(folder)
    assert first["kl/coef"] == 0.3
    error = 0.0 if target is None else min(max(first["kl/reference"] / target - 1.0, -0.2), 0.2)
    assert second["kl/coef"] == pytest.approx(0.7 if target is None else 0.3 * (1.0 + error * 4 / 10.0))


def test_learning_rate_zero(tiny_run: TinyRun, library: Any) -> None:
    folder = train(tiny_run(**{"ppo.iterations": 2, "ppo.learning_rate": 0.0}))
    assert all(abs(record["kl/reference"]) < 1e-5 for record in metrics_of(folder))
    assert_same_weights(folder / "policy", library.path("llama", "sft"))
    assert_same_weights(folder / "value", library.path("llama", "reward"))


def test_ppo_learns_what_the_reward_model_likes(tiny_run: TinyRun) -> None:
    """A reward function for one token: its share rises far above chance."""
    values = tiny_run(
        **{
            "rewards": [{"function": "rewards_for_tests:many_a", "weight": 1.0}],
            "models.value_head_init": "zero",
            "ppo.iterations": 12,
            "ppo.learning_rate": 1e-2,
            "ppo.kl_coef": 0.0,
            "ppo.epochs": 2,
            "rollout.batch_size": 16,
            "rollout.batch_rows": 16,
            "ppo.microbatch_rows": 16,
            "rollout.stop": None,
        }
    )
    records = metrics_of(train(values))
    early, late = ([record["reward/score"] for record in part] for part in (records[:2], records[-2:]))
    assert sum(late) / 2 > sum(early) / 2 + 1.0


def test_stop_token_by_name(tiny_run: TinyRun) -> None:
    by_name, by_id = (train(tiny_run(**{"rollout.stop": s, "run.dir": d})) for s, d in stops(tiny_run))
    assert computed(by_name) == computed(by_id)


def stops(tiny_run: TinyRun) -> list[tuple[str | int, str]]:
    run = tiny_run()["run"]["dir"]
    return [("<eos>", f"{run}-name"), (EOS, f"{run}-id")]
