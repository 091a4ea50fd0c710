"""Per-token estimates of the KL divergence from the reference, and the controller of its weight."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || reference) at each token from the log-probabilities of the token that was sampled.

    With `r = p_ref / p_policy` of that token (http://joschu.net/blog/kl-approx.html):
    k1 is `-log r` (unbiased, may be negative), k2 is `(log r)^2 / 2` (biased, low variance), k3 is `(r - 1) - log r`
    (unbiased, never negative).

    Args:
        logprobs: `[B, T]`, nats, under the policy that sampled.
        ref_logprobs: `[B, T]`, nats, under the reference.
        estimator: which of the three.

    Returns:
        `[B, T]`, nats; meaningless where the inputs are.
    """
    assert logprobs.shape == ref_logprobs.shape, f"{tuple(logprobs.shape)} against {tuple(ref_logprobs.shape)}"
    log_ratio = ref_logprobs - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            # expm1 keeps the digits that exp(x) - 1 loses for a policy close to its reference.
            return torch.expm1(log_ratio) - log_ratio
        case _:
            assert_never(estimator)


def adapt_kl_coef(coef: float, observed_kl: float, target: float, episodes: int, horizon: float) -> float:
    """Move the weight of the KL penalty so that the KL comes to a target (arXiv 1909.08593, section 2.2).

    `error = clip(observed / target - 1, -0.2, 0.2)`, `coef' = coef * (1 + error * episodes / horizon)`.

    Args:
        coef: the present weight.
        observed_kl: mean KL per response of the last iteration, nats.
        target: wanted mean KL per response, nats, above 0.
        episodes: episodes of the last iteration.
        horizon: episodes over which the largest error, 0.2, moves the weight by about a fifth; at least `episodes`, so that
            the weight stays above 0.

    Returns:
        The weight of the next iteration.
    """
    error = observed_kl / target - 1.0
    error = min(max(error, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coef * (1.0 + error * episodes / horizon)
