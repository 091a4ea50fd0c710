"""Layers of a small transformer as decoding steps know them, for tests of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quartet import kernels

DTYPES = [torch.float32, torch.bfloat16]


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def weights(dtype: torch.dtype, rank: int, **sizes: int) -> tuple[list[Any], dict[str, int]]:
    """Two layers of a small transformer, with adapters of a rank on some of their layers."""
    size = {"hidden": 40, "heads": 4, "shared": 2, "size": 12, "inner": 70, "columns": 32, "rows": 20} | sizes

    def linear(features: int, width: int, seed: int, *, adapted: bool = True, bias: bool = False) -> kernels.Linear:
        low = made(rank, width, dtype=dtype, seed=seed) / 8 if rank and adapted else None
        high = made(features, rank, dtype=dtype, seed=seed) / 8 if rank and adapted else None
        first = made(features, width, dtype=dtype, seed=seed) / 6
        return kernels.Linear(first, made(features, seed=seed) if bias else None, low, high)

    layers = []
    for seed in (100, 200):
        hidden, mixed, kept = size["hidden"], size["heads"] * size["size"], size["shared"] * size["size"]
        cache = (size["rows"], size["shared"], size["columns"], size["size"])
        layers.append(
            kernels.Layer(
                made(hidden, seed=seed),
                made(hidden, seed=seed + 1),
                made(size["size"], seed=seed + 2) if seed == 200 else None,
                made(size["size"], seed=seed + 3) if seed == 200 else None,
                linear(mixed, hidden, seed + 4, bias=True),
                linear(kept, hidden, seed + 5, adapted=False),
                linear(kept, hidden, seed + 6),
                linear(hidden, mixed, seed + 7),
                linear(size["inner"], hidden, seed + 8),
                linear(size["inner"], hidden, seed + 9, adapted=False),
                linear(hidden, size["inner"], seed + 10),
                made(*cache, dtype=dtype, seed=seed + 11),
                made(*cache, dtype=dtype, seed=seed + 12),
                7 if seed == 100 else None,
            )
        )
    return layers, size
