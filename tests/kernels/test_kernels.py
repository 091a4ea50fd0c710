"""Compiled kernels against their formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet import kernels
from quartet.kernels import library

DTYPES = [torch.float32, torch.bfloat16]
PRECISION = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
SHAPES = [(1, 1), (3, 7), (5, 64), (70, 300)]
"""The last is shared among threads."""

needs_kernels = pytest.mark.skipif(library.kernel("rms_norm_f32") is None, reason="no compiler at installation")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype)


def close(found: Tensor, expected: Tensor, *, times: float = 4.0) -> None:
    """To a few roundings of the result's own dtype."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=times * PRECISION[found.dtype], atol=times * 1e-7)


def silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_product(dtype: torch.dtype, shape: tuple[int, int], count: int) -> None:
    torch.manual_seed(0)
    gate, up, out = (drawn(*shape, dtype=dtype, scale=5.0) for _ in range(3))
    with threads(count):
        assert kernels.silu_product(gate, up, out)
    close(out, silu_and_slope(gate.double())[0] * up.double())


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("with_product", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_gradient(
    dtype: torch.dtype, shape: tuple[int, int], in_place: bool, with_product: bool, count: int
) -> None:
    torch.manual_seed(0)
    by, gate, up = (drawn(*shape, dtype=dtype, scale=5.0) for _ in range(3))
    active, slope = silu_and_slope(gate.double())
    expected = by.double() * up.double() * slope, by.double() * active, active * up.double()
    by_gate, by_up = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    product = torch.empty_like(gate) if with_product else None
    with threads(count):
        assert kernels.silu_gradient(by, gate, up, by_gate, by_up, product)
    close(by_gate, expected[0], times=20)  # s + x s (1 - s) is a difference where x is below -1
    close(by_up, expected[1])
    if product is not None:
        close(product, expected[2])


@needs_kernels
def test_some_columns_of_wider_rows() -> None:
    torch.manual_seed(0)
    wide = drawn(6, 40)
    gate, up, out = wide[:, 3:12], wide[:, 20:29], torch.zeros(6, 11)
    assert kernels.silu_product(gate, up, out[:, 1:10])
    close(out[:, 1:10], silu_and_slope(gate.double())[0] * up.double())
    assert not out[:, 0].any()
    assert not out[:, 10].any()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_ends(dtype: torch.dtype) -> None:
    x = torch.tensor(
        [[0.0, 1e-30, -1e-30, 30.0, -30.0, 59.0, -59.0, 61.0, -61.0, 200.0, -200.0, 1e30, -1e30]], dtype=dtype
    )
    out, by_gate, by_up = (torch.empty_like(x) for _ in range(3))
    assert kernels.silu_product(x, torch.ones_like(x), out)
    assert kernels.silu_gradient(torch.ones_like(x), x, torch.ones_like(x), by_gate, by_up, None)
    active, slope = silu_and_slope(x.double())
    for found, expected in ((out, active), (by_up, active), (by_gate, slope)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-20)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, bad: float) -> None:
    """A run ends where numbers are not finite, so that no kernel may hide them."""
    out = torch.empty(1, 3, dtype=dtype)
    good, one_bad = torch.ones(1, 3, dtype=dtype), torch.tensor([[1.0, bad, 1.0]], dtype=dtype)
    for gate, up in ((one_bad, good), (good, one_bad)):
        assert kernels.silu_product(gate, up, out)
        assert out.isfinite().tolist() == [[True, False, True]]
    by_gate, by_up = torch.empty_like(good), torch.empty_like(good)
    assert kernels.silu_gradient(one_bad, good, good, by_gate, by_up, None)
    assert by_gate.isfinite().tolist() == by_up.isfinite().tolist() == [[True, False, True]]
    found = kernels.rms_norm(one_bad.float(), torch.ones(3), 1e-6)
    assert found is not None
    assert not found[0].isfinite().all()
    angles = torch.ones(1, 1, 2)
    turned = kernels.rotary(one_bad[:, :2].view(1, 1, 1, 2), angles, angles, back=False)
    assert not turned.isfinite().any()


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7), (70, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    torch.manual_seed(0)
    states, weight = drawn(*shape, dtype=dtype, scale=3.0), drawn(shape[-1], dtype=dtype)
    by = drawn(*shape, dtype=dtype)
    x, w = states.double().requires_grad_(), weight.double().requires_grad_()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * w
    expected.backward(by.double())
    assert x.grad is not None
    assert w.grad is not None
    with threads(count):
        found = kernels.rms_norm(states, weight, 1e-3)
        assert found is not None
        gradients = kernels.rms_norm_gradient(by, states, weight, found[1], of_weight=True)
        only_states = kernels.rms_norm_gradient(by, states, weight, found[1], of_weight=False)
    assert gradients is not None
    assert gradients[1] is not None
    assert only_states is not None
    assert only_states[1] is None
    assert torch.equal(only_states[0], gradients[0])
    close(found[0], expected.detach(), times=8)
    narrow = dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0].double(), x.grad, rtol=PRECISION[dtype] if narrow else 1e-5, atol=2e-6)
    torch.testing.assert_close(gradients[1].double(), w.grad, rtol=PRECISION[dtype] if narrow else 1e-5, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7), (70, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_sums(dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    """Bit for bit what a sum of torch's and the norm of it are, and their gradients."""
    torch.manual_seed(0)
    states, sums, by, also = (drawn(*shape, dtype=dtype, scale=3.0) for _ in range(4))
    weight, total, version = drawn(shape[-1], dtype=dtype), states + sums, sums._version
    with threads(count):
        expected, found = kernels.rms_norm(total, weight, 1e-3), kernels.rms_norm(states, weight, 1e-3, sums=sums)
        assert expected is not None
        assert found is not None
        assert torch.equal(sums, total)
        assert sums._version > version
        assert all(map(torch.equal, found, expected))
        plain = kernels.rms_norm_gradient(by, total, weight, found[1], of_weight=True)
        with_another = kernels.rms_norm_gradient(by, total, weight, found[1], of_weight=True, also=also)
    assert plain is not None
    assert with_another is not None
    assert torch.equal(with_another[0], plain[0] + also)
    assert plain[1] is not None
    assert with_another[1] is not None
    assert torch.equal(with_another[1], plain[1])


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(1,), (2, 3, 7), (70, 300), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    torch.manual_seed(0)
    sums, states = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype)
    expected, version = sums + states, sums._version
    with threads(count):
        assert kernels.add(sums, states)
    assert torch.equal(sums, expected)
    assert sums._version > version


@needs_kernels
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("dtype", "angles"), [(DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[0]), (DTYPES[1], DTYPES[1])])
def test_rotary(dtype: torch.dtype, angles: torch.dtype, back: bool, rows: int, count: int) -> None:
    """Of heads beside each other in a token, as linear layers give them, and of heads one after the other."""
    torch.manual_seed(0)
    beside = drawn(3, 90, 4, 18, dtype=dtype).transpose(1, 2)
    cos, sin = drawn(rows, 90, 18, dtype=angles), drawn(rows, 90, 18, dtype=angles)
    x, c, s = beside.double(), cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    x.requires_grad_()
    turned = x * c + torch.cat((-x[..., 9:], x[..., :9]), -1) * s
    by = drawn(3, 4, 90, 18, dtype=dtype)
    turned.backward(by.double())
    assert x.grad is not None
    for states in (beside, beside.contiguous()):
        with threads(count):
            found = kernels.rotary(by if back else states, cos, sin, back=back)
        # A sum of two products may be much smaller than they are.
        bound = 4 * PRECISION[dtype]
        torch.testing.assert_close(found.double(), x.grad if back else turned.detach(), rtol=bound, atol=bound)


