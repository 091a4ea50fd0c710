"""Which engine `auto` is."""

from __future__ import annotations

from typing import Any

import pytest

from quartet.config import parse_config
from quartet.distributed import engine_name, refuse_impossible
from tiny import TinyRun


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "fsdp2"),
        ({"models.lora": {}}, "ddp"),
        ({"models.freeze_layers": 1}, "ddp"),
        ({"models.quantization": "8bit"}, "ddp"),
        ({"ppo.optimizer": {"name": "adamw8bit"}}, "ddp"),
        ({"ppo.optimizer": {"name": "paged_adamw8bit"}}, "ddp"),
    ],
)
def test_auto_is_an_engine_that_takes_the_configuration(
    changes: dict[str, Any], engine: str, tiny_run: TinyRun
) -> None:
    config = parse_config(tiny_run(**changes))
    assert engine_name(config, 1) == "none"
    assert engine_name(config, 2) == engine
    refuse_impossible(config, engine, 2)
