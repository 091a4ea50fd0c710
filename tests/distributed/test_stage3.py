"""ZeRO-3 loads no more than a process's share; a DeepSpeed that sets up otherwise trains all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.runs import exported, largest_difference, train_watching_stage3
from processes import results
from quartet.distributed.stage3 import HOOKS, SETUP, STATES, as_expected
from tiny import TinyRun, changed


@pytest.fixture
def values(tiny_run: TinyRun) -> dict[str, Any]:
    return tiny_run(**{"ppo.iterations": 2, "distributed.engine": "zero3", "rollout.batch_size": 8})


def watched(values: dict[str, Any], folder: Path, *, known: bool) -> dict[str, Any]:
    given = changed(values, {"run.dir": str(folder / "run")})
    found = results(folder / "results", 2, _KNOWN[known], given)
    assert found[1]["said"] == []  # one process speaks for all
    return dict(found[0])


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return train_watching_stage3(values, known=True)


def _unknown(values: dict[str, Any]) -> dict[str, Any]:
    return train_watching_stage3(values, known=False)


_KNOWN = {True: _known, False: _unknown}


def test_masters_are_the_weights_and_gradients_come_with_the_first_backward(
    values: dict[str, Any], tmp_path: Path
) -> None:
    lean = watched(values, tmp_path / "lean", known=True)
    assert lean["shared"]
    assert not lean["gradients at first"]
    assert lean["gradients then"] > 0
    assert lean["in their places"]
    assert str(lean["device"]) == "cpu"
    assert lean["said"] == []
    other = watched(values, tmp_path / "other", known=False)
    assert other["shared"]
    assert other["gradients at first"]
    assert other["hooks without weights"] > lean["hooks without weights"]
    assert (lean["classes"], other["classes"]) == (1, 2 * other["modules"])
    assert other["modules"] > lean["modules"] > 10
    for calls in ("calls of pre_sub_module_backward_function", "calls of post_sub_module_backward_function"):
        assert lean[calls] == other[calls] > 100  # weights are fetched and released as often
    assert len(other["said"]) == 1
    assert "is not known here" in other["said"][0]
    weights = [exported(tmp_path / name / "run") for name in ("lean", "other")]
    assert largest_difference(*weights) == 0


def _sets_its_own_functions(self: Any, module: Any, count: list[int] = [0]) -> None:  # noqa: B006
    """Takes the number of modules as DeepSpeed's does, but does not look for what is set already."""


def test_what_is_expected_of_deepspeed() -> None:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    optimizer, hooks = vars(DeepSpeedZeroOptimizer_Stage3), vars(DeepSpeedZeRoOffload)
    assert as_expected(optimizer, hooks)
    for name in (SETUP, STATES):
        assert not as_expected({key: value for key, value in optimizer.items() if key != name}, hooks)
    assert not as_expected({**optimizer, SETUP: lambda self: None}, hooks)
    assert not as_expected(optimizer, {HOOKS: lambda self, module, count: None})
    assert not as_expected(optimizer, {HOOKS: _sets_its_own_functions})
