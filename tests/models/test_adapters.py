"""Adapters: switching, starting from a checkpoint's adapter, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers.models.llama.modeling_llama import LlamaAttention

from checkpoints import plain_model, write_adapter
from pipeline import Pipeline, hidden_of, sequences
from quartet.errors import CheckpointError, QuartetError
from quartet.trainer import train
from tiny import TinyRun

IDS = torch.tensor([[5, 9, 30, 40, 41], [64, 65, 66, 67, 68]])


def adapter_state(model: torch.nn.Module) -> list[tuple[bool, list[str]]]:
    """What PEFT itself says of every layer."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]


def single(tiny_run: TinyRun, **changes: Any) -> Pipeline:
    return Pipeline(tiny_run("llama", reward="reward-lora", **{"models.lora": {"r": 5}, **changes}))


def test_switch_restores_state_after_exceptions(tiny_run: TinyRun) -> None:
    backbone = single(tiny_run).roles.policy.backbone
    trained = {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"policy", "value"}
    layers = len(adapter_state(backbone.model))
    assert adapter_state(backbone.model) == [(True, [])] * layers
    with backbone.role("policy"):
        assert adapter_state(backbone.model) == [(False, ["policy"])] * layers
        with pytest.raises(ZeroDivisionError), backbone.role("value"):
            assert 1 / len([state for state in adapter_state(backbone.model) if state != (False, ["value"])])
        assert adapter_state(backbone.model) == [(False, ["policy"])] * layers
        with backbone.role(None):
            assert adapter_state(backbone.model) == [(True, [])] * layers
        assert adapter_state(backbone.model) == [(False, ["policy"])] * layers
    assert adapter_state(backbone.model) == [(True, [])] * layers
    assert trained == {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}


def test_an_unknown_adapter_changes_nothing(tiny_run: TinyRun) -> None:
    backbone = single(tiny_run).roles.policy.backbone
    before = adapter_state(backbone.model)
    with pytest.raises(AssertionError), backbone.role("nobody"):
        pass
    assert adapter_state(backbone.model) == before


