"""What it saves to compute sequences side by side: updates with and without padding, in turn, in one process.

A machine whose speed changes from minute to minute changes both of a pair alike. Each case is a process of its own.

usage: python benchmarks/packing.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from in_turn import Case, compare, worker

WAYS = ("padded", "side by side")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {'ends early' if early else 'to the limit'}": Case(
        size, plan, "float32", early
    )
    for size, early in (("S", False), ("S", True), ("M", False))
    for plan in ("separate", "paired")
}
LONGEST = sys.maxsize


@cache
def require_packing(backbone: Any) -> None:
    """Asked before the first change: whether sequences lie side by side by themselves."""
    assert backbone.packs_up_to


def switch(loaded: Any, way: str) -> None:
    """Lay sequences out so from here on."""
    from quartet.models.packing import assume_packing

    require_packing(loaded.roles.policy.backbone)
    for view in (loaded.roles.policy, loaded.roles.value):
        assume_packing(view.backbone, LONGEST if way == WAYS[1] else 0)


if __name__ == "__main__":
    if "--out" in sys.argv:
        worker(WAYS, switch)
    else:
        compare(__file__, __doc__, CASES, WAYS, 9, {"tokens": "tokens", "with padding": "padded"})
