"""Stage 3: per-token rewards, advantages and returns."""

from __future__ import annotations

from quartet.config import PPOConfig
from quartet.ops.gae import gae
from quartet.ops.kl import kl_estimate
from quartet.ops.losses import explained_variance
from quartet.ops.masking import masked_mean, whiten
from quartet.ops.rewards import penalise_unstopped, token_rewards
from quartet.records import Advantaged, Scored


def compute_advantages(scored: Scored, ppo: PPOConfig, *, kl_coef: float) -> Advantaged:
    """KL penalty, score and GAE.

    Args:
        kl_coef: the coefficient in force (it moves under an adaptive target).
    """
    rollout = scored.rollout
    mask = rollout.response_mask
    kl = kl_estimate(rollout.logprobs, scored.ref_logprobs, ppo.kl_estimator)
    scores = penalise_unstopped(scored.scores, rollout.stopped, ppo.missing_eos_penalty)
    rewards = token_rewards(kl, scores, mask, kl_coef=kl_coef, placement=ppo.score_placement)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, scored.value_mask, shift_mean=False)
    advantages, returns = gae(rewards, scored.values, gamma=ppo.gamma, lam=ppo.lam)
    quality = explained_variance(scored.values, returns, scored.value_mask)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, shift_mean=True)
    log_ratio = (rollout.logprobs - scored.ref_logprobs).where(mask, 0.0)
    penalty = kl.where(mask, 0.0).sum(-1)
    metrics = {
        "reward/score": scored.scores.mean().item(),
        "reward/score_std": scored.scores.std(correction=0).item(),
        "reward/total": (scores - kl_coef * penalty).mean().item(),
        "kl/reference": log_ratio.sum(-1).mean().item(),
        "kl/coef": kl_coef,
        "value/mean": masked_mean(scored.values, scored.value_mask).item(),
        "value/explained_variance": quality.item(),
        "response/length": mask.sum(-1).float().mean().item(),
        "response/stopped_fraction": rollout.stopped.float().mean().item(),
    }
    zero_outside = advantages.where(mask, 0.0), returns.where(scored.value_mask, 0.0)
    return Advantaged(scored, rewards, *zero_outside, metrics)
