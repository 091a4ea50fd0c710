"""Weights are shared where the plan says so and nowhere else, and each is in memory once."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from checkpoints import HIDDEN, LAYERS, MLP, VOCABULARY
from pipeline import Pipeline
from storages import count_bytes
from tiny import TinyRun

RANK = 5
LORA = {"models.lora": {"r": RANK}}
ROLES = ("policy", "reference", "value", "reward")
PAIRS = {frozenset(pair) for pair in combinations(ROLES, 2)}
KEYS = HIDDEN // 2  # two of four heads
LINEAR = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEYS),
    (HIDDEN, KEYS),
    (HIDDEN, HIDDEN),
    (HIDDEN, MLP),
    (HIDDEN, MLP),
    (MLP, HIDDEN),
]
TRUNK = VOCABULARY * HIDDEN + LAYERS * (sum(a * b for a, b in LINEAR) + 2 * HIDDEN) + HIDDEN
LM_HEAD = VOCABULARY * HIDDEN
ADAPTER = LAYERS * sum(RANK * (a + b) for a, b in LINEAR)
CHECKPOINT_ADAPTER = ADAPTER // RANK * 4


def storages(module: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


@pytest.mark.parametrize(
    ("plan", "changes", "sharing", "numbers"),
    [
        ("separate", {}, set(), 4 * TRUNK + 2 * LM_HEAD),
        ("separate", LORA, set(), 4 * TRUNK + 2 * LM_HEAD + 2 * ADAPTER),
        ("paired", LORA, {("policy", "reference"), ("value", "reward")}, 2 * TRUNK + LM_HEAD + 2 * ADAPTER),
        ("single", LORA, PAIRS, TRUNK + LM_HEAD + 2 * ADAPTER + CHECKPOINT_ADAPTER),
    ],
)
def test_distinct_storages(plan: str, changes: dict[str, Any], sharing: Any, numbers: int, tiny_run: TinyRun) -> None:
    reward = "reward-lora" if plan == "single" else "reward"
    roles = Pipeline(tiny_run("llama", reward=reward, **{"models.sharing": plan, **changes})).roles
    seen = {role: storages(getattr(roles, role).backbone.model) for role in ROLES}
    shared = {frozenset(pair) for pair in combinations(ROLES, 2) if seen[pair[0]] & seen[pair[1]]}
    assert shared == {frozenset(pair) for pair in sharing}
    assert len(set().union(*seen.values())) == sum(len(storages(b.model)) for b in roles.backbones.values())
    models = [backbone.model for backbone in roles.backbones.values()]
    rotary = sum(buffer.nbytes for model in models for buffer in model.buffers())
    assert count_bytes(models) - rotary == 4 * numbers
    heads = [roles.value.head, roles.reward.head]
    assert count_bytes([*models, *heads]) - rotary == 4 * (numbers + 2 * HIDDEN)
    assert storages(heads[0]).isdisjoint(storages(heads[1]))


def test_frozen_weights_in_bfloat16_take_half(tiny_run: TinyRun) -> None:
    changes = {"models.sharing": "paired", **LORA, "models.dtype": "bfloat16"}
    roles = Pipeline(tiny_run("llama", **changes)).roles
    models = [backbone.model for backbone in roles.backbones.values()]
    rotary = sum(buffer.nbytes for model in models for buffer in model.buffers())
    assert count_bytes(models) - rotary == 2 * (2 * TRUNK + LM_HEAD) + 4 * 2 * ADAPTER


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_tied_embeddings_are_in_memory_once(family: str, tiny_run: TinyRun) -> None:
    model = Pipeline(tiny_run(family)).roles.policy.backbone.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("plan", ["separate", "paired", "single"])
def test_trained_parameters_by_name(plan: str, tiny_run: TinyRun) -> None:
    """Attaching one adapter must not freeze another, nor thaw what is frozen."""
    reward = "reward-lora" if plan == "single" else "reward"
    roles = Pipeline(tiny_run("llama", "sft-lora", reward, **{"models.sharing": plan, **LORA})).roles
    places = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    expected = {
        role: {
            f"model.layers.{layer}.{place}.lora_{part}.{role}.weight"
            for layer in range(LAYERS)
            for place in places
            for part in "AB"
        }
        for role in ("policy", "value")
    }
    assert {name for name, _ in roles.trained_parameters("policy")} == expected["policy"]
    assert {name for name, _ in roles.trained_parameters("value")} == expected["value"] | {"score.weight"}
    thawed = {n for b in roles.backbones.values() for n, p in b.model.named_parameters() if p.requires_grad}
    assert thawed == expected["policy"] | expected["value"]
    assert not roles.reward.head.weight.requires_grad


def test_full_fine_tuning_trains_every_weight_of_policy_and_value(tiny_run: TinyRun) -> None:
    roles = Pipeline(tiny_run("llama")).roles
    numbers = {role: sum(p.numel() for _, p in roles.trained_parameters(role)) for role in ("policy", "value")}  # type: ignore[arg-type]
    assert numbers == {"policy": TRUNK + LM_HEAD, "value": TRUNK + HIDDEN}
    for role in ("reference", "reward"):
        assert not any(p.requires_grad for p in getattr(roles, role).backbone.model.parameters())
