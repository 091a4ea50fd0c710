"""Checkpoints that are a configuration and a header: sparse files of any size."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., dict[str, Any]]


@pytest.fixture
def hollow(tmp_path: Path) -> Write:
    """hollow(**llama_config, changes): values of a run over two Llama checkpoints without a weight in them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    def write(sizes: dict[str, Any], **changes: Any) -> dict[str, Any]:
        for name, loader in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
            folder = tmp_path / name
            config = LlamaConfig(**sizes, num_labels=1, pad_token_id=0)
            with torch.device("meta"):
                model = loader.from_config(config)
            config.save_pretrained(folder)
            shapes = {key: list(p.shape) for key, p in model.named_parameters()}
            write_header(folder / "model.safetensors", shapes)
        values: dict[str, Any] = {
            "models": {"sft": str(tmp_path / "sft"), "reward": str(tmp_path / "reward"), "device": "cpu"},
            "data": {"prompts": "unread"},
        }
        for key, value in changes.items():
            section, field = key.split(".")
            values.setdefault(section, {})[field] = value
        return values

    return write


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bfloat16 tensors that takes no room on disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
