"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over all columns (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma * V_{t+1} - V_t`, `A_t = delta_t + gamma * lam * A_{t+1}`, with `V_T = A_T = 0`;
    the returns are `A_t + V_t`.

    Rewards and values must be 0 after the end of each row: then nothing flows back from there, and columns of padding
    change nothing. The last row entry that is not 0 is thus treated as terminal.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`; `values[:, t]` is the value before token t was produced.
        gamma: discount, 0 to 1.
        lam: lambda, 0 to 1.

    Returns:
        (advantages, returns), both `[B, T]` and not masked.
    """
    assert rewards.shape == values.shape, f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)}"
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for step in reversed(range(deltas.shape[1])):
        running = deltas[:, step] + gamma * lam * running
        advantages[:, step] = running
    return advantages, advantages + values
