"""The run on fake tensors against the same code on real ones, and few layers against all of them."""

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoints import WIDE, write_model
from pipeline import Pipeline
from quartet.config import LoraConfig, parse_config
from quartet.errors import CheckpointError
from quartet.memory import skeleton
from quartet.memory.choices import Choices, Workload, choices_of, workload_of
from quartet.memory.estimate import Estimator, estimator_for
from quartet.memory.phases import PHASES, RUNS
from quartet.memory.simulator import Simulator
from quartet.memory.skeleton import fake_roles, tensors_of
from quartet.memory.trace import GRADIENTS, LOGITS, FakeTensors, MemoryTrace
from quartet.models.checkpoint_info import read_checkpoint
from quartet.models.layout import PackedLayout
from quartet.models.linears import FastLinear
from quartet.models.loading import plan_for
from quartet.models.plan import Source, make_plan

WORKLOAD = Workload(10, 6, 8, 1, 1, False, 1.0, 1.0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"models.gradient_checkpointing": True}),
        ("gpt2", {"models.lora": {"r": 4}, "models.sharing": "paired"}),
        ("llama", {"models.lora": {"r": 4}, "models.sharing": "paired", "models.dtype": "bfloat16"}),
        ("llama", {"models.freeze_layers": 1}),
        (WIDE, {}),
        (WIDE, {"models.gradient_checkpointing": True}),
        (WIDE, {"models.lora": {"r": 4}, "models.sharing": "paired"}),
    ],
)
def test_fake_tensors_take_as_much_as_real_ones(
    tiny_run: Any, tmp_path: Any, family: str, changes: dict[str, Any]
) -> None:
    # The plan has all prompts as long as the longest.
    (tmp_path / "prompts.txt").write_text("to be\nq 123\nx - y\nwhy??\n")
    one_microbatch = {"ppo.minibatches": 1, "ppo.microbatch_rows": 4, "ppo.epochs": 1, "rollout.stop": None}
    pipeline = Pipeline(tiny_run(family, **one_microbatch, **{"rollout.batch_rows": 4}, **changes))
    batch = pipeline.advantages(pipeline.score(pipeline.rollout()))
    pipeline.update(batch)  # the optimizer's state is there from now on
    longest = max(len(tokens) for tokens in batch.scored.rollout.prompts.tokens)
    known = [*tensors_of(pipeline.roles), *(t for s in pipeline.loaded.optimizer.state.values() for t in s.values())]
    pipeline.loaded.optimizer.zero_grad()
    with MemoryTrace(known, vocabulary=-1) as trace:
        trace.enter("update")
        pipeline.update(batch)
    real = sum(trace.peaks["update"].values())
    device = torch.device("cpu")
    estimator = Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config, longest), device)
    phase = estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device)).phase("update")
    # The real update also slices its batch and sums its metrics: under a kilobyte here.
    assert phase.activations + phase.logits + phase.gradients == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("lora", "checkpointing"), [*itertools.product((None, LoraConfig(r=2)), (False, True))])
@pytest.mark.parametrize("depth", [7, 10, 4])
def test_few_layers_tell_what_all_layers_take(
    tmp_path: Any, phase: str, lora: LoraConfig | None, checkpointing: bool, depth: int
) -> None:
    """Policy and reward model need not be equally deep."""
    for name, task in (("sft", "lm"), ("reward", "classifier")):
        write_model(tmp_path / name, "gemma2", task=task, num_hidden_layers=7 if task == "lm" else depth)
    sft, reward = read_checkpoint(str(tmp_path / "sft"), "sft"), read_checkpoint(str(tmp_path / "reward"), "reward")
    sources = Source(sft.base, None), Source(reward.base, None)
    plan = make_plan("auto", lora=lora is not None, sft=sources[0], reward=sources[1], bases_equal=False)
    choices = Choices("auto", lora, "float32", checkpointing, microbatch_rows=4, batch_rows=4)
    shapes = Estimator(sft, reward, WORKLOAD, torch.device("cpu")).holdings.shapes(plan)
    assert {(shape.layers, shape.period) for shape in shapes.values()} == {(7, 2), (depth, 2)}
    found = Simulator(sft, reward, WORKLOAD).working(phase, plan, choices, shapes)
    unrepeated = {task: replace(shape, period=shape.layers) for task, shape in shapes.items()}
    whole = Simulator(sft, reward, WORKLOAD).working(phase, plan, choices, unrepeated)
    assert found == whole


