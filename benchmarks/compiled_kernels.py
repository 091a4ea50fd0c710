"""What compiled kernels save: updates with them and with torch's operations, in turn, in one process.

usage: python benchmarks/compiled_kernels.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from in_turn import Case, compare, worker

WAYS = ("torch", "kernels")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {dtype}": Case(size, plan, dtype, early=False)
    for size in ("S", "M")
    for plan in ("separate", "paired")
    for dtype in ("float32", "bfloat16")
}


@cache
def compiled() -> Any:
    """The kernels as this process finds them.

    Raises:
        SystemExit: there are none.
    """
    from quartet.kernels import library

    if not library.are_there():
        raise SystemExit("there are no compiled kernels here; install Quartet where there is a C compiler")
    return library.kernel


def switch(_: Any, way: str) -> None:
    """Compute so from here on."""
    from quartet.kernels import attending, elementwise, multiplying, softmax

    find = compiled()
    for module in (attending, elementwise, multiplying, softmax):
        module.kernel = find if way == WAYS[1] else lambda _: None


if __name__ == "__main__":
    if "--out" in sys.argv:
        worker(WAYS, switch)
    else:
        compare(__file__, __doc__, CASES, WAYS, pairs=9)
