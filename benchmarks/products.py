"""Rates of float32 matrix products on this processor: through MKL (`F.linear`), and through oneDNN.

update     `[tokens, in] x [in, out]` forward, by the states (g W) and by the weight (g^T x), one product again and again
decoding   all linear layers of a model of size S one after the other, whose weights do not fit into the caches: MKL, oneDNN,
           oneDNN with weights packed for it beforehand, and W x^T

GFLOP/s from medians; `models/linears.py` and `rollout/linears.py` choose by them.

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

TOKENS = 896
SHAPES = ((256, 256), (2048, 256), (256, 2048), (8192, 256), (16, 256), (256, 16), (768, 768), (3072, 768), (768, 3072))
"""Out, in: sizes S and M, and adapters of rank 16."""
LAYER = ((256, 256),) * 4 + ((2048, 256),) * 2 + ((256, 2048),)
LAYERS, HEAD = 6, (8192, 256)


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


def update(times: int) -> list[dict[str, Any]]:
    """One row for each shape."""
    rows = []
    for out, wide in SHAPES:
        states, weight, gradient = torch.randn(TOKENS, wide), torch.randn(out, wide), torch.randn(TOKENS, out)
        done = {
            "forward MKL": lambda x=states, w=weight: torch.nn.functional.linear(x, w),
            "forward oneDNN": lambda x=states, w=weight: onednn(x, w),
            "by states MKL": lambda g=gradient, w=weight: g @ w,
            "by states oneDNN": lambda g=gradient, w=weight: onednn(g, w.t()),
            "by weight MKL": lambda g=gradient, x=states: g.t() @ x,
        }
        work = 2 * TOKENS * out * wide / 1e9
        rows.append({"out": out, "in": wide} | {name: work / seconds(run, times) for name, run in done.items()})
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
    times = 5 if options.quick else 21
    figures = {"update": update(times), "decoding": decoding(times)}
    for rows in figures.values():
        show(rows)
    about = {"machine": machine(), "versions": versions, "threads": options.threads, "tokens": TOKENS, "seed": 0}
    write_json(options.json, about | figures)


if __name__ == "__main__":
    main()
