"""Heads: the value head starts as the score head, both in float32; a head that would be random or changed is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import FAMILIES, FURTHER, edit_json, plain_model, write_model
from pipeline import Pipeline, hidden_of, sequences
from quartet.errors import CheckpointError
from tiny import TinyRun

PROMPTS = [[5, 9, 30], [7], [64, 65]]
RESPONSES = [[40, 41, 42, 43], [50, 51], [60, 61, 257]]
PLANS: dict[str, dict[str, Any]] = {
    "separate": {"models.lora": None},
    "paired": {"models.lora": {"r": 5}, "models.sharing": "paired"},
    "single": {"models.lora": {"r": 5}, "models.sharing": "single", "reward": "reward-lora"},
}


def values_at_the_end(pipeline: Pipeline) -> torch.Tensor:
    """Value after the last token of each sequence, read where a further token would be."""
    batch, mask = sequences(PROMPTS, RESPONSES)
    after = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.bool)
    after[torch.arange(len(mask)), mask.sum(-1)] = True
    with torch.no_grad():
        return pipeline.roles.value(batch, after)[after]


def scores(pipeline: Pipeline) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.roles.reward.scores(sequences(PROMPTS, RESPONSES)[0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_value_at_the_last_token_starts_as_the_score(family: str, plan: str, tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(family, **PLANS[plan]))
    torch.testing.assert_close(values_at_the_end(pipeline), scores(pipeline), rtol=1e-5, atol=1e-5)
    assert scores(pipeline).std() > 0.01


@pytest.mark.parametrize("family", FURTHER)
def test_further_families_compute_what_they_compute_alone(family: str, tiny_run: TinyRun, library: Any) -> None:
    """What else a family's forward asks its transformer for (a router's logits, its decoder) is no part of a head."""
    pipeline = Pipeline(tiny_run(family))
    batch, mask = sequences([[5, 9, 30], [7, 8, 9]], [[40, 41, 42, 43], [50, 51, 52, 257]])
    ids = batch.input_ids
    with torch.no_grad():
        logits = plain_model(library.path(family, "sft"))(input_ids=ids).logits[:, 2:-1]
        score = plain_model(library.path(family, "reward"), task="classifier")(input_ids=ids).logits[:, 0]
        logprobs, _ = pipeline.roles.policy(batch, mask, temperature=1.0)
        alone = logits.log_softmax(-1).gather(-1, ids[:, 3:, None])[..., 0]
        torch.testing.assert_close(logprobs, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pipeline.roles.reward.scores(batch), score, rtol=1e-5, atol=1e-5)
    pipeline.iterate()


def test_value_head_may_start_at_zero(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**{"models.value_head_init": "zero"}))
    assert torch.equal(values_at_the_end(pipeline), torch.zeros(3))
    assert scores(pipeline).abs().min() > 0


def test_training_the_value_head_leaves_the_score_head(tiny_run: TinyRun, library: Any) -> None:
    pipeline = Pipeline(tiny_run(**PLANS["single"]))
    stored = load_file(library.path("llama", "reward-lora") / "adapter_model.safetensors")
    weight = stored["base_model.model.score.weight"]
    assert torch.equal(pipeline.roles.reward.head.weight, weight)
    assert torch.equal(pipeline.roles.value.head.weight, weight)
    pipeline.iterate()
    assert torch.equal(pipeline.roles.reward.head.weight, weight)
    assert not torch.equal(pipeline.roles.value.head.weight, weight)


@pytest.mark.parametrize("plan", PLANS)
def test_heads_stay_in_float32(plan: str, tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**PLANS[plan], **{"models.dtype": "bfloat16"}))
    roles = pipeline.roles
    assert roles.reward.backbone.dtype == torch.bfloat16
    assert {roles.reward.head.weight.dtype, roles.value.head.weight.dtype} == {torch.float32}
    assert {weights.dtype for weights in pipeline.trained().values()} == {torch.float32}
    seen = scores(pipeline)
    assert seen.dtype == torch.float32
    assert not torch.equal(seen, seen.bfloat16().float())
    exact = scores(Pipeline(tiny_run(**PLANS[plan])))
    torch.testing.assert_close(seen, exact, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str, tiny_run: TinyRun, library: Any) -> None:
    """Soft-caps and scales of a family included, tied embeddings or not."""
    view = Pipeline(tiny_run(family)).roles.policy
    model: Any = plain_model(library.path(family, "sft"))
    ids = torch.tensor([[5, 9, 30, 40, 41, 42]])
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0]
        assert torch.equal(view.head(hidden_of(view.backbone, ids, view.adapter)[0]), expected)
    if family == "gemma2":
        assert expected.abs().max() < 5.0 < (expected / 5.0).atanh().abs().max() * 5.0


@pytest.fixture
def damaged(library: Any, tmp_path: Path) -> Path:
    """A copy of the reward checkpoint, to be changed."""
    return Path(shutil.copytree(library.path("llama", "reward"), tmp_path / "damaged"))


def refusal(tiny_run: TinyRun, reward: Path, **changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Pipeline(tiny_run(**{"models.reward": str(reward), **changes}))
    message = str(caught.value)
    assert message.startswith(f"models.reward={str(reward)!r}")
    assert "\n" not in message
    return message


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_head_is_refused(damaged: Path, tiny_run: TinyRun) -> None:
    rewrite(damaged, lambda weights: weights.pop("score.weight"))
    assert "score.weight is missing" in refusal(tiny_run, damaged)


def test_head_bias_is_refused(damaged: Path, tiny_run: TinyRun) -> None:
    rewrite(damaged, lambda weights: weights.update({"score.bias": torch.ones(1)}))
    assert "holds score.bias, which transformers would drop" in refusal(tiny_run, damaged)


def test_head_of_another_name_is_refused(damaged: Path, tiny_run: TinyRun) -> None:
    rewrite(damaged, lambda weights: weights.update({"v_head.weight": weights.pop("score.weight")}))
    assert "score.weight is missing (it holds v_head.weight instead)" in refusal(tiny_run, damaged)


def test_two_labels_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "two", "llama", task="classifier", num_labels=2)
    assert "has num_labels=2" in refusal(tiny_run, folder)


def test_two_rows_under_a_configuration_of_one_label_are_refused(damaged: Path, tiny_run: TinyRun) -> None:
    rewrite(damaged, lambda weights: weights.update({"score.weight": weights["score.weight"].repeat(2, 1)}))
    assert "has num_labels=2" in refusal(tiny_run, damaged)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_language_model_as_reward_is_refused(family: str, tiny_run: TinyRun, library: Any) -> None:
    message = refusal(tiny_run, library.path(family, "sft"), family=family)
    assert "has no scalar head: score.weight is missing" in message


def test_bare_transformer_as_reward_is_refused_in_few_words(tiny_run: TinyRun, damaged: Path) -> None:
    rewrite(
        damaged, lambda weights: [weights.update({k.removeprefix("model."): weights.pop(k)}) for k in list(weights)]
    )
    rewrite(damaged, lambda weights: weights.pop("score.weight"))
    message = refusal(tiny_run, damaged)
    assert "score.weight is missing" in message
    assert len(message) < 500


def test_missing_layer_is_refused(damaged: Path, tiny_run: TinyRun) -> None:
    rewrite(damaged, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in refusal(tiny_run, damaged)


def test_layers_that_the_configuration_does_not_know_are_refused(damaged: Path, tiny_run: TinyRun) -> None:
    edit_json(damaged / "config.json", num_hidden_layers=1)
    assert "holds the unused model.layers.1." in refusal(tiny_run, damaged)


def test_other_shape_is_refused(damaged: Path, tiny_run: TinyRun) -> None:
    edit_json(damaged / "config.json", intermediate_size=24)
    assert "model.layers.0.mlp" in refusal(tiny_run, damaged)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_classifier_as_sft_is_refused(
    family: str, adapter: bool, tiny_run: TinyRun, library: Any, tmp_path: Path
) -> None:
    """A language model without its LM head would get a random one; so would the base of an adapter."""
    folder = library.path(family, "reward")
    if adapter:
        folder = Path(shutil.copytree(library.path(family, "sft-lora"), tmp_path / "adapter"))
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(library.path(family, "reward")))
    changes: dict[str, Any] = {"models.sft": str(folder), "models.lora": {}}
    if adapter and family == "qwen2":
        Pipeline(tiny_run(family, **changes))  # the head is the embedding, which a classifier has too
        return
    with pytest.raises(CheckpointError, match=r"models\.sft=") as caught:
        Pipeline(tiny_run(family, **changes))
    assert ("score.weight" if family == "qwen2" else "lm_head.weight") in str(caught.value)


def test_reward_adapter_without_its_head_is_refused(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(library.path("llama", "reward-lora"), tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.score.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    for plan in ("paired", "single"):
        message = refusal(tiny_run, folder, **{"models.lora": {}, "models.sharing": plan})
        assert "score.weight is missing" in message


def test_reward_adapter_may_leave_the_head_to_its_base(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(library.path("llama", "reward-on-reward"), tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.score.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    pipeline = Pipeline(tiny_run(**{"models.lora": {}, "models.reward": str(folder)}))
    base = load_file(library.path("llama", "reward") / "model.safetensors")
    assert torch.equal(pipeline.roles.reward.head.weight, base["score.weight"])


@pytest.mark.parametrize(("device", "chunks"), [("cpu", [128, 22]), ("cuda", [150])])
def test_a_gpu_computes_the_logits_of_more_tokens_at_once(device: str, chunks: list[int], tiny_run: TinyRun) -> None:
    """Weights that say that they run there; here they do not leave the CPU."""
    policy = Pipeline(tiny_run(**{"models.dtype": "float32"})).roles.policy
    policy.backbone.weights.device = torch.device(device)
    batch, mask = sequences([[5, 9, 30]], [list(range(3, 153))])
    seen: list[int] = []
    policy.backbone.model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    with torch.no_grad():
        policy(batch, mask, temperature=1.0)
    assert seen == chunks
