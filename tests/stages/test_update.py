"""The update: what it optimises, that cutting it up changes nothing, how many steps it takes and what stops it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline import Pipeline, hidden_of
from quartet.records import Advantaged
from quartet.stages.batching import SequenceTable, microbatches
from quartet.stages.optimizer import schedule_factor, set_learning_rate
from stages_batch import LENGTHS, assert_same, batch_of
from tiny import TinyRun

SINGLE: dict[str, Any] = {"reward": "reward-lora", "models.lora": {"r": 5}, "models.sharing": "single"}


def one_step(tiny_run: TinyRun, *, settings: dict[str, Any], **changes: Any) -> Pipeline:
    """One optimizer step over the whole batch; the gradients of it are left in place."""
    once = {"rollout.batch_size": 8, "ppo.epochs": 1, "ppo.minibatches": 1, "ppo.max_grad_norm": None}
    pipeline = Pipeline(tiny_run(**{**once, **settings, **changes}))
    pipeline.update(batch_of(pipeline))
    return pipeline


def plain_loss(pipeline: Pipeline, batch: Advantaged) -> torch.Tensor:
    """The loss written out token by token, one episode at a time, from the models' own logits."""
    ppo, roles = pipeline.config.ppo, pipeline.roles
    scored = batch.scored
    policy, values, entropies = [], [], []
    for row, (prompt, length) in enumerate(LENGTHS):
        ids = torch.cat([scored.rollout.prompts.tokens[row], scored.rollout.tokens[row, :length]])[None]
        hidden = hidden_of(roles.policy.backbone, ids, roles.policy.adapter)[0, prompt - 1 : -1]
        with roles.policy.active():
            log_softmax = torch.log_softmax(roles.policy.head(hidden) / pipeline.config.rollout.temperature, -1)
        states = hidden_of(roles.value.backbone, ids, roles.value.adapter)[0, prompt - 1 : -1]
        value = states @ roles.value.head.weight[0]
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
        for step in range(length):
            logprob = log_softmax[step, ids[0, prompt + step]]
            ratio = torch.exp(logprob - scored.rollout.logprobs[row, step])
            advantage = batch.advantages[row, step]
            high = ppo.clip if ppo.clip_high is None else ppo.clip_high
            policy.append(-torch.min(ratio * advantage, ratio.clamp(1 - ppo.clip, 1 + high) * advantage))
            old, target = scored.values[row, step], batch.returns[row, step]
            error = (value[step] - target) ** 2
            if ppo.value_clip is not None:
                error = torch.max(error, (value[step].clamp(old - ppo.value_clip, old + ppo.value_clip) - target) ** 2)
            values.append(0.5 * error)
    loss = torch.stack(policy).mean() + ppo.value_coef * torch.stack(values).mean()
    return loss - ppo.entropy_coef * torch.cat(entropies).mean()


@pytest.mark.parametrize("plan", [{"models.lora": None}, SINGLE], ids=["separate", "single"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ppo.entropy_coef": 0.3, "rollout.temperature": 0.7},
        {"ppo.clip_high": 0.05, "ppo.value_clip": None, "ppo.value_coef": 2.0},
    ],
    ids=["plain", "entropy", "clips"],
)
def test_gradient_is_that_of_the_plain_loss(plan: dict[str, Any], changes: dict[str, Any], tiny_run: TinyRun) -> None:
    pipeline = one_step(tiny_run, settings=plan, **changes, **{"ppo.learning_rate": 0.0, "ppo.microbatch_rows": 3})
    seen = pipeline.gradients()
    pipeline.loaded.optimizer.zero_grad()
    plain_loss(pipeline, batch_of(pipeline)).backward()
    assert_same(seen, pipeline.gradients())
    assert plan is SINGLE or all(gradient.abs().max() > 0 for gradient in seen.values())


