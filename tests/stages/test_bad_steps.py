"""Losses and gradients that are not finite, and memory that runs out: neither reaches the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline import Pipeline
from quartet.errors import TrainingError
from quartet.models.gradients import IN_PLACE
from quartet.models.roles import ScalarView
from quartet.records import Advantaged
from quartet.stages.bad_steps import step_unless
from quartet.stages.batching import SequenceTable
from quartet.stages.passes import Losses
from stages_batch import LENGTHS, assert_same, batch_of
from tiny import TinyRun

ONCE: dict[str, Any] = {"rollout.batch_size": 8, "ppo.epochs": 1, "ppo.minibatches": 1}
BAD = [math.nan, math.inf, -math.inf]


def spoiled(batch: Advantaged, row: int, bad: float) -> Advantaged:
    batch.advantages[row, 0] = bad
    return batch


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_not_taken_changes_neither_weights_nor_optimizer(bad: float, fused: bool) -> None:
    """AdamW's first step has the size of the learning rate, whatever came before it if that left nothing behind."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.25, weight_decay=0.5, eps=1e-12, fused=fused)
    for gradient, skip in [(bad, True), (2.0, False), (bad, True)]:
        weight.grad = torch.full((3,), gradient)
        step_unless(torch.tensor(skip), optimizer, optimizer.step)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1.0 - 0.25 * 0.5 - 0.25))
    state = optimizer.state[weight]
    assert float(state["step"]) == 1.0
    torch.testing.assert_close(state["exp_avg"], torch.full((3,), 0.2))


@pytest.mark.parametrize("bad", BAD)
def test_only_the_minibatch_of_the_bad_episode_is_left_out(bad: float, tiny_run: TinyRun) -> None:
    """The other minibatch trains exactly as if the bad one had never been."""
    changes = {**ONCE, "ppo.minibatches": 2}
    pipeline = Pipeline(tiny_run(**changes))
    order = pipeline.updater()._permutation(8, 1, 0)
    before = pipeline.trained()
    stats = pipeline.update(spoiled(batch_of(pipeline), order[0], bad))
    assert stats.metrics["gradient/skipped_steps"] == 1
    assert stats.optimizer_steps == 1
    assert stats.bad_steps == 0
    kept = order[4:]
    assert stats.tokens == sum(LENGTHS[row][1] for row in kept)
    assert all(math.isfinite(value) for value in stats.metrics.values())

    alone = Pipeline(tiny_run(**changes))
    batch = batch_of(alone)
    updater = alone.updater()
    with IN_PLACE.added():  # as `update` does: a gradient that autograd adds up rounds otherwise
        updater._gradients_within_memory(batch, SequenceTable.of(batch.scored.rollout), kept)
    updater._engine.clip_gradients(updater._parameters, alone.config.ppo.max_grad_norm)
    alone.loaded.optimizer.step()
    weights, expected = pipeline.trained(), alone.trained()
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_run_ends_after_so_many_in_a_row_and_names_the_episode(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**ONCE, **{"ppo.max_bad_steps": 3}))
    before = pipeline.trained()
    batch = spoiled(batch_of(pipeline), 4, math.nan)
    updater = pipeline.updater()
    stats = updater.update(batch, iteration=1)
    assert (stats.bad_steps, stats.optimizer_steps, stats.tokens) == (1, 0, 0)
    assert math.isnan(stats.metrics["policy/loss"])
    stats = updater.update(batch, iteration=2, bad_steps=stats.bad_steps)
    assert stats.bad_steps == 2
    with pytest.raises(
        TrainingError, match=r"the loss of episode 4 \(prompt 'prompt 4'\) is nan; .* ppo.max_bad_steps=3 in a row"
    ):
        updater.update(batch, iteration=3, bad_steps=stats.bad_steps)
    assert all(torch.equal(weights, before[name]) for name, weights in pipeline.trained().items())


def test_a_good_step_in_between_starts_the_count_again(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**ONCE, **{"ppo.max_bad_steps": 2}))
    updater = pipeline.updater()
    for _ in range(3):
        stats = updater.update(spoiled(batch_of(pipeline), 4, math.inf), iteration=1, bad_steps=0)
        assert stats.bad_steps == 1
        stats = updater.update(batch_of(pipeline), iteration=1, bad_steps=stats.bad_steps)
        assert (stats.bad_steps, stats.metrics["gradient/skipped_steps"]) == (0, 0)


