"""Generalised advantage estimation against its closed forms and against the sum it abbreviates."""

from __future__ import annotations

import pytest
import torch

from quartet.ops.gae import gae


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    values = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return rewards, values


def next_values(values):
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def test_lambda_one_is_the_discounted_return(case):
    rewards, values = case
    advantages, returns = gae(rewards, values, gamma=0.9, lam=1.0)
    discounted = torch.stack([sum(0.9 ** (k - t) * rewards[:, k] for k in range(t, 7)) for t in range(7)], dim=1)
    torch.testing.assert_close(returns, discounted)
    torch.testing.assert_close(advantages, discounted - values)


def test_lambda_zero_is_the_one_step_error(case):
    rewards, values = case
    advantages, returns = gae(rewards, values, gamma=0.9, lam=0.0)
    torch.testing.assert_close(returns, rewards + 0.9 * next_values(values))
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values(values) - values)


def test_gamma_zero_sees_only_the_present_reward(case):
    rewards, values = case
    advantages, returns = gae(rewards, values, gamma=0.0, lam=0.95)
    torch.testing.assert_close(returns, rewards)
    torch.testing.assert_close(advantages, rewards - values)


def test_in_between_is_the_sum_of_discounted_errors(case):
    rewards, values = case
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.8)
    deltas = rewards + 0.9 * next_values(values) - values
    for t in range(7):
        expected = sum((0.9 * 0.8) ** (k - t) * deltas[:, k] for k in range(t, 7))
        torch.testing.assert_close(advantages[:, t], expected)


def test_columns_of_padding_change_nothing(case):
    rewards, values = case
    wide = [torch.nn.functional.pad(each, (0, 4)) for each in case]
    for narrow, padded in zip(gae(rewards, values, gamma=1.0, lam=0.95), gae(*wide, gamma=1.0, lam=0.95), strict=True):
        assert padded[:, :7].equal(narrow)
        assert padded[:, 7:].eq(0).all()


def test_rows_are_independent(case):
    rewards, values = case
    whole, _ = gae(rewards, values, gamma=0.9, lam=0.8)
    alone, _ = gae(rewards[1:2], values[1:2], gamma=0.9, lam=0.8)
    assert whole[1:2].equal(alone)
