"""Rates of matrix products on this processor: through MKL (`F.linear`, `@`), oneDNN and compiled kernels.

update     `[tokens, in] x [in, out]` forward, by the states (g W) and by the weight (g^T x); the ways in turn, on one of
           several sets of matrices after the other, so that these come from memory as they do in training
decoding   all linear layers of a model of size S one after the other, whose weights do not fit into the caches: MKL, oneDNN,
           oneDNN with weights packed for it beforehand, and W x^T
bfloat16   where it has tiles of AMX: forward, the same with an adapter of rank 16, by the states, and by the weight added to a
           gradient in float32: torch's operations (oneDNN), and the kernels' tiles

GFLOP/s from medians; `models/products.py` and `rollout/linears.py` choose by them. Kernels are measured whether they are chosen
on this processor or not.

usage: OMP_NUM_THREADS=2 python benchmarks/products.py [--quick] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from harness import heading, machine, own_versions, parser, write_json
from torch import Tensor

from quartet import kernels
from quartet.kernels import Term, multiplying

TOKENS = 896
OF_S, OF_M = ((256, 256), (2048, 256), (256, 2048), (8192, 256)), ((768, 768), (3072, 768), (768, 3072))
SHAPES = (*OF_S, (16, 256), (256, 16), (16, 2048), *OF_M)
"""Out, in: sizes S and M, and adapters of rank 16."""
LAYER = ((256, 256),) * 4 + ((2048, 256),) * 2 + ((256, 2048),)
LAYERS, HEAD = 6, (8192, 256)
SETS = 7
"""Matrices of a shape that take turns: more than the caches hold, but of the smallest."""


def onednn(states: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` by oneDNN."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return result


def seconds(work: Callable[[], Any], times: int) -> float:
    """Median of a few runs after two to warm up."""
    taken = []
    for _ in range(times + 2):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken[2:])


def by_kernels(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` over `out`, by compiled kernels.

    Raises:
        SystemExit: there are none.
    """
    if not kernels.multiply(out, Term(left, right)):
        raise SystemExit("there are no compiled kernels here; install Quartet where there is a C compiler")
    return out


