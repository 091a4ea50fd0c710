"""What it saves to compute sequences side by side: updates with and without padding, in turn, in one process.

A machine whose speed changes from minute to minute changes both of a pair alike. Each case is a process of its own.

usage: python benchmarks/packing.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from functools import cache
from statistics import median
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json
from in_turn import worker

CASES = {
    f"{size} {'LoRA' if plan == 'paired' else 'full'}, {'ends early' if early else 'to the limit'}": (size, plan, early)
    for size, early in (("S", False), ("S", True), ("M", False))
    for plan in ("separate", "paired")
}
LONGEST = sys.maxsize


WAYS = ("padded", "side by side")


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


def main() -> None:
    """Run the cases and print their ratios."""
    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    make_models(options, sorted({size for size, _, _ in chosen.values()}), early=any(e for *_, e in chosen.values()))
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads))
    print("\n| one epoch | tokens | with padding | pairs | seconds, padded | side by side | ratio of a pair (median) |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, (size, plan, early) in chosen.items():
        ending = ["--policy", "policy-early", "--stop", "eos"] if early else ["--stop", "none"]
        arguments = ["--root", str(options.models / size), "--plan", plan, "--epochs", "1", *ending]
        pairs = 3 if options.quick or size == "M" else 9
        found = run_worker(sys.executable, "packing.py", [*arguments, str(pairs)], options.threads)
        padded, packed = found["seconds"]["padded"], found["seconds"]["side by side"]
        ratio = median(b / a for a, b in zip(padded, packed, strict=True))
        results[name] = {**found, "ratio": ratio}
        cells = (name, found["tokens"], found["padded"], len(padded))
        print(
            f"| {' | '.join(map(str, cells))} | {median(padded):.2f} | {median(packed):.2f} | {ratio:.2f} |", flush=True
        )
    write_json(
        options.json,
        {"machine": machine(), "versions": versions, "threads": options.threads, "seed": 7, "cases": results},
    )


if __name__ == "__main__":
    worker(WAYS, switch) if "--out" in sys.argv else main()
