"""The result of a run, loaded with transformers and PEFT alone: the same logits, the same values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import EOS, PAD, plain_model
from pipeline import Pipeline, hidden_of
from quartet.run.export import export
from tiny import TinyRun

IDS = torch.tensor([[5, 9, 30, 40, 41, 42], [64, 65, 66, 67, 68, 69]])
LORA = {"models.lora": {"r": 5, "alpha": 20.0}}
PLANS: dict[str, dict[str, Any]] = {
    "full": {"models.lora": None},
    "separate": {**LORA, "models.sharing": "separate"},
    "paired": {**LORA, "models.sharing": "paired"},
    "single": {**LORA, "models.sharing": "single"},
}


def trained(tiny_run: TinyRun, tmp_path: Path, family: str, sft: str, reward: str, **changes: Any) -> Pipeline:
    """One iteration, then the export to tmp_path."""
    pipeline = Pipeline(tiny_run(family, sft, reward, **changes, **{"ppo.learning_rate": 1e-2}))
    pipeline.iterate()
    inputs = pipeline.inputs
    export(pipeline.roles, tmp_path, sft=inputs.sft, reward=inputs.reward, tokenizer=inputs.tokenizer)
    return pipeline


def ours(pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, L, V]` of the policy and values `[n]` after the last token."""
    policy, value = pipeline.roles.policy, pipeline.roles.value
    with torch.no_grad():
        with policy.active():
            rows = hidden_of(policy.backbone, IDS, policy.adapter).flatten(0, 1)
            logits = policy.head(rows).view(*IDS.shape, -1)
        return logits, value.head(hidden_of(value.backbone, IDS, value.adapter)[:, -1])


def load_policy(folder: Path) -> Any:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    is_adapter = (folder / "adapter_config.json").is_file()
    with peft_warnings():
        return (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder).eval()


def load_value(folder: Path) -> Any:
    return plain_model(folder, task="classifier")


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Passes over what PEFT says of itself: its use of deprecated names, and Conv1D layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*|.*fan_in_fan_out.*")
        yield


