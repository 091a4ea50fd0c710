"""Bytes of parameters, gradients and optimizer state, against models that were really loaded and trained for a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoints import write_model
from pipeline import Pipeline
from quartet.kernels import decodes
from quartet.memory.choices import choices_of, workload_of
from quartet.memory.estimate import Estimator
from quartet.memory.figures import Estimate
from quartet.memory.libraries import (
    ADAPTER_MODULES,
    ADAPTERS_AT_LOAD,
    AT_LOAD,
    FEW_ROWS,
    LIBRARIES,
    MODULES,
    QUANTIZING,
    WITH_ENGINE,
    WITH_QUANTIZATION,
)
from quartet.memory.simulator import Simulator

TRUNK = {"models.value_model": "trunk", "models.value_head_init": "zero"}
CASES = [
    ("llama", "sft", "reward", {}),
    ("gpt2", "sft", "reward", {}),
    ("gemma2", "sft", "reward", {}),
    ("llama", "sft", "reward", {"models.lora": {"r": 4}, "models.sharing": "separate"}),
    ("llama", "sft", "reward", {"models.lora": {"r": 4}, "models.sharing": "paired"}),
    ("gpt2", "sft", "reward", {"models.lora": {"r": 2}, "models.sharing": "paired"}),
    ("llama", "sft", "reward-lora", {"models.lora": {"r": 4}, "models.sharing": "single"}),
    ("gemma2", "sft-lora", "reward-lora", {"models.lora": {"r": 4}, "models.sharing": "single"}),
    ("llama", "sft-lora", "reward-on-reward", {"models.lora": {"r": 5}, "models.sharing": "paired"}),
    ("llama", "sft", "reward", {"models.lora": {"r": 4, "target_modules": ["q_proj"]}, "models.dtype": "bfloat16"}),
    ("llama", "sft-lora", "reward", {"models.dtype": "bfloat16"}),
    ("llama", "sft", "reward", {"models.freeze_layers": 1}),
    ("gpt2", "sft", "reward", {"models.freeze_layers": 1, "models.dtype": "bfloat16"}),
    ("llama", "sft", "reward", TRUNK),
    ("opt", "sft", "reward", TRUNK),
    ("opt", "sft", "reward", {}),
    (
        "llama",
        "sft",
        "reward-lora",
        {"models.freeze_layers": 1, "models.value_model": "trunk", "models.value_head_init": "zero"},
    ),
    (
        "llama",
        "sft",
        "reward",
        {
            "models.value_model": "trunk",
            "models.value_head_init": "zero",
            "models.lora": {"r": 4},
            "models.sharing": "paired",
        },
    ),
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "cache"))


CPU = torch.device("cpu")


def estimator_of(pipeline: Pipeline) -> Estimator:
    return Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), CPU)


def estimate_for(pipeline: Pipeline, **changes: Any) -> Estimate:
    """The planner's view of a pipeline's configuration, with some choices changed."""
    choices = replace(choices_of(pipeline.config, CPU), **changes)
    return estimator_of(pipeline).estimate(pipeline.inputs.plan, choices)


def distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def own_bytes(model: torch.nn.Module, seen: set[int]) -> int:
    """Bytes of the distinct storages that are not in `seen`, which then holds them too."""
    held = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            held[storage.data_ptr()] = storage.nbytes()
    seen.update(held)
    return sum(held.values())


@pytest.mark.parametrize(("family", "sft", "reward", "changes"), CASES)
def test_bytes_equal_those_of_loaded_models(
    tiny_run: Any, family: str, sft: str, reward: str, changes: dict[str, Any]
) -> None:
    pipeline = Pipeline(tiny_run(family, sft, reward, **changes))
    estimate = estimate_for(pipeline)
    pipeline.iterate()
    roles = pipeline.roles
    seen: set[int] = set()
    for backbone in estimate.backbones:
        # A twin's own bytes are those that the backbone before it does not hold.
        held = own_bytes(roles.backbones[backbone.name].model, seen)
        assert backbone.weights + backbone.adapters == held, backbone.name
    for role in ("policy", "value"):
        predicted = next(r for r in estimate.roles if r.role == role)
        trained = [p for _, p in roles.trained_parameters(role)]  # type: ignore[arg-type]
        state = [t for p in trained for t in pipeline.loaded.optimizer.state[p].values()]
        assert predicted.trained_parameters == sum(p.numel() for p in trained)
        assert predicted.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
        assert predicted.optimizer == sum(t.nbytes for t in state)
    for role in ("reference", "reward"):
        predicted = next(r for r in estimate.roles if r.role == role)
        assert (predicted.gradients, predicted.optimizer) == (0, 0)
    assert next(r for r in estimate.roles if r.role == "value").head == roles.value.head.weight.nbytes


def test_tied_embeddings_are_counted_once_and_an_untied_head_is_named(tiny_run: Any) -> None:
    tied = estimate_for(Pipeline(tiny_run("gemma2")))
    untied = estimate_for(Pipeline(tiny_run("llama")))
    # 260 tokens of 32 features in float32.
    assert [next(r for r in e.roles if r.role == "policy").head for e in (tied, untied)] == [0, 260 * 32 * 4]


def test_weights_that_need_no_copy_are_not_anonymous(tiny_run: Any) -> None:
    changes = {"models.lora": {"r": 4}, "models.sharing": "paired"}
    same = estimate_for(Pipeline(tiny_run("llama", **changes)))
    other = estimate_for(Pipeline(tiny_run("llama", **changes, **{"models.dtype": "bfloat16"})))
    trained = estimate_for(Pipeline(tiny_run("llama")))
    assert [backbone.mapped for backbone in same.backbones] == [b.parameters * 4 for b in same.backbones]
    # Converted once on disk, and mapped from there.
    assert [backbone.mapped for backbone in other.backbones] == [b.parameters * 2 for b in other.backbones]
    mapped = {backbone.name: backbone.mapped for backbone in trained.backbones}
    assert (mapped["policy"], mapped["value"]) == (0, 0)
    assert min(mapped["reference"], mapped["reward"]) > 0
    # What is trained is mapped too until the first step writes to it.
    assert trained.phase("load").weights < trained.phase("rollout").weights


def test_what_a_merged_adapter_leaves_alone_stays_mapped(tiny_run: Any) -> None:
    estimate = estimate_for(Pipeline(tiny_run("llama", "sft-lora", **{"models.freeze_layers": 1})))
    # Embeddings and two norms of the frozen layer; its linear layers have the adapter in them.
    assert estimate.backbones[0].mapped == (260 * 32 + 2 * 32) * 4
    assert estimate.phase("load").weights < estimate.phase("rollout").weights


def test_a_shallow_reward_model_beside_frozen_layers_is_planned(tiny_run: Any, tmp_path: Any) -> None:
    """Its layers are not those that are frozen."""
    deep, shallow = tmp_path / "deep", tmp_path / "shallow"
    write_model(deep, "llama", num_hidden_layers=6)
    write_model(shallow, "llama", task="classifier", num_hidden_layers=2)
    found = {}
    for frozen in (1, 5):
        given = {"models.sft": str(deep), "models.reward": str(shallow), "models.freeze_layers": frozen} | TRUNK
        pipeline = Pipeline(tiny_run("llama", **given))
        known, plan = estimator_of(pipeline), pipeline.inputs.plan
        simulator = Simulator(known.sft, known.reward, known.workload)
        working = simulator.working("scoring", plan, choices_of(pipeline.config, CPU), known.holdings.shapes(plan))
        found[frozen] = working.peaks["reward last layer"]
    assert found[1] == found[5]


def test_layers_that_alternate_are_counted(tmp_path: Any, tiny_run: Any) -> None:
    for name, task in (("sft", "lm"), ("reward", "classifier")):
        write_model(tmp_path / name, "gemma2", task=task, num_hidden_layers=7)
    values = tiny_run("gemma2", **{"models.lora": {"r": 4}, "models.sharing": "paired"})
    values["models"] |= {"sft": str(tmp_path / "sft"), "reward": str(tmp_path / "reward")}
    pipeline = Pipeline(values)
    estimate = estimate_for(pipeline)
    for backbone in estimate.backbones:
        model = pipeline.roles.backbones[backbone.name].model
        assert backbone.weights + backbone.adapters == distinct_bytes([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [
        ("ddp", 1, 1, 1),
        ("zero2", 1, 4, 4),
        ("zero3", 4, 4, 4),
        ("fsdp2", 4, 4, 4),
    ],
)
def test_shards(tiny_run: Any, engine: str, weights: int, gradients: int, optimizer: int) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    device = torch.device("cpu")
    estimator = Estimator(pipeline.inputs.sft, pipeline.inputs.reward, workload_of(pipeline.config), device)
    one = estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device))
    four = estimator.estimate(pipeline.inputs.plan, choices_of(pipeline.config, device, world_size=4, engine=engine))
    assert [b.weights for b in four.backbones] == [b.weights / weights for b in one.backbones]
    for mine, whole in zip(four.roles, one.roles, strict=True):
        assert (mine.gradients, mine.optimizer) == (whole.gradients / gradients, whole.optimizer / optimizer)
    # A share of a weight in a file is a copy of it.
    assert [b.mapped > 0 for b in four.backbones] == [not b.trained and weights == 1 for b in four.backbones]


def test_a_process_engine_adds_to_what_libraries_keep(tiny_run: Any, computed_by: str) -> None:
    """And keeps what oneDNN takes for few rows, which a single process does not have where kernels decode."""
    pipeline = Pipeline(tiny_run("llama"))
    alone, many = (estimate_for(pipeline, engine=engine, world_size=2) for engine in ("none", "ddp"))
    for phase in ("rollout", "scoring", "update"):
        fewer = 0 if computed_by == "torch" else FEW_ROWS["float32"]
        kept = (alone.phase(phase).libraries, many.phase(phase).libraries)
        assert kept == (LIBRARIES - fewer, LIBRARIES + WITH_ENGINE)
    assert WITH_ENGINE > 0


def test_where_weights_are_cut_libraries_fit_into_what_whole_ones_leave(tiny_run: Any) -> None:
    pipeline = Pipeline(tiny_run("llama"))
    found = {
        name: estimate_for(pipeline, engine=name, world_size=2).phase("load") for name in ("ddp", "fsdp2", "zero3")
    }
    assert found["ddp"].libraries > found["fsdp2"].libraries == found["zero3"].libraries == 0
    assert found["zero3"].gathered > 0


@pytest.mark.parametrize(
    ("sft", "reward", "sharing", "read"),
    [
        ("sft", "reward", "paired", ()),
        ("sft", "reward-lora", "single", ("reward",)),
        ("sft", "reward", "separate", None),
    ],
)
def test_an_adapters_file_is_beside_the_adapter_that_it_fills(
    tiny_run: Any, sft: str, reward: str, sharing: str, read: tuple[str, ...] | None
) -> None:
    lora = {} if read is None else {"models.lora": {"r": 4}}
    pipeline = Pipeline(tiny_run("llama", sft=sft, reward=reward, **lora, **{"models.sharing": sharing}))
    estimate = estimate_for(pipeline)
    names = [name for b in pipeline.roles.backbones.values() for name, _ in b.model.named_parameters()]
    of_adapters = sum("lora_" in name for name in names)
    backbone = pipeline.roles.backbones[estimate.backbones[0].name].model
    in_files = [p.nbytes for name, p in backbone.named_parameters() if "lora_" in name and ".reward." in name]
    assert bool(in_files) is bool(read)
    imported = AT_LOAD if read is None else AT_LOAD + ADAPTERS_AT_LOAD
    objects = MODULES * (len(names) - of_adapters) + ADAPTER_MODULES * of_adapters
    assert estimate.phase("load").libraries == imported + objects + sum(in_files)
    if read == ():
        largest = max(p.numel() for p in backbone.model.layers.parameters())
        # The ledger alone: rows of 32 are no whole blocks of four bits, and an estimate would refuse them.
        known = estimator_of(pipeline)
        quantized = known.holdings.ledger(
            pipeline.inputs.plan, replace(choices_of(pipeline.config, CPU), quantization="4bit")
        )
        assert quantized.load.libraries == pytest.approx(imported + objects + QUANTIZING["4bit"] * largest)
        fewer = FEW_ROWS["float32"] if decodes(torch.float32) else 0
        assert (estimate.phase("update").libraries, quantized.fixed("update").libraries) == (
            LIBRARIES - fewer,
            WITH_QUANTIZATION["4bit"],
        )
