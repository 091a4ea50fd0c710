"""What loading refuses, the plan refuses before it."""

from __future__ import annotations

from typing import Any

import pytest

from quartet.config import parse_config
from quartet.errors import ConfigError
from quartet.memory.choices import choices_of
from quartet.memory.estimate import estimator_for
from quartet.memory.search import search
from quartet.models.loading import plan_for

NARROW = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
}


def estimated(values: Any) -> None:
    config = parse_config(values)
    estimator = estimator_for(config)
    plan = plan_for(config.models, estimator.sft, estimator.reward)
    estimator.estimate(plan, choices_of(config, estimator.device))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"models.lora": {"r": 4}, "models.quantization": "4bit"},
            "q_proj has 96 inputs; use models.quantization=8bit",
        ),
        ({"ppo.optimizer": {"name": "paged_adamw8bit"}}, "the models are on the CPU; use adamw8bit or adamw"),
    ],
)
def test_settings_that_loading_refuses(hollow: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        estimated(hollow(NARROW, **changes))


def test_an_adapter_too_small_to_go_on_from(tiny_run: Any) -> None:
    for r in (5, 4):
        estimated(tiny_run("llama", "sft-lora", **{"models.lora": {"r": r}}))
    with pytest.raises(ConfigError, match=r"models\.lora\.r=3 is smaller than rank 4"):
        estimated(tiny_run("llama", "sft-lora", **{"models.lora": {"r": 3}}))


def test_the_search_finds_nothing_that_loading_refuses(hollow: Any) -> None:
    """Rows of 96 are no whole blocks of 64: 8 bit is the least that these weights can be held in."""
    values = hollow(NARROW | {"num_hidden_layers": 24}, **{"models.lora": {"r": 4}, "models.dtype": "float32"})
    config = parse_config(values)
    estimator = estimator_for(config)
    found = search(config, estimator, 1 << 20)
    assert found.chosen is None
    tried = {candidate.change.get("models.quantization") for candidate in found.nearer}
    assert tried == {None, "8bit"}
