"""The demo's reward model: LoRA and a scalar head on the language model, fitted to human ratings by pairwise comparison."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quartet.demo.ratings import RatedSentence


@dataclass(frozen=True, slots=True)
class RewardRecipe:
    """How the reward model is trained."""

    steps: int = 66
    """Optimizer steps; every one takes fresh sentences."""
    batch_rows: int = 32
    """Sentences in a step; all their pairs count."""
    max_tokens: int = 32
    """Longer sentences are not used: a step costs what its tokens cost, and the demo's sequences are short."""
    learning_rate: float = 3e-4
    """At the start; it falls linearly to zero."""
    min_gap: float = 1.0
    """Pairs whose ratings differ by less are not compared."""
    cut_weight: float = 0.25
    """Weight of the same loss on the sentences cut off at a random token."""
    lora_rank: int = 16
    lora_alpha: int = 32
    head_std: float = 0.01
    """Standard deviation that the score head is drawn with."""
    trained_layers: int | None = None
    """Layers from the top whose adapters are trained; the others keep adapters that change nothing."""


def pairwise_loss(scores: Tensor, ratings: Tensor, *, min_gap: float) -> Tensor:
    """Bradley-Terry loss over all pairs of a batch: mean of -log sigmoid(s_i - s_j) over i, j with r_i - r_j >= min_gap.

    Args:
        scores: `[B]`, the reward model's.
        ratings: `[B]`, people's, in their own unit.
        min_gap: least difference of ratings that makes a pair.

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