@pytest.mark.parametrize(
    ("family", "plan", "sft", "reward"),
    [
        *((family, "full", "sft", "reward") for family in ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2")),
        ("llama", "full", "sft-lora", "reward-on-reward"),
        ("qwen2", "separate", "sft", "reward"),
        *((family, "paired", "sft", "reward") for family in ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2")),
        ("llama", "paired", "sft-lora", "reward-on-reward"),
        ("llama", "single", "sft", "reward-lora"),
        ("qwen2", "single", "sft-lora", "reward-lora"),
        ("gpt2", "single", "sft", "reward-lora"),
    ],
)
def test_policy_and_value_load_without_quartet(
    family: str, plan: str, sft: str, reward: str, tiny_run: TinyRun, tmp_path: Path, library: Any
) -> None:
    pipeline = trained(tiny_run, tmp_path, family, sft, reward, **PLANS[plan])
    # In float64, where the order in which products are summed up does not show; roles with adapters compute in float32, and
    # add them up in another order than PEFT.
    dtype, apart = torch.float64, 2e-5
    if plan == "full":
        apart = 1e-9
        for role in (pipeline.roles.policy, pipeline.roles.value):
            role.backbone.double()
    logits, values = ours(pipeline)
    with torch.no_grad():
        seen = load_policy(tmp_path / "policy").to(dtype)(input_ids=IDS, use_cache=False).logits
        before = load_policy(library.path(family, sft))(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(logits.to(dtype), seen, rtol=0, atol=apart)
        assert (seen - before).abs().max() > 0.01
        scores = load_value(tmp_path / "value").to(dtype)(input_ids=IDS, use_cache=False).logits[:, 0]
        torch.testing.assert_close(values.to(dtype), scores, rtol=1e-6, atol=max(apart, 1e-6))  # heads are float32
        old = load_value(library.path(family, reward))(input_ids=IDS, use_cache=False).logits[:, 0]
        assert (scores - old).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_of_padded_rows(family: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The classifier finds the last token of a padded row by the pad token that is saved with it."""
    pipeline = trained(tiny_run, tmp_path, family, "sft", "reward")
    _, values = ours(pipeline)
    padded = torch.cat([IDS, torch.full((2, 3), PAD)], dim=1)
    mask = (torch.arange(9) < 6).long().expand(2, -1)
    with torch.no_grad():
        seen = load_value(tmp_path / "value")(input_ids=padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(seen, values, rtol=0, atol=1e-5)


def test_whole_models_are_saved_as_what_they_are(tiny_run: TinyRun, tmp_path: Path) -> None:
    trained(tiny_run, tmp_path, "gpt2", "sft", "reward")
    policy, value = (json.loads((tmp_path / role / "config.json").read_text()) for role in ("policy", "value"))
    assert policy["architectures"] == ["GPT2LMHeadModel"]
    assert value["architectures"] == ["GPT2ForSequenceClassification"]
    for config in (policy, value):
        assert config["resid_pdrop"] == 0.1
        assert config["dtype"] == "float32"
        assert config.get("use_cache", True)
    assert (policy["eos_token_id"], value["pad_token_id"]) == (EOS, PAD)
    assert len(value["id2label"]) == 1


def test_tied_weights_are_saved_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    from safetensors import safe_open

    trained(tiny_run, tmp_path, "qwen2", "sft", "reward")
    with safe_open(tmp_path / "policy" / "model.safetensors", framework="pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118 - no mapping
        assert "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118


def test_exported_models_serve_as_inputs_again(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Of another run: the policy as SFT checkpoint, the value model as reward checkpoint."""
    for plan, folder in (("full", tmp_path / "one"), ("paired", tmp_path / "two")):
        first = trained(tiny_run, folder, "llama", "sft", "reward", **PLANS[plan])
        again = tiny_run(**{"models.sft": str(folder / "policy"), "models.reward": str(folder / "value")})
        second = Pipeline({**again, "models": {**again["models"], "lora": {"r": 5}}})
        assert second.inputs.plan.name == "paired"
        logits, values = ours(first)
        with torch.no_grad():
            reference, reward = second.roles.reference, second.roles.reward
            with reference.active():
                seen = reference.head(hidden_of(reference.backbone, IDS, reference.adapter)[0])
            scores = reward.head(hidden_of(reward.backbone, IDS, reward.adapter)[:, -1])
        torch.testing.assert_close(seen, logits[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(scores, values, rtol=0, atol=2e-5)


def test_tokenizer_goes_along(tiny_run: TinyRun, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pipeline = trained(tiny_run, tmp_path, "llama", "sft", "reward", **PLANS["paired"])
    for role in ("policy", "value"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / role)
        assert tokenizer.get_vocab() == pipeline.inputs.tokenizer.get_vocab()
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)


@pytest.mark.parametrize("plan", ["paired", "single"])
def test_value_adapter_under_plain_auto_classes(plan: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Both ways of loading the adapter folder in one call."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    reward = "reward-lora" if plan == "single" else "reward"
    pipeline = trained(tiny_run, tmp_path, "llama", "sft", reward, **PLANS[plan])
    _, values = ours(pipeline)
    for loader in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        with peft_warnings():
            model = loader.from_pretrained(tmp_path / "value", num_labels=1).eval()
        with torch.no_grad():
            seen = model(input_ids=IDS, use_cache=False).logits[:, 0]
        torch.testing.assert_close(seen, values, rtol=0, atol=2e-5, msg=loader.__name__)


@pytest.mark.parametrize("plan", ["full", "paired"])
def test_bfloat16_keeps_trained_weights_in_float32(plan: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trained(tiny_run, tmp_path, "llama", "sft", "reward", **PLANS[plan], **{"models.dtype": "bfloat16"})
    for role in ("policy", "value"):
        file = next((tmp_path / role).glob("*model.safetensors"))
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_what_was_trained_above_frozen_layers_in_bfloat16_loads_unrounded(tiny_run: TinyRun, tmp_path: Path) -> None:
    """transformers loads every weight in the configuration's dtype."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trained(tiny_run, tmp_path, "llama", "sft", "reward", **{"models.dtype": "bfloat16", "models.freeze_layers": 1})
    for role, load in (("policy", AutoModelForCausalLM), ("value", AutoModelForSequenceClassification)):
        stored = load_file(tmp_path / role / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
        loaded = load.from_pretrained(tmp_path / role).state_dict()
        assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in stored.items())


def test_exporting_twice_leaves_no_trace_of_the_first(tiny_run: TinyRun, tmp_path: Path) -> None:
    pipeline = trained(tiny_run, tmp_path, "llama", "sft", "reward")
    (tmp_path / "policy" / "stray").write_text("old")
    inputs = pipeline.inputs
    export(pipeline.roles, tmp_path, sft=inputs.sft, reward=inputs.reward, tokenizer=inputs.tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "value", "prompts.txt"}
    assert not (tmp_path / "policy" / "stray").exists()
