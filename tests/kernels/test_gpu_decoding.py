"""What a decoding step computes on a GPU against plain operations in float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels import DEVICE
from quartet.kernels import gpu_decoding, gpu_forward

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3}
"""Of a result that is rounded once, in bfloat16 by 2^-9 at the most; the shares of attention are rounded before."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Of each row, relative to its size."""
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    assert float(error.max()) < tolerance


def normed(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("size", [32, 1536, 8192])
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(size: int, held: torch.dtype, dtype: torch.dtype, adds: bool) -> None:
    states, weight = random(3, size, dtype=held), random(size, seed=1)
    delta = random(3, size, dtype=dtype, seed=2) if adds else None
    exact = states.double() + (0 if delta is None else delta.double())
    found = gpu_decoding.add_norm(states, delta, weight, 1e-5, dtype)
    assert found.dtype == dtype
    assert_close(states, exact, TOLERANCE[held])
    assert_close(found, normed(states.double(), weight, 1e-5), TOLERANCE[dtype])


def turned(states: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """Of `[n, heads, size]` in float64."""
    first, second = states.chunk(2, -1)
    cosines, sines = (table.double()[positions][:, None] for table in angles)
    return states * cosines + torch.cat([-second, first], -1) * sines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 8), (6, 1, 80), (12, 2, 128)])
def test_rotate_and_store(heads: int, shared: int, size: int, norms: bool, joined: bool, dtype: torch.dtype) -> None:
    rows, columns = 5, 32
    positions = torch.tensor([0, 31, 7], device=DEVICE)
    widths = [heads * size, shared * size, shared * size]
    given = random(3, sum(widths), dtype=dtype).split(widths, 1)
    parts = list(given) if joined else [part.contiguous() for part in given]
    cache = [random(rows, shared, columns, size, dtype=dtype, seed=seed) for seed in (1, 2)]
    before = [store.clone() for store in cache]
    angles = random(columns, size, seed=3), random(columns, size, seed=4)
    weights = (random(size, seed=5), random(size, seed=6)) if norms else None
    exact = [part.double().unflatten(1, (-1, size)) for part in given]
    if weights is not None:
        exact[:2] = [normed(part, weight, 1e-6) for part, weight in zip(exact[:2], weights, strict=True)]
    expected = [turned(part, angles, positions) for part in exact[:2]] + [exact[2]]
    gpu_decoding.rotate_and_store(*parts, *cache, angles, positions.int(), weights, 1e-6)
    row = torch.arange(3, device=DEVICE)
    found = [parts[0].unflatten(1, (-1, size)), *(store[row, :, positions] for store in cache)]
    for one, wanted in zip(found, expected, strict=True):
        assert_close(one, wanted, TOLERANCE[dtype])
    for store, old in zip(cache, before, strict=True):  # nothing else is written
        store[row, :, positions] = old[row, :, positions]
        assert torch.equal(store, old)


def attended(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scaling: float, window: int | None
) -> Tensor:
    count, size = len(query), keys.shape[-1]
    asked = query.double().unflatten(1, (keys.shape[1], -1, size))
    column = torch.arange(keys.shape[2], device=DEVICE)
    seen = column <= positions[:, None]
    if window is not None:
        seen &= column > positions[:, None] - window
    scores = asked @ keys[:count].double().transpose(-1, -2) * scaling
    shares = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (shares @ values[:count].nan_to_num().double()).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 8), (6, 1, 80), (12, 2, 128), (4, 4, 64)])
def test_attend(heads: int, shared: int, size: int, window: int | None, dtype: torch.dtype) -> None:
    """Rows of one token, of a block's whole columns, of one more, and of all."""
    rows, columns = 6, 272
    positions = torch.tensor([0, 127, 128, 31, 271], device=DEVICE)
    query = random(len(positions), heads * size + 16, dtype=dtype)[:, : heads * size]
    keys, values = (random(rows, shared, columns, size, dtype=dtype, seed=seed) for seed in (1, 2))
    expected = attended(query, keys, values, positions, size**-0.5, window)
    for store in (keys, values):  # what no row looks at may be anything
        store[0, :, 1:], store[3, :, 32:], store[5] = float("nan"), float("nan"), float("nan")
    found = gpu_decoding.attend(query, keys, values, positions.int(), size**-0.5, window)
    assert found.is_contiguous()
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 8960])
def test_silu_product(size: int, dtype: torch.dtype) -> None:
    gate, up = random(3, 2 * size, dtype=dtype).mul(3).split(size, 1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    for given in ((gate, up), (gate.contiguous(), up.contiguous())):
        assert_close(gpu_forward.silu_product(*given), expected, TOLERANCE[dtype])
