"""Shares of reference and reward model that rest in host memory give the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.runs import exported, largest_difference, train_offloaded
from processes import results
from quartet.trainer import train
from tiny import TinyRun, changed


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_frozen_shares_rest_on_the_host(engine: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    values = tiny_run(**{"ppo.iterations": 2, "ppo.learning_rate": 1e-4, "rollout.batch_size": 8})
    train(changed(values, {"run.dir": str(tmp_path / "one")}))
    two = {"run.dir": str(tmp_path / "two"), "distributed.engine": engine, "models.offload": "cpu"}
    found = results(tmp_path / "results", 2, train_offloaded, changed(values, two))
    expected = {"policy": False, "reference": True, "value": False, "reward": True}
    assert found == [expected, expected]
    assert largest_difference(exported(tmp_path / "one"), exported(tmp_path / "two")) < 1e-5
