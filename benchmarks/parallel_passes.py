"""What it saves to take the passes of policy and value at the same time: updates in both ways, in turn, in one process.

A machine whose speed changes from minute to minute changes both of a pair alike. Each case is a process of its own.

usage: python benchmarks/parallel_passes.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys

from in_turn import Case, compare, worker
from torch import get_num_threads

WAYS = ("one after the other", "at the same time")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}{', ends early' if early else ''}, {dtype}": Case(
        size, plan, dtype, early
    )
    for size in ("S", "M")
    for early in (False, True)
    for plan in ("separate", "paired")
    for dtype in ("float32", "bfloat16")
}


if __name__ == "__main__":
    if get_num_threads() < 2:
        raise SystemExit("one thread cannot be halved; leave out OMP_NUM_THREADS=1 and --threads 1")
    if "--out" in sys.argv:
        worker(WAYS, lambda loaded, way: None, at_once=WAYS[1])
    else:
        compare(__file__, __doc__, CASES, WAYS, 9)
