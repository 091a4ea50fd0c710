"""A reward function that runs in tests name by module and name."""

from collections.abc import Sequence


def many_a(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Ten times the share of characters from the first half of the alphabet, capitals included."""
    return [10.0 * sum(c in "abcdefghijklmABCDEFGHIJKLM" for c in text) / max(1, len(text)) for text in responses]
