"""What the metrics of an iteration warn of, each with what to do about it.

The thresholds are rules of thumb of the field, not proofs; `docs/warnings.md` says where each comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Metrics = Mapping[str, float]

KL_NATS_PER_TOKEN = 1.0
"""KL to the reference, nats for each response token, above which responses have little to do with the reference's."""
ENTROPY_NATS = 0.1
"""Entropy of the policy, nats a token, below which sampling hardly explores."""
CLIP_FRACTION = 0.3
"""Share of tokens whose ratio is clipped above which an iteration goes further than its samples vouch for."""
SCORE_STD = 1e-6
"""Standard deviation of the scores below which they say nothing about which response is better."""
LOGPROB_GAP = 0.05
"""Mean difference of log-probabilities between rollout and update before the first step, nats."""
PATIENCE = 5
"""Iterations in a row for a warning about what the first iterations commonly show."""


@dataclass(frozen=True)
class Rule:
    """One warning."""

    name: str
    applies: Callable[[Metrics], bool]
    """On the metrics of one iteration; NaN compares false."""
    seen: str
    """What is seen; metrics in braces are filled in."""
    remedy: str
    """What to do."""
    in_a_row: int = 1
    """Iterations in a row that the rule has to apply to before it is said."""


RULES = (
    Rule(
        "logprob_gap",
        lambda m: m["rollout/logprob_gap"] > LOGPROB_GAP,
        f"rollout and training disagree by {{rollout/logprob_gap:.3f}} nats a token (rollout/logprob_gap, over {LOGPROB_GAP}): "
        "the update is off-policy from its first step",
        "models.dtype=float32 removes rounding as a cause",
    ),
    Rule(
        "kl_runaway",
        lambda m: m["kl/reference"] > KL_NATS_PER_TOKEN * m["response/length"],
        "the KL to the reference is {kl/reference:.1f} nats a response of {response/length:.0f} tokens (kl/reference, over "
        f"{KL_NATS_PER_TOKEN:g} a token): the policy is running away from it",
        "raise ppo.kl_coef, set ppo.adaptive_kl_target or lower ppo.learning_rate",
    ),
    Rule(
        "entropy_collapse",
        lambda m: m["policy/entropy"] < ENTROPY_NATS,
        f"the policy's entropy is {{policy/entropy:.3f}} nats a token (policy/entropy, under {ENTROPY_NATS}): "
        "it hardly explores",
        "raise ppo.entropy_coef or ppo.kl_coef, or lower ppo.learning_rate",
    ),
    Rule(
        "clip_fraction",
        lambda m: m["policy/clip_fraction"] > CLIP_FRACTION,
        f"{{policy/clip_fraction:.0%}} of the tokens are clipped (policy/clip_fraction, over {CLIP_FRACTION:.0%}): the policy "
        "moves too far in one iteration",
        "lower ppo.learning_rate or ppo.epochs",
    ),
    Rule(
        "explained_variance",
        lambda m: m["value/explained_variance"] < 0.0,
        "the critic predicts returns worse than a constant would (value/explained_variance {value/explained_variance:.2f}, "
        f"under 0, for {PATIENCE} iterations)",
        "raise ppo.value_learning_rate or ppo.value_coef",
        in_a_row=PATIENCE,
    ),
    Rule(
        "unstopped",
        lambda m: m["response/stopped_fraction"] == 0.0,
        "no response stopped by itself (response/stopped_fraction 0): scores are of cut-off text",
        "raise rollout.response_length, check rollout.stop (null says that this is meant), or set ppo.missing_eos_penalty",
    ),
    Rule(
        "constant_scores",
        lambda m: m["reward/score_std"] < SCORE_STD,
        "all episodes have the same score, {reward/score:.4g} (reward/score_std {reward/score_std:.1e}): there is nothing to "
        "learn from",
        "check models.reward and rewards",
    ),
    Rule(
        "skipped_steps",
        lambda m: m["gradient/skipped_steps"] > 0,
        "{gradient/skipped_steps:.0f} optimizer steps were not taken because a loss or gradient was not finite "
        "(gradient/skipped_steps)",
        "lower ppo.learning_rate or use models.dtype=float32",
    ),
)


class Adviser:
    """Turns metrics into sentences, each once at first and then every so often while it lasts."""

    def __init__(self, *, stops: bool) -> None:
        """`stops`: whether responses can stop by themselves (rollout.stop is not null)."""
        self._rules = tuple(rule for rule in RULES if stops or rule.name != "unstopped")
        self._lasting = {rule.name: 0 for rule in self._rules}

    def advice(self, metrics: Metrics) -> Iterator[str]:
        """The warnings that one iteration's metrics call for.

        A rule speaks when it has applied to `in_a_row` iterations, and while it goes on applying, after 10, 20, 40 ...
        iterations more: a run that is meant to be so is not drowned in warnings.
        """
        for rule in self._rules:
            lasting = self._lasting[rule.name] = self._lasting[rule.name] + 1 if rule.applies(metrics) else 0
            if _speaks(lasting - rule.in_a_row):
                yield f"{rule.seen.format_map(metrics)}; {rule.remedy}"


def _speaks(since: int) -> bool:
    """At 0, 10, 20, 40, 80, ..."""
    return since == 0 or (since > 0 and since % 10 == 0 and (since // 10).bit_count() == 1)