def rates(
    ways: dict[str, Callable[..., Any]], sets: list[tuple[Tensor, ...]], work: int, times: int
) -> dict[str, float]:
    """GFLOP/s of each way, in turn, each time with the next of the sets.

    Raises:
        SystemExit: the kernels do not compute one.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(times + 1):
        for number, (name, run) in enumerate(ways.items()):
            given = sets[(turn * len(ways) + number) % len(sets)]
            start = time.perf_counter()
            if run(*given) is False:
                raise SystemExit(f"the kernels do not compute this: {name}")
            if turn:  # the first warms up
                taken[name].append(time.perf_counter() - start)
    return {name: work / 1e9 / median(found) for name, found in taken.items()}


def update(times: int) -> list[dict[str, Any]]:
    """One row for each shape."""
    rows = []
    for out, wide in SHAPES:
        sets = [
            (torch.randn(TOKENS, wide), torch.randn(out, wide), torch.randn(TOKENS, out), torch.empty(TOKENS, out))
            for _ in range(SETS)
        ]
        by_states, by_weight = torch.empty(TOKENS, wide), torch.empty(out, wide)
        ways: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
            "forward MKL": lambda x, w, g, y: torch.mm(x, w.t(), out=y),
            "forward oneDNN": lambda x, w, g, y: onednn(x, w),
            "forward kernels": lambda x, w, g, y: by_kernels(x, w.t(), y),
            "by states MKL": lambda x, w, g, y, out=by_states: torch.mm(g, w, out=out),
            "by states oneDNN": lambda x, w, g, y: onednn(g, w.t()),
            "by states kernels": lambda x, w, g, y, out=by_states: by_kernels(g, w, out),
            "by weight MKL": lambda x, w, g, y, out=by_weight: torch.mm(g.t(), x, out=out),
            "by weight kernels": lambda x, w, g, y, out=by_weight: by_kernels(g.t(), x, out),
        }
        rows.append({"out": out, "in": wide} | rates(ways, sets, 2 * TOKENS * out * wide, times))
    return rows


def in_bfloat16(times: int) -> list[dict[str, Any]]:
    """One row for each shape, the large ones."""
    rows, dtype, rank = [], torch.bfloat16, 16
    for out, wide in (shape for shape in SHAPES if min(shape) > rank):
        sets = [
            tuple(torch.randn(*size).to(dtype) for size in ((TOKENS, wide), (out, wide), (TOKENS, out)))
            for _ in range(SETS)
        ]
        result, by_states, gradient = (
            torch.empty(TOKENS, out, dtype=dtype),
            torch.empty(TOKENS, wide, dtype=dtype),
            torch.zeros(out, wide),
        )
        low, up = torch.randn(TOKENS, rank).to(dtype), torch.randn(out, rank).to(dtype)
        upright = up.t().contiguous()
        ways: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
            "forward oneDNN": lambda x, w, g, y=result: torch.mm(x, w.t(), out=y),
            "forward tiles": lambda x, w, g, y=result: kernels.multiply(y, Term(x, w.t())),
            "with adapter oneDNN": lambda x, w, g, y=result, a=low, b=upright: torch.mm(x, w.t(), out=y).addmm_(
                a, b, alpha=2.0
            ),
            "with adapter tiles": lambda x, w, g, y=result, a=low, b=up: kernels.multiply(
                y, Term(x, w.t()), Term(a, b.t(), 2.0)
            ),
            "by states oneDNN": lambda x, w, g, y=by_states: torch.mm(g, w, out=y),
            "by states tiles": lambda x, w, g, y=by_states: kernels.multiply(y, Term(g, w)),
            "by weight oneDNN": lambda x, w, g, y=gradient: y.add_(g.t() @ x),
            "by weight tiles": lambda x, w, g, y=gradient: kernels.multiply(y, Term(g.t(), x), add=True),
        }
        rows.append({"out": out, "in": wide} | rates(ways, sets, 2 * TOKENS * out * wide, times))
    return rows


def decoding(times: int) -> list[dict[str, Any]]:
    """One row for each number of rows."""
    weights = [torch.randn(*shape) for _ in range(LAYERS) for shape in LAYER] + [torch.randn(*HEAD)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
    rows = []
    for count in (1, 8, 16, 32):
        states = {wide: torch.randn(count, wide) for wide in {weight.shape[1] for weight in weights}}
        pairs = [(states[weight.shape[1]], weight, ready) for weight, ready in zip(weights, packed, strict=True)]
        done = {
            "MKL": lambda pairs=pairs: [torch.nn.functional.linear(x, w) for x, w, _ in pairs],
            "oneDNN": lambda pairs=pairs: [onednn(x, w) for x, w, _ in pairs],
            "oneDNN packed": lambda pairs=pairs: [onednn(x, ready) for x, _, ready in pairs],
            "W x^T": lambda pairs=pairs: [w @ x.t() for x, w, _ in pairs],
        }
        work = 2 * count * sum(weight.numel() for weight in weights) / 1e9
        rows.append({"rows": count} | {name: work / seconds(run, times) for name, run in done.items()})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    print("\n| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")


@torch.no_grad()
def main() -> None:
    """Print the tables; write the figures."""
    options = parser(__doc__).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    versions = {"quartet": own_versions()}
    print(heading(versions, options.threads), f"({torch.backends.cpu.get_cpu_capability()})")
    multiplying.kernels_are_faster, multiplying.SMALLEST, multiplying.NARROW = lambda: True, 0, 10**9
    times = 5 if options.quick else 21
    figures = {"update": update(times), "decoding": decoding(times)}
    if kernels.multiplies(torch.bfloat16):
        figures["bfloat16"] = in_bfloat16(times)
    for rows in figures.values():
        show(rows)
    about = {"machine": machine(), "versions": versions, "threads": options.threads, "tokens": TOKENS, "seed": 0}
    write_json(options.json, about | figures)


if __name__ == "__main__":
    main()
