"""The configuration's section on the algorithm."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from quartet.config.values import (
    Decay,
    Epsilon,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    UnitInterval,
)

_HORIZON = 10_000.0


class OptimizerConfig(Section):
    """The optimizer of policy and value."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """AdamW with decoupled weight decay. adamw8bit holds its state in 8 bit through bitsandbytes; paged_adamw8bit, on a
    GPU, also lets the state move to host memory under pressure."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Epsilon = 1.0e-5
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over the iterations, after the warm-up; linear and cosine end at zero."""
    warmup_iterations: NonNegativeInt = 0
    """Iterations over which the learning rate rises linearly from zero; fewer than ppo.iterations."""


class PPOConfig(Section):
    """The algorithm (arXiv 1707.06347; for language models arXiv 2403.17031)."""

    iterations: PositiveInt = 100
    """Passes of rollout, scoring, advantages and update."""
    epochs: PositiveInt = 4
    """Passes over the episodes of one iteration in the update."""
    minibatches: PositiveInt = 1
    """Optimizer steps per epoch; divides rollout.batch_size."""
    microbatch_rows: PositiveInt = 8
    """Sequences in one forward and backward, where they are as long as the longest; in one process more of shorter ones, up to
    as many tokens. Changes memory and speed, never the gradient."""
    learning_rate: NonNegative = 1.0e-5
    """Learning rate of the policy."""
    value_learning_rate: NonNegative | None = None
    """Learning rate of the value model; null takes learning_rate."""
    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty against the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL (http://joschu.net/blog/kl-approx.html)."""
    adaptive_kl_target: Positive | None = None
    """Target of the mean KL per response in nats; kl_coef is then adapted to it (arXiv 1909.08593)."""
    adaptive_kl_horizon: Positive = _HORIZON
    """Episodes over which the adaptive controller moves kl_coef by at most about a fifth (times e^0.2 or e^-0.2)."""
    clip: Positive = 0.2
    """The policy's ratio is clipped to [1 - clip, 1 + clip_high]."""
    clip_high: Positive | None = None
    """Upper clip of the ratio; null takes clip."""
    value_clip: Positive | None = 0.2
    """Values are clipped to this distance from the old values; null turns it off."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    gamma: UnitInterval = 1.0
    """Discount."""
    lam: UnitInterval = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_rewards: bool = False
    """Scale the per-token rewards to unit variance, keeping their mean."""
    whiten_advantages: bool = True
    """Scale the advantages of the iteration to mean 0 and variance 1."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a response that did not stop by itself."""
    score_placement: Literal["stop", "after_stop"] = "stop"
    """Token that receives the score: the last one, or one step later where there is room (as TRL did)."""
    max_grad_norm: Positive | None = 1.0
    """Gradients of policy and value together are scaled to at most this norm; null turns it off."""
    max_bad_steps: PositiveInt = 4
    """A minibatch whose loss or gradient is not finite takes no optimizer step; this many in a row end the run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _adapts_something(self) -> PPOConfig:
        if self.adaptive_kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"ppo.adaptive_kl_target={self.adaptive_kl_target} multiplies ppo.kl_coef, which stays 0; start from another "
                "ppo.kl_coef, or leave the target out"
            )
        if self.adaptive_kl_target is None and self.adaptive_kl_horizon != _HORIZON:
            raise ValueError(
                f"ppo.adaptive_kl_horizon={self.adaptive_kl_horizon} is given, and nothing adapts ppo.kl_coef; set "
                "ppo.adaptive_kl_target, or leave the horizon out"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> PPOConfig:
        warmup = self.optimizer.warmup_iterations
        if warmup >= self.iterations:
            raise ValueError(
                f"ppo.optimizer.warmup_iterations={warmup} leaves none of ppo.iterations={self.iterations} at the full "
                "learning rate; lower it"
            )
        return self
