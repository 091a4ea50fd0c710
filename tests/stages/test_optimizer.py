"""The optimizers beside AdamW, against AdamW itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import Pipeline
from quartet.errors import ConfigError
from quartet.run.checkpoint import RunState, load_checkpoint, save_checkpoint
from tiny import TinyRun

WIDE = {"ppo.learning_rate": 1e-3, "ppo.optimizer": {"name": "adamw8bit"}}


def test_eight_bit_adam_steps_as_adam_does(tiny_run: TinyRun) -> None:
    """Dynamic 8-bit quantization (arXiv 2110.02861) keeps the direction of the steps."""
    exact, rounded = Pipeline(tiny_run("llama", **{"ppo.learning_rate": 1e-3})), Pipeline(tiny_run("llama", **WIDE))
    start = exact.trained()
    for pipeline in (exact, rounded):
        pipeline.iterate()
    moved = [
        torch.cat([(after - start[key]).flatten() for key, after in pipeline.trained().items()])
        for pipeline in (exact, rounded)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.95
    state = rounded.loaded.optimizer.state
    assert {entry["state1"].dtype for entry in state.values()} == {torch.float32, torch.uint8}
    large = [(p, entry) for p, entry in state.items() if p.numel() >= 4096]
    assert large
    for parameter, entry in large:
        assert entry["state1"].nbytes + entry["state2"].nbytes == 2 * parameter.numel()


def test_eight_bit_state_is_resumed_exactly(tiny_run: TinyRun, tmp_path: Path) -> None:
    whole, broken, resumed = (Pipeline(tiny_run("llama", **WIDE)) for _ in range(3))
    for pipeline in (whole, broken):
        pipeline.iterate()
    saved = save_checkpoint(tmp_path, broken.roles, broken.loaded.optimizer, RunState(1, 4, 0.05), keep=1)
    load_checkpoint(saved, resumed.roles, resumed.loaded.optimizer)
    resumed.iteration = 1
    for pipeline in (whole, resumed):
        pipeline.iterate()
    expected = whole.trained()
    assert all(torch.equal(expected[key], found) for key, found in resumed.trained().items())


def test_paged_state_needs_a_gpu(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match=r"paged_adamw8bit pages optimizer state .* use adamw8bit or adamw"):
        Pipeline(tiny_run("llama", **{"ppo.optimizer": {"name": "paged_adamw8bit"}}))


def test_paged_state_is_paged_again_when_it_is_resumed(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where paged memory is a marked tensor; bitsandbytes pages from 1e5 elements on, here from 5000."""

    def buffer(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = torch.full_like(parameter, 7, dtype=dtype)
        if parameter.numel() >= 5000:
            found.is_paged = True  # type: ignore[attr-defined]
        return found

    before, resumed = Pipeline(tiny_run("llama", **WIDE)), Pipeline(tiny_run("llama", **WIDE))
    before.iterate()
    saved = save_checkpoint(tmp_path, before.roles, before.loaded.optimizer, RunState(1, 4, 0.05), keep=1)
    optimizer: Any = resumed.loaded.optimizer
    monkeypatch.setattr(optimizer, "is_paged", True)
    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    load_checkpoint(saved, resumed.roles, optimizer)
    entries, sizes = [], set()
    for one, other in zip(before.loaded.optimizer.param_groups, optimizer.param_groups, strict=True):
        pairs = zip(one["params"], other["params"], strict=True)
        entries += [(p, before.loaded.optimizer.state[p], optimizer.state[q]) for p, q in pairs]
    for parameter, expected, found in entries:
        assert expected.keys() == found.keys()
        assert all(torch.equal(torch.as_tensor(expected[key]), torch.as_tensor(found[key])) for key in expected)
        paged = {key for key, value in found.items() if getattr(value, "is_paged", False)}
        assert paged == ({"state1", "state2"} if parameter.numel() >= 5000 else set())
        sizes.add(len(paged))
    assert sizes == {0, 2}


def test_a_missing_library_is_named(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quartet.stages.optimizer.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* pip install quartet-rlhf\[quantization\]"):
        Pipeline(tiny_run("llama", **WIDE))
