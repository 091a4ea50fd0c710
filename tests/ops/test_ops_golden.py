"""The formulas against cases computed with TRL 1.12.0's own lines; `tests/golden/README.md` describes the file.

Every case runs in float64 and float32, and once more with NaN in every slot that a mask excludes. TRL's losses are
means over the microbatch, so sums of our per-token losses are divided by the counts here; metrics that TRL averages
over padding are rebuilt that way from our per-token tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quartet.config import PPOConfig
from quartet.ops.kl import kl_estimate
from quartet.ops.logprobs import chunked_logprobs, entropy, token_logprobs
from quartet.ops.losses import (
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    policy_clipped,
    value_clipped,
)
from quartet.ops.masking import length_mask, masked_mean
from quartet.ops.rewards import penalise_unstopped, score_index, value_mask
from quartet.records import Prompts, Rollout, Scored
from quartet.stages.advantages import compute_advantages

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppo_cases.json").read_text())
DEGENERATE = {case["kind"]: case for case in GOLDEN["degenerate_cases"]}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-7}

every_case = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['id']}-{case['kind']}")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
clean_or_poisoned = pytest.mark.parametrize("poison", [False, True], ids=["clean", "nan_in_masked"])


def check(actual: Tensor, expected: Any, dtype: torch.dtype, name: str) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=lambda text: f"{name}: {text}"
    )


def lengths_and_stops(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Length of each response as TRL counts it (padding starts at the first pad token, sampled or not), and whether
    its kept part contains EOS."""
    lengths, contains_eos = [], []
    for response in case["responses"]:
        row = list(response)
        if case["stop_token_id"] is not None and case["stop_token_id"] in row:
            stop = row.index(case["stop_token_id"])
            row[stop + 1 :] = [case["pad_token_id"]] * (len(row) - stop - 1)
        lengths.append(row.index(case["pad_token_id"]) if case["pad_token_id"] in row else len(row))
        contains_eos.append(case["eos_token_id"] in row)
    return torch.tensor(lengths), torch.tensor(contains_eos)


def inputs(case: dict[str, Any], dtype: torch.dtype, poison: bool) -> SimpleNamespace:
    names = ("logprobs", "ref_logprobs", "values", "scores", "new_logprobs", "vpred")
    given = SimpleNamespace(**{name: torch.tensor(case[name], dtype=dtype) for name in names})
    given.lengths, given.contains_eos = lengths_and_stops(case)
    given.mask = length_mask(given.lengths, given.logprobs.shape[1])
    given.value_mask = value_mask(given.mask, "after_stop")
    given.rows = torch.tensor(case["micro_batch_inds"])
    if poison:
        for name, mask in (
            ("logprobs", given.mask),
            ("ref_logprobs", given.mask),
            ("values", given.value_mask),
            ("new_logprobs", given.mask[given.rows]),
            ("vpred", given.value_mask[given.rows]),
        ):
            getattr(given, name).masked_fill_(~mask, float("nan"))
    return given


def advantaged(case: dict[str, Any], given: SimpleNamespace) -> SimpleNamespace:
    """Rewards, advantages, returns and metrics of a case, by the advantages stage, beside the scores and KL inside it."""
    config = case["config"]
    names = ("kl_estimator", "whiten_rewards", "missing_eos_penalty", "gamma", "lam")
    ppo = PPOConfig(**{name: config[name] for name in names}, whiten_advantages=True, score_placement="after_stop")
    out = SimpleNamespace()
    out.scores = penalise_unstopped(given.scores, given.contains_eos, config["missing_eos_penalty"])
    out.kl = kl_estimate(given.logprobs, given.ref_logprobs, config["kl_estimator"])
    out.values = torch.where(given.value_mask, given.values, 0.0)
    count = len(given.lengths)
    tokens = torch.tensor(case["responses"])
    prompts = Prompts(tuple(range(count)), ("",) * count, (torch.tensor([1]),) * count)
    rollout = Rollout(prompts, tokens, given.mask, given.logprobs, given.contains_eos, decode_steps=0)
    # Of what a record holds outside its masks only the values are read, and those are zeros there.
    scored = Scored(rollout, given.ref_logprobs, out.values, given.value_mask, given.scores)
    stage = compute_advantages(scored, ppo, kl_coef=config["kl_coef"])
    out.rewards, out.advantages, out.returns, out.metrics = (
        stage.rewards,
        stage.advantages,
        stage.returns,
        stage.metrics,
    )
    return out