@pytest.mark.parametrize("plan", [{"models.lora": None}, SINGLE], ids=["separate", "single"])
@pytest.mark.parametrize("placement", ["stop", "after_stop"])
def test_microbatches_change_no_gradient(plan: dict[str, Any], placement: str, tiny_run: TinyRun) -> None:
    """With ragged lengths a loss averaged per microbatch would depend on the cut."""
    found = []
    for rows in (1, 3, 8):
        settings = {**plan, "ppo.microbatch_rows": rows, "ppo.score_placement": placement}
        pipeline = one_step(tiny_run, settings=settings)
        found.append((pipeline.gradients(), pipeline.trained()))
    for gradients, weights in found[1:]:
        assert_same(gradients, found[0][0])
        for name, expected in found[0][1].items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_one_process_fills_its_microbatches(alone: bool, packed: bool, tiny_run: TinyRun) -> None:
    """Several processes that hold shares take as many steps as each other, whatever their lengths."""
    pipeline = Pipeline(tiny_run(**{"rollout.batch_size": 8, "ppo.microbatch_rows": 1}))
    batch, updater = batch_of(pipeline), pipeline.updater()
    updater._alone = alone
    table, seen = SequenceTable.of(batch.scored.rollout), []
    rows = SequenceTable.rows

    def counted(self: SequenceTable, chosen: list[int]) -> Any:
        seen.append([self.length(row) for row in chosen])
        return rows(self, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceTable, "rows", counted)
        patch.setattr(type(updater._trained), "packs", lambda *_: packed)
        updater._gradients(batch, table, list(range(8)))
    assert sum(map(len, seen)) == 8
    assert all(sum(lengths) <= table.longest for lengths in seen)
    assert all(len(lengths) * max(lengths) <= (table.widest if packed else table.longest) for lengths in seen)
    assert table.widest == max(map(len, batch.scored.rollout.prompts.tokens)) + batch.scored.rollout.tokens.shape[1]
    assert (max(map(len, seen)) > 1) == alone


