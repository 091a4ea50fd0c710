"""Statistics over the kept positions of a tensor; what stands in the other positions, NaN included, never matters."""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True in the first `lengths[b]` columns of row b.

    Args:
        lengths: integers `[B]`, from 0 to `width`.
        width: number of columns T.

    Returns:
        bool `[B, T]`.
    """
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where `mask` is True; 0 where it is True nowhere.

    Args:
        values: float, any shape.
        mask: bool, the shape of `values`; True for positions that count.

    Returns:
        Scalar tensor.
    """
    _check_mask(values, mask)
    return _kept(values, mask).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance over the positions where `mask` is True; 0 with fewer than two of them.

    Args:
        values: float, any shape.
        mask: bool, the shape of `values`; True for positions that count.

    Returns:
        Scalar tensor.
    """
    _check_mask(values, mask)
    centred = _kept(values - masked_mean(values, mask), mask)
    return centred.square().sum() / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
    """Scale the kept values to unit variance: `(x - mean) * rsqrt(var + 1e-8)`, with the unbiased variance.

    One kept value is safe: its variance counts as 0, so it comes back as 0 (`shift_mean=True`) or as itself.

    Args:
        values: float, any shape.
        mask: bool, the shape of `values`; True for positions that count.
        shift_mean: True moves the mean to 0; False adds the mean back, so that only the spread changes.

    Returns:
        The shape of `values`; 0 where `mask` is False.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + WHITEN_EPSILON)
    return _kept(whitened if shift_mean else whitened + mean, mask)


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    # `where`, not a product: 0 * NaN is NaN.
    return torch.where(mask, values, 0.0)


def _check_mask(values: Tensor, mask: Tensor) -> None:
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}, not bool"
    assert mask.shape == values.shape, f"mask {tuple(mask.shape)} over values {tuple(values.shape)}"