def microbatch(case: dict[str, Any], given: SimpleNamespace, out: SimpleNamespace) -> SimpleNamespace:
    """Losses, gradients and indicators of the case's microbatch."""
    config, rows = case["config"], given.rows
    mask, wide = given.mask[rows], given.value_mask[rows]
    new, vpred = given.new_logprobs.clone().requires_grad_(), given.vpred.clone().requires_grad_()
    policy = (new, given.logprobs[rows], out.advantages[rows], mask)
    value = (vpred, out.values[rows], out.returns[rows], wide)
    clip = {"clip_low": config["cliprange"], "clip_high": config["cliprange"]}
    losses = SimpleNamespace(mask=mask, value_mask=wide)
    losses.policy = clipped_policy_loss(*policy, **clip)
    losses.value = clipped_value_loss(*value, clip=config["cliprange_value"])
    losses.policy_clipped = policy_clipped(*policy, **clip)
    losses.value_clipped = value_clipped(*value, clip=config["cliprange_value"])
    losses.approx_kl = approx_kl(new, given.logprobs[rows], mask).detach()
    losses.pg_loss = losses.policy.sum() / mask.sum().clamp(min=1)
    losses.vf_loss = losses.value.sum() / wide.sum().clamp(min=1)
    losses.loss = losses.pg_loss + config["vf_coef"] * losses.vf_loss
    losses.grad_new, losses.grad_vpred = torch.autograd.grad(losses.loss, (new, vpred))
    return losses


@every_case
def test_masks_and_score_position(case):
    given = inputs(case, torch.float64, False)
    expected = case["expected"]
    assert (given.lengths - 1).tolist() == expected["sequence_lengths"]
    assert (~given.mask).tolist() == expected["padding_mask"]
    assert (~given.value_mask).tolist() == expected["padding_mask_p1"]
    assert score_index(given.lengths, given.mask.shape[1], "after_stop").tolist() == expected["actual_end"]


@clean_or_poisoned
@both_dtypes
@every_case
def test_rewards_advantages_and_returns(case, dtype, poison):
    given = inputs(case, dtype, poison)
    expected = case["expected"]
    out = advantaged(case, given)
    kl = torch.where(given.mask, out.kl, 0.0)
    check(out.scores, expected["scores"], dtype, "scores")
    check(kl, expected["kl"], dtype, "kl")
    check(-case["config"]["kl_coef"] * kl, expected["non_score_reward"], dtype, "non_score_reward")
    check(out.rewards, expected["rewards"], dtype, "rewards")
    check(out.values, expected["values"], dtype, "values")
    check(out.returns, expected["returns"], dtype, "returns")
    check(out.advantages, expected["advantages"], dtype, "advantages")


@clean_or_poisoned
@both_dtypes
@every_case
def test_losses_and_gradients(case, dtype, poison):
    given = inputs(case, dtype, poison)
    expected = case["expected"]
    losses = microbatch(case, given, advantaged(case, given))
    for name in ("pg_loss", "vf_loss", "loss"):
        check(getattr(losses, name), expected[name], dtype, name)
    check(losses.grad_new, expected["grad_new_logprobs"], dtype, "grad_new_logprobs")
    check(losses.grad_vpred, expected["grad_vpred"], dtype, "grad_vpred")
    check(masked_mean(losses.policy_clipped.to(dtype), losses.mask), expected["pg_clipfrac"], dtype, "pg_clipfrac")
    check(masked_mean(losses.value_clipped.to(dtype), losses.value_mask), expected["vf_clipfrac"], dtype, "vf_clipfrac")
    assert not losses.policy_clipped[~losses.mask].any()
    assert not losses.value_clipped[~losses.value_mask].any()
    # TRL divides by padding too; Quartet's metric is the masked mean of the same tensor.
    check(losses.approx_kl.mean(), expected["approxkl"], dtype, "approxkl")


