"""Rewards per token: the KL penalty at every response token, and the score of the episode at one of them.

A response mask is True on a prefix of each row: the tokens of the response, the stop token included.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quartet.ops.masking import length_mask

ScorePlacement = Literal["stop", "after_stop"]


def score_index(lengths: Tensor, width: int, placement: ScorePlacement) -> Tensor:
    """Column that receives the score of each episode.

    `stop`: the last token of the response. `after_stop`: one step later where there is room, else the last column (the
    placement of arXiv 2403.17031 and of TRL). An empty response has column 0.

    Args:
        lengths: integers `[B]`, tokens of each response, from 0 to `width`.
        width: number of columns T.
        placement: `stop` or `after_stop`.

    Returns:
        int64 `[B]`, from 0 to T - 1.
    """
    column = lengths - 1 if placement == "stop" else lengths
    return column.to(torch.int64).clamp(min=0, max=width - 1)


def value_mask(response_mask: Tensor, placement: ScorePlacement) -> Tensor:
    """Positions whose value counts: those of the response, and with `after_stop` one more where there is room.

    Args:
        response_mask: bool `[B, T]`, True on response tokens.
        placement: `stop` or `after_stop`.

    Returns:
        bool `[B, T]`.
    """
    if placement == "stop":
        return response_mask
    return length_mask(response_mask.sum(-1) + 1, response_mask.shape[-1])


def penalise_unstopped(scores: Tensor, stopped: Tensor, penalty: float | None) -> Tensor:
    """Subtract `penalty` from the score of every episode that did not end at the stop token; None subtracts nothing.

    Args:
        scores: `[B]`.
        stopped: bool `[B]`, True where the response ended at the stop token.
        penalty: what is subtracted, or None.

    Returns:
        `[B]`.
    """
    if penalty is None:
        return scores
    return torch.where(stopped, scores, scores - penalty)


def token_rewards(
    kl: Tensor, scores: Tensor, response_mask: Tensor, *, kl_coef: float, placement: ScorePlacement
) -> Tensor:
    """`-kl_coef * kl` at every response token, plus the score of the episode at `score_index`.

    The result is 0 outside `value_mask(response_mask, placement)`, so with `stop` an empty response, which has no token
    to carry it, loses its score.

    Args:
        kl: `[B, T]`, nats; anything where `response_mask` is False.
        scores: `[B]`.
        response_mask: bool `[B, T]`, True on response tokens.
        kl_coef: weight of the KL penalty.
        placement: `stop` or `after_stop`.

    Returns:
        `[B, T]`, in the type of `kl`.
    """
    assert kl.shape == response_mask.shape, f"kl {tuple(kl.shape)}, mask {tuple(response_mask.shape)}"
    assert scores.shape == kl.shape[:1], f"scores {tuple(scores.shape)}, kl {tuple(kl.shape)}"
    column = score_index(response_mask.sum(-1), response_mask.shape[-1], placement)
    penalty = torch.where(response_mask, -kl_coef * kl, 0.0)
    rewards = penalty.scatter_add(1, column[:, None], scores[:, None].to(kl.dtype))
    return torch.where(value_mask(response_mask, placement), rewards, 0.0)
