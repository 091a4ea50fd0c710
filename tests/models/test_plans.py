"""Every family under every sharing plan: it trains, the plans agree, and frozen roles stay what the checkpoints say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import FAMILIES, plain_model
from pipeline import Pipeline, hidden_of, sequences
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.run.setup import read_inputs
from tiny import TinyRun

LORA = {"r": 5, "alpha": 20.0}
PLANS: dict[str, dict[str, Any]] = {
    "separate-full": {"models.sharing": "separate", "models.lora": None},
    "separate-lora": {"models.sharing": "separate", "models.lora": LORA},
    "paired": {"models.sharing": "paired", "models.lora": LORA},
    "single": {"models.sharing": "single", "models.lora": LORA},
}
PROMPTS = [[5, 9, 30], [7], [64, 65, 66, 67, 68]]
RESPONSES = [[40, 41, 42, 43], [50, 51], [60, 61, 257]]


def plain_logprobs(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities of the response in one unpadded sequence, by transformers alone."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, prompt - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[prompt:, None]).squeeze(-1)


def plain_score(model: Any, ids: Tensor) -> Tensor:
    """Score of one unpadded sequence, by transformers alone."""
    return model(input_ids=ids[None], use_cache=False).logits[0, 0]


@dataclass
class Outcome:
    """What two iterations of one plan did."""

    metrics: list[dict[str, float]]
    moved: set[str]
    """Roles of the weights that moved."""


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, ...], Outcome]:
    return {}


@pytest.fixture
def outcome(outcomes: dict[tuple[str, ...], Outcome], tiny_run: TinyRun) -> Callable[..., Outcome]:
    """outcome(family, plan, sft, reward), computed once."""

    def run(family: str, plan: str, sft: str = "sft", reward: str = "reward") -> Outcome:
        key = (family, plan, sft, reward)
        if key not in outcomes:
            changes = {**PLANS[plan], "reward": reward, "ppo.epochs": 1, "ppo.minibatches": 1}
            pipeline, metrics = Pipeline(tiny_run(family, sft, **changes)), []
            assert pipeline.inputs.plan.name == plan.removesuffix("-full").removesuffix("-lora")
            before = pipeline.trained()
            for _ in range(2):
                batch, stats = pipeline.iterate()
                metrics.append(batch.metrics | stats.metrics)
            moved = {
                n.split(":")[0] for n, weights in pipeline.trained().items() if not torch.equal(weights, before[n])
            }
            outcomes[key] = Outcome(metrics, moved)
        return outcomes[key]

    return run


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ratio_is_one_before_the_first_step(family: str, plan: str, outcome: Callable[..., Outcome]) -> None:
    """In the second iteration too, so that the rollout samples from the weights of the update."""
    done = outcome(family, plan, reward="reward-lora" if plan == "single" else "reward")
    assert [metrics["ratio/max_log"] < 1e-5 for metrics in done.metrics] == [True, True]
    assert done.metrics[0]["kl/update"] < 1e-10
    assert done.moved == {"policy", "value"}


@pytest.mark.parametrize("family", FAMILIES)
def test_paired_computes_what_four_models_compute(family: str, outcome: Callable[..., Outcome]) -> None:
    assert outcome(family, "paired").metrics == outcome(family, "separate-lora").metrics


@pytest.mark.parametrize(("family", "sft"), [*((family, "sft") for family in FAMILIES), ("llama", "sft-lora")])
def test_single_computes_what_two_models_compute(family: str, sft: str, outcome: Callable[..., Outcome]) -> None:
    single, paired = (outcome(family, plan, sft, "reward-lora").metrics for plan in ("single", "paired"))
    for one, other in zip(single, paired, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("family", "sft"), [("llama", "sft-lora"), ("qwen2", "sft"), ("gpt2", "sft")])
def test_frozen_roles_are_the_checkpoints_and_never_change(
    family: str, plan: str, sft: str, tiny_run: TinyRun, library: Any
) -> None:
    """Llama has untied embeddings, Qwen2 and GPT-2 tied ones; the first starts from an SFT checkpoint that is an adapter."""
    changes = dict(PLANS[plan])
    reward = "reward-lora" if plan == "single" else "reward" if sft == "sft" else "reward-on-reward"
    pipeline = Pipeline(tiny_run(family, sft, reward, **changes))
    language = plain_model(library.path(family, sft))
    classifier = plain_model(library.path(family, reward), task="classifier")

    def look() -> list[Tensor]:
        seen = []
        with torch.no_grad():
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
                one, mask = sequences([prompt], [response])
                seen.append(pipeline.roles.reference(one, mask, temperature=1.0)[0][0])
                seen.append(pipeline.roles.reward.scores(one)[0])
        return seen

    before = look()
    for prompt, response, logprobs, score in zip(PROMPTS, RESPONSES, before[::2], before[1::2], strict=True):
        ids = torch.tensor(prompt + response)
        with torch.no_grad():
            torch.testing.assert_close(logprobs, plain_logprobs(language, ids, len(prompt)), rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(score, plain_score(classifier, ids), rtol=1e-6, atol=2e-6)
    start = pipeline.trained()
    for _ in range(2):
        pipeline.iterate()
    assert all(not torch.equal(old, pipeline.trained()[name]) for name, old in start.items())
    assert all(torch.equal(old, new) for old, new in zip(before, look(), strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sft", ["sft", "sft-lora"])
def test_hidden_states_are_bit_identical_to_the_plain_model(
    plan: str, sft: str, tiny_run: TinyRun, library: Any
) -> None:
    changes = dict(PLANS[plan])
    reward = "reward-lora" if plan == "single" else "reward-on-reward"
    pipeline = Pipeline(tiny_run("llama", sft, reward, **changes))
    batch, _ = sequences(PROMPTS, RESPONSES)
    for role, name, task in (("reference", sft, "lm"), ("reward", reward, "classifier")):
        view = getattr(pipeline.roles, role)
        plain: Any = plain_model(library.path("llama", name), task=task)
        trunk = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
        with torch.no_grad():
            expected = trunk.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            assert torch.equal(hidden_of(view.backbone, batch.input_ids, view.adapter), expected)


@pytest.mark.parametrize("plan", ["paired", "single"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_reference_are_bit_identical_to_the_checkpoints_alone(
    family: str, plan: str, tiny_run: TinyRun, library: Any
) -> None:
    """Same batch, same numbers: the base by transformers, the reward adapter by PEFT. The chunks of logits are two here."""
    reward = "reward-lora" if plan == "single" else "reward"
    roles = Pipeline(tiny_run(family, "sft", reward, **PLANS[plan])).roles
    base: Any = plain_model(library.path(family, "sft"))
    classifier: Any = plain_model(library.path(family, reward), task="classifier")
    draw = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(3, 250, (5, 9), generator=draw), torch.randint(3, 250, (5, 30), generator=draw)
    batch, mask = sequences(prompts.tolist(), responses.tolist())
    with torch.no_grad():
        logits = base(input_ids=batch.input_ids, use_cache=False).logits[:, 8:-1]
        expected = torch.log_softmax(logits, -1).gather(-1, responses[..., None]).squeeze(-1)
        assert torch.equal(roles.reference(batch, mask, temperature=1.0)[0], expected)
        scores = classifier(input_ids=batch.input_ids, use_cache=False).logits.squeeze(-1)
        assert torch.equal(roles.reward.scores(batch), scores)


@pytest.mark.parametrize("plan", ["separate-full", "separate-lora", "paired", "single"])
def test_policy_starts_as_the_sft_adapter(plan: str, tiny_run: TinyRun, library: Any) -> None:
    """Adapter off is the base model, which is neither the reference nor where the policy starts."""
    pipeline = Pipeline(tiny_run("llama", "sft-lora", "reward-lora", **PLANS[plan]))
    adapted, base = plain_model(library.path("llama", "sft-lora")), plain_model(library.path("llama", "sft"))
    one, mask = sequences(PROMPTS[:1], RESPONSES[:1])
    ids = torch.tensor(PROMPTS[0] + RESPONSES[0])
    with torch.no_grad():
        policy = pipeline.roles.policy(one, mask, temperature=1.0)[0][0]
        torch.testing.assert_close(policy, plain_logprobs(adapted, ids, 3), rtol=1e-4, atol=1e-5)
        assert (policy - plain_logprobs(base, ids, 3)).abs().max() > 0.05


def test_single_needs_the_same_base(tiny_run: TinyRun) -> None:
    other = r"is an adapter over other weights or another configuration of them; use models.sharing=paired"
    with pytest.raises(ConfigError, match=other):
        Pipeline(tiny_run("llama", "sft", "reward-on-reward", **{"models.sharing": "single", "models.lora": LORA}))
    with pytest.raises(ConfigError, match=r"is a full checkpoint; use models.sharing=paired"):
        Pipeline(tiny_run("llama", "sft", "reward", **{"models.sharing": "single", "models.lora": LORA}))


@pytest.mark.parametrize(
    ("reward", "lora", "plan"),
    [
        ("reward", None, "separate"),
        ("reward-lora", None, "separate"),
        ("reward", LORA, "paired"),
        ("reward-on-reward", LORA, "paired"),
        ("reward-lora", LORA, "single"),
    ],
)
def test_auto_takes_the_plan_with_the_fewest_backbones(
    reward: str, lora: dict[str, Any] | None, plan: str, tiny_run: TinyRun
) -> None:
    config = parse_config(tiny_run("llama", "sft", reward, **{"models.lora": lora}))
    assert read_inputs(config, lambda _: None).plan.name == plan