@both_dtypes
@every_case
def test_metrics_in_the_old_way(case, dtype):
    """TRL sums over the columns, padding included, and averages over the rows."""
    given = inputs(case, dtype, False)
    expected = case["expected"]
    out = advantaged(case, given)
    kl = torch.where(given.mask, out.kl, 0.0)
    logprobs = torch.where(given.mask, given.logprobs, 0.0)
    non_score = (-case["config"]["kl_coef"] * kl).sum(1).mean()
    check(kl.sum(1).mean(), expected["mean_kl"], dtype, "mean_kl")
    check((-logprobs).sum(1).mean(), expected["mean_entropy"], dtype, "mean_entropy")
    check(non_score, expected["mean_non_score_reward"], dtype, "mean_non_score_reward")
    check(non_score + out.scores.mean(), expected["rlhf_reward"], dtype, "rlhf_reward")
    check(torch.tensor(out.metrics["reward/total"]).double(), expected["rlhf_reward"], torch.float32, "reward/total")


@clean_or_poisoned
def test_microbatch_of_one_empty_response(poison):
    """TRL's policy loss is NaN (0 tokens); ours is 0, and everything else is TRL's number."""
    case = DEGENERATE["micro_batch_of_one_empty_response"]
    given = inputs(case, torch.float64, poison)
    out = advantaged(case, given)
    losses = microbatch(case, given, out)
    expected = case["expected"]
    assert torch.isnan(torch.tensor(expected["pg_loss"]))
    assert losses.pg_loss.item() == 0.0
    for name in ("rewards", "returns", "advantages"):
        check(getattr(out, name), expected[name], torch.float64, name)
    check(losses.vf_loss, expected["vf_loss"], torch.float64, "vf_loss")
    check(losses.grad_new, expected["grad_new_logprobs"], torch.float64, "grad_new_logprobs")
    check(losses.grad_vpred, expected["grad_vpred"], torch.float64, "grad_vpred")


@clean_or_poisoned
def test_all_responses_empty(poison):
    """TRL raises for a mask that keeps nothing; ours gives zeros, and the score where `after_stop` puts it."""
    case = DEGENERATE["all_responses_empty"]
    assert "sum of the mask is zero" in case["expected"]["error"]
    given = inputs(case, torch.float64, poison)
    out = advantaged(case, given)
    losses = microbatch(case, given, out)
    check(out.rewards, [[score, 0.0, 0.0] for score in case["scores"]], torch.float64, "rewards")
    assert out.advantages.eq(0).all()
    assert losses.pg_loss.item() == 0.0
    assert losses.grad_new.eq(0).all()
    assert torch.isfinite(losses.grad_vpred).all()


def test_stop_token_is_not_eos_with_penalty():
    """With TRL's notion of stopped (EOS in the response) ours gives TRL's numbers, penalising the response that ended
    at the stop token; with Quartet's notion the other one, which ran to the end, is penalised."""
    case = DEGENERATE["stop_token_is_not_eos_with_penalty"]
    given = inputs(case, torch.float64, False)
    out = advantaged(case, given)
    losses = microbatch(case, given, out)
    for name in ("scores", "rewards", "returns", "advantages"):
        check(getattr(out, name), case["expected"][name], torch.float64, name)
    for name in ("pg_loss", "vf_loss", "loss"):
        check(getattr(losses, name), case["expected"][name], torch.float64, name)
    assert given.contains_eos.tolist() == [False, True]
    ended_at_stop_token = torch.tensor([True, False])
    scores = penalise_unstopped(given.scores, ended_at_stop_token, 1.0)
    check(scores, [case["scores"][0], case["scores"][1] - 1.0], torch.float64, "scores")


@both_dtypes
@pytest.mark.parametrize("case", GOLDEN["logprob_cases"], ids=lambda case: f"T={case['temperature']}")
def test_logprobs_and_entropy(case, dtype):
    # TRL adds 1e-7 to the temperature; ours is divided by as it is.
    temperature = case["temperature"] + 1e-7
    logits = torch.tensor(case["logits"], dtype=dtype)
    tokens = torch.tensor(case["responses"])
    flat, chosen = logits.flatten(0, 1), tokens.flatten()
    expected = [[x for row in case[name] for x in row] for name in ("logprobs", "entropy")]
    check(token_logprobs(flat, chosen, temperature), expected[0], dtype, "logprobs")
    check(entropy(flat, temperature), expected[1], dtype, "entropy")
    chunked = chunked_logprobs(
        flat,
        lambda states: states,
        chosen,
        temperature=temperature,
        chunk_tokens=3,
        with_entropy=True,
        head_trainable=False,
    )
    check(chunked[0], expected[0], dtype, "chunked logprobs")
    check(chunked[1], expected[1], dtype, "chunked entropy")
