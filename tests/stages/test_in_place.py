"""An update that adds its gradients in place moves the weights as one that leaves them to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import Pipeline
from quartet.models.gradients import IN_PLACE
from quartet.stages.out_of_memory import release_memory
from stages_batch import batch_of
from tiny import TinyRun

SEVERAL: dict[str, Any] = {"rollout.batch_size": 8, "ppo.epochs": 2, "ppo.minibatches": 2, "ppo.microbatch_rows": 2}


def trained(pipeline: Pipeline) -> dict[str, Tensor]:
    """Copies of the trained weights."""
    roles = pipeline.roles
    return {
        f"{role} {name}": p.detach().clone()
        for role in ("policy", "value")
        for name, p in roles.trained_parameters(role)
    }


def moved(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Trained weights after an update of two epochs, with backbones in a dtype."""
    pipeline = Pipeline(values)
    batch = batch_of(pipeline)
    for role in (pipeline.roles.policy, pipeline.roles.value):
        role.backbone.to(dtype)
    pipeline.update(batch)
    return trained(pipeline)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"ppo.microbatch_rows": 4}),
        ("llama", {"models.gradient_checkpointing": True}),
        ("llama", {"models.value_model": "trunk", "models.value_head_init": "zero", "ppo.entropy_coef": 0.1}),
        ("qwen2", {"models.freeze_layers": 1}),
        ("gpt2", {}),
        ("gemma2", {}),
    ],
)
def test_the_weights_move_alike(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    values = tiny_run(family, **{**SEVERAL, **changes})
    taken = []
    takes = IN_PLACE.takes
    with monkeypatch.context() as patch:
        patch.setattr(IN_PLACE, "takes", lambda weight, **on: takes(weight, **on) and not taken.append(weight))  # type: ignore[func-returns-value]
        in_place = moved(values)
    assert taken
    monkeypatch.setattr(IN_PLACE, "takes", lambda *_, **__: False)
    by_autograd = moved(values)
    before = trained(Pipeline(values))
    for found in (in_place, by_autograd):
        for name in [name for name in found if name.endswith("attn.c_attn.bias")]:
            query, key, value = found[name].chunk(3)
            assert_is_rounding(key - before[name].chunk(3)[1])
            found[name] = torch.cat([query, value])
    torch.testing.assert_close(in_place, by_autograd, rtol=1e-5, atol=1e-7)


def test_key_biases_move_alike(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all else, in float64, where rounding is too small for Adam to follow."""
    values = tiny_run("gpt2", **SEVERAL)
    in_place = moved(values, torch.float64)
    assert in_place["policy transformer.h.1.attn.c_attn.bias"].dtype == torch.float64
    monkeypatch.setattr(IN_PLACE, "takes", lambda *_, **__: False)
    torch.testing.assert_close(in_place, moved(values, torch.float64), rtol=0, atol=1e-9)


def assert_is_rounding(moves: Tensor) -> None:
    """A key's bias adds one number to all scores of a query, which the softmax takes away: its gradient is zero.

    What rounding leaves of it, Adam divides by eps and not by its own size; two orders of summing need not agree on it.
    What has a gradient moves by about 2e-3 here.
    """
    assert moves.abs().max() < 2e-5


def test_memory_of_gradients_is_given_up_where_it_runs_out() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    with IN_PLACE.added():
        IN_PLACE.add_product(parameter, torch.ones(3, 1), torch.ones(1, 2))
        IN_PLACE.reset([parameter], reuse=True)
        assert IN_PLACE._spare
        release_memory()
        assert not IN_PLACE._spare
