"""What the time of an update goes to: torch's profile of one epoch, its operations put together by kind.

Each case is a process of its own, in which an iteration is run before the one that is profiled. Passes come one after the
other, so that times add up. `compiled` is the part of an update without the profiler that calls of compiled kernels take,
products in float32 among them where kernels multiply. Then the profile: `rest` is what no operation accounts for: Python,
autograd, and the profiler itself.

usage: python benchmarks/profile_update.py [--quick] [--json FILE] [--only TEXT ...]
"""

from __future__ import annotations

import sys
from typing import Any

from harness import chosen_cases, heading, machine, make_models, own_versions, parser, run_worker, write_json

_ELEMENTWISE = (
    "mul add sub div neg silu sigmoid gelu tanh exp log sqrt rsqrt pow square addcmul addcdiv maximum clamp lerp where "
    "masked_fill cos sin eq ne gt lt ge le triu"
)
_COPIES = (
    "copy to _to_copy clone contiguous cat stack repeat index_select index index_add index_fill index_put _index_put_impl "
    "gather scatter scatter_add fill zero embedding embedding_dense"
)
KINDS = {
    "products": ["mm", "addmm", "bmm", "baddbmm", "mv", "mkl_linear", "_linear_pointwise"],
    "attention": ["_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_softmax_backward_data"],
    "activations, elementwise": _ELEMENTWISE.split(),
    "sums, norms": [
        "sum",
        "mean",
        "max",
        "amax",
        "logsumexp",
        "linalg_vector_norm",
        "cumsum",
        "any",
        "all",
        "isfinite",
    ],
    "copies, conversions": _COPIES.split(),
    "optimizer": ["_fused_adamw", "_foreach_mul", "_foreach_norm"],
    "kernels": [
        *("LayerPass", "GatedMLP", "Projections", "LoraPass", "LinearPass", "_RMSNorm", "Turned", "Causal"),
        *("_LinearLogprobs", "_FrozenLogprobs"),
    ],
}
"""Kinds of operations, by name without namespace and without what marks one that writes in place or a gradient."""
CASES = {
    f"{size}{', ends early,' if early else ''} {'full' if plan == 'separate' else 'LoRA'}, {dtype}": (
        size,
        plan,
        dtype,
        early,
    )
    for early in (False, True)
    for size in ("S", "M")
    for plan in ("separate", "paired")
    for dtype in ("float32", "bfloat16")
}


def kind_of(operation: str) -> str:
    """The kind of an operation of the profile; `rest` for an autograd node or anything else.

    The profiler does not know compiled kernels: their time is that of the nodes which call them, with the Python in these.
    """
    name = operation.partition("::")[2].removesuffix("_").removesuffix("_backward") or operation.removesuffix(
        "Backward"
    )
    return next((kind for kind, names in KINDS.items() if name in names), "rest")


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Share of each kind in the seconds of the update."""
    seconds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for operation, taken in found["operations"].items():
        seconds[kind_of(operation)] += taken
    seconds["rest"] += found["seconds"] - sum(seconds.values())
    return {kind: taken / found["seconds"] for kind, taken in seconds.items()}


def main() -> None:
    """Profile every case; print the table."""
    options = parser(__doc__).parse_args()
    chosen = chosen_cases(options, CASES)
    for early in (False, True):
        make_models(options, sorted({size for size, _, _, of in chosen.values() if of is early}), early=early)
    print(heading({"quartet": own_versions()}, options.threads))
    print("| update, one epoch | seconds | compiled | profiled, seconds | " + " | ".join([*KINDS, "rest"]) + " |")
    print("|---|---|---|---|" + "---|" * (len(KINDS) + 1))
    rows = []
    for name, (size, plan, dtype, early) in chosen.items():
        arguments = ["--root", str(options.models / size), "--plan", plan, "--dtype", dtype, "--parallel", "false"]
        arguments += ["--iterations", "2", "--epochs", "1", "--profile"]
        arguments += ["--policy", "policy-early", "--stop", "eos"] if early else []
        found = run_worker(sys.executable, "quartet_worker.py", arguments, options.threads)["iterations"][-1]["profile"]
        rows.append({"name": name, "shares": shares(found), **found})
        cells = " | ".join(f"{share:.0%}" for share in rows[-1]["shares"].values())
        plain = found["plain"]
        compiled = sum(plain["kernels"].values()) / plain["seconds"]
        print(f"| {name} | {plain['seconds']:.2f} | {compiled:.0%} | {found['seconds']:.2f} | {cells} |", flush=True)
    write_json(
        options.json, {"machine": machine(), "versions": own_versions(), "threads": options.threads, "rows": rows}
    )


if __name__ == "__main__":
    main()
