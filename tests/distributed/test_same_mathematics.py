"""Several processes give the weights, losses and responses of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import WIDE
from distributed.runs import exported, largest_difference, train_run
from processes import results
from quartet.trainer import train
from tiny import TinyRun, changed

MEASURED = ("time/", "memory/")


def records(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


def samples(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [{k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in line.items()} for line in lines]


PLANS: dict[str, dict[str, Any]] = {
    "separate": {},
    "paired": {"models.lora": {"r": 4}},
    "single": {"models.lora": {"r": 4}, "reward": "reward-lora"},
    "whole layers": {"family": WIDE, "models.lora": {"r": 4}},
}
ITERATIONS = 3


@pytest.mark.parametrize(
    ("engine", "plan", "extra"),
    [
        ("ddp", "separate", {}),
        ("ddp", "paired", {}),
        ("ddp", "whole layers", {}),
        ("zero2", "separate", {}),
        ("zero2", "single", {}),
        ("zero3", "separate", {}),
        ("zero3", "single", {"distributed.gather_for_rollout": False}),
        ("fsdp2", "separate", {}),
        ("fsdp2", "single", {"distributed.gather_for_rollout": False}),
        ("fsdp2", "paired", {"models.gradient_checkpointing": True}),
        ("fsdp2", "whole layers", {}),
    ],
)
def test_two_processes_are_as_one(
    engine: str, plan: str, extra: dict[str, Any], tiny_run: TinyRun, tmp_path: Path
) -> None:
    common = {
        "ppo.iterations": ITERATIONS,
        "ppo.max_grad_norm": 0.5,
        "data.eval_count": 3,
        "run.eval_every": 1,
        "ppo.learning_rate": 1e-4,
    }
    values = tiny_run(**common, **{"rollout.batch_size": 8}, **PLANS[plan])
    train(changed(values, {"run.dir": str(tmp_path / "one")}))
    two = changed(values, {"run.dir": str(tmp_path / "two"), "distributed.engine": engine, **extra})
    results(tmp_path / "results", 2, train_run, two)
    assert largest_difference(exported(tmp_path / "one"), exported(tmp_path / "two")) < 1e-5
    for one, other in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=3e-5, abs=1e-5)
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