def test_an_evaluation_larger_than_an_iteration_counts(tiny_run: Any) -> None:
    few = {"rollout.batch_size": 4, "rollout.batch_rows": 40}
    small, large = (parse_config(tiny_run("llama", **few, **{"data.eval_count": count})) for count in (4, 40))
    as_large = parse_config(tiny_run("llama", **few | {"rollout.batch_size": 40}))
    caches = []
    for config in (small, large, as_large):
        estimator = estimator_for(config)
        plan = plan_for(config.models, estimator.sft, estimator.reward)
        caches.append(estimator.estimate(plan, choices_of(config, torch.device("cpu"))).phase("rollout").kv_cache)
    assert caches[0] * 10 == caches[1] == caches[2]
    assert estimator_for(large, evaluated=7).workload.together(1) == 7


@pytest.mark.parametrize("side_by_side", [False, True])
def test_correcting_the_rollout_counts(side_by_side: bool, tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's pass over the responses: with padding as the reference's in scoring, whose layers are the same here;
    side by side its layers are as the value's, and its logits the reference's."""
    if not side_by_side:
        monkeypatch.setattr(skeleton, "longest_packed", lambda _: 0)
    config = parse_config(tiny_run("llama", **{"rollout.correct_rollout": True}))
    estimator, choices = estimator_for(config), choices_of(config, torch.device("cpu"))
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    shapes = estimator.holdings.shapes(plan)
    simulator = Simulator(estimator.sft, estimator.reward, estimator.workload)
    peaks = {phase: simulator.working(phase, plan, choices, shapes).peaks for phase in ("rollout", "scoring")}
    found = {place: peaks["rollout"][f"correction policy {place}"] for place in ("first layer", "last layer", "logits")}
    for place in ("first layer", "last layer"):
        assert found[place] == peaks["scoring"][f"{'value' if side_by_side else 'reference'} {place}"]
    expected = peaks["scoring"]["reference logits"]
    if not side_by_side:
        assert found["logits"] == expected
    assert found["logits"]["logits"] == expected["logits"] > 0
    assert 0 < found["logits"]["activations"] <= expected["activations"], "states of prompts are not kept for them"


def test_offloaded_backbones_take_turns(tiny_run: Any) -> None:
    values = tiny_run("llama", **{"models.lora": {"r": 4}, "models.sharing": "paired"})
    pipeline = Pipeline(values)
    estimator = Estimator(
        pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), torch.device("cuda")
    )
    choices = choices_of(pipeline.config, torch.device("cpu"))
    held = estimator.estimate(pipeline.inputs.plan, choices)
    away = estimator.estimate(pipeline.inputs.plan, replace(choices, offload="cpu"))
    # The value's adapter is trained, and stays.
    _, reward = (backbone.weights for backbone in held.backbones)
    saved = {phase: held.phase(phase).weights - away.phase(phase).weights for phase in PHASES}
    assert saved == {"rollout": reward, "scoring": 0, "update": 0}


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_offloaded_shares_are_away_for_good(tiny_run: Any, engine: str) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    estimator = Estimator(
        pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), torch.device("cuda")
    )
    choices = replace(choices_of(pipeline.config, torch.device("cpu")), engine=engine, world_size=2)
    held = estimator.estimate(pipeline.inputs.plan, choices)
    away = estimator.estimate(pipeline.inputs.plan, replace(choices, offload="cpu"))
    frozen = sum(backbone.weights for backbone in held.backbones if not backbone.trained)
    assert frozen > 0
    for phase in ("load", *PHASES):
        assert held.phase(phase).weights - away.phase(phase).weights == frozen
    # fsdp2 has a unit's share on the device before the unit is put together from it.
    model = pipeline.roles.reference.backbone.model
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - len(model.model.layers) * layer
    on_its_way = away.phase("scoring").gathered - held.phase("scoring").gathered
    assert on_its_way == (max(layer, outside) * 4 // 2 if engine == "fsdp2" else 0)


def test_a_model_that_needs_data_is_refused_by_name(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    monkeypatch.setitem(RUNS, "scoring", lambda *_: torch.empty(3).nonzero())
    estimator = Estimator(
        pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), torch.device("cpu")
    )
    with pytest.raises(CheckpointError, match=r"models\.sft=.*cannot be planned: its scoring"):
        estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, torch.device("cpu")))


def test_a_model_that_does_not_run_side_by_side_is_planned_padded(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, device = Pipeline(tiny_run("llama")), torch.device("cpu")

    def update_of(packs: bool) -> float:
        monkeypatch.setattr("quartet.memory.skeleton.longest_packed", lambda _: 10**6 * packs)
        estimator = Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), device)
        return estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device)).phase("update").peak

    tried = []
    monkeypatch.setattr(PackedLayout, "one_a_row", lambda *_: (tried.append(True), torch.empty(3).nonzero()))
    padded = update_of(False)
    assert not tried
    assert update_of(True) == padded
    assert tried


def test_gradients_of_the_microbatches_before_are_there(tiny_run: Any) -> None:
    """With several microbatches the gradients stay while the next one's graph is built."""
    shared = {"ppo.minibatches": 1, "rollout.stop": None}
    one, two = (
        Pipeline(tiny_run("llama", **shared, **{"ppo.microbatch_rows": 2, "rollout.batch_size": size}))
        for size in (2, 4)
    )
    device = torch.device("cpu")
    held = []
    for pipeline in (one, two):
        estimator = Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config, 4), device)
        held.append(estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device)).phase("update"))
    trained = sum(p.nbytes for role in ("policy", "value") for _, p in one.roles.trained_parameters(role))  # type: ignore[arg-type]
    assert held[1].gradients == trained
    assert held[0].peak < held[1].peak


