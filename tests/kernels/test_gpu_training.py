"""Kernels of training on a GPU against the same formulas in float64: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels import DEVICE
from quartet.kernels import gpu_forward, gpu_training

EXACT = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Relative to the largest number: the rounding of a result."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    off = (found.double() - expected).abs().max() / expected.abs().max()
    assert off <= EXACT[dtype], float(off)


@pytest.mark.parametrize("features", [16, 48])
@pytest.mark.parametrize(("stream", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_norms_and_their_gradients(features: int, stream: torch.dtype, dtype: torch.dtype) -> None:
    states, also = drawn(5, features, dtype=stream), drawn(5, features, dtype=dtype, seed=1)
    weight, gradient = drawn(features, seed=2), drawn(5, features, dtype=dtype, seed=3)
    residual = drawn(5, features, dtype=stream, seed=4)
    for added in (None, also):
        out, sums, scales = gpu_training.rms_norm(states, weight, 1e-3, dtype, added)
        exact_sums = states.double() + (0 if added is None else added.double())
        assert_near(sums, exact_sums, stream)
        assert sums.dtype == stream
        x, w = sums.double().requires_grad_(), weight.double().requires_grad_()
        r = (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
        exact = x * r * w
        assert_near(out, exact.detach(), dtype)
        assert out.dtype == dtype
        assert_near(scales, r.detach()[:, 0], torch.float32)
        exact.backward(gradient.double())
        for of_weight in (True, False):
            for extra in (None, residual):
                by_states, by_weight = gpu_training.rms_norm_gradient(
                    gradient, sums, weight, scales, of_weight=of_weight, also=extra
                )
                assert by_states.dtype == stream
                assert x.grad is not None
                assert_near(by_states, x.grad + (0 if extra is None else extra.double()), stream)
                assert (by_weight is not None) == of_weight
                if by_weight is not None:
                    assert w.grad is not None
                    assert_near(by_weight, w.grad, torch.float32)


def test_gradients_of_a_norm_of_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "PARTS", 3)
    states, weight, gradient = drawn(8, 16), drawn(16, seed=1), drawn(8, 16, seed=2)
    _, sums, scales = gpu_training.rms_norm(states, weight, 1e-5, torch.float32)
    x, w = states.double().requires_grad_(), weight.double().requires_grad_()
    (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w).backward(gradient.double())
    by_states, by_weight = gpu_training.rms_norm_gradient(gradient, sums, weight, scales, of_weight=True)
    assert x.grad is not None
    assert w.grad is not None
    assert by_weight is not None
    assert_near(by_states, x.grad, torch.float32)
    assert_near(by_weight, w.grad, torch.float32)


@pytest.mark.parametrize("width", [8, 12])
def test_turning_and_turning_back(width: int) -> None:
    query, key = drawn(5, 3, width), drawn(5, 2, width, seed=1)
    cosines, sines = drawn(5, width, seed=2), drawn(5, width, seed=3)

    def turned(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cosines.double()[:, None] + torch.cat((-second, first), -1) * sines.double()[:, None]

    wide = [heads.double().requires_grad_() for heads in (query, key)]
    exact = [turned(heads) for heads in wide]
    found = query.clone(), key.clone()
    gpu_training.turn(*found, cosines, sines, back=False)
    for one, expected in zip(found, exact, strict=True):
        assert_near(one, expected.detach(), torch.float32)
    gradients = [drawn(*heads.shape, seed=4) for heads in (query, key)]
    for expected, gradient in zip(exact, gradients, strict=True):
        expected.backward(gradient.double())
    gpu_training.turn(gradients[0], gradients[1], cosines, sines, back=True)
    for one, heads in zip(gradients, wide, strict=True):
        assert heads.grad is not None
        assert_near(one, heads.grad, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_products_and_their_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "BLOCK", 32)
    gate, up, by = (drawn(3, 30, dtype=dtype, seed=seed) for seed in range(3))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.nn.functional.silu(g) * u
    assert_near(gpu_forward.silu_product(gate, up), exact.detach(), dtype)
    exact.backward(by.double())
    before = gate._version
    gpu_training.silu_gradient(by, gate, up)
    assert g.grad is not None
    assert u.grad is not None
    assert_near(gate, g.grad, dtype)
    assert_near(up, u.grad, dtype)
    assert_near(by, exact.detach(), dtype)
    assert gate._version > before
