"""A reward function that runs in tests name by module and name."""

from collections.abc import Sequence


def many_a(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Ten times the share of characters from the first half of the alphabet, capitals included."""
    return [10.0 * sum(c in "abcdefghijklmABCDEFGHIJKLM" for c in text) / max(1, len(text)) for text in responses]


calls_left = float("inf")
"""How often `flaky` answers before it fails."""


def flaky(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The lengths of the responses, for as long as there are calls left."""
    global calls_left
    if calls_left <= 0:
        raise ConnectionError("the judge is gone")
    calls_left -= 1
    return [float(len(text)) for text in responses]
