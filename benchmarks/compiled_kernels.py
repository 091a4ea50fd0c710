"""What compiled kernels save: updates with them and with torch's operations, in turn, in one process.

usage: python benchmarks/compiled_kernels.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from statistics import median
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json
from in_turn import worker

WAYS = ("torch", "kernels")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {dtype}": (size, plan, dtype)
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


def main() -> None:
    """Run the cases and print their ratios."""
    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    make_models(options, sorted({size for size, _, _ in chosen.values()}), early=False)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    print("\n| one epoch | pairs | seconds, torch's operations | kernels | ratio of a pair (median) |")
    print("|---|---|---|---|---|")
    results = {}
    for name, (size, plan, dtype) in chosen.items():
        arguments = ["--root", str(options.models / size), "--plan", plan, "--dtype", dtype, "--epochs", "1"]
        pairs = 3 if options.quick or size == "M" else 9
        found = run_worker(sys.executable, "compiled_kernels.py", [*arguments, str(pairs)], options.threads)
        plain, fast = (found["seconds"][way] for way in WAYS)
        ratio = median(b / a for a, b in zip(plain, fast, strict=True))
        results[name] = {**found, "ratio": ratio}
        print(f"| {name} | {len(plain)} | {median(plain):.2f} | {median(fast):.2f} | {ratio:.2f} |", flush=True)
    write_json(
        options.json,
        {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "cases": results},
    )


if __name__ == "__main__":
    worker(WAYS, switch) if "--out" in sys.argv else main()
