"""Passes without gradients that compute as a training pass does."""

from __future__ import annotations

import pytest
import torch

from pipeline import Pipeline
from quartet.kernels.library import are_there
from quartet.models.as_in_training import as_in_training
from quartet.models.precision import autocast
from tiny import TinyRun

IDS = torch.tensor([[5, 9, 30, 40, 41, 7], [64, 65, 66, 67, 68, 3]])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_those_of_a_pass_with_gradients(tiny_run: TinyRun, dtype: str, lora: bool) -> None:
    changes = {"models.dtype": dtype} | ({"models.lora": {"r": 4}} if lora else {})
    backbone = Pipeline(tiny_run("llama", **changes)).roles.policy.backbone
    with backbone.role("policy" if lora else None), autocast(torch.device("cpu"), getattr(torch, dtype)):
        expected = backbone.model(input_ids=IDS, use_cache=False)[0]
        with torch.no_grad():
            plain = backbone.model(input_ids=IDS, use_cache=False)[0]
            with as_in_training():
                found = backbone.model(input_ids=IDS, use_cache=False)[0]
    assert expected.requires_grad
    assert torch.equal(found, expected)
    assert not are_there() or not torch.equal(plain, expected)
