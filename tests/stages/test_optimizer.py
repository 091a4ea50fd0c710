"""The optimizers beside AdamW, against AdamW itself."""

from __future__ import annotations

from pathlib import Path

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


def test_a_missing_library_is_named(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quartet.stages.optimizer.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* pip install quartet-rlhf\[quantization\]"):
        Pipeline(tiny_run("llama", **WIDE))
