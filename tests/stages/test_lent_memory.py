"""The update keeps the memory of its activations from one microbatch to the next, and no longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import Pipeline
from quartet.models.lending import LENDER
from quartet.stages.out_of_memory import release_memory
from stages_batch import batch_of
from tiny import TinyRun

LORA: dict[str, Any] = {"models.lora": {"r": 5}, "rollout.batch_size": 8, "ppo.epochs": 2, "ppo.minibatches": 1}


def test_kept_for_one_update(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run(**LORA))
    lent: list[tuple[int, bool]] = []
    borrowed = LENDER.borrowed

    def spy(like: Tensor, rows: int, columns: int) -> Tensor:
        free = {block.untyped_storage().data_ptr() for block in LENDER._free or ()}
        found = borrowed(like, rows, columns)
        lent.append((rows, found.untyped_storage().data_ptr() in free))
        return found

    monkeypatch.setattr(LENDER, "borrowed", spy)
    pipeline.update(batch_of(pipeline))
    assert LENDER._free is None
    assert not lent[0][1]
    half = lent[len(lent) // 2 :]  # the second epoch, whose microbatches have other lengths
    assert len(half) > 10
    assert sum(again for _, again in half) > len(half) * 0.8


def test_given_up_where_memory_runs_out() -> None:
    with LENDER.keeping():
        LENDER.given_back(torch.empty(4, 4))
        assert len(LENDER._free or ()) == 1
        release_memory()
        assert not LENDER._free
