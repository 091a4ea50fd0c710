"""Whole runs that something goes wrong with: what is kept, what is said, and that resuming gives the undisturbed run."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from quartet.cli import main
from quartet.config import parse_config
from quartet.errors import CheckpointError, ConfigError, Interrupted, RewardError, TrainingError
from quartet.ops.losses import clipped_policy_loss
from quartet.rollout.dynamic import DynamicEngine
from quartet.rollout.static import StaticEngine
from quartet.run.checkpoint_folder import list_checkpoints, verify
from quartet.run.folder import RunFolder, writing
from quartet.run.metrics import read_metrics
from quartet.run.session import Session
from quartet.trainer import resume, train
from tiny import TinyRun, as_if_started_with, changed

CLOCKS = ("time/", "memory/")
FUNCTION = {"function": "rewards_for_tests:flaky"}


def computed(run: Path) -> list[dict[str, float]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    assert computed(one) == computed(other)
    for role in ("policy", "value"):
        first, second = (load_file(run / role / "model.safetensors") for run in (one, other))
        assert all(torch.equal(first[name], second[name]) for name in first)


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]


@pytest.fixture
def values(tiny_run: TinyRun) -> dict[str, Any]:
    return tiny_run(**{"ppo.iterations": 3, "run.save_every": 2})


@pytest.fixture
def whole(values: dict[str, Any]) -> Path:
    return train(changed(values, {"run.dir": values["run"]["dir"] + "-whole"}))


def test_a_reward_source_that_fails_leaves_a_checkpoint_to_go_on_from(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every iteration is there, saved or not: the state is that of the last iteration's end."""
    import rewards_for_tests

    values = changed(values, {"rewards": [FUNCTION], "run.save_every": 0, "data.eval_count": 1, "run.eval_every": 1})
    whole = train(changed(values, {"run.dir": values["run"]["dir"] + "-whole"}))
    run = Path(values["run"]["dir"])
    for calls, expected in [(0, 0), (2, 1), (5, 2)]:
        monkeypatch.setattr(rewards_for_tests, "calls_left", calls)
        shutil.rmtree(run, ignore_errors=True)
        with pytest.raises(
            RewardError,
            match=rf"flaky raised .*gone.* go on from step-00000{expected} with: quartet resume \S+ --trust$",
        ):
            train(values)
        assert steps(run) == [expected]
        monkeypatch.setattr(rewards_for_tests, "calls_left", math.inf)
        assert_same_run(resume(run, trust=True), whole)
        assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_an_endpoint_that_answers_500_is_quoted(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from quartet.rewards import endpoint

    def refuse(*_: Any) -> bytes:
        raise endpoint.Temporary("it answered status 500 with 'out of GPUs'")

    monkeypatch.setattr(endpoint.Endpoint, "_send", refuse)
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE", 0.0)
    with pytest.raises(
        RewardError, match=r"failed 4 times, at last because it answered status 500 with 'out of GPUs'"
    ) as caught:
        train(changed(values, {"rewards": [{"url": "http://127.0.0.1:9/score"}]}))
    run = Path(values["run"]["dir"])
    said = f"another url or timeout goes into {run / 'config.yaml'}, go on from step-000000 with: quartet resume {run} --trust"
    assert str(caught.value).endswith(said)
    assert steps(Path(values["run"]["dir"])) == [0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rewards": [FUNCTION]}, "the reward function rewards_for_tests:flaky"),
        ({"rewards": [{"url": "https://a.test/s?model=3"}]}, "the reward endpoint https://a.test/s, which"),
        ({"models.trust_remote_code": True}, r"the code that its checkpoints bring along \(models.trust_remote_code\)"),
    ],
)
def test_resuming_asks_before_it_uses_what_config_yaml_names(
    change: dict[str, Any], named: str, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is imported or sent before."""
    as_if_started_with(whole, change)
    monkeypatch.setattr("quartet.run.session.read_inputs", lambda *_, **__: pytest.fail("went on"))
    with pytest.raises(ConfigError, match=rf"names {named}.*add --trust"):
        resume(whole)
    assert main(["resume", str(whole)]) == 2
    assert "add --trust" in capsys.readouterr().err
    monkeypatch.setattr(
        "quartet.run.session.read_inputs", lambda *_, **__: (_ for _ in ()).throw(ConfigError("trusted"))
    )
    with pytest.raises(ConfigError, match="trusted"):
        resume(whole, trust=True)


def spoil_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[7] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["models.sft", "models.reward", "data.prompts", "data.eval_prompts", "config"])
def test_changed_inputs_are_named(key: str, tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    sft, reward = (shutil.copytree(library.path("llama", name), tmp_path / name) for name in ("sft", "reward"))
    prompts, held = tmp_path / "p.txt", tmp_path / "held.txt"
    prompts.write_text("one\ntwo\nthree\n")
    held.write_text("four\n")
    changes = {"models.sft": str(sft), "models.reward": str(reward), "data.prompts": str(prompts)}
    more = {"data.eval_prompts": str(held), "data.eval_count": 1}
    run = train(tiny_run(**changes, **more))
    (tmp_path / "moved.txt").write_bytes(prompts.read_bytes().replace(b"\n", b"\r\n"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(changed(config, {"data.prompts": str(tmp_path / "moved.txt")})))
    resume(run)  # the same prompts in another file
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if key == "config":
        key, content = "models.sft", (sft / "config.json").read_text()
        assert '"rms_norm_eps": 1e-06' in content
        (sft / "config.json").write_text(content.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    elif key.startswith("models"):
        spoil_weights(Path(changes[key]))
    else:
        (prompts if key == "data.prompts" else held).write_text("one\ntwo\nfour\n")
    with pytest.raises(CheckpointError, match=rf"^{key} is not what this run was started with .* or start a new run"):
        resume(run)


def test_prompts_of_which_some_are_held_out_are_named_themselves(tiny_run: TinyRun, tmp_path: Path) -> None:
    """With them the held-out ones are others too, which no key of the configuration names."""
    run = train(tiny_run(**{"data.eval_count": 2}))
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(CheckpointError, match=r"^data\.prompts is not what this run was started with"):
        resume(run)


def test_a_run_stopped_before_its_first_checkpoint_begins_again(
    values: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(values)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from, though it got further"):
        resume(run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        resume(run, start="step-000002")
    shutil.rmtree(run / "policy")
    assert_same_run(resume(run), whole)


@pytest.mark.parametrize("content", [None, "", "[]", "{", "[" * 99_999])
def test_fingerprints_that_are_gone_or_damaged(content: str | None, whole: Path) -> None:
    file = whole / "inputs.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        CheckpointError, match=r"inputs\.json is (missing|not readable as JSON); restore it from a copy"
    ):
        resume(whole)


def test_going_back_to_an_earlier_checkpoint(
    values: dict[str, Any], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(values)
    assert steps(run) == [2, 3]
    (run / "checkpoints" / "step-000003" / "value.safetensors").write_bytes(b"")
    assert main(["resume", str(run)]) == 2
    command = capsys.readouterr().err.rpartition("quartet resume ")[2].split()
    assert command == [str(run), "--from", "step-000002"]
    assert main(["resume", *command]) == 0
    assert steps(run) == [2, 3]
    assert_same_run(run, whole)


def test_divergence_ends_a_run_with_its_last_good_checkpoint(
    values: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third iteration on no loss is finite."""

    def spoiled(*given: Any, **options: Any) -> Any:
        return clipped_policy_loss(*given, **options) * math.nan

    def score(session: Session, rollout: Any) -> Any:
        if session.state.iteration == 2:
            monkeypatch.setattr("quartet.stages.passes.clipped_policy_loss", spoiled)
        return plain(session, rollout)

    plain = Session.score
    monkeypatch.setattr(Session, "score", score)
    with pytest.raises(
        TrainingError, match=r"the loss of episode \d+ .* is nan; .* go on from step-000002 with"
    ) as caught:
        train(changed(values, {"ppo.max_bad_steps": 4}))
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    run = Path(values["run"]["dir"])
    assert steps(run) == [2]
    exported = load_file(run / "policy" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values())
    assert_same_run(resume(run), whole)


@pytest.mark.parametrize("rate", ["ppo.learning_rate", "ppo.value_learning_rate"])
def test_weights_that_a_step_makes_infinite_are_written_nowhere(rate: str, values: dict[str, Any]) -> None:
    """A decay that float32 cannot hold."""
    changes = {rate: 1e30, "ppo.optimizer.weight_decay": 1e30}
    run = Path(values["run"]["dir"])
    with pytest.raises(
        TrainingError, match=r"step of iteration 1 made weights that are not finite; lower .* no checkpoint"
    ):
        train(changed(values, {"run.save_every": 1, "run.keep": 1, **changes}))
    assert steps(run) == []
    assert not (run / "policy").exists()


def test_the_checkpoint_before_weights_that_became_infinite_stays(values: dict[str, Any]) -> None:
    small = {"ppo.learning_rate": 1e-33, "ppo.value_learning_rate": 1e-33, "ppo.optimizer.weight_decay": 1e30}
    run = train(changed(values, {"ppo.iterations": 2, "run.save_every": 1, "run.keep": 1, **small}))
    trained = (run / "policy" / "model.safetensors").read_bytes()
    file = run / "config.yaml"
    config = changed(yaml.safe_load(file.read_text()), {"ppo.iterations": 3, "ppo.learning_rate": 1e30})
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(TrainingError, match=r"not finite; .* go on from step-000002 with") as caught:
        resume(run)
    assert "weights as they were" not in str(caught.value)
    assert steps(run) == [2]
    assert (run / "policy" / "model.safetensors").read_bytes() == trained
    file.write_text(yaml.safe_dump(changed(config, {"ppo.learning_rate": 1e-33})))
    assert len(read_metrics(resume(run) / "metrics.jsonl")) == 3


def test_bad_steps_in_a_row_are_counted_over_a_checkpoint(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations of four steps, the last one of which is bad; then the first of the resumed run."""
    values = changed(values, {"ppo.iterations": 2, "run.save_every": 1, "ppo.max_bad_steps": 2})
    calls = 0

    def spoiled(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return clipped_policy_loss(*given, **options) * (math.nan if calls in (4, 5) else 1.0)

    monkeypatch.setattr("quartet.stages.passes.clipped_policy_loss", spoiled)
    with pytest.raises(TrainingError, match=r"ppo\.max_bad_steps=2 in a row"):
        train(values)
    run = Path(values["run"]["dir"])
    assert [record["gradient/skipped_steps"] for record in read_metrics(run / "metrics.jsonl")] == [1]
    calls = 4
    with pytest.raises(TrainingError, match=r"ppo\.max_bad_steps=2 in a row"):
        resume(run)
    calls = 5
    assert read_metrics(resume(run) / "metrics.jsonl")[-1]["gradient/skipped_steps"] == 0


def test_advice_to_resume_says_trust_where_resuming_would_ask_for_it(whole: Path) -> None:
    """A full disk, a damaged checkpoint and a folder in use; a configuration that cannot be read is for `resume` to say."""

    def advice(error: type[Exception], act: Callable[[], object]) -> str:
        with pytest.raises(error) as caught:
            act()
        return str(caught.value).partition("quartet resume ")[2]

    def full() -> None:
        with writing(whole / "metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    newest = list_checkpoints(whole / "checkpoints")[-1]
    (newest / "state.json").write_text("{")
    acts: list[tuple[type[Exception], Callable[[], object], str]] = [
        (CheckpointError, full, ""),
        (CheckpointError, lambda: verify(newest, ()), " --from step-000002"),
        (ConfigError, RunFolder(whole).refuse_used, ""),
    ]
    for trust in ("", " --trust"):
        for error, act, more in acts:
            assert advice(error, act) == f"{whole}{trust}{more}"
        as_if_started_with(whole, {"rewards": [FUNCTION]})
    (whole / "config.yaml").write_text("{")
    assert advice(CheckpointError, full) == str(whole)


@pytest.mark.parametrize("writer", ["metrics", "samples"])
def test_a_full_disk_in_between_is_said(
    writer: str, values: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(stream: Any) -> None:
        nonlocal calls
        calls += 1
        stream.flush()
        if calls == (3 if writer == "metrics" else 4):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"quartet.run.{writer}.put_on_disk", full)
    watched = {} if writer == "metrics" else {"data.eval_count": 1, "run.eval_every": 1}
    with pytest.raises(CheckpointError, match=rf"{writer}\.jsonl could not be written \(No space left on device\)"):
        train(changed(values, watched))
    monkeypatch.undo()
    run = Path(values["run"]["dir"])
    assert [record["iteration"] for record in read_metrics(resume(run) / "metrics.jsonl")] == [1, 2, 3]
    if writer == "metrics":
        assert_same_run(run, whole)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("file", ["plan.json", "inputs.json", "config.yaml"])
def test_a_disk_that_is_full_when_the_run_folder_is_made(
    file: str, exists: bool, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: Any) -> None:
        if file in stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(tmp_path / "made")
    if exists:
        folder.path.mkdir()
    monkeypatch.setattr("quartet.run.folder.put_on_disk", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left"):
        folder.create(parse_config(values), {}, {})
    monkeypatch.undo()
    assert folder.path.exists() == exists
    assert not exists or list(folder.path.iterdir()) == []
    folder.create(parse_config(values), {}, {})


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl", "plan.json"])
def test_a_disk_that_is_full_when_a_run_is_resumed(
    file: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(changed(values, {"data.eval_count": 1}))

    def full(stream: Any) -> None:
        if file.partition(".")[0] in stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in ("metrics", "samples", "folder"):
        monkeypatch.setattr(f"quartet.run.{module}.put_on_disk", full)
    monkeypatch.setattr("quartet.run.session.MemoryAccount.grown", lambda _: True)  # then plan.json is written
    with pytest.raises(CheckpointError, match=rf"{file} could not be written \(No space left on device\)"):
        resume(run, start="step-000002")


@pytest.mark.parametrize("stage", ["rollout", "update"])
def test_memory_that_runs_out(stage: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    if stage == "rollout":
        for engine in (StaticEngine, DynamicEngine):
            monkeypatch.setattr(engine, "generate", full)
        said = r"memory ran out in the rollout; lower rollout\.batch_rows, .* go on from step-000000"
    else:
        monkeypatch.setattr("quartet.stages.passes.clipped_policy_loss", full)
        said = r"memory ran out in the update with a single sequence"
    with pytest.raises(TrainingError, match=said):
        train(values)


def test_a_second_ctrl_c_stops_at_once(values: dict[str, Any], whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Session.score

    def interrupted(session: Session, rollout: Any) -> Any:
        if session.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        return score(session, rollout)

    monkeypatch.setattr(Session, "score", interrupted)
    with pytest.raises(Interrupted, match="stopped at once; go on from the newest checkpoint with: quartet resume"):
        train(values)
    monkeypatch.undo()
    run = Path(values["run"]["dir"])
    assert steps(run) == [2]
    assert_same_run(resume(run), whole)


def test_no_secret_is_written(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from quartet.rewards.endpoint import Endpoint

    def answer(self: Endpoint, path: str, body: bytes | None) -> bytes:
        assert self._token == "hunter2"
        return b'{"rewards": [1, 2, 3, 4]}'

    monkeypatch.setenv("QUARTET_REWARD_TOKEN", "hunter2")
    monkeypatch.setattr(Endpoint, "_send", answer)
    run = train(changed(values, {"rewards": [{"url": "http://127.0.0.1:9/score"}]}))
    assert parse_config(yaml.safe_load((run / "config.yaml").read_text())).rewards[0].url == "http://127.0.0.1:9/score"
    for path in run.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
