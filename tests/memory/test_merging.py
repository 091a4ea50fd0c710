"""When the rollout multiplies with weights that hold the adapter: by hand for each reason, and in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from pipeline import Pipeline
from quartet import resume, train
from quartet.config import LoraConfig, parse_config
from quartet.errors import ConfigError
from quartet.memory.choices import Choices, choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.figures import PhaseBytes
from quartet.memory.merging import merges_adapters, still_merges
from quartet.memory.search import search
from quartet.memory.simulator import Simulator
from quartet.models.loading import plan_for
from quartet.models.plan import SharingPlan, Source, make_plan
from quartet.rollout import static_decoder
from quartet.rollout.static import StaticEngine
from quartet.rollout.static_cache import NotDrivable
from quartet.run.reopen import evaluate
from quartet.stages.correction import corrected
from tiny import TinyRun

LORA = Choices("paired", LoraConfig(), "bfloat16", False, 4, 4, merge_adapters="auto")


def plan(*, lora: bool = True) -> SharingPlan:
    return make_plan("auto", lora=lora, sft=Source("sft", None), reward=Source("reward", None), bases_equal=False)


def decided(choices: Choices, *, more: float = 0.0, update: float = 100.0, lora: bool = True) -> bool:
    """With a rollout of 60 bytes that takes one more, and some more, with merged adapters; the same where none is merged."""

    def phase(name: str, merged: bool) -> PhaseBytes:
        held = {"rollout": 60.0 + (1 + more) * merged, "scoring": 50.0, "update": update}[name]
        return PhaseBytes(name, held, 0, 0, 0, 0, 0, 0, 0, 0, at="")

    return merges_adapters(plan(lora=lora), choices, phase)


@pytest.mark.parametrize(
    ("more", "update", "found"), [(-2, 10, True), (39, 100, True), (40, 100, False), (0, 10, False), (-1, 100, False)]
)
def test_auto_merges_where_the_peak_stays(more: float, update: float, found: bool) -> None:
    assert decided(LORA, more=more, update=update) is found


@pytest.mark.parametrize(
    ("changes", "lora", "reason"),
    [
        ({}, False, "no adapter"),
        ({"quantization": "4bit"}, True, "quantization=4bit"),
        ({"engine": "zero3", "world_size": 2}, True, "engine=zero3 cuts"),
        ({"engine": "fsdp2", "world_size": 2}, True, "engine=fsdp2 cuts"),
        ({"rollout_engine": "dynamic"}, True, "engine=dynamic"),
        ({"rollout_engine": "vllm"}, True, "engine=vllm"),
    ],
)
def test_where_it_is_not_possible(changes: dict[str, Any], lora: bool, reason: str) -> None:
    choices = replace(LORA, **changes)
    assert not decided(choices, lora=lora)
    assert not decided(replace(choices, merge_adapters=False), lora=lora)
    with pytest.raises(
        ConfigError, match=rf"rollout\.merge_adapters=true, and .*{reason}.*use rollout\.merge_adapters=auto"
    ):
        decided(replace(choices, merge_adapters=True), lora=lora)


def test_when_asked_for_memory_does_not_count() -> None:
    assert decided(replace(LORA, merge_adapters=True), more=1000)
    assert not decided(replace(LORA, merge_adapters=False))
    assert not decided(replace(LORA, dtype="float32"))
    assert decided(replace(LORA, dtype="float32", merge_adapters=True))


@pytest.mark.parametrize(
    ("wanted", "before", "found"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False), (True, True, True)],
)
def test_a_run_that_goes_on(wanted: Any, before: bool, found: bool) -> None:
    choices = replace(LORA, merge_adapters=wanted)
    assert still_merges(plan(), choices, before) is found
    cut = replace(choices, engine="fsdp2", world_size=2)
    if wanted is True:
        with pytest.raises(ConfigError, match=r"merge_adapters=true, and distributed\.engine=fsdp2"):
            still_merges(plan(), cut, before)
    else:
        assert not still_merges(plan(), cut, before)


@pytest.mark.parametrize("reason", ["GPT-2's layers", "an engine that runs the model as it is"])
def test_where_no_layer_is_merged(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Asked for it is refused, and `auto` does not claim it."""
    if reason != "GPT-2's layers":
        monkeypatch.setattr("quartet.memory.decoding.Decoder", _not_drivable)
    family = "gpt2" if reason == "GPT-2's layers" else "llama"
    lora = {"models.lora": {"r": 4}, "models.sharing": "paired", "models.dtype": "bfloat16"}
    for wanted in ("auto", True):
        config = parse_config(tiny_run(family, **lora, **{"rollout.merge_adapters": wanted}))
        estimator = estimator_for(config)
        found = plan_for(config.models, estimator.sft, estimator.reward)
        choices = choices_of(config, torch.device("cpu"))
        if wanted is True:
            with pytest.raises(ConfigError, match="merge_adapters=true, and no layer of this model"):
                estimator.estimate(found, choices)
        else:
            assert estimator.estimate(found, choices).choices.merge_adapters is False


