"""Copies of trained weights in bfloat16 live for one optimizer step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import Pipeline
from quartet.models.converted import CONVERTED, ConvertedWeights
from quartet.stages.out_of_memory import release_memory
from stages_batch import batch_of
from tiny import TinyRun


def test_one_copy_until_it_is_forgotten() -> None:
    weights, weight = ConvertedWeights(), nn.Parameter(torch.randn(3, 4))
    assert weights.of(weight, torch.float32) is weight
    assert weights.of(weight, torch.bfloat16) is not weights.of(weight, torch.bfloat16)
    with weights.keeping():
        first = weights.of(weight, torch.bfloat16)
        assert torch.equal(first, weight.bfloat16())
        assert weights.of(weight, torch.bfloat16) is first
        assert weights.of(weight, torch.float64).dtype == torch.float64
        weights.forget()
        assert weights.of(weight, torch.bfloat16) is not first
    assert weights._kept is None


def test_frozen_weights_and_results_of_others_are_converted_as_ever() -> None:
    weights = ConvertedWeights()
    with weights.keeping():
        weights.of(torch.randn(3, 4), torch.bfloat16)
        weights.of(nn.Parameter(torch.randn(3, 4)) * 2.0, torch.bfloat16)
        assert weights._kept == {}


def test_rows_are_those_of_the_one_copy_where_one_is_kept() -> None:
    weights, weight, rows = ConvertedWeights(), nn.Parameter(torch.randn(6, 4)), slice(2, 5)
    assert weights.rows(weight, rows, torch.float32).data_ptr() == weight[rows].data_ptr()
    alone = weights.rows(weight, rows, torch.bfloat16)
    assert alone.untyped_storage().nbytes() == 3 * 4 * 2
    with weights.keeping():
        found = weights.rows(weight, rows, torch.bfloat16)
        assert found.data_ptr() == weights.of(weight, torch.bfloat16)[rows].data_ptr()
        frozen = weights.rows(weight.detach(), rows, torch.bfloat16)
        assert frozen.untyped_storage().nbytes() == 3 * 4 * 2
    for one in (alone, found, frozen):
        assert torch.equal(one, weight[rows].bfloat16())


def test_given_up_where_memory_runs_out() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    with CONVERTED.keeping():
        CONVERTED.of(weight, torch.bfloat16)
        assert len(CONVERTED._kept or ()) == 1
        release_memory()
        assert CONVERTED._kept == {}


@pytest.mark.parametrize("changes", [{}, {"models.lora": {"r": 4}, "models.sharing": "paired"}])
def test_updates_are_the_same_bit_for_bit(
    tiny_run: TinyRun, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several microbatches, minibatches and epochs."""
    several = {"rollout.batch_size": 8, "ppo.epochs": 2, "ppo.minibatches": 2, "ppo.microbatch_rows": 2}
    found, asked = [], 0
    of = ConvertedWeights.of

    def counted(self: ConvertedWeights, weight: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal asked
        asked += weight.dtype != dtype and weight.requires_grad and self._kept is not None
        return of(self, weight, dtype)

    monkeypatch.setattr(ConvertedWeights, "of", counted)
    for kept in (False, True):
        pipeline = Pipeline(tiny_run(**several, **changes, **{"models.dtype": "bfloat16"}))
        batch = batch_of(pipeline)
        with monkeypatch.context() as patch:
            if not kept:
                patch.setattr(CONVERTED, "keeping", lambda wanted=True: nullcontext())
            pipeline.update(batch)
        found.append(pipeline.trained())
    assert asked > 10
    for key, tensor in found[0].items():
        assert torch.equal(found[1][key], tensor), key


@pytest.mark.parametrize("recomputing", [False, True])
def test_no_copies_where_activations_are_computed_again(
    tiny_run: TinyRun, recomputing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing holds the copies of one layer at a time, and is there to save memory."""
    changes = {"models.dtype": "bfloat16", "models.gradient_checkpointing": recomputing}
    pipeline = Pipeline(tiny_run(**changes))
    batch, keeping = batch_of(pipeline), []
    of = ConvertedWeights.of

    def spy(self: ConvertedWeights, weight: Tensor, dtype: torch.dtype) -> Tensor:
        keeping.append(self._kept is not None)
        return of(self, weight, dtype)

    monkeypatch.setattr(ConvertedWeights, "of", spy)
    pipeline.update(batch)
    assert set(keeping) == {not recomputing}
