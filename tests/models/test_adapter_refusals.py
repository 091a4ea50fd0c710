"""Adapters that would change the base, lose weights or sit on a head are refused; names match exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints import edit_json, write_adapter
from pipeline import Pipeline
from quartet.errors import CheckpointError, ConfigError
from quartet.models.adapter_files import adapter_state
from quartet.models.adapters import adapter_parameters


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_starts_that_rewrite_the_base_are_refused(start: str, library: Any, tiny_run: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"))
    edit_json(adapter / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(CheckpointError, match=rf"init_lora_weights='{start}', which changes the base's own weights"):
        Pipeline(tiny_run("llama", **{"models.sft": str(adapter), "models.lora": {"r": 4}}))


def test_another_revision_of_the_base_is_refused(library: Any, tiny_run: Any, tmp_path: Path) -> None:
    """PEFT would load it; the main revision's weights are others."""
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"))
    edit_json(adapter / "adapter_config.json", revision="v2")
    Pipeline(tiny_run("llama", **{"models.sft": str(adapter), "models.lora": {"r": 4}}))  # a folder has no revisions
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="organisation/base")
    with pytest.raises(CheckpointError, match="trained on revision 'v2' of 'organisation/base'"):
        Pipeline(tiny_run("llama", **{"models.sft": str(adapter), "models.lora": {"r": 4}}))


def test_an_adapter_that_repeats_layers_is_refused(library: Any, tiny_run: Any, tmp_path: Path) -> None:
    """Injecting it would give the other roles of the backbone more layers too."""
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"), layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(CheckpointError, match="repeats layers of its base"):
        Pipeline(tiny_run("llama", **{"models.sft": str(adapter), "models.lora": {"r": 4}}))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_tied_embeddings_is_not_merged(
    target: str, library: Any, tiny_run: Any, tmp_path: Path
) -> None:
    """Merged, it would change the other end too: other log-probabilities than PEFT's."""
    adapter = write_adapter(tmp_path / "adapter", library.path("qwen2", "sft"), target_modules=["q_proj", target])
    _drop_whole_modules(adapter)
    with pytest.raises(CheckpointError, match=rf"adapts .*{target}, whose weight another module shares"):
        Pipeline(tiny_run("qwen2", **{"models.sft": str(adapter)}))


def _drop_whole_modules(adapter: Path) -> None:
    """PEFT saves an adapted embedding's own weight too unless told not to."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)


def test_targets_that_are_no_expression_are_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.lora\.target_modules='q_proj\(' cannot be applied"):
        Pipeline(tiny_run("llama", **{"models.lora": {"r": 4, "target_modules": "q_proj("}}))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "v_prj"], r"target_modules has 'v_prj', and no layer has that name; did you mean v_proj\?"),
        (["q_proj", "wte"], r"target_modules has 'wte', .*; correct it or leave it out"),
        (["q_proj", "_proj"], r"target_modules has '_proj', "),
    ],
)
def test_a_target_that_names_nothing_is_refused(targets: list[str], said: str, tiny_run: Any) -> None:
    """PEFT trains the others and says nothing."""
    with pytest.raises(ConfigError, match=said):
        Pipeline(tiny_run("llama", **{"models.lora": {"r": 4, "target_modules": targets}}))


def test_a_target_may_be_a_layer_of_one_of_two_families(library: Any, tiny_run: Any) -> None:
    """c_attn is GPT-2's, which has no q_proj."""
    lora = {"r": 4, "target_modules": ["q_proj", "layers.1.self_attn.v_proj", "c_attn", "attn.c_proj"]}
    pipeline = Pipeline(
        tiny_run("llama", **{"models.reward": str(library.path("gpt2", "reward")), "models.lora": lora})
    )
    adapted = {
        role: {
            name.split(".lora_")[0].split(".")[-1]
            for name, _ in pipeline.roles.trained_parameters(role)
            if ".lora_" in name
        }
        for role in ("policy", "value")
    }
    assert adapted == {"policy": {"q_proj", "v_proj"}, "value": {"c_attn", "c_proj"}}


@pytest.mark.parametrize("changes", [{"target_modules": "q_proj("}, {"r": "x"}, {"target_modules": 5}])
def test_a_damaged_adapter_configuration_is_refused(
    changes: dict[str, Any], library: Any, tiny_run: Any, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"), task="classifier")
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match="does not fit its base"):
        Pipeline(tiny_run("llama", **{"models.reward": str(adapter), "models.lora": {"r": 4}}))


def test_an_adapter_with_lora_biases_is_not_continued(library: Any, tiny_run: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", library.path("llama", "sft"), lora_bias=True)
    with pytest.raises(CheckpointError, match="DoRA or trained biases"):
        Pipeline(tiny_run("llama", **{"models.sft": str(adapter), "models.lora": {"r": 4}}))


def test_a_head_is_no_target(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match="takes in the head lm_head"):
        Pipeline(tiny_run("llama", **{"models.lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}}))


def test_a_module_of_the_adapters_name_is_not_the_adapter() -> None:
    layer = nn.Module()
    layer.lora_A = nn.ModuleDict({"value": nn.Linear(2, 2, bias=False), "policy": nn.Linear(2, 2, bias=False)})
    attention = nn.Module()
    attention.value = layer
    model = nn.Module()
    model.attention = attention
    assert [name for name, _ in adapter_parameters(model, "value")] == ["attention.value.lora_A.value.weight"]
    assert list(adapter_state(model, "value")) == ["base_model.model.attention.value.lora_A.weight"]


def test_a_base_with_other_embedding_rows_is_another_base(library: Any, tmp_path: Path) -> None:
    """The middle of an embedding too large to be looked at only at its ends."""
    from safetensors.torch import load_file, save_file

    from checkpoints import write_model
    from quartet.models.base_comparison import same_base
    from quartet.models.checkpoint_info import read_checkpoint

    first = write_model(tmp_path / "first", "llama", vocab_size=70_000)
    second = write_model(tmp_path / "second", "llama", vocab_size=70_000)
    one, other = read_checkpoint(str(first), "sft"), read_checkpoint(str(second), "reward")
    assert same_base(one, other)
    tensors = load_file(second / "model.safetensors")
    tensors["model.embed_tokens.weight"][35_000] += torch.ones(())
    save_file(tensors, second / "model.safetensors", metadata={"format": "pt"})
    assert not same_base(one, read_checkpoint(str(second), "reward"))


def test_a_policy_with_more_tokens_than_the_reward_model_reads_is_refused(tiny_run: Any, tmp_path: Path) -> None:
    from checkpoints import VOCABULARY, write_model

    wide = write_model(tmp_path / "wide", "llama", vocab_size=VOCABULARY + 40)
    with pytest.raises(CheckpointError, match=rf"can produce {VOCABULARY + 40} token ids.*embeddings for {VOCABULARY}"):
        Pipeline(tiny_run("llama", **{"models.sft": str(wide)}))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("rollout.stop", True, "rollout.stop=True is not possible: a number or name is needed"),
        ("ppo.iterations", True, "ppo.iterations=True is not possible: a number or name is needed"),
    ],
)
def test_switches_are_not_numbers(tiny_run: Any, key: str, value: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Pipeline(tiny_run("llama", **{key: value}))


def test_a_penalty_that_would_fall_on_every_episode_is_refused(tiny_run: Any) -> None:
    with pytest.raises(ConfigError, match="would fall on every episode"):
        Pipeline(tiny_run("llama", **{"rollout.stop": None, "ppo.missing_eos_penalty": 1.0}))
