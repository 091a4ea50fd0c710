"""Whether two checkpoints rest on the same weights is judged by content, not by path."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import edit_json, write_adapter
from quartet.models.base_comparison import same_base
from quartet.models.checkpoint_info import read_checkpoint


@pytest.fixture
def copied(library: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(library.path("llama", "sft"), tmp_path / "copy"))


def judged(library: Any, base: Path, tmp_path: Path) -> bool:
    adapter = write_adapter(tmp_path / "adapter", base, task="classifier")
    sft = read_checkpoint(str(library.path("llama", "sft")), "sft")
    return same_base(sft, read_checkpoint(str(adapter), "reward"))


def test_a_copy_is_the_same_base(library: Any, copied: Path, tmp_path: Path) -> None:
    assert judged(library, copied, tmp_path)


def test_other_weights_are_not(library: Any, tmp_path: Path) -> None:
    assert not judged(library, library.path("llama", "reward"), tmp_path)


@pytest.mark.parametrize(
    "changed",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"],
)
def test_one_changed_tensor_is_noticed(changed: str, library: Any, copied: Path, tmp_path: Path) -> None:
    """A base of which only a part was trained further gives other scores under the same adapter."""
    weights = load_file(copied / "model.safetensors")
    weights[changed] += 0.5
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert not judged(library, copied, tmp_path)


def test_fewer_layers_are_not(library: Any, copied: Path, tmp_path: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    edit_json(copied / "config.json", num_hidden_layers=1)
    assert not judged(library, copied, tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
        {"is_decoder": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ],
)
def test_the_same_weights_that_compute_otherwise_are_not(
    changed: dict[str, Any], library: Any, copied: Path, tmp_path: Path
) -> None:
    """The reward model would run under the policy's configuration, and its scores would be others."""
    edit_json(copied / "config.json", **changed)
    assert not judged(library, copied, tmp_path)


def test_labels_and_special_tokens_make_no_other_base(library: Any, copied: Path, tmp_path: Path) -> None:
    edit_json(copied / "config.json", pad_token_id=5, attention_dropout=0.1, id2label={"0": "a"}, use_cache=False)
    edit_json(copied / "config.json", dtype="bfloat16", architectures=["LlamaForSequenceClassification"])
    assert judged(library, copied, tmp_path)