def _not_drivable(*_: Any) -> None:
    raise NotDrivable("it is a test")


def test_a_search_for_less_memory_gives_merging_up(tiny_run: TinyRun) -> None:
    lora = {"models.lora": {"r": 4}, "models.sharing": "paired", "rollout.merge_adapters": True}
    config = parse_config(tiny_run("llama", **lora, **{"models.dtype": "float32", "ppo.microbatch_rows": 1}))
    estimator = estimator_for(config)
    found = plan_for(config.models, estimator.sft, estimator.reward)
    apart, merged = (
        estimator.estimate(found, replace(choices_of(config, torch.device("cpu")), merge_adapters=wanted)).peak.peak
        for wanted in (False, True)
    )
    assert merged > apart
    result = search(config, estimator, int(merged) - 1)
    assert result.chosen is not None
    assert result.chosen.change == {"rollout.merge_adapters": "auto"}
    nothing = search(config, estimator, 2**20)
    assert nothing.chosen is None


def test_the_copies_are_planned(tiny_run: TinyRun) -> None:
    """Each linear layer with an adapter once more, less the small matrices made upright for as long."""
    lora = {"models.lora": {"r": 4}, "models.sharing": "paired", "models.dtype": "float32"}
    config = parse_config(tiny_run("llama", **lora))
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    choices, shapes = choices_of(config, torch.device("cpu")), estimator.holdings.shapes(plan)
    simulator = Simulator(estimator.sft, estimator.reward, estimator.workload)
    apart, merged = (
        simulator.working("rollout", plan, replace(choices, merge_adapters=merge), shapes).peaks
        for merge in (False, True)
    )
    sizes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    copies = 2 * sum(4 * out * inputs for out, inputs in sizes)
    upright = 2 * sum(4 * 4 * (out + inputs) for out, inputs in sizes)
    assert merged["merging policy embeddings"]["activations"] >= copies
    for place in ("prompts policy embeddings", "decoding policy embeddings", "decoding policy logits"):
        assert merged[place]["activations"] - apart[place]["activations"] == copies - upright


def test_log_probabilities_are_those_of_a_full_pass(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("llama", **{"models.lora": {"r": 4}, "models.sharing": "paired"}))
    pipeline.iterate()  # the adapter is not zero any more
    apart, policy = pipeline.loaded.rollout, pipeline.roles.policy
    assert isinstance(apart, StaticEngine)
    prompts = pipeline.inputs.prompts.batch(0, 8, 0)
    before = {name: parameter.clone() for name, parameter in policy.backbone.model.named_parameters()}
    rollout = StaticEngine(policy, apart._settings, merged=True).generate(prompts)
    full, _ = corrected(rollout, pipeline.roles, temperature=pipeline.config.rollout.temperature, rows=4)
    torch.testing.assert_close(rollout.logprobs, full.logprobs, rtol=0, atol=1e-4)
    assert torch.equal(rollout.tokens, apart.generate(prompts).tokens)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.backbone.model.named_parameters())


@pytest.mark.parametrize("merged", [True, False])
def test_a_run_does_what_was_planned(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, merged: bool) -> None:
    """In training, after a stop, and in evaluations of the run later on."""
    asked: list[bool] = []
    plain = static_decoder.fast_linears

    def fast_linears(model: Any, *arguments: Any, merged: bool) -> Any:
        if not any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):  # those of the plan
            asked.append(merged)
        return plain(model, *arguments, merged=merged)

    monkeypatch.setattr(static_decoder, "fast_linears", fast_linears)
    returned: list[None] = []
    monkeypatch.setattr("quartet.run.session.return_gaps", lambda: returned.append(None))
    lora = {"models.lora": {"r": 4}, "models.sharing": "paired", "rollout.merge_adapters": merged}
    run = train(tiny_run(**lora, **{"data.eval_count": 2, "ppo.iterations": 1}))
    assert len(returned) == 1 + 3 * merged  # after the update; the copies after the rollout and two evaluations
    trained = len(asked)
    assert trained > 2
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("iterations: 1", "iterations: 2"))
    resume(run)
    resumed = len(asked)
    evaluate(run, say=print)
    assert len(asked) > resumed > trained
    evaluated = len(asked)
    config = (run / "config.yaml").read_text().replace("iterations: 2", "iterations: 3")
    before, after = (f"merge_adapters: {str(wanted).lower()}" for wanted in (merged, not merged))
    assert before in config
    (run / "config.yaml").write_text(config.replace(before, after))
    resume(run)
    assert set(asked[evaluated:]) == {not merged}  # edited
    del asked[evaluated:]
    choices = json.loads((run / "plan.json").read_text())["memory"]["choices"]
    assert choices["merge_adapters"] is merged
    assert set(asked) == {merged}
