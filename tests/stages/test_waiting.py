"""The update asks the device for nothing while it runs: on a GPU every question would hold up the next kernels."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import Pipeline
from quartet.records import Advantaged
from stages_batch import batch_of
from tiny import TinyRun

ASKING = {"aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
"""Operations whose result, or its shape, the host has to wait for."""


class Questions(TorchDispatchMode):
    """Notes every operation that would make the host wait, with the place that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name() == "aten::index.Tensor" else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or func.name().partition(".")[0] in ASKING:
            self.seen.append(f"{func.name()} in {''.join(traceback.format_stack()[-8:-1])}")
        return func(*args, **(kwargs or {}))


def questions_of(pipeline: Pipeline, batch: Advantaged) -> list[str]:
    updater = pipeline.updater()
    with Questions() as questions:
        updater.update(batch, iteration=1)
    return questions.seen


@pytest.mark.parametrize("placement", ["stop", "after_stop"])
@pytest.mark.parametrize("plan", [{}, {"models.lora": {"r": 4}}], ids=["separate", "paired"])
def test_questions_do_not_grow_with_microbatches(plan: dict[str, Any], placement: str, tiny_run: TinyRun) -> None:
    """As many with eight microbatches of one row in each of two minibatches and three epochs as with one of all rows."""
    common = {"rollout.batch_size": 8, "ppo.score_placement": placement, **plan}
    few = Pipeline(tiny_run(**common, **{"ppo.epochs": 1, "ppo.minibatches": 1, "ppo.microbatch_rows": 8}))
    many = Pipeline(tiny_run(**common, **{"ppo.epochs": 3, "ppo.minibatches": 2, "ppo.microbatch_rows": 1}))
    asked = [questions_of(pipeline, batch_of(pipeline, placement=placement)) for pipeline in (few, many)]
    assert len(asked[1]) == len(asked[0]), asked[1][0]


def test_a_question_is_seen() -> None:
    mask = torch.tensor([True, False])
    with Questions() as questions:
        mask.nonzero()
        mask[mask]
        bool(mask.any())
    assert len(questions.seen) == 3