def test_an_infinite_gradient_of_finite_losses_moves_nothing_and_names_its_episode(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episode 5 is the one with a prompt of 7 tokens; its values' gradient is spoiled on the way back."""
    forward = ScalarView.forward

    def overflowing(view: ScalarView, sequences: Any, mask: torch.Tensor) -> torch.Tensor:
        values = forward(view, sequences, mask)
        spoiled = torch.where(sequences.prompt_lengths == 7, math.inf, 1.0)[:, None]
        values.register_hook(lambda gradient: torch.where(gradient == 0, 0, gradient * spoiled))
        return values

    pipeline = Pipeline(tiny_run(**ONCE, **{"ppo.max_bad_steps": 1, "ppo.microbatch_rows": 8}))
    batch, before = batch_of(pipeline), pipeline.trained()
    monkeypatch.setattr(ScalarView, "forward", overflowing)
    with pytest.raises(TrainingError, match=r"the gradient of episode 5 .* is not finite although its loss is"):
        pipeline.update(batch)
    assert all(torch.equal(weights, before[name]) for name, weights in pipeline.trained().items())


class Memory:
    """Lets the backward of a microbatch of more than `rows` sequences fail, after half of it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, rows: int) -> None:
        forward, self.failed = ScalarView.forward, 0

        def limited(view: ScalarView, sequences: Any, mask: torch.Tensor) -> torch.Tensor:
            values = forward(view, sequences, mask)
            if values.requires_grad and len(sequences.input_ids) > rows:

                def fail(_: torch.Tensor) -> None:
                    self.failed += 1
                    raise error

                # The policy has its gradient by now, the value model has none.
                values.register_hook(fail)
            return values

        monkeypatch.setattr(ScalarView, "forward", limited)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_smaller_microbatches_give_the_same_gradient(
    error: BaseException, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**ONCE, "ppo.microbatch_rows": 8, "ppo.max_grad_norm": None}
    whole = Pipeline(tiny_run(**settings))
    expected = whole.update(batch_of(whole))
    pipeline, said = Pipeline(tiny_run(**settings)), []
    batch = batch_of(pipeline)
    memory = Memory(monkeypatch, error, rows=3)
    updater = pipeline.updater()
    updater._say = said.append
    stats = updater.update(batch, iteration=1)
    assert memory.failed == 2
    assert [line.split(":")[1] for line in said] == [
        " going on with 4 sequences at once instead of ppo.microbatch_rows=8; the gradient is the same",
        " going on with 2 sequences at once instead of ppo.microbatch_rows=8; the gradient is the same",
    ]
    assert_same(pipeline.gradients(), whole.gradients())
    assert stats.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-5)
    assert stats.tokens == expected.tokens
    updater.update(batch, iteration=2)
    assert (memory.failed, len(said)) == (2, 2)


@pytest.mark.parametrize("role", ["policy", "value"])
def test_of_two_passes_at_a_time_one_goes_first(role: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before microbatches are made smaller."""
    settings = {**ONCE, "ppo.microbatch_rows": 4, "ppo.max_grad_norm": None}
    whole = Pipeline(tiny_run(**settings))
    whole.update(batch_of(whole))
    pipeline, said, failed = Pipeline(tiny_run(**settings)), [], 0
    batch = batch_of(pipeline)
    loss = getattr(Losses, f"_{role}_loss")

    def limited(self: Losses, *given: Any) -> torch.Tensor:
        nonlocal failed
        if updater._lanes.count > 1:
            failed += 1
            raise MemoryError
        return loss(self, *given)

    monkeypatch.setattr(Losses, f"_{role}_loss", limited)
    torch.set_num_threads(2)
    updater = pipeline.updater(at_once=True)
    updater._say = said.append
    for iteration in (1, 2):
        updater.update(batch, iteration=iteration)
        if iteration == 1:
            assert_same(pipeline.gradients(), whole.gradients())
    assert failed == 1
    assert [line.split(":")[1] for line in said] == [
        " from now on policy and value take their passes one after the other (run.parallel_passes=false does so from the start)"
    ]


def test_no_memory_for_one_sequence_is_said(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run(**ONCE))
    batch, before = batch_of(pipeline), pipeline.trained()
    Memory(monkeypatch, OUT_OF_MEMORY[0], rows=0)
    with pytest.raises(TrainingError, match=r"single sequence .*gradient_checkpointing=true"):
        pipeline.update(batch)
    assert all(torch.equal(weights, before[name]) for name, weights in pipeline.trained().items())


def test_another_error_is_no_lack_of_memory(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run(**ONCE))
    batch = batch_of(pipeline)
    Memory(monkeypatch, RuntimeError("shapes do not fit"), rows=0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pipeline.update(batch)
