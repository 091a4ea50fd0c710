"""What it saves to compute a decoder layer in one pass: updates with layers whole and part by part, in turn, in one process.

usage: python benchmarks/whole_layers.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from in_turn import Case, compare, worker

WAYS = ("parts", "whole")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {dtype}, {'ends early' if early else 'to the limit'}": Case(
        size, plan, dtype, early
    )
    for size in ("S", "M")
    for plan in ("separate", "paired")
    for dtype in ("float32", "bfloat16")
    for early in (True, False)
}


@cache
def taken_apart() -> Any:
    """What takes layers apart, as this process finds it."""
    from quartet.models import decoder_layer

    return decoder_layer._taken_apart


def switch(_: Any, way: str) -> None:
    """Compute layers so from here on.

    Raises:
        SystemExit: a layer that is to be computed whole cannot be.
    """
    from quartet.models import decoder_layer

    found = taken_apart()

    def whole(*given: Any, **more: Any) -> Any:
        result = found(*given, **more)
        if result is None:
            raise SystemExit("a layer cannot be computed in one pass here")
        return result

    decoder_layer._taken_apart = whole if way == WAYS[1] else lambda *_, **__: None


if __name__ == "__main__":
    if "--out" in sys.argv:
        worker(WAYS, switch)
    else:
        compare(__file__, __doc__, CASES, WAYS, pairs=15)