@needs_kernels
def test_tensors_that_only_stand_for_others_are_left_alone() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6)
        assert kernels.silu_product(x, x, x)
        found = kernels.rms_norm(x, x[0], 1e-6)
        assert found is not None
        assert [tuple(t.shape) for t in found] == [(4, 6), (4, 1)]
        assert kernels.rotary(x.view(1, 1, 4, 6), x[None], x[None], back=False).shape == (1, 1, 4, 6)


@needs_kernels
def test_what_does_not_fit_is_left_to_torch() -> None:
    x, double, meta = torch.ones(4, 6), torch.ones(4, 6).double(), torch.ones(4, 6, device="meta")
    assert not kernels.silu_product(double, double, double)
    assert not kernels.silu_product(meta, meta, meta)
    assert not kernels.silu_product(x, x[:, :5], x)
    assert not kernels.silu_product(x, x.bfloat16(), x)
    assert not kernels.silu_product(x.t(), x.t(), x.t())
    assert not kernels.silu_product(x[0], x[0], x[0])
    assert not kernels.silu_product(x[None], x[None], x[None])
    assert not kernels.silu_gradient(x, x, x, x, x, x.bfloat16())
    assert kernels.rms_norm(x.bfloat16(), x[0], 1e-6) is None
    assert kernels.rms_norm(x, x[0].bfloat16(), 1e-6) is None
    assert kernels.rms_norm(double, double[0], 1e-6) is None
    assert kernels.rms_norm(x.t(), x[:, 0].contiguous(), 1e-6) is None
    assert kernels.rms_norm_gradient(x, x, x[0].double(), x[:, :1], of_weight=True) is None
    assert kernels.rms_norm_gradient(x.bfloat16(), x, x[0], x[:, :1], of_weight=True) is None
    for weight in (torch.ones(3), torch.ones(12), torch.ones(0), torch.tensor(1.0)):
        assert kernels.rms_norm(x, weight, 1e-6) is None
        assert kernels.rms_norm_gradient(x, x, weight, x[:, :1].contiguous(), of_weight=True) is None
    assert kernels.rms_norm_gradient(x[:2], x, x[0], x[:, :1].contiguous(), of_weight=True) is None
    assert kernels.rms_norm_gradient(x, x, x[0], x[0, :2], of_weight=True) is None
    assert kernels.rms_norm(x, x[0], 1e-6, sums=x[:2]) is None
    assert kernels.rms_norm(x, x[0], 1e-6, sums=x.bfloat16()) is None
    scales = x[:, :1].contiguous()
    assert kernels.rms_norm_gradient(x, x, x[0], scales, of_weight=True, also=x[:2]) is None
    assert kernels.rms_norm_gradient(x, x, x[0], scales, of_weight=True, also=x.bfloat16()) is None
    assert not kernels.norms(x, x[0].bfloat16())
    assert kernels.norms(x, x[0])
    assert not kernels.add(x, x[:2])
    assert not kernels.add(x, x.bfloat16())
    assert not kernels.add(double, double)
    assert not kernels.add(x.t(), x.t())
    states, angles = x.view(1, 2, 2, 6), torch.ones(1, 2, 6)
    assert kernels.rotary_fits(states, angles, angles)
    for cos, sin in (
        (angles.double(), angles.double()),
        (angles.bfloat16(), angles.bfloat16()),
        (angles[..., :4], angles[..., :4]),
        (angles, angles[:, :1]),
    ):
        assert not kernels.rotary_fits(states, cos, sin)
        with pytest.raises(ValueError, match="no kernel turns"):
            kernels.rotary(states, cos, sin, back=False)
    assert not kernels.rotary_fits(states[..., :5], angles[..., :5], angles[..., :5])


@needs_kernels
def test_what_is_written_over_counts_as_changed() -> None:
    """Autograd then refuses a second backward pass through what was saved and written over."""
    by, gate, up, out = (drawn(2, 4) for _ in range(4))
    assert kernels.silu_product(gate, up, out)
    assert kernels.silu_gradient(by, gate, up, gate, up, None)
    assert [t._version for t in (by, gate, up, out)] == [0, 1, 1, 1]
