"""KL estimators against the divergence of known distributions, and the adaptive controller against its equation."""

from __future__ import annotations

import math

import pytest
import torch

from quartet.ops.kl import adapt_kl_coef, kl_estimate

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64)


def expectation(estimator):
    """Exact expectation under P of the estimate of KL(P || Q): one 'token' per outcome, weighted by its probability."""
    return (P * kl_estimate(P.log()[None], Q.log()[None], estimator)[0]).sum().item()


def closed_form():
    return sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    assert expectation(estimator) == pytest.approx(closed_form(), abs=1e-12)


def test_k2_is_half_the_mean_squared_log_ratio():
    squared = sum(p * math.log(p / q) ** 2 for p, q in zip(P.tolist(), Q.tolist(), strict=True))
    assert expectation("k2") == pytest.approx(squared / 2, abs=1e-12)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -math.log(2)), ("k2", math.log(2) ** 2 / 2)])
def test_one_token_of_ratio_two(estimator, expected):
    # p_ref / p_policy = 2.
    value = kl_estimate(torch.tensor([[math.log(0.25)]]), torch.tensor([[math.log(0.5)]]), estimator)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_k3_of_ratio_two():
    value = kl_estimate(torch.tensor([[math.log(0.25)]]), torch.tensor([[math.log(0.5)]]), "k3")
    assert value.item() == pytest.approx(1 - math.log(2), abs=1e-6)


def test_k2_and_k3_are_never_negative_and_agree_near_zero():
    log_ratios = torch.linspace(-2, 2, 41)[None]
    zeros = torch.zeros_like(log_ratios)
    for estimator in ("k2", "k3"):
        assert (kl_estimate(zeros, log_ratios, estimator) >= 0).all()
    # r - 1 - log r = (log r)^2 / 2 + (log r)^3 / 6 + ...; in float32 exp(x) - 1 - x would be 0 or 1.2e-7 here.
    tiny = torch.tensor([[1e-4]])
    assert kl_estimate(torch.zeros(1, 1), tiny, "k3").item() == pytest.approx(5e-9, rel=2e-3)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # 10 % above
        (5.4, 0.1 * (1 - 0.1 * 64 / 1000)),  # 10 % below
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # clipped
        (-3.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # clipped; k1 may be negative
    ],
)
def test_adaptive_coefficient(observed, expected):
    assert adapt_kl_coef(0.1, observed, 6.0, 64, 1000.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("episodes", [1, 10, 250])
@pytest.mark.parametrize(("observed", "factor"), [(1e6, math.exp(0.2)), (-1e6, math.exp(-0.2))])
def test_a_horizon_moves_the_coefficient_by_a_fifth_at_most(episodes, observed, factor):
    coef = 0.1
    for _ in range(1000 // episodes):
        coef = adapt_kl_coef(coef, observed, 6.0, episodes, 1000.0)
    assert coef == pytest.approx(0.1 * factor, rel=0.01)


@pytest.mark.parametrize("observed", [1e6, -1e6])
def test_the_shortest_horizon_keeps_the_coefficient_above_zero(observed):
    assert 0.08 <= adapt_kl_coef(0.1, observed, 6.0, 64, 64.0) <= 0.12 + 1e-12
