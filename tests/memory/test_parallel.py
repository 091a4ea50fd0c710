"""When policy and value take their passes at the same time, and what that takes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from pipeline import Pipeline
from quartet import kernels
from quartet.cli import main
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.memory import estimate
from quartet.memory.choices import Choices, choices_of, workload_of
from quartet.memory.estimate import Estimator, estimator_for
from quartet.memory.figures import Estimate
from quartet.memory.parallel import passes_in_parallel
from quartet.memory.search import search
from quartet.memory.simulator import Simulator
from quartet.memory.trace import ACTIVATIONS, LOGITS
from quartet.models.loading import plan_for
from quartet.models.plan import SharingPlan
from quartet.run.memory_account import MemoryAccount
from tiny import TinyRun

CPU = torch.device("cpu")
BFLOAT16 = {"models.dtype": "bfloat16"}
LORA = {"models.lora": {"r": 4}}


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


class Planned:
    """A configuration's estimates."""

    def __init__(self, values: dict[str, Any], device: torch.device = CPU) -> None:
        pipeline = Pipeline(values)
        self.plan: SharingPlan = pipeline.inputs.plan
        self.choices: Choices = choices_of(pipeline.config, CPU)
        self.sft, self.reward = pipeline.inputs.sft, pipeline.inputs.reward
        self.workload = workload_of(pipeline.config)
        self.estimator = Estimator(self.sft, self.reward, self.workload, device)

    def estimate(self, free: float | None = None, **changes: Any) -> Estimate:
        return self.estimator.estimate(self.plan, replace(self.choices, **changes), free)


def test_auto_takes_it_in_bfloat16_where_half_of_the_memory_is_enough(tiny_run: TinyRun) -> None:
    planned = Planned(tiny_run(**BFLOAT16))
    assert planned.choices.parallel_passes == "auto"
    both, one = planned.estimate(), planned.estimate(parallel_passes=False)
    assert both.choices.parallel_passes is True
    assert one.choices.parallel_passes is False
    need = both.phase("update").peak
    assert planned.estimate(2 * need).choices.parallel_passes is True
    assert planned.estimate(2 * need - 2).choices.parallel_passes is False


@pytest.mark.parametrize(
    ("intel", "by_kernels", "hidden", "expected"),
    [(True, True, 384, True), (True, True, 385, False), (False, True, 384, False), (True, False, 384, False)],
)
def test_auto_takes_it_in_float32_where_it_was_measured_to_pay(
    intel: bool, by_kernels: bool, hidden: int, expected: bool, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "is_intel", lambda: intel)
    monkeypatch.setattr(kernels, "multiplies", lambda dtype: by_kernels and dtype == torch.float32)
    planned = Planned(tiny_run(**{"models.dtype": "float32"}))
    update = planned.estimate(parallel_passes=False).phase("update")
    assert passes_in_parallel(planned.plan, planned.choices, hidden, None, lambda: update) is expected


