"""Frozen checkpoints in another dtype are converted once, exactly, and then mapped instead of copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_model
from pipeline import Pipeline
from quartet.models.cache import largest_to_convert, mappable
from quartet.models.checkpoint_info import read_checkpoint, read_headers


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "cache"))


def test_the_copy_holds_every_tensor_rounded_as_torch_rounds(library: Any) -> None:
    source = library.path("llama", "sft")
    folder = Path(mappable(read_checkpoint(str(source), "sft"), torch.bfloat16))
    original, converted = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert original.keys() == converted.keys()
    assert all(torch.equal(converted[name], tensor.to(torch.bfloat16)) for name, tensor in original.items())
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert {t.dtype for t in read_headers([folder / "model.safetensors"]).values()} == {"BF16"}


def test_a_checkpoint_in_the_right_dtype_is_used_as_it_is(library: Any, tmp_path: Path) -> None:
    source = library.path("llama", "sft")
    assert mappable(read_checkpoint(str(source), "sft"), torch.float32) == str(source)
    assert not (tmp_path / "cache").exists()


def test_converted_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "gpt2", seed=1)
    first = mappable(read_checkpoint(str(source), "sft"), torch.bfloat16)
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert mappable(read_checkpoint(str(source), "sft"), torch.bfloat16) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    write_model(source, "gpt2", seed=2)
    assert mappable(read_checkpoint(str(source), "sft"), torch.bfloat16) != first


def test_what_is_still_to_be_converted(library: Any) -> None:
    """A tensor at a time, the largest of which decides what that takes."""
    source = library.path("llama", "sft")
    info = read_checkpoint(str(source), "sft")
    largest = max(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert largest_to_convert(info, torch.float32) == 0
    assert largest_to_convert(info, torch.bfloat16) == 2 * largest
    mappable(info, torch.bfloat16)
    assert largest_to_convert(info, torch.bfloat16) == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's view of a process")
def test_frozen_weights_are_mapped_from_the_converted_file(tiny_run: Any, tmp_path: Path) -> None:
    tree = tiny_run("llama", **{"models.dtype": "bfloat16", "models.lora": {"r": 4}})
    pipeline = Pipeline(tree)
    weight = pipeline.roles.policy.backbone.transformer.get_submodule("layers.0.mlp.up_proj").base_layer.weight
    assert weight.dtype == torch.bfloat16
    address = weight.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in re.match(r"([0-9a-f]+)-([0-9a-f]+)", line).groups())  # type: ignore[union-attr]
        if low <= address < high:
            assert str(tmp_path / "cache" / "converted") in line
            return
    pytest.fail("the weight's address is in no mapping")
