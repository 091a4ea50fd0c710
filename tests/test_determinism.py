"""Same seed, same numbers: bit by bit where nothing differs, up to rounding where only the cut into rows does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quartet.run.metrics import read_metrics
from quartet.trainer import train
from tiny import TinyRun, changed

CLOCKS = ("time/", "memory/")
PLANS: dict[str, dict[str, Any]] = {
    "separate": {},
    "paired": {"models.lora": {"r": 4}, "models.sharing": "paired"},
    "single": {"models.lora": {"r": 4}, "models.sharing": "single", "reward": "reward-lora"},
}


def computed(run: Path) -> list[dict[str, float]]:
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.startswith(CLOCKS)} for record in records]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("*/*model.safetensors"))
    assert len(files) == 2
    return {f"{file.parent.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def responses(run: Path) -> list[str]:
    return [json.loads(line)["response"] for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_run_twice_is_the_same_bit_by_bit(plan: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Another thread of the process draws random numbers in between, and the prompts lie elsewhere."""
    values = tiny_run(**PLANS[plan], **{"ppo.iterations": 2, "data.eval_count": 2, "run.eval_every": 1})
    one = train(values)
    torch.rand(1000)
    (tmp_path / "again.txt").write_bytes(Path(values["data"]["prompts"]).read_bytes())
    other = train(changed(values, {"run.dir": str(tmp_path / "other"), "data.prompts": str(tmp_path / "again.txt")}))
    assert computed(one) == computed(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cut", [(1, 1), (2, 5), (8, 8)], ids=lambda cut: f"microbatch{cut[0]}-batch{cut[1]}")
@pytest.mark.parametrize("plan", ["separate", "single"])
def test_rows_change_rounding_alone(plan: str, cut: tuple[int, int], tiny_run: TinyRun, tmp_path: Path) -> None:
    """Adam divides by the gradient's size, so a weight whose gradient is nothing but rounding may differ by a step."""
    same = {"ppo.iterations": 2, "data.eval_count": 2, "run.eval_every": 1, "rollout.batch_size": 8}
    values = tiny_run(**PLANS[plan], **same, **{"ppo.microbatch_rows": 4, "rollout.batch_rows": 3})
    rows = {"ppo.microbatch_rows": cut[0], "rollout.batch_rows": cut[1], "run.dir": str(tmp_path / "cut")}
    one, other = train(values), train(changed(values, rows))
    assert responses(one) == responses(other)
    for first, second in zip(computed(one), computed(other), strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
    before, after = weights(one), weights(other)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
