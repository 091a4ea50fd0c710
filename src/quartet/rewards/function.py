"""A Python function as a reward source."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from operator import attrgetter

from quartet.errors import RewardError, brief
from quartet.rewards.check import checked_rewards
from quartet.rewards.deadline import DeadlineExceeded, call_within

RewardFunction = Callable[[list[str], list[str]], object]
"""(prompts, responses) -> one number per episode, as a list, a tuple, an array or a tensor."""


class FunctionReward:
    """Scores a batch by calling a function of (prompts, responses) with two lists of text.

    The function runs in a thread of its own, so `signal` handlers cannot be set in it. After a timeout it is left
    behind: the process can end, but cannot stop it.
    """

    def __init__(self, target: str, *, weight: float = 1.0, timeout: float = 60.0) -> None:
        """Import `target`, written `module:name`; modules of the current working directory are found.

        `timeout` is in seconds, for one batch. Raises RewardError if it cannot be imported, is not callable or does
        not take two arguments.
        """
        self._set(target, _imported(target), weight, timeout)

    @classmethod
    def from_callable(
        cls, function: RewardFunction, weight: float = 1.0, timeout: float = 60.0, name: str | None = None
    ) -> FunctionReward:
        """A source from a function at hand; `name` is what messages call it, by default the function's own name."""
        new = cls.__new__(cls)
        default = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
        new._set(default if name is None else name, function, weight, timeout)
        return new

    def _set(self, name: str, function: object, weight: float, timeout: float) -> None:
        self.name = name
        self.weight = weight
        self._timeout = timeout
        self._label = f"reward function {name}"
        self._function = _checked_function(function, self._label)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One reward per episode, not yet weighted.

        Raises RewardError if the function raises, is not done in time, or returns anything but one finite number per
        episode.
        """
        # Copies: the function may change its lists, but not the caller's.
        given = list(prompts), list(responses)
        try:
            values = call_within(self._timeout, lambda: self._function(*given))
        except DeadlineExceeded as error:
            raise RewardError(
                f"{self._label} was not done with {len(responses)} episodes after {self._timeout:g} s; make it faster "
                "or raise the timeout of this entry of rewards"
            ) from error
        except (Exception, SystemExit) as error:
            raise RewardError(f"{self._label} raised {_described(error)}; repair it") from error
        return checked_rewards(values, len(responses), self._label)


def _imported(target: str) -> object:
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise RewardError(
            f"reward function {target!r} is not of the form module:name; write for example rewards:length"
        )
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        # As `python -m` does; the installed `quartet` command starts without it.
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward function {target} cannot be imported: {_described(error)}; check the name and run from the folder "
            "that holds the module"
        ) from error
    try:
        return attrgetter(attribute)(module)
    except AttributeError as error:
        where = getattr(module, "__file__", None) or module_name
        raise RewardError(
            f"reward function {target} is not there: {where} has no {attribute}; check the name"
        ) from error


def _checked_function(function: object, label: str) -> RewardFunction:
    if not callable(function):
        raise RewardError(f"{label} is of type {type(function).__name__}, not a function; name a function")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"{label} is an async function; give a plain one, for example one that calls asyncio.run")
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions written in C have no signature to look at.
        return function
    try:
        signature.bind([], [])
    except TypeError as error:
        raise RewardError(
            f"{label} cannot be called with (prompts, responses): {brief(error)}; take two arguments"
        ) from error
    return function


def _described(error: BaseException) -> str:
    """Kind, text and place of an error in one line; the place is the line of the user's function, or of the module."""
    text = brief(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_foreign(frame.filename)]
    place = f" ({os.path.basename(frames[0].filename)}, line {frames[0].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def _is_foreign(filename: str) -> bool:
    own = os.path.dirname(os.path.abspath(__file__))
    return not filename.startswith((own, "<frozen")) and filename != importlib.__file__