@pytest.mark.parametrize(("packed", "rows"), [(True, range(8)), (False, [2, 0, 3])])
def test_the_microbatch_with_the_most_tokens_comes_first(
    packed: bool, rows: Sequence[int], tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that count, with padding or without, so that what it was lent fits the others."""
    pipeline = Pipeline(tiny_run(**{"rollout.batch_size": 8, "ppo.microbatch_rows": 2}))
    batch, updater = batch_of(pipeline), pipeline.updater()
    monkeypatch.setattr(type(updater._trained), "packs", lambda *_: packed)
    table = SequenceTable.of(batch.scored.rollout)

    def size(part: list[int]) -> int:
        lengths = [table.length(row) for row in part]
        return sum(lengths) if packed else len(lengths) * max(lengths)

    cut = [part.tolist() for part, _ in microbatches(table, rows, 2, fill=True, packed=packed)]
    largest_first = sorted(cut, key=size, reverse=True)
    assert cut != largest_first
    found = updater._gradients(batch, table, list(rows))[1]
    assert found.tolist() == list(itertools.chain(*largest_first))


def test_microbatches_change_no_metric(tiny_run: TinyRun) -> None:
    found = []
    for rows in (1, 8):
        pipeline = Pipeline(tiny_run(**{"rollout.batch_size": 8, "ppo.microbatch_rows": rows}))
        found.append(pipeline.update(batch_of(pipeline)))
    assert found[0].metrics == pytest.approx(found[1].metrics, rel=1e-3, abs=1e-5)
    assert found[0].tokens == found[1].tokens == 2 * sum(response for _, response in LENGTHS)


def test_padding_changes_nothing(tiny_run: TinyRun) -> None:
    """Three more columns that no response reaches."""
    found = []
    for extra in (0, 3):
        pipeline = Pipeline(tiny_run(**{"rollout.batch_size": 8}))
        batch = batch_of(pipeline)
        wide = {name: torch.nn.functional.pad(getattr(batch, name), (0, extra)) for name in ("advantages", "returns")}
        scored, rollout = batch.scored, batch.scored.rollout
        rollout = dataclasses.replace(
            rollout,
            **{
                name: torch.nn.functional.pad(getattr(rollout, name), (0, extra))
                for name in ("tokens", "response_mask", "logprobs")
            },
        )
        scored = dataclasses.replace(
            scored,
            rollout=rollout,
            **{
                name: torch.nn.functional.pad(getattr(scored, name), (0, extra))
                for name in ("ref_logprobs", "values", "value_mask")
            },
        )
        found.append(pipeline.update(dataclasses.replace(batch, scored=scored, **wide)).metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4), (1, 8)])
def test_one_optimizer_step_a_minibatch(
    epochs: int, minibatches: int, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is skipped, and every episode is trained on once an epoch."""
    changes = {"rollout.batch_size": 8, "ppo.epochs": epochs, "ppo.minibatches": minibatches, "ppo.microbatch_rows": 3}
    pipeline = Pipeline(tiny_run(**changes))
    steps = []
    step = pipeline.loaded.optimizer.step
    monkeypatch.setattr(pipeline.loaded.optimizer, "step", lambda: steps.append(1) or step())
    stats = pipeline.update(batch_of(pipeline))
    assert len(steps) == stats.optimizer_steps == epochs * minibatches
    assert stats.tokens == epochs * sum(response for _, response in LENGTHS)
    states = pipeline.loaded.optimizer.state_dict()["state"]
    assert {float(state["step"]) for state in states.values()} == {float(epochs * minibatches)}
    assert len(states) == len(pipeline.trained())


def test_order_of_minibatches_depends_on_seed_iteration_and_epoch(tiny_run: TinyRun) -> None:
    updater = Pipeline(tiny_run()).updater()
    orders = [updater._permutation(32, iteration, epoch) for iteration in range(4) for epoch in range(4)]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len({tuple(order) for order in orders}) == 16
    assert orders[5] == updater._permutation(32, 1, 1)


def test_gradient_norm_is_bounded(tiny_run: TinyRun) -> None:
    """Policy and value together are scaled to the norm; none means the gradient as it is."""
    norms = {}
    for limit in (None, 1e-3):
        settings = {"ppo.max_grad_norm": limit, "ppo.learning_rate": 0.0}
        gradients = one_step(tiny_run, settings=settings).gradients()
        norms[limit] = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert norms[None] > 0.1
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_the_norm_before_clipping_is_reported(tiny_run: TinyRun) -> None:
    free = one_step(tiny_run, settings={"ppo.learning_rate": 0.0}).gradients()
    expected = torch.cat([gradient.flatten() for gradient in free.values()]).norm().item()
    settings = {"rollout.batch_size": 8, "ppo.epochs": 1, "ppo.minibatches": 1, "ppo.max_grad_norm": 1e-3}
    pipeline = Pipeline(tiny_run(**settings))
    assert pipeline.update(batch_of(pipeline)).metrics["gradient/norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("plan", [{"models.lora": None}, SINGLE], ids=["separate", "single"])
def test_learning_rate_zero_moves_nothing(plan: dict[str, Any], tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**plan, **{"ppo.learning_rate": 0.0, "ppo.epochs": 3}))
    before = pipeline.trained()
    for _ in range(2):
        batch, stats = pipeline.iterate()
        assert abs(batch.metrics["kl/reference"]) < 1e-5
        assert stats.metrics["kl/update"] < 1e-10
        assert stats.metrics["ratio/max_log"] < 1e-5
        assert stats.metrics["policy/clip_fraction"] == 0
    assert all(torch.equal(weights, before[name]) for name, weights in pipeline.trained().items())


def test_value_has_a_learning_rate_of_its_own(tiny_run: TinyRun) -> None:
    """Adam's first step is the learning rate for every weight whose gradient is far above epsilon."""
    settings = {"ppo.learning_rate": 1e-3, "ppo.value_learning_rate": 2e-2, "ppo.optimizer": {"eps": 1e-12}}
    once = {"rollout.batch_size": 8, "ppo.epochs": 1, "ppo.minibatches": 1}
    pipeline = Pipeline(tiny_run(**once, **settings))
    before = pipeline.trained()
    pipeline.update(batch_of(pipeline))
    moved = {name: (weights - before[name]).abs().max().item() for name, weights in pipeline.trained().items()}
    assert {round(size, 5) for name, size in moved.items() if name.startswith("policy")} == {1e-3}
    assert {round(size, 5) for name, size in moved.items() if name.startswith("value")} == {2e-2}


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [1 / 3, 2 / 3, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("cosine", 0, [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("cosine", 1, [0.5, 1.0, 0.75, 0.25]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_schedule(schedule: str, warmup: int, factors: list[float]) -> None:
    seen = [schedule_factor(schedule, iteration, total=4, warmup=warmup) for iteration in range(4)]
    assert seen == pytest.approx(factors, abs=1e-12)


def test_schedule_sets_both_rates(tiny_run: TinyRun) -> None:
    changes = {
        "ppo.iterations": 4,
        "ppo.learning_rate": 1e-3,
        "ppo.value_learning_rate": 4e-3,
        "ppo.optimizer": {"schedule": "linear"},
    }
    pipeline = Pipeline(tiny_run(**changes))
    optimizer = pipeline.loaded.optimizer
    for iteration, factor in [(3, 0.25), (0, 1.0), (2, 0.5)]:
        assert set_learning_rate(optimizer, pipeline.config.ppo, iteration) == pytest.approx(1e-3 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * factor, 4e-3 * factor])


def test_weight_decay_shrinks_weights_without_gradient(tiny_run: TinyRun) -> None:
    settings = {"ppo.learning_rate": 0.1, "ppo.optimizer": {"weight_decay": 0.5}, "ppo.value_coef": 0.0}
    pipeline = Pipeline(tiny_run(**{"rollout.batch_size": 8, "ppo.epochs": 1, "ppo.minibatches": 1, **settings}))
    before = pipeline.trained()["value:score.weight"]
    pipeline.update(batch_of(pipeline))
    torch.testing.assert_close(pipeline.trained()["value:score.weight"], before * 0.95, rtol=1e-6, atol=1e-8)