def test_each_adapter_has_its_own_output(tiny_run: TinyRun, library: Any) -> None:
    """PEFT's own switch gives the same hidden states as ours: fails when PEFT renames what ours touches."""
    backbone = single(tiny_run).roles.policy.backbone
    plain: Any = plain_model(library.path("llama", "reward-lora"), task="classifier")
    base: Any = plain_model(library.path("llama", "sft"))
    with torch.no_grad():
        adapted = plain.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
        bare = base.model(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(hidden_of(backbone, IDS, "reward"), adapted)
        assert torch.equal(hidden_of(backbone, IDS, None), bare)
        assert torch.equal(hidden_of(backbone, IDS, "policy"), bare)
        assert (adapted - bare).abs().max() > 0.1


def test_fresh_adapters_depend_on_the_seed_alone(tiny_run: TinyRun) -> None:
    one, same, other = (single(tiny_run, **{"run.seed": seed}).trained() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    first = next(name for name in one if name.startswith("policy") and "lora_A" in name)
    twin = first.replace("policy", "value")
    state = torch.get_rng_state()
    single(tiny_run)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one[first], one[twin])


@pytest.mark.parametrize("rank", [4, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "few-modules"],
)
def test_training_continues_from_the_checkpoints_adapter(
    rank: int, changes: dict[str, Any], tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    """The policy before training computes what PEFT computes, and reference is that, bit by bit."""
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"), seed=9, rank=4, **changes)
    values = tiny_run(**{"models.lora": {"r": rank, "alpha": 7.0}, "models.sft": str(adapter)})
    roles = Pipeline(values).roles
    plain: Any = plain_model(adapter)
    with torch.no_grad():
        expected = plain.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(hidden_of(roles.reference.backbone, IDS, roles.reference.adapter), expected)
        started = hidden_of(roles.policy.backbone, IDS, roles.policy.adapter)
        torch.testing.assert_close(started, expected, rtol=1e-5, atol=2e-5)


def refusal(tiny_run: TinyRun, **changes: Any) -> str:
    with pytest.raises(QuartetError) as caught:
        Pipeline(tiny_run(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return f"{type(caught.value).__name__}: {message}"


def test_adapter_of_smaller_rank_is_refused(tiny_run: TinyRun) -> None:
    said = refusal(tiny_run, sft="sft-lora", **{"models.lora": {"r": 3}})
    assert said.startswith("ConfigError: models.lora.r=3 is smaller than rank 4")
    assert said.endswith("set models.lora.r=4 or more")


def test_adapter_that_leaves_out_a_module_is_refused(tiny_run: TinyRun) -> None:
    said = refusal(tiny_run, sft="sft-lora", **{"models.lora": {"target_modules": ["q_proj", "v_proj"]}})
    assert said.startswith("ConfigError: models.lora.target_modules leaves out")


def test_unknown_target_modules_are_refused(tiny_run: TinyRun) -> None:
    said = refusal(tiny_run, **{"models.lora": {"target_modules": ["q_project"]}})
    assert said.startswith("ConfigError: models.lora.target_modules=('q_project',) cannot be applied")


def test_embeddings_as_target_are_refused(tiny_run: TinyRun) -> None:
    """PEFT keeps an embedding's adapter under other names, which would be neither trained nor saved."""
    said = refusal(tiny_run, **{"models.lora": {"target_modules": ["q_proj", "embed_tokens"]}})
    assert said.startswith("ConfigError")
    assert "embed_tokens" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "lora_only", "family": "qwen2"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["dora", "bias", "saved-head", "saved-embedding", "adapted-embedding"],
)
def test_adapters_that_cannot_be_continued_are_refused(
    changes: dict[str, Any], tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    family = changes.get("family", "llama")
    options = {key: value for key, value in changes.items() if key != "family"}
    adapter = write_adapter(tmp_path / "adapter", library.path(family, "sft"), **options)
    said = refusal(tiny_run, family=family, **{"models.lora": {}, "models.sft": str(adapter)})
    assert said.startswith(f"CheckpointError: models.sft={str(adapter)!r}")
    assert "merge it into its base" in said


@pytest.mark.parametrize("plan", ["separate", "single"])
def test_an_adapted_embedding_is_named_before_the_memory_is_planned(
    plan: str, tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    """Not models.lora.target_modules, which has nothing to do with it."""
    adapter = write_adapter(
        tmp_path / "adapter", library.path("llama", "sft"), target_modules=["q_proj", "embed_tokens"]
    )
    values = tiny_run(reward="reward-lora", **{"models.lora": {}, "models.sft": str(adapter), "models.sharing": plan})
    with pytest.raises(
        CheckpointError, match=r"adapts the embedding model\.embed_tokens, which cannot be continued; merge"
    ):
        train(values)


@pytest.mark.parametrize("saved", [["score", "embed_tokens"], ["score", "norm"]], ids=["embedding", "norm"])
@pytest.mark.parametrize("plan", ["separate", "paired", "single"])
def test_reward_adapters_whose_weights_would_be_dropped_are_refused(
    saved: list[str], plan: str, tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    base = library.path("llama", "sft")
    adapter = write_adapter(tmp_path / "adapter", base, task="classifier", modules_to_save=saved)
    lora = None if plan == "separate" else {}
    said = refusal(tiny_run, **{"models.lora": lora, "models.sharing": plan, "models.reward": str(adapter)})
    assert said.startswith(f"CheckpointError: models.reward={str(adapter)!r}")
    assert saved[1] in said


def test_adapter_of_another_architecture_is_refused(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    from checkpoints import edit_json

    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"), seed=9)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(library.path("gpt2", "sft")))
    said = refusal(tiny_run, **{"models.lora": {}, "models.sft": str(adapter)})
    assert said.startswith("CheckpointError: models.sft=")


@pytest.mark.parametrize("plan", ["separate", "paired", "single"])
def test_gradients_of_one_joint_pass_are_those_of_separate_passes(plan: str, tiny_run: TinyRun) -> None:
    """PEFT's `set_adapter` between forward and backward would silently drop the first adapter's."""
    joint, apart = gradients(tiny_run, plan, joint=True), gradients(tiny_run, plan, joint=False)
    assert joint.keys() == apart.keys()
    assert len(joint) == 2 * 28 + 1  # A and B of seven layers in two blocks, for two roles, and the value head
    for name, gradient in joint.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-6, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("plan", ["full", "separate", "paired", "single"])
def test_gradient_checkpointing_changes_no_gradient(plan: str, tiny_run: TinyRun) -> None:
    """Recomputing under the adapter that is on at backward time would give other gradients, silently."""
    plain = gradients(tiny_run, plan, joint=True)
    recomputed = gradients(tiny_run, plan, joint=True, **{"models.gradient_checkpointing": True})
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, recomputed[name], rtol=1e-6, atol=1e-6, msg=name)


def gradients(tiny_run: TinyRun, plan: str, *, joint: bool, **changes: Any) -> dict[str, torch.Tensor]:
    """Gradients of a sum over log-probabilities and values, from adapters that are not the identity."""
    if plan != "full":
        changes |= {"models.lora": {"r": 5}, "models.sharing": plan}
    pipeline = Pipeline(tiny_run("llama", "sft-lora", "reward-lora", **changes))
    batch, mask = sequences([[5, 9, 30], [7], [64, 65]], [[40, 41, 42, 43], [50, 51], [60, 61, 257]])
    policy, value = pipeline.roles.policy, pipeline.roles.value
    if joint:
        logprobs, _, values = pipeline.roles.trained(
            batch, mask, mask, temperature=1.0, with_entropy=False, entropy_grad=False
        )
        (logprobs.sum() + 3.0 * values.square().sum()).backward()
    else:
        policy(batch, mask, temperature=1.0)[0].sum().backward()
        (3.0 * value(batch, mask).square().sum()).backward()
    return pipeline.gradients()


@pytest.mark.parametrize("plan", ["full", "single"])
def test_gradient_checkpointing_recomputes(plan: str, tiny_run: TinyRun) -> None:
    """Each decoder layer runs twice when a backward pass follows, once when none does."""
    runs = []
    changes: dict[str, Any] = {"models.gradient_checkpointing": True}
    if plan == "single":
        changes |= {"models.lora": {"r": 5}, "models.sharing": "single"}
    pipeline = Pipeline(tiny_run("llama", "sft-lora", "reward-lora", **changes))
    for module in pipeline.roles.policy.backbone.model.modules():
        if isinstance(module, LlamaAttention):
            module.register_forward_pre_hook(lambda *_: runs.append(1))
    batch, mask = sequences([[5, 9, 30]], [[40, 41, 42, 43]])
    with torch.no_grad():
        pipeline.roles.policy(batch, mask, temperature=1.0)
    assert len(runs) == 2
    pipeline.roles.policy(batch, mask, temperature=1.0)[0].sum().backward()
    assert len(runs) == 6


@pytest.mark.parametrize("engine", ["dynamic", "auto"])
def test_rollout_under_gradient_checkpointing_uses_its_cache(engine: str, tiny_run: TinyRun) -> None:
    """transformers drops the cache of a model in training mode that recomputes: the rollout must not be in it."""
    changes = {"models.lora": {"r": 5}, "models.gradient_checkpointing": True, "rollout.engine": engine}
    _, stats = Pipeline(tiny_run("llama", **changes, **{"ppo.epochs": 1, "ppo.minibatches": 1})).iterate()
    assert stats.metrics["ratio/max_log"] < 1e-5
