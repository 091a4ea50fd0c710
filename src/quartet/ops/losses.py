"""PPO's clipped losses per token, 0 outside the mask: the caller sums them and divides by what it normalises by.

Masked positions may hold NaN: `where` stands before the arithmetic as well as after it, so that the gradients do not
see them either (0 times NaN is NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.ops.masking import masked_var


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped surrogate objective, negated (arXiv 1707.06347, equation 7).

    With `ratio = exp(logprobs - old_logprobs)`: `max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))`.

    Args:
        logprobs: `[B, T]`, nats, under the policy that is trained; receives the gradient.
        old_logprobs: `[B, T]`, nats, under the policy that sampled.
        advantages: `[B, T]`.
        mask: bool `[B, T]`, True on response tokens.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far the ratio may rise above 1.

    Returns:
        `[B, T]`, 0 where `mask` is False.
    """
    unclipped, clipped = _policy_terms(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    return torch.where(mask, torch.maximum(unclipped, clipped), 0.0)


def policy_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Where `clipped_policy_loss` (same arguments) takes the clipped ratio, so that the token has no gradient.

    Returns:
        bool `[B, T]`, False where `mask` is False.
    """
    with torch.no_grad():
        unclipped, clipped = _policy_terms(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
        return (clipped > unclipped) & mask


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> Tensor:
    """Squared error of the values, clipped to stay near the old ones (arXiv 2403.17031, detail of the value loss).

    `0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`; `0.5 * (V - R)^2` with `clip=None`.

    Args:
        values: `[B, T]`, of the value model that is trained; receives the gradient.
        old_values: `[B, T]`, of the scoring stage.
        returns: `[B, T]`, the targets.
        mask: bool `[B, T]`, True where the value counts.
        clip: largest distance from the old values, or None.

    Returns:
        `[B, T]`, 0 where `mask` is False.
    """
    unclipped, clipped = _value_terms(values, old_values, returns, mask, clip)
    return torch.where(mask, 0.5 * torch.maximum(unclipped, clipped), 0.0)


def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None) -> Tensor:
    """Where `clipped_value_loss` (same arguments) takes the clipped value, so that the token has no gradient.

    Returns:
        bool `[B, T]`, False where `mask` is False.
    """
    with torch.no_grad():
        unclipped, clipped = _value_terms(values, old_values, returns, mask, clip)
        return (clipped > unclipped) & mask


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """How far the update has moved the policy: `0.5 * (logprobs - old_logprobs)^2` per token, nats.

    Returns:
        `[B, T]`, 0 where `mask` is False.
    """
    return 0.5 * _log_ratio(logprobs, old_logprobs, mask).square()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 - var(returns - values) / var(returns)` over the mask: 1 for a perfect critic, 0 for a constant one.

    Returns:
        Scalar tensor; 0 where the returns do not vary, so that there is nothing to explain.
    """
    total = masked_var(returns, mask)
    residual = masked_var(returns - values, mask)
    return torch.where(total > 0, 1.0 - residual / total, 0.0)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    assert logprobs.shape == old_logprobs.shape == mask.shape, (
        f"logprobs {tuple(logprobs.shape)}, old {tuple(old_logprobs.shape)}, mask {tuple(mask.shape)}"
    )
    return torch.where(mask, logprobs - old_logprobs, 0.0)


def _policy_terms(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    assert advantages.shape == mask.shape, f"advantages {tuple(advantages.shape)}, mask {tuple(mask.shape)}"
    ratio = torch.exp(_log_ratio(logprobs, old_logprobs, mask))
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)


def _value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    assert values.shape == old_values.shape == returns.shape == mask.shape, (
        f"values {tuple(values.shape)}, old {tuple(old_values.shape)}, returns {tuple(returns.shape)}, "
        f"mask {tuple(mask.shape)}"
    )
    values, old_values, returns = (torch.where(mask, each, 0.0) for each in (values, old_values, returns))
    unclipped = (values - returns).square()
    if clip is None:
        return unclipped, unclipped
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return unclipped, (near - returns).square()
