"""Shared fixtures: one thread for torch, tiny checkpoints, tiny runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import TinyRun, Tree, changed


def pytest_configure() -> None:
    """Before anything is imported that reads it."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _no_network_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may reach the network or the user's cache, and what is made once is made on one thread."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUARTET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread_of_a_module() -> None:
    """For what is made once for a module."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests share few cores, and decisions and last digits depend on threads: whatever the test before has set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`library.path(family, name)`: a tiny checkpoint (see tests/checkpoints.py). Not to be written to."""
    from checkpoints import Library

    return Library(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def tiny_run(library: Any, tmp_path: Path) -> TinyRun:
    """tiny_run(family, sft="sft", reward="reward", **{"ppo.iterations": 1}): nested values of a small configuration."""

    def make(family: str = "llama", sft: str = "sft", reward: str = "reward", **changes: Any) -> Tree:
        prompts = tmp_path / "prompts.txt"
        if not prompts.exists():
            prompts.write_text("".join(f"{word}\n" for word in ("a", "to be", "why?", "q 12", "one two", "zz", "x-y")))
        tree: Tree = {
            "models": {
                "sft": str(library.path(family, sft)),
                "reward": str(library.path(family, reward)),
                "dtype": "float32",
                "device": "cpu",
            },
            "data": {"prompts": str(prompts), "eval_count": 0},
            "rollout": {"batch_size": 4, "response_length": 6, "batch_rows": 3},
            "ppo": {"iterations": 1, "epochs": 2, "minibatches": 2, "microbatch_rows": 2, "learning_rate": 1.0e-3},
            "run": {"dir": str(tmp_path / "run"), "seed": 3, "save_every": 0},
        }
        return changed(tree, changes)

    return make


@pytest.fixture(params=["kernels", "products", "torch"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test runs three times: with compiled kernels, where there are some, with matrix products by kernels too, and with
    torch's operations alone."""
    from quartet.kernels import elementwise, multiplying

    by: str = request.param
    if by == "torch":
        request.getfixturevalue("without_kernels")
    elif elementwise.kernel("silu_product_f32") is None:
        pytest.skip("no kernels: no compiler was there at installation")
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: by == "products")
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    return by


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no compiler was there at installation."""
    from quartet.kernels import attending, decoding, drawing, elementwise, multiplying, softmax, squares, waiting

    for module in (attending, decoding, drawing, elementwise, multiplying, softmax, squares, waiting):
        monkeypatch.setattr(module, "kernel", lambda _: None)
