"""A checkpoint of any engine goes on under any other and on any number of processes, as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from distributed.runs import exported, largest_difference, resume_run, train_run
from processes import results
from quartet.errors import CheckpointError, RewardError
from quartet.run import checkpoint_folder
from quartet.run.checkpoint_folder import MANIFEST
from quartet.run.reopen import evaluate, export_checkpoint
from quartet.run.samples import read_samples
from quartet.trainer import resume, train
from tiny import TinyRun, changed


def set_engine(run: Path, engine: str) -> None:
    """As a user would: in the run's config.yaml."""
    file = run / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["distributed"]["engine"] = engine
    file.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("first", "then", "count"),
    [("fsdp2", "zero3", 2), ("zero3", "none", 1), ("none", "zero2", 2), ("zero2", "fsdp2", 4)],
)
def test_another_engine_and_number_of_processes(
    first: str, then: str, count: int, tiny_run: TinyRun, tmp_path: Path
) -> None:
    values = tiny_run(
        **{"ppo.iterations": 4, "rollout.batch_size": 8, "run.save_every": 2, "run.keep": 5, "ppo.learning_rate": 1e-4}
    )
    train(changed(values, {"run.dir": str(tmp_path / "whole")}))
    values = changed(values, {"run.dir": str(tmp_path / "run"), "distributed.engine": first})
    if first == "none":
        train(values)
    else:
        results(tmp_path / "results", 2, train_run, values)
    run = tmp_path / "run"
    newest = run / "checkpoints" / "step-000004"
    newest.rename(tmp_path / "later")
    set_engine(run, then)
    if count == 1:
        resume(run)
    else:
        results(tmp_path / "results", count, resume_run, str(run))
    assert largest_difference(exported(tmp_path / "whole"), exported(run)) < 1e-5
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("then", ["zero2", "zero3", "fsdp2"])
def test_a_checkpoint_from_before_the_first_step(
    then: str, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward source that failed at its first call left one, in which the optimizer has no state."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    values = tiny_run(**{"ppo.iterations": 2, "rollout.batch_size": 8, "ppo.learning_rate": 1e-4})
    train(changed(values, {"run.dir": str(whole)}))

    def fail(*_: Any) -> None:
        raise RewardError("the judge is not there yet")

    with monkeypatch.context() as patch:
        patch.setattr("quartet.run.session.score_with", fail)
        with pytest.raises(RewardError, match="go on from step-000000"):
            train(values)
    set_engine(run, then)
    results(tmp_path / "results", 2, resume_run, str(run))
    assert largest_difference(exported(whole), exported(run)) < 1e-5


@pytest.mark.parametrize("lost", ["0.exp_avg", "0.step"])
def test_a_checkpoint_that_lacks_a_part_of_a_state_is_refused(lost: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    train(tiny_run(**{"ppo.iterations": 1, "run.save_every": 1}))
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    file = folder / "optimizer.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if key != lost}, file)
    (folder / MANIFEST).unlink()
    checkpoint_folder._write_manifest(folder)
    set_engine(tmp_path / "run", "fsdp2")
    with pytest.raises(CheckpointError, match="holds other weights than this run's configuration trains"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_shards_are_opened_by_one_process_beside_the_run(engine: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """`quartet eval` and `quartet export` of a checkpoint in shards: what the run itself sampled and wrote."""
    given = {"distributed.engine": engine, "ppo.iterations": 2, "rollout.batch_size": 8, "run.save_every": 2}
    values = tiny_run(**given, **{"data.eval_count": 2, "run.eval_every": 2, "ppo.learning_rate": 1e-3})
    results(tmp_path / "results", 2, train_run, values)
    run = tmp_path / "run"
    assert list((run / "checkpoints" / "step-000002").glob("shard-*-of-00002.safetensors"))
    export_checkpoint(run, tmp_path / "out", say=print)
    assert largest_difference(exported(run), exported(tmp_path / "out")) == 0
    found = evaluate(run, say=print)
    last = [sample for sample in read_samples(run / "samples.jsonl") if sample["iteration"] == 2]
    assert [sample.response for sample in found.samples] == [sample["response"] for sample in last]
    assert [sample.score for sample in found.samples] == pytest.approx([sample["score"] for sample in last], abs=1e-5)
