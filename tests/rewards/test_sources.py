"""Building sources from the configuration, and their weighted sum."""

from collections.abc import Sequence

import pytest

from quartet.config.schema import RewardSourceConfig
from quartet.errors import RewardError
from quartet.rewards import FunctionReward, HttpReward, RewardSource, build_sources, combine


class Fixed:
    """A source of the caller's own: anything with name, weight and score is one."""

    def __init__(self, weight: float, scores: list[float]) -> None:
        self.name, self.weight, self.scores = "fixed", weight, scores

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.scores


def test_build_sources_in_order() -> None:
    entries = (
        RewardSourceConfig(url="http://127.0.0.1:9/score", weight=-1.0, timeout=2.0),
        RewardSourceConfig(function="operator:concat", weight=0.25, timeout=3.0),
    )
    endpoint, function = build_sources(entries)
    assert isinstance(endpoint, HttpReward)
    assert isinstance(function, FunctionReward)
    assert [(source.name, source.weight) for source in (endpoint, function)] == [
        ("http://127.0.0.1:9/score", -1.0),
        ("operator:concat", 0.25),
    ]
    assert (endpoint._endpoint._timeout, function._timeout) == (2.0, 3.0)
    assert build_sources(()) == []


def test_build_refuses_what_cannot_be_used() -> None:
    with pytest.raises(RewardError, match="absent_module_xyz"):
        build_sources([RewardSourceConfig(function="absent_module_xyz:f")])


def test_weighted_sum() -> None:
    sources: list[RewardSource] = [
        Fixed(0.5, [1.0, -2.0]),
        Fixed(-2.0, [0.25, 4.0]),
        FunctionReward.from_callable(lambda prompts, responses: [len(text) for text in responses], weight=10.0),
    ]
    assert combine(sources, ["p", "q"], ["a", "bcd"]) == [0.5 - 0.5 + 10.0, -1.0 - 8.0 + 30.0]


def test_no_sources_and_no_episodes() -> None:
    assert combine([], ["p", "q"], ["a", "b"]) == [0.0, 0.0]
    assert combine([Fixed(1.0, [])], [], []) == []


def test_sum_that_overflows() -> None:
    with pytest.raises(RewardError, match="fixed with weight 1e\\+300 makes the reward overflow; lower the weight"):
        combine([Fixed(1e300, [1e38])], ["p"], ["a"])
