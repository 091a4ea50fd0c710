"""What it saves to compute a decoder layer in one pass: updates with layers whole and part by part, in turn, in one process.

usage: python benchmarks/whole_layers.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from statistics import median
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json
from in_turn import worker

WAYS = ("parts", "whole")
CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {dtype}, {'ends early' if early else 'to the limit'}": (
        *(size, plan, dtype, early),
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


def main() -> None:
    """Run the cases and print their ratios."""
    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    make_models(options, sorted({size for size, *_ in chosen.values()}), early=any(e for *_, e in chosen.values()))
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    print("\n| one epoch | pairs | seconds, layers in parts | whole | ratio of a pair (median) |")
    print("|---|---|---|---|---|")
    results = {}
    for name, (size, plan, dtype, early) in chosen.items():
        ending = ["--policy", "policy-early", "--stop", "eos"] if early else ["--stop", "none"]
        arguments = ["--root", str(options.models / size), "--plan", plan, "--dtype", dtype, "--epochs", "1", *ending]
        pairs = 3 if options.quick or size == "M" else 15
        found = run_worker(sys.executable, "whole_layers.py", [*arguments, str(pairs)], options.threads)
        parts, whole = (found["seconds"][way] for way in WAYS)
        ratio = median(b / a for a, b in zip(parts, whole, strict=True))
        results[name] = {**found, "ratio": ratio}
        print(f"| {name} | {len(parts)} | {median(parts):.2f} | {median(whole):.2f} | {ratio:.2f} |", flush=True)
    write_json(
        options.json,
        {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "cases": results},
    )


if __name__ == "__main__":
    worker(WAYS, switch) if "--out" in sys.argv else main()
