"""Python functions as reward sources: what is taken, and the errors of what is not."""

import functools
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

from quartet.errors import RewardError
from quartet.rewards import FunctionReward

PROMPTS, RESPONSES = ["p", "q", "r"], ["a", "bb", "ccc"]


@pytest.fixture
def make_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """make_module(source) writes a module into the working directory and gives its name; all is undone after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    names: list[str] = []

    def make(source: str) -> str:
        names.append(f"rewards_{uuid.uuid4().hex}")
        (tmp_path / f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield make
    for name in names:
        sys.modules.pop(name, None)


def returning(value: object) -> FunctionReward:
    return FunctionReward.from_callable(lambda prompts, responses: value, name="mine")


def test_function_of_the_working_directory(make_module: Callable[[str], str]) -> None:
    name = make_module(
        """
        class Judge:
            @staticmethod
            def length(prompts, responses):
                return [len(p) + 10 * len(r) for p, r in zip(prompts, responses)]
        length = Judge.length
        """
    )
    source = FunctionReward(f"{name}:length", weight=0.5, timeout=9)
    assert (source.name, source.weight) == (f"{name}:length", 0.5)
    rewards = source.score(PROMPTS, RESPONSES)
    assert rewards == [11.0, 21.0, 31.0]
    assert all(type(reward) is float for reward in rewards)
    assert FunctionReward(f"{name}:Judge.length").score(PROMPTS, RESPONSES) == rewards


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, True],
        (1.0, 2.5, 1),
        numpy.array([1, 2.5, 1], dtype=numpy.float32),
        [numpy.float32(1), numpy.float64(2.5), numpy.int64(1)],
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(2.5), 1],
    ],
)
def test_numbers_of_all_kinds(value: object) -> None:
    assert returning(value).score(PROMPTS, RESPONSES) == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "returned 2 rewards for 3 episodes; return one per episode"),
        ([1] * 4, "returned 4 rewards for 3 episodes"),
        (None, "returned None; return a list of 3 numbers"),
        ({"rewards": [1, 2, 3]}, "returned a dict; return a list of 3 numbers"),
        ("abc", "returned a str; return a list of 3 numbers"),
        (b"abc", "returned a bytes; return"),
        (5, "returned an int; return"),
        (torch.tensor(1.0), "returned a float; return"),
        ([1, "2", 3], "returned a str for episode 1 of the batch; return a number"),
        ([1, 2, None], "returned None for episode 2 of the batch"),
        (torch.zeros(3, 1), "returned a list for episode 0 of the batch"),
        ([1, 2j, 3], "returned a complex for episode 1"),
        ([1, float("nan"), float("inf")], "returned nan for episode 1 of the batch; return a finite number"),
        ([1, 2, float("-inf")], "returned -inf for episode 2"),
        (torch.tensor([1, float("nan"), 0]), "returned nan for episode 1"),
        ([3.5e38, 0, 0], "returned a number too large for float32 for episode 0"),
        ([0, 10**400, 0], "returned a number too large for float32 for episode 1"),
    ],
)
def test_wrong_results(value: object, message: str) -> None:
    with pytest.raises(RewardError, match="^reward function mine " + message):
        returning(value).score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("target", ["rewards", "rewards:", ":length", ""])
def test_target_of_the_wrong_form(target: str) -> None:
    with pytest.raises(RewardError, match="is not of the form module:name"):
        FunctionReward(target)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("", "absent_module_xyz:f", "cannot be imported: ModuleNotFoundError: No module named 'absent_module_xyz'"),
        ("x = 1\n\ny = 1 / 0", "{}:f", r"cannot be imported: ZeroDivisionError: division by zero \(.*\.py, line 3\)"),
        ("def f(:", "{}:f", "cannot be imported: SyntaxError: .*line 1"),
        ("import sys; sys.exit('bye')", "{}:f", "cannot be imported: SystemExit: bye"),
        ("g = 1", "{}:f", r"is not there: .*\.py has no f; check the name"),
        ("f = 3", "{}:f", "is of type int, not a function"),
        ("async def f(p, r): ...", "{}:f", "is an async function"),
        (
            "def f(responses): ...",
            "{}:f",
            r"cannot be called with \(prompts, responses\): too many positional arguments",
        ),
    ],
)
def test_target_that_cannot_be_used(make_module: Callable[[str], str], source: str, target: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        FunctionReward(target.format(make_module(source)))
    assert "\n" not in str(caught.value)


def test_function_that_raises_is_named_with_its_line(make_module: Callable[[str], str]) -> None:
    name = make_module("def f(prompts, responses):\n    text = 'two\\n lines'\n    raise ValueError(text)\n")
    with pytest.raises(RewardError, match=rf"{name}:f raised ValueError: two lines \({name}\.py, line 3\)") as caught:
        FunctionReward(f"{name}:f").score(PROMPTS, RESPONSES)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_function_that_exits() -> None:
    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        FunctionReward.from_callable(lambda prompts, responses: sys.exit(3)).score(PROMPTS, RESPONSES)


def test_hanging_function_ends_at_its_timeout() -> None:
    release, before = threading.Event(), set(threading.enumerate())
    source = FunctionReward.from_callable(lambda prompts, responses: release.wait(60), timeout=0.05, name="slow")
    with pytest.raises(RewardError, match=r"reward function slow was not done with 3 episodes after 0\.05 s"):
        source.score(PROMPTS, RESPONSES)
    (left,) = [thread for thread in threading.enumerate() if thread.name == "quartet-reward" and thread not in before]
    assert left.daemon
    release.set()
    left.join(10)


def test_function_gets_lists_of_its_own_and_no_gradients() -> None:
    def greedy(prompts: list[str], responses: list[str]) -> list[float]:
        prompts.clear()
        responses.append("x")
        return [float(torch.is_grad_enabled())] * 3

    prompts, responses = list(PROMPTS), list(RESPONSES)
    assert FunctionReward.from_callable(greedy).score(prompts, responses) == [0.0] * 3
    assert (prompts, responses) == (PROMPTS, RESPONSES)
    assert torch.is_grad_enabled()


def test_names_of_callables_at_hand() -> None:
    def mine(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    source = FunctionReward.from_callable(mine, 2.0)
    assert source.name == f"{__name__}:test_names_of_callables_at_hand.<locals>.mine"
    assert source.weight == 2.0
    assert "partial" in FunctionReward.from_callable(functools.partial(mine)).name


def test_builtin_whose_signature_is_unknown() -> None:
    with pytest.raises(RewardError, match="builtins:max returned a str for episode 0"):
        FunctionReward.from_callable(max).score(["a"], ["b"])
