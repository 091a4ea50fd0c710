"""models.freeze_layers: the trunk is shared and computed once, and the numbers are those of the whole computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoints import FAMILIES, plain_model
from pipeline import Pipeline, sequences
from quartet.errors import ConfigError
from storages import count_bytes


def frozen(tiny_run: Any, family: str, sft: str = "sft", reward: str = "reward", **changes: Any) -> Pipeline:
    return Pipeline(tiny_run(family, sft, reward, **{"models.lora": None, "models.freeze_layers": 1, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_trunk_states_change_no_number(tiny_run: Any, family: str) -> None:
    cached, plain = frozen(tiny_run, family), frozen(tiny_run, family)
    for _ in range(2):
        rollout = cached.rollout()
        assert set(cached.score(rollout).trunks) == {"policy", "value"}
        cached.iterate()
        # The same without the states: every pass runs the whole transformer.
        whole = plain.advantages(plain.score(plain.rollout()))
        plain.update(replace(whole, scored=replace(whole.scored, trunks={})))
    ours, theirs = cached.trained(), plain.trained()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_top_equals_the_whole_transformer(tiny_run: Any, family: str) -> None:
    pipeline = frozen(tiny_run, family)
    backbone = pipeline.roles.policy.backbone
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        whole = backbone.transformer(input_ids=ids, use_cache=False).last_hidden_state
        states = backbone.trunk_states(ids)
        assert backbone.branch is not None
        top = backbone.branch.top(states, input_ids=ids, use_cache=False).last_hidden_state
        other = backbone.branch.top(torch.zeros_like(states), input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(top, whole, rtol=0, atol=0)
    assert not torch.allclose(other, whole)


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_layers_that_return_tuples_are_cut_too(family: str, tiny_run: Any, library: Any) -> None:
    """The reference and the reward model never run the bottom; they have to know all the same in which form it hands on."""
    pipeline = frozen(tiny_run, family)
    batch, mask = sequences([[5, 9, 30], [7, 8, 9]], [[40, 41, 42, 43], [50, 51, 52, 257]])
    ids, roles = batch.input_ids, pipeline.roles
    with torch.no_grad():
        along = replace(batch, trunks=roles.trunk_states(batch))
        logits = plain_model(library.path(family, "sft"))(input_ids=ids).logits[:, 2:-1]
        alone = logits.log_softmax(-1).gather(-1, ids[:, 3:, None])[..., 0]
        score = plain_model(library.path(family, "reward"), task="classifier")(input_ids=ids).logits[:, 0]
        logprobs, _ = roles.reference(along, mask, temperature=1.0)
        torch.testing.assert_close(logprobs, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(roles.reward.scores(along), score, rtol=1e-5, atol=1e-5)
    pipeline.iterate()


def test_the_trunk_runs_once_for_both_roles_and_never_in_the_epochs(tiny_run: Any) -> None:
    pipeline = frozen(tiny_run, "llama", **{"ppo.epochs": 3, "rollout.batch_rows": 4})
    scored = pipeline.advantages(pipeline.score(pipeline.rollout()))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    transformer = pipeline.roles.policy.backbone.transformer
    handle = transformer.layers[0].register_forward_hook(count)
    pipeline.update(scored)
    assert calls == 0
    pipeline.score(scored.scored.rollout)
    handle.remove()
    assert calls == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_storage_and_trained_weights(tiny_run: Any, family: str) -> None:
    pipeline = frozen(tiny_run, family)
    roles = pipeline.roles
    policy, reference = roles.policy.backbone.model, roles.reference.backbone.model
    mine = {name: tensor.untyped_storage().data_ptr() for name, tensor in policy.named_parameters()}
    other = {name: tensor.untyped_storage().data_ptr() for name, tensor in reference.named_parameters()}
    trained = {name for name, _ in roles.trained_parameters("policy")}
    assert trained == {name for name in mine if mine[name] != other[name]}
    bottom = {name for name in mine if ".0." in name or "embed" in name or "wte" in name or "wpe" in name}
    # An untied LM head belongs to the top; a tied one is the embedding and stays frozen.
    assert trained == set(mine) - bottom
    top_bytes = sum(policy.get_parameter(name).nbytes for name in trained)
    assert count_bytes([policy, reference]) == count_bytes([policy]) + top_bytes


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_reference_and_reward_stay_while_the_top_moves(tiny_run: Any, family: str) -> None:
    pipeline = frozen(tiny_run, family, **{"ppo.learning_rate": 1e-2})
    rollout = pipeline.rollout()
    before, weights = pipeline.score(rollout), pipeline.trained()
    pipeline.iterate()
    after = pipeline.score(rollout)
    assert torch.equal(before.ref_logprobs, after.ref_logprobs)
    assert torch.equal(before.scores, after.scores)
    assert all(not torch.equal(weights[name], tensor) for name, tensor in pipeline.trained().items())


def test_checkpoints_that_are_adapters_are_added_into_the_weights(tiny_run: Any, library: Any) -> None:
    """Reference and reward model are the checkpoints, not their bases."""
    roles = frozen(tiny_run, "llama", sft="sft-lora", reward="reward-lora").roles
    language = plain_model(library.path("llama", "sft-lora"))
    classifier: Any = plain_model(library.path("llama", "reward-lora"), task="classifier")
    one, mask = sequences([[5, 9, 30]], [[40, 41, 42]])
    with torch.no_grad():
        logits = language(input_ids=one.input_ids, use_cache=False).logits[0, 2:5]
        expected = torch.log_softmax(logits, -1)[range(3), [40, 41, 42]]
        for role in (roles.reference, roles.policy):
            torch.testing.assert_close(role(one, mask, temperature=1.0)[0][0], expected, rtol=1e-4, atol=1e-5)
        score = classifier(input_ids=one.input_ids, use_cache=False).logits[0]
        torch.testing.assert_close(roles.reward.scores(one), score, rtol=1e-4, atol=1e-5)


def test_quantization_beside_frozen_layers_is_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.quantization=8bit finds nothing .*freeze_layers=1"):
        frozen(tiny_run, "llama", **{"models.quantization": "8bit"})


def test_nothing_left_to_train_is_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"freeze_layers=2 leaves nothing to train.*use at most 1"):
        frozen(tiny_run, "llama", **{"models.freeze_layers": 2})


def test_freezing_layers_under_lora_is_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match="freeze_layers=1 is for full fine-tuning"):
        Pipeline(tiny_run("llama", **{"models.freeze_layers": 1, "models.lora": {"r": 4}}))


@pytest.mark.parametrize(
    ("family", "lora", "reward"),
    [
        ("llama", None, "reward"),
        ("llama", {"r": 4}, "reward"),
        ("llama", {"r": 4}, "reward-lora"),
        ("opt", None, "reward"),  # its last states are a projection, half as wide
    ],
)
def test_a_value_head_on_the_policys_states(tiny_run: Any, family: str, lora: Any, reward: str) -> None:
    changes = {"models.lora": lora, "models.value_model": "trunk", "models.value_head_init": "zero"}
    pipeline = Pipeline(tiny_run(family, reward=reward, **changes))
    roles = pipeline.roles
    assert roles.value.backbone is roles.policy.backbone
    assert [name for name, _ in roles.trained_parameters("value")] == ["score.weight"]
    scored = pipeline.score(pipeline.rollout())
    assert not scored.values.any()
    before = pipeline.trained()
    pipeline.iterate()
    pipeline.iterate()
    moved = pipeline.trained()
    assert all(not torch.equal(before[name], moved[name]) for name in before)


def test_a_reward_adapter_beside_a_value_head_on_the_policy_stays_an_adapter(tiny_run: Any, library: Any) -> None:
    """There is no trained twin whose weights it was added into."""
    changes = {"models.value_model": "trunk", "models.value_head_init": "zero"}
    pipeline = frozen(tiny_run, "llama", reward="reward-lora", **changes)
    batch, _ = sequences([[5, 9, 30], [7, 8, 9]], [[40, 41, 42, 43], [50, 51, 52, 257]])
    alone = plain_model(library.path("llama", "reward-lora"), task="classifier")
    with torch.no_grad():
        scores = alone(input_ids=batch.input_ids).logits[:, 0]
        torch.testing.assert_close(pipeline.roles.reward.scores(batch), scores, rtol=0, atol=0)
    view = pipeline.roles.plan.view("reward")
    assert (view.backbone, view.adapter) == ("reward", "reward")
    pipeline.iterate()


def test_a_score_head_on_other_states_is_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"set models\.value_head_init=zero"):
        Pipeline(tiny_run("llama", **{"models.value_model": "trunk"}))