@pytest.mark.parametrize("wide", ["language_model", "classifier"])
def test_the_wider_of_policy_and_value_decides(wide: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, asked = Planned(tiny_run(**{"models.dtype": "float32"})), []
    shape = planned.estimator.holdings.shape
    monkeypatch.setattr(
        planned.estimator.holdings,
        "shape",
        lambda task, frozen: replace(shape(task, frozen), hidden=500 if task == wide else 64),
    )
    monkeypatch.setattr(estimate, "passes_in_parallel", lambda plan, choices, hidden, *_: bool(asked.append(hidden)))
    planned.estimate()
    assert asked == [500]


def test_auto_asks_for_half_of_the_memory_in_float32_too(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_intel", lambda: True)
    monkeypatch.setattr(kernels, "multiplies", lambda dtype: dtype == torch.float32)
    planned = Planned(tiny_run(**{"models.dtype": "float32", "models.sharing": "paired"}, **LORA))
    both = planned.estimate(parallel_passes=True).phase("update").peak
    assert planned.estimate(2 * both).choices.parallel_passes is True
    assert planned.estimate(2 * both - 2).choices.parallel_passes is False


@pytest.mark.parametrize("changes", [{}, {**LORA, "models.sharing": "paired"}])
def test_it_takes_the_activations_of_both(tiny_run: TinyRun, changes: dict[str, Any]) -> None:
    planned = Planned(tiny_run(**changes))
    one, both = (planned.estimate(parallel_passes=wanted).phase("update") for wanted in (False, True))
    # At the peak of the policy's passes those of the value are in memory as well, of a model of the same size.
    assert both.activations > 1.3 * one.activations
    assert both.activations + both.logits < 2 * (one.activations + one.logits)
    assert (both.weights, both.optimizer) == (one.weights, one.optimizer)


def test_the_policys_peak_is_counted_beside_the_values(tiny_run: TinyRun) -> None:
    planned = Planned(tiny_run())
    shapes = planned.estimator.holdings.shapes(planned.plan)
    simulator = Simulator(planned.sft, planned.reward, planned.workload)

    def most(parallel: bool, role: str) -> float:
        choices = replace(planned.choices, parallel_passes=parallel, dtype="float32")
        peaks = simulator.working("update", planned.plan, choices, shapes).peaks
        return max(held[ACTIVATIONS] + held[LOGITS] for label, held in peaks.items() if role in label)

    # What one after the other leaves for the next, lent memory above all, is counted twice on the right.
    assert most(True, "policy") > 0.9 * (most(False, "policy") + most(False, "value"))


@pytest.mark.parametrize(
    ("changes", "choices", "reason"),
    [
        ({**LORA, "models.value_model": "trunk", "models.value_head_init": "zero"}, {}, "are one backbone"),
        ({}, {"checkpointing": True}, "models.gradient_checkpointing=true is there to save memory"),
        ({}, {"engine": "ddp", "world_size": 2}, "distributed.engine=ddp orders"),
        (LORA, {"quantization": "8bit"}, "models.quantization=8bit"),
        ({}, {"device": "cuda"}, "share the one device cuda"),
    ],
)
def test_where_it_cannot_be(tiny_run: TinyRun, changes: dict[str, Any], choices: dict[str, Any], reason: str) -> None:
    planned = Planned(tiny_run(**BFLOAT16, **changes))
    assert planned.estimate(**choices).choices.parallel_passes is False
    with pytest.raises(ConfigError, match=rf"run.parallel_passes=true, and .*{reason}.*; use run.parallel_passes=auto"):
        planned.estimate(parallel_passes=True, **choices)


def test_one_thread_is_too_few(tiny_run: TinyRun) -> None:
    planned = Planned(tiny_run(**BFLOAT16))
    torch.set_num_threads(1)
    assert planned.estimate().choices.parallel_passes is False
    with pytest.raises(ConfigError, match="torch has one thread"):
        planned.estimate(parallel_passes=True)


def test_a_search_keeps_what_was_asked_for_or_leaves_it_to_auto(tiny_run: TinyRun) -> None:
    config = parse_config(tiny_run(**{"run.parallel_passes": True, "models.dtype": "float32"}))
    estimator = estimator_for(config)
    given = search(config, estimator, 2**40).chosen
    assert given is not None
    assert given.estimate is not None
    assert (given.change, given.estimate.choices.parallel_passes) == ({}, True)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    one = estimator.estimate(plan, replace(given.estimate.choices, parallel_passes=False)).peak.peak
    assert one < given.estimate.peak.peak
    less = search(config, estimator, math.ceil(one)).chosen
    assert less is not None
    assert less.change["run.parallel_passes"] == "auto"
    assert search(config, estimator, 2**10).chosen is None


def test_asked_for_in_vain_is_a_users_mistake(
    tiny_run: TinyRun, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_run(**{"run.parallel_passes": True, "models.gradient_checkpointing": True})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    for command in ("plan", "train"):
        assert main([command, str(config)]) == 2
        error = capsys.readouterr().err
        assert "run.parallel_passes=true" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_does_as_its_plan_says() -> None:
    assert MemoryAccount(CPU, {"choices": {"parallel_passes": True}}).parallel_passes
    assert not MemoryAccount(CPU, {"choices": {"parallel_passes": False}}).parallel_passes
    assert not MemoryAccount(CPU).parallel_passes  # not predicted


@pytest.mark.parametrize(
    ("before", "edited", "now"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"run.parallel_passes": False}, False),
        (False, {"run.parallel_passes": True}, True),
        (True, {"models.gradient_checkpointing": True}, False),
        (True, {"run.parallel_passes": True, "models.gradient_checkpointing": True}, False),
    ],
)
def test_a_run_that_goes_on_does_as_its_configuration_says_now(
    tiny_run: TinyRun, before: bool, edited: dict[str, Any], now: bool
) -> None:
    pipeline, said = Pipeline(tiny_run(**BFLOAT16, **edited)), []
    account = MemoryAccount(CPU, {"choices": {"parallel_passes": before}})
    assert account.in_parallel(pipeline.config, pipeline.inputs.plan, pipeline.loaded.engine, said.append) is now
    assert said == []
    assert not MemoryAccount(CPU).in_parallel(
        pipeline.config, pipeline.inputs.plan, pipeline.loaded.engine, said.append
    )


def test_a_run_that_goes_on_is_refused_passes_that_cannot_be(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(**BFLOAT16, **{"run.parallel_passes": True, "models.gradient_checkpointing": True}))
    account = MemoryAccount(CPU, {"choices": {"parallel_passes": False}})
    with pytest.raises(ConfigError, match=r"run\.parallel_passes=true, and models\.gradient_checkpointing=true"):
        account.in_parallel(pipeline.config, pipeline.inputs.plan, pipeline.loaded.engine, print)


@pytest.mark.parametrize("before", [True, False])
def test_a_single_thread_ends_them_and_says_so(tiny_run: TinyRun, before: bool) -> None:
    pipeline, said = Pipeline(tiny_run(**BFLOAT16)), []
    account = MemoryAccount(CPU, {"choices": {"parallel_passes": before}})
    torch.set_num_threads(1)
    assert not account.in_parallel(pipeline.config, pipeline.inputs.plan, pipeline.loaded.engine, said.append)
    assert [line.startswith("torch has one thread here") for line in said] == [True] * before
