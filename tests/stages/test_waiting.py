"""The update asks the device for nothing while it runs: on a GPU every question would hold up the next kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoints import WIDE
from pipeline import Pipeline
from quartet.records import Advantaged
from questions import Questions
from stages_batch import batch_of
from tiny import TinyRun


def questions_of(pipeline: Pipeline, batch: Advantaged) -> list[str]:
    updater = pipeline.updater()
    with Questions(lists=True) as questions:
        updater.update(batch, iteration=1)
    return [question for question in questions.seen if "randperm" not in question]  # an epoch's order is the host's own


@pytest.mark.parametrize("placement", ["stop", "after_stop"])
@pytest.mark.parametrize(
    "plan",
    [{}, {"models.lora": {"r": 4}}, {"models.freeze_layers": 1}, {"family": WIDE}],
    ids=["separate", "paired", "frozen layers", "whole layers"],
)
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
    with Questions(lists=True) as questions:
        mask.tolist()
    assert len(questions.seen) == 1
