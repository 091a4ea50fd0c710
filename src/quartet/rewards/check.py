"""Checks what a reward source returned: one finite number per episode."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quartet.errors import RewardError

_FLOAT32_MAX = 3.4028234663852886e38


def checked_rewards(values: object, count: int, source: str) -> list[float]:
    """`values` as `count` floats: a list, a tuple, an array or a tensor of one dimension; booleans count as 0 and 1.

    Raises RewardError that names the source and the first wrong episode of the batch, counted from 0, if there are
    more or fewer than `count`, or one is not a number, not finite or too large for float32.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RewardError(f"{source} returned {_kind(values)}; return a list of {count} numbers, one per episode")
    if len(values) != count:
        raise RewardError(f"{source} returned {len(values)} rewards for {count} episodes; return one per episode")
    return [_checked(value, episode, source) for episode, value in enumerate(values)]


def _checked(value: object, episode: int, source: str) -> float:
    if hasattr(value, "tolist"):
        # A scalar of NumPy or torch.
        value = value.tolist()
    if not isinstance(value, int | float):
        raise RewardError(f"{source} returned {_kind(value)} for episode {episode} of the batch; return a number")
    # The comparison is exact for an int too large for a float, and False for NaN.
    if not abs(value) <= _FLOAT32_MAX:
        shown = value if isinstance(value, float) and not math.isfinite(value) else "a number too large for float32"
        raise RewardError(f"{source} returned {shown} for episode {episode} of the batch; return a finite number")
    return float(value)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
