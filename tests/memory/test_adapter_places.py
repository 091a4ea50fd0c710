"""Adapters that are not on all layers alike: counted where they are, and planned with as if they were everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_adapter, write_model
from pipeline import Pipeline
from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.memory.choices import choices_of, workload_of
from quartet.memory.estimate import Estimator, estimator_for
from quartet.memory.figures import Estimate
from quartet.models.loading import plan_for

CPU = torch.device("cpu")


def planned(pipeline: Pipeline) -> Estimate:
    inputs = pipeline.inputs
    estimator = Estimator(inputs.sft, inputs.reward, workload_of(pipeline.config), CPU)
    return estimator.estimate(inputs.plan, choices_of(pipeline.config, CPU))


@pytest.fixture
def deep(tiny_run: Any, tmp_path: Path) -> Any:
    """Values of a run over checkpoints of six layers."""

    def make(**changes: Any) -> Any:
        given = {}
        for name, task in (("sft", "lm"), ("reward", "classifier")):
            given[f"models.{name}"] = str(write_model(tmp_path / name, "llama", task=task, num_hidden_layers=6))
        return tiny_run("llama", **given | changes)

    return make


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (r".*layers\.[45]\..*q_proj", 2),
        (r".*layers\.[0-1]\..*q_proj", 2),
        (["layers.5.self_attn.q_proj"], 1),
        (r".*q_proj", 6),
    ],
)
def test_an_adapter_on_some_layers_is_counted_there(deep: Any, targets: Any, count: int) -> None:
    pipeline = Pipeline(deep(**{"models.lora": {"r": 4, "target_modules": targets}}))
    pipeline.iterate()
    parameters = sum(p.numel() for _, p in pipeline.roles.trained_parameters("policy"))
    assert parameters == count * 4 * (32 + 32)
    assert [role.trained_parameters for role in planned(pipeline).roles if role.role == "policy"] == [parameters]


def test_a_target_that_is_nowhere_is_refused_by_the_plan_too(deep: Any) -> None:
    config = parse_config(deep(**{"models.lora": {"r": 4, "target_modules": r".*layers\.9\..*q_proj"}}))
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    with pytest.raises(ConfigError, match="cannot be applied"):
        estimator.estimate(plan, choices_of(config, CPU))


def test_a_checkpoints_adapter_on_some_layers_is_planned(deep: Any, tmp_path: Path) -> None:
    values = deep()
    base = Path(values["models"]["sft"])
    targets = ["layers.4.self_attn.q_proj", "layers.5.self_attn.q_proj"]
    adapter = write_adapter(tmp_path / "adapter", base, task="classifier", target_modules=targets)
    for lora in ({"r": 4}, None):
        pipeline = Pipeline(deep(**{"models.reward": str(adapter), "models.lora": lora}))
        reward = next(role for role in planned(pipeline).roles if role.role == "reward")
        assert reward.adapters == 2 * 4 * (32 + 32) * 4


def test_a_checkpoints_adapter_on_the_head_is_planned(deep: Any, tmp_path: Path) -> None:
    """It is the reference's in full fine-tuning, and nobody asked for adapters."""
    base = Path(deep()["models"]["sft"])
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".lora_" in name}, file)
    pipeline = Pipeline(deep(**{"models.sft": str(adapter)}))
    reference = next(role for role in planned(pipeline).roles if role.role == "reference")
    assert reference.adapters == 4 * 4 * (6 * (32 + 32) + 32 + 260)
