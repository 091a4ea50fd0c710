"""Frozen weights that leave the device between uses; here both places are host memory, and moving in makes a copy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline import Pipeline
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.models import page_locked
from quartet.models.offload import Offloaded, make_residency, refuse_unmovable, rests_on_host
from quartet.models.plan import Role
from quartet.models.residency import Residency
from storages import count_bytes
from tiny import TinyRun

PLANS = {
    "separate": {},
    "frozen bottom": {"models.freeze_layers": 1},
    "paired": {"models.lora": {"r": 4}, "models.sharing": "paired"},
}


def offloaded(pipeline: Pipeline, *, pin: bool = False) -> Pipeline:
    roles = pipeline.roles
    residency = Offloaded(roles.plan, roles.backbones, torch.device("cpu"), pin=pin)
    pipeline.loaded = replace(pipeline.loaded, roles=replace(roles, residency=residency))
    return pipeline


def places(pipeline: Pipeline) -> dict[str, set[int]]:
    """Addresses of the frozen weights of every backbone."""
    return {
        name: {p.data_ptr() for p in backbone.model.parameters() if not p.requires_grad}
        for name, backbone in pipeline.roles.backbones.items()
    }


@pytest.mark.parametrize("name", PLANS)
def test_the_numbers_are_the_same(tiny_run: TinyRun, name: str) -> None:
    plain, moved = Pipeline(tiny_run("llama", **PLANS[name])), offloaded(Pipeline(tiny_run("llama", **PLANS[name])))
    for _ in range(2):
        (expected, _), (found, _) = plain.iterate(), moved.iterate()
        assert torch.equal(found.scored.ref_logprobs, expected.scored.ref_logprobs)
        assert torch.equal(found.scored.scores, expected.scored.scores)
        assert torch.equal(found.returns, expected.returns)
        moved.roles.use("policy")
    weights = plain.trained()
    assert all(torch.equal(weights[key], value) for key, value in moved.trained().items())


def test_weights_in_shared_blocks_give_the_same_numbers(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied embeddings are one tensor there too."""
    monkeypatch.setattr(page_locked, "_block", lambda size: torch.zeros(size, dtype=torch.uint8))
    plain, moved = Pipeline(tiny_run("gpt2")), offloaded(Pipeline(tiny_run("gpt2")), pin=True)
    model = moved.roles.backbones["reference"].model
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) < len(list(model.parameters())) // 2
    for _ in range(2):
        (expected, _), (found, _) = plain.iterate(), moved.iterate()
        assert torch.equal(found.scored.ref_logprobs, expected.scored.ref_logprobs)
        assert torch.equal(found.scored.scores, expected.scored.scores)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[union-attr]


def test_only_what_a_role_needs_is_moved_in(tiny_run: TinyRun) -> None:
    pipeline = offloaded(Pipeline(tiny_run("llama")))
    home = places(pipeline)

    def inside(*roles: Role) -> set[str]:
        pipeline.roles.use(*roles)
        now = places(pipeline)
        assert all(now[name] == home[name] or not now[name] & home[name] for name in home)
        return {name for name in home if now[name] != home[name]}

    assert inside("reference") == {"reference"}
    assert inside("reward") == {"reward"}
    assert inside("value") == set()  # trained, and always there
    assert inside("reference", "reward") == {"reference", "reward"}
    assert inside("policy", "value") == set()
    assert places(pipeline) == home


def test_tied_weights_are_moved_once(tiny_run: TinyRun) -> None:
    pipeline = offloaded(Pipeline(tiny_run("gpt2")))
    model = pipeline.roles.backbones["reference"].model
    before = count_bytes([model])
    pipeline.roles.use("reference")
    assert count_bytes([model]) == before
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()  # type: ignore[union-attr]


def test_a_trunk_that_is_shared_with_trained_weights_stays(tiny_run: TinyRun) -> None:
    pipeline = offloaded(Pipeline(tiny_run("llama", **PLANS["frozen bottom"])))
    home = places(pipeline)
    pipeline.roles.use("reference")
    now = places(pipeline)
    assert now["policy"] == home["policy"]
    assert now["reference"] & home["reference"] == now["reference"] & home["policy"] != set()


@pytest.mark.parametrize(
    ("device", "changes", "plan", "cut", "message"),
    [
        ("cpu", {}, "paired", False, "the models are on the CPU already; use models.offload=none"),
        ("cpu", {}, "separate", True, "the models are on the CPU already; use models.offload=none"),
        (
            "cuda",
            {"quantization": "8bit"},
            "paired",
            False,
            "cannot move layers of models.quantization=8bit.*use models.quantization=4bit or null",
        ),
        ("cuda", {}, "single", False, "has nothing to move under the single plan, whose one backbone"),
        ("cuda", {}, "paired", True, "nothing to move under the paired plan where weights are cut into shares"),
        ("cuda", {}, "separate", True, None),
        ("cuda", {}, "paired", False, None),
        ("cpu", {"offload": "none"}, "single", True, None),
    ],
)
def test_what_cannot_be_moved_is_refused(
    tiny_run: TinyRun, device: str, changes: dict[str, Any], plan: str, cut: bool, message: str | None
) -> None:
    kind = {"reward": "reward-lora", "models.lora": {"r": 4}} if plan == "single" else PLANS[plan]
    values = tiny_run("llama", **kind)
    inputs = Pipeline(values).inputs
    models = parse_config(values).models.model_copy(update={"offload": "cpu", **changes})
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        refuse_unmovable(models, inputs.plan, torch.device(device), cut=cut)


def test_engines_that_cut_weights_keep_them_at_home_by_themselves(tiny_run: TinyRun) -> None:
    roles = Pipeline(tiny_run("llama", **PLANS["separate"])).roles
    assert type(make_residency("cpu", roles.plan, roles.backbones, torch.device("cuda"), cut=True)) is Residency
    resting = {name for name, backbone in roles.backbones.items() if rests_on_host(backbone.spec)}
    assert resting == {"reference", "reward"}


def test_a_backbone_is_where_its_weights_run(tiny_run: TinyRun) -> None:
    """Shares at rest may be elsewhere."""
    backbone = Pipeline(tiny_run("llama")).roles.reference.backbone
    assert backbone.device.type == "cpu"
    backbone.weights.device = torch.device("meta")
    assert backbone.device.type == "meta"


def test_the_configuration_reaches_the_refusal(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a weight is read."""
    values = tiny_run("llama", **{"models.offload": "cpu"})
    monkeypatch.setattr("quartet.run.setup.load_roles", None)
    with pytest.raises(ConfigError, match=r"models\.offload=cpu"):
        Pipeline(values)
