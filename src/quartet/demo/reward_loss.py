"""Learning a reward from rated texts: the pairwise loss over a batch and the accuracy that goes with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pairwise_loss(scores: Tensor, ratings: Tensor, *, min_gap: float) -> Tensor:
    """Bradley-Terry loss over pairs of a batch: mean of -log sigmoid(s_i - s_j) over i, j with r_i - r_j >= min_gap.

    Args:
        scores: `[B]`, the reward model's.
        ratings: `[B]`, people's, in their own unit.
        min_gap: least difference of ratings that makes a pair; above zero.

    Returns:
        Scalar, nats per pair; zero where the batch has no pair. Bradley and Terry, Biometrika 39 (1952).
    """
    better = ratings[:, None] - ratings[None, :] >= min_gap
    losses = -functional.logsigmoid(scores[:, None] - scores[None, :])
    return torch.where(better, losses, 0.0).sum() / better.sum().clamp(min=1)


def pair_accuracy(scores: Tensor, ratings: Tensor, *, min_gap: float) -> float:
    """Share of the pairs with a rating gap of at least `min_gap` that the scores `[N]` order as the ratings `[N]` do.

    A tie of scores counts half. NaN where there is no pair.
    """
    better = ratings[:, None] - ratings[None, :] >= min_gap
    difference = scores[:, None] - scores[None, :]
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    return float(right[better].mean())


def correlation(scores: Tensor, ratings: Tensor) -> float:
    """Pearson correlation of two series `[N]`."""
    return float(torch.corrcoef(torch.stack([scores.double(), ratings.double()]))[0, 1])