def test_a_gpu_is_planned_with_the_logits_of_more_tokens_at_once(hollow: Any) -> None:
    """Scoring in bfloat16 holds a chunk's logits and two float32 tensors of that size: 10 bytes an element."""
    sizes = {"vocab_size": 50000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values = hollow({**sizes, "num_attention_heads": 2}, **{"rollout.response_length": 300, "models.dtype": "bfloat16"})
    config = parse_config(values)
    known = estimator_for(config)
    plan = plan_for(config.models, known.sft, known.reward)
    workload, shapes = workload_of(config, 10), known.holdings.shapes(plan)
    logits = {}
    for name in ("cpu", "cuda"):
        choices = replace(choices_of(config, torch.device(name)), batch_rows=4)
        simulator = Simulator(known.sft, known.reward, workload)
        logits[name] = simulator.working("scoring", plan, choices, shapes).held[LOGITS]
    assert logits == {"cpu": 128 * 50000 * 10, "cuda": 4 * 300 * 50000 * 10}


def test_a_gpu_is_planned_without_what_only_a_cpu_does(hollow: Any, computed_by: str) -> None:
    """Short attention by a kernel, which holds no scores, or by plain products, whose scores a GPU never holds."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = parse_config(hollow(sizes, **{"rollout.response_length": 30, "models.dtype": "bfloat16"}))
    known = estimator_for(config)
    plan = plan_for(config.models, known.sft, known.reward)
    shapes, found = known.holdings.shapes(plan), {}
    for name in ("cpu", "cuda"):
        simulator = Simulator(known.sft, known.reward, workload_of(config, 10))
        working = simulator.working("update", plan, choices_of(config, torch.device(name)), shapes)
        found[name] = {str(product[0]) for product in working.products}
    scores = {"aten::baddbmm", "aten::bmm"} & found["cpu"]
    assert len(scores) == (2 if computed_by == "torch" else 0)
    assert not {"aten::baddbmm", "aten::bmm"} & found["cuda"]


@pytest.mark.parametrize(("engine", "own"), [("ddp", True), ("zero2", True), ("zero3", False), ("fsdp2", False)])
def test_engines_that_cut_weights_are_planned_with_the_libraries_layers(tiny_run: Any, engine: str, own: bool) -> None:
    """As a run loads them: the update of a gated MLP then keeps the product of its gate."""
    pipeline = Pipeline(tiny_run("llama"))
    plan, sft, reward = pipeline.inputs.plan, pipeline.inputs.sft, pipeline.inputs.reward
    choices = choices_of(pipeline.config, torch.device("cpu"), world_size=2, engine=engine)
    mode = FakeTensors()
    roles = fake_roles(plan, sft, reward, choices, {"language_model": 1, "classifier": 1}, mode)
    found = {type(module) for backbone in roles.backbones.values() for module in backbone.model.modules()}
    assert (FastLinear in found) is own


@pytest.mark.parametrize(("quantization", "twice"), [(None, True), ("8bit", False)])
def test_the_rollout_holds_the_policys_adapter_twice(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, quantization: str | None, twice: bool
) -> None:
    """Scaled and transposed, for as long as it generates; layers over quantized weights stay as they are."""
    pipeline = Pipeline(tiny_run("llama", **{"models.lora": {"r": 20}, "rollout.merge_adapters": False}))
    inputs, device = pipeline.inputs, torch.device("cpu")

    def planned() -> Any:
        estimator = Estimator(inputs.sft, inputs.reward, workload_of(pipeline.config), device)
        return estimator.estimate(inputs.plan, replace(choices_of(pipeline.config, device), quantization=quantization))

    # Prompts as the library computes them: layers that nobody replaced would be computed together there, in other memory.
    monkeypatch.setattr("quartet.rollout.static_decoder.as_in_training", nullcontext)
    estimate = planned()
    monkeypatch.setattr("quartet.rollout.static_decoder.fast_linears", lambda *_, **__: nullcontext())
    copies = estimate.phase("rollout").activations - planned().phase("rollout").activations
    adapters = next(role.adapters for role in estimate.roles if role.role == "policy")
    assert (0.8 * adapters < copies <= adapters) if twice else (copies == 0)


@pytest.mark.parametrize(("engine", "first"), [("none", "both"), ("fsdp2", "policy"), ("ddp", "policy")])
def test_which_gradients_are_there_in_the_policys_passes(tiny_run: Any, engine: str, first: str) -> None:
    """An engine's gradients are dropped before a minibatch: the value's are made in its own passes, after the policy's."""
    several = {"rollout.batch_size": 8, "ppo.minibatches": 1, "ppo.microbatch_rows": 1}
    config = parse_config(tiny_run("llama", **several, **{"run.parallel_passes": False}))
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    choices = replace(choices_of(config, torch.device("cpu")), engine=engine, world_size=2 if engine != "none" else 1)
    found = Simulator(estimator.sft, estimator.reward, estimator.workload).working(
        "update", plan, choices, estimator.holdings.shapes(plan)
    )
    policy, value = (found.peaks[f"backward {role} last layer"][GRADIENTS] for role in ("policy", "value"))
    backbones = {spec.task: estimator.holdings.shape(spec.task, 0) for spec in plan.backbones}
    own = 4 * backbones["language_model"].parameters
    assert policy == (own if first == "policy" else value)
    head = 4 * backbones["classifier"].hidden  # the first gradient of the value's pass
    assert value == own + 4 * backbones["classifier"].parameters + head
