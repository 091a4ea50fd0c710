"""Pages of mapped weights that leave memory between uses, and weights that must not be lost with them."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import pytest
import torch

from pipeline import Pipeline
from quartet.models.mapped import PAGEMAP, can_drop_pages
from tiny import TinyRun

pytestmark = pytest.mark.skipif(not can_drop_pages(), reason="needs /proc/self/pagemap")


def held(pipeline: Pipeline, name: str) -> int:
    """Pages of a backbone's frozen weights that are in this process's memory."""
    found = 0
    with Path(PAGEMAP).open("rb", buffering=0) as file:
        for parameter in pipeline.roles.backbones[name].model.parameters():
            start, page = parameter.data_ptr(), mmap.PAGESIZE
            for number in range(-(-start // page), (start + parameter.nbytes) // page):
                file.seek(8 * number)
                found += struct.unpack("Q", file.read(8))[0] >> 63
    return found


def test_frozen_pages_leave_when_no_role_needs_them(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    pipeline.score(pipeline.rollout())
    assert held(pipeline, "reward") > 0  # scoring ends with it
    pipeline.roles.use("policy", "value")
    assert held(pipeline, "reference") == held(pipeline, "reward") == 0
    assert held(pipeline, "policy") > 0


def test_the_numbers_stay_the_same(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    rollout = pipeline.rollout()
    first = pipeline.score(rollout)
    pipeline.roles.use("policy")
    second = pipeline.score(rollout)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.ref_logprobs, second.ref_logprobs)
    assert torch.equal(first.values, second.values)


def test_what_was_written_to_is_not_dropped(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    weight = pipeline.roles.backbones["reward"].model.get_input_embeddings().weight
    with torch.no_grad():
        weight.add_(1.0)  # type: ignore[operator]
    expected = weight.clone()  # type: ignore[operator]
    pipeline.roles.use("reward")
    pipeline.roles.use("policy")
    assert torch.equal(weight, expected)  # type: ignore[arg-type]


PLANS = {
    "frozen bottom": {"models.freeze_layers": 1},
    "paired": {"models.lora": {"r": 4}, "models.sharing": "paired"},
    "8bit": {"models.lora": {"r": 4}, "models.sharing": "paired", "models.quantization": "8bit"},
}


@pytest.mark.parametrize("name", PLANS)
def test_weights_of_roles_in_use_stay(tiny_run: TinyRun, name: str) -> None:
    pipeline = Pipeline(tiny_run("llama", **PLANS[name]))
    pipeline.score(pipeline.rollout())
    pipeline.roles.use("policy", "reference", "value", "reward")
    before = {name: held(pipeline, name) for name in pipeline.roles.backbones}
    pipeline.roles.use("policy", "value")
    assert {name: held(pipeline, name) for name in before} == before
