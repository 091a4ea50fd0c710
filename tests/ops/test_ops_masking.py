"""Masked statistics: against the dense computation on the kept values, and safe for whatever the mask excludes."""

from __future__ import annotations

import math

import pytest
import torch

from quartet.ops.masking import length_mask, masked_mean, masked_var, whiten

NAN = float("nan")
VALUES = [[1.0, 2.0, NAN], [6.0, NAN, float("inf")]]
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_length_mask_is_true_on_a_prefix():
    mask = length_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, False, False], [True, True, False], [True, True, True]]


def test_mean_and_unbiased_variance_by_hand():
    # Kept: 1, 2, 6. Mean 3, squared distances 4 + 1 + 9, divided by 3 - 1.
    assert masked_mean(torch.tensor(VALUES), MASK).item() == 3.0
    assert masked_var(torch.tensor(VALUES), MASK).item() == 7.0


def test_nothing_kept_gives_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_mean(torch.tensor(VALUES), nothing).item() == 0.0
    assert masked_var(torch.tensor(VALUES), nothing).item() == 0.0
    assert whiten(torch.tensor(VALUES), nothing, shift_mean=True).eq(0).all()


def test_one_kept_token_is_safe():
    one = torch.tensor([[True, False, False], [False, False, False]])
    assert masked_var(torch.tensor(VALUES), one).item() == 0.0
    assert whiten(torch.tensor(VALUES), one, shift_mean=True).eq(0).all()
    assert whiten(torch.tensor(VALUES), one, shift_mean=False).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_whitening_by_hand():
    # (x - 3) / sqrt(7), and the same plus 3.
    root = math.sqrt(7.0)
    shifted = torch.tensor([[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]])
    kept = torch.tensor([[3 - 2 / root, 3 - 1 / root, 0.0], [3 + 3 / root, 0.0, 0.0]])
    torch.testing.assert_close(whiten(torch.tensor(VALUES), MASK, shift_mean=True), shifted, rtol=0, atol=1e-6)
    torch.testing.assert_close(whiten(torch.tensor(VALUES), MASK, shift_mean=False), kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shift_mean", "mean"), [(True, 0.0), (False, 2.0)])
def test_whitened_mean_and_variance(shift_mean, mean):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 16, generator=generator) < 0.6
    values = 5.0 * torch.randn(8, 16, generator=generator, dtype=torch.float64)
    values += 2.0 - values[mask].mean()
    whitened = whiten(values.masked_fill(~mask, NAN), mask, shift_mean=shift_mean)
    assert whitened[mask].mean().item() == pytest.approx(mean, abs=1e-12)
    assert whitened[mask].var().item() == pytest.approx(1.0, abs=1e-8)
    assert whitened[~mask].eq(0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_equals_dense_on_the_kept_tokens(shift_mean):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(4, 8, generator=generator) < 0.5
    values = torch.randn(4, 8, generator=generator)
    dense = values[mask]
    whitened = whiten(values, mask, shift_mean=shift_mean)[mask]
    torch.testing.assert_close(whitened, whiten(dense, torch.ones_like(dense).bool(), shift_mean=shift_mean))


def test_gradient_of_the_mean_is_zero_outside_the_mask():
    values = torch.tensor(VALUES, requires_grad=True)
    masked_mean(values, MASK).backward()
    torch.testing.assert_close(values.grad, MASK / 3.0)


def test_a_mask_of_another_shape_or_type_is_refused():
    with pytest.raises(AssertionError, match="over values"):
        masked_mean(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(AssertionError, match="not bool"):
        masked_mean(torch.ones(2), torch.ones(2))
