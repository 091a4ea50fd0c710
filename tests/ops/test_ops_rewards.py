"""Where score and KL penalty land, by hand: 3 tokens + EOS, padded and full length, and the two placements."""

from __future__ import annotations

import pytest
import torch

from quartet.ops.gae import gae
from quartet.ops.masking import length_mask
from quartet.ops.rewards import penalise_unstopped, score_index, token_rewards, value_mask

NAN = float("nan")


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("stop", [0, 0, 3, 5]), ("after_stop", [0, 1, 4, 5])],
)
def test_score_index(placement, expected):
    index = score_index(torch.tensor([0, 1, 4, 6], dtype=torch.int32), 6, placement)
    assert index.dtype == torch.int64
    assert index.tolist() == expected


def test_value_mask():
    mask = length_mask(torch.tensor([0, 2, 3, 4]), 4)
    assert value_mask(mask, "stop").equal(mask)
    assert value_mask(mask, "after_stop").sum(-1).tolist() == [1, 3, 4, 4]


def test_penalty_only_for_the_unstopped():
    scores, stopped = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert penalise_unstopped(scores, stopped, 5.0).tolist() == [1.0, -3.0]
    assert penalise_unstopped(scores, stopped, None).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("padding", [0, 2])
def test_three_tokens_and_eos(padding):
    """Rewards, advantages and returns worked out by hand; the columns of padding hold NaN and change nothing."""
    width = 4 + padding
    kl = torch.full((1, width), NAN)
    kl[0, :4] = torch.tensor([0.1, 0.2, -0.1, 0.4])
    values = torch.full((1, width), NAN)
    values[0, :4] = torch.tensor([0.5, 0.4, 0.3, 0.2])
    mask = length_mask(torch.tensor([4]), width)

    rewards = token_rewards(kl, torch.tensor([2.0]), mask, kl_coef=0.5, placement="stop")
    tail = [0.0] * padding
    # -0.5 * kl, and 2 more at the EOS.
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, -0.1, 0.05, 1.8, *tail]]))

    advantages, returns = gae(rewards, torch.where(value_mask(mask, "stop"), values, 0.0), gamma=1.0, lam=0.5)
    # delta: 1.8 - 0.2 = 1.6; 0.05 + 0.2 - 0.3 = -0.05; -0.1 + 0.3 - 0.4 = -0.2; -0.05 + 0.4 - 0.5 = -0.15
    # A: 1.6; -0.05 + 0.8 = 0.75; -0.2 + 0.375 = 0.175; -0.15 + 0.0875 = -0.0625
    torch.testing.assert_close(advantages, torch.tensor([[-0.0625, 0.175, 0.75, 1.6, *tail]]))
    torch.testing.assert_close(returns, torch.tensor([[0.4375, 0.575, 1.05, 1.8, *tail]]))


def test_after_stop_lands_one_step_later_where_there_is_room():
    mask = length_mask(torch.tensor([2, 4]), 4)
    kl = torch.where(mask, 1.0, NAN)
    rewards = token_rewards(kl, torch.tensor([5.0, 7.0]), mask, kl_coef=0.1, placement="after_stop")
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.1, 5.0, 0.0], [-0.1, -0.1, -0.1, 6.9]]))


def test_an_empty_response_has_no_token_for_its_score():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    kl = torch.full((1, 3), NAN)
    assert token_rewards(kl, torch.tensor([5.0]), mask, kl_coef=0.1, placement="stop").tolist() == [[0.0, 0.0, 0.0]]
    rewards = token_rewards(kl, torch.tensor([5.0]), mask, kl_coef=0.1, placement="after_stop")
    assert rewards.tolist() == [[5.0, 0.0, 0.0]]
