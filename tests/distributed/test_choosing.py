"""Which engine `auto` is, and that all who speak of engines say the same of each."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from quartet.config import DistributedConfig, parse_config
from quartet.distributed import (
    CUTTING,
    SHARING_STATE,
    ProcessEngine,
    SingleProcess,
    engine_name,
    launch,
    refuse_impossible,
)
from quartet.distributed.ddp import DataParallel
from quartet.distributed.fsdp2 import FullyShardedDataParallel
from quartet.distributed.zero2 import Zero2
from quartet.distributed.zero3 import Zero3
from quartet.memory.phases import TOGETHER
from tiny import TinyRun

ENGINES: dict[str, type[ProcessEngine]] = {
    "none": SingleProcess,
    "ddp": DataParallel,
    "zero2": Zero2,
    "zero3": Zero3,
    "fsdp2": FullyShardedDataParallel,
}


def test_every_engine_of_the_configuration_is_here() -> None:
    assert {"auto", *ENGINES} == set(get_args(DistributedConfig.model_fields["engine"].annotation))


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_planned_of_an_engine_is_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are refused and memory is planned by name, before there is an engine."""
    engine = ENGINES[name]
    assert engine.name == name
    assert engine.cuts_weights == (name in CUTTING)
    assert engine.shares_state == (name in SHARING_STATE)
    assert engine.one_module == (name in TOGETHER)
    if name != "none":
        monkeypatch.setattr(engine, "__init__", lambda self, device: None)
        assert type(launch._engine(name, torch.device("cpu"))) is engine


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
