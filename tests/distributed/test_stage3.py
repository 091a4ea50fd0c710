"""ZeRO-3 loads no more than a process's share; a DeepSpeed that sets up otherwise trains all the same."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from distributed.runs import exported, largest_difference, train_watching_stage3
from processes import results
from quartet.distributed.stage3 import FLAT, NAMES, REDUCE, SETUP, STATES, as_expected, found_functions
from quartet.distributed.stage3_hooks import EXTERNAL, INJECT, REGISTER
from quartet.distributed.stage3_weights import CONVERT
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
    assert (lean["hooks"], other["hooks"]) == (4, 4 * (other["modules"] - 1))
    assert lean["hooks when whole"] == other["hooks when whole"] == 0
    assert (lean["hooks then"], other["hooks then"]) == (4, 4 * (other["modules"] - 1))
    assert lean["functions"] < 10 * 2 < other["functions"]
    assert lean["cut"] == sorted(lean["cut"], key=lambda one: (not one[0], -one[1]))
    assert lean["whole in set-up"] == []
    assert len(other["whole in set-up"]) == sum(trained for trained, _ in other["cut"]) > 0
    assert lean["names"] == 0 < other["names"]
    assert lean["cut into place"] == [True]
    assert other["cut into place"] == []
    assert len(other["said"]) == 1
    assert "is not known here" in other["said"][0]
    weights = [exported(tmp_path / name / "run") for name in ("lean", "other")]
    assert largest_difference(*weights) == 0


_IMPORTS = """
import sys
import torch
from quartet.distributed import deepspeed_setup
deepspeed_setup.LATER = ("deepspeed.no_such_module", *deepspeed_setup.LATER)
deepspeed_setup.import_deepspeed(torch.device("cpu"))
print(*set(deepspeed_setup.LATER) - set(sys.modules))
"""


def test_what_deepspeed_imports_while_it_loads_is_there_before() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["deepspeed.no_such_module"]


def _sets_its_own_functions(self: Any, module: Any, count: list[int] = [0]) -> None:  # noqa: B006
    """Takes the number of modules as DeepSpeed's does, but does not look for what is set already."""


def edited(function: Any, old: str, new: str) -> Any:
    """One of DeepSpeed's functions as it would be with another line in it."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    defined: dict[str, Any] = {}
    exec(source.replace(old, new), function.__globals__, defined)
    return defined[function.__name__]


def test_what_is_expected_of_deepspeed() -> None:
    found = found_functions()
    assert as_expected(found)
    for name in (SETUP, STATES, FLAT, NAMES, REDUCE, REGISTER, EXTERNAL, INJECT, CONVERT):
        assert not as_expected({key: value for key, value in found.items() if key != name})
    for name in (SETUP, FLAT, NAMES, REDUCE, EXTERNAL, INJECT, CONVERT):
        assert not as_expected({**found, name: lambda self: None})
    for register in (lambda self, module, count: None, _sets_its_own_functions):
        assert not as_expected({**found, REGISTER: register})


@pytest.mark.parametrize(
    ("name", "line", "same", "other"),
    [
        (REGISTER, "hook(module, *args)", "hook(module, *arguments)", "hook(given, *args)"),  # a hook for one module
        (CONVERT, "self._convert_to_zero_parameters(p", "self._convert_to_zero_parameters(p", "self._convert(param, p"),
        (
            CONVERT,
            "return self._aligned_size(",
            "return +self._aligned_size(",
            "return partition and self._aligned_size(",
        ),
    ],
)
def test_functions_that_are_shared_know_no_more_than_they_did(name: str, line: str, same: str, other: str) -> None:
    found = found_functions()
    assert as_expected({**found, name: edited(found[name], line, same)})
    assert not as_expected({**found, name: edited(found[name], line, other)})
