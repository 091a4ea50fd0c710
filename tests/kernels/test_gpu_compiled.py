"""Kernels for GPUs compile for one, where none is: what Triton's interpreter runs its compiler may refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quartet.kernels import gpu, gpu_decoding, gpu_forward, gpu_training

pytest.importorskip("triton")
if gpu.is_interpreted() or torch.cuda.is_available():
    pytest.skip("Triton interprets, or a GPU is there", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {"8.0": GPUTarget("cuda", 80, 32), "9.0": GPUTarget("cuda", 90, 32)}
SHARED_MEMORY = 99 * 1024
"""Bytes that a block may have on the smaller of these GPUs."""
STREAMS = (torch.float32, torch.bfloat16)


@pytest.fixture(params=list(TARGETS))
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[str]]:
    """Names of the kernels that were compiled in place of being run."""
    names: list[str] = []
    target = TARGETS[request.param]
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run: Callable[..., Any] = triton.runtime.JITFunction.run

    def compiles(self: Any, *given: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        found = run(self, *given, grid=grid, warmup=True, **more)
        assert found.asm["cubin"]
        assert found.metadata.shared <= SHARED_MEMORY
        names.append(self.fn.__name__)
        return found

    monkeypatch.setattr(triton.runtime.JITFunction, "run", compiles)
    triton.runtime.driver.set_active(driver)
    yield names
    triton.runtime.driver._active = None


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("hidden", [1024, 1536])
def test_norms(stream: torch.dtype, hidden: int, compiled: list[str]) -> None:
    states, narrow, weight = of(5, hidden, dtype=stream), of(5, hidden), of(hidden, dtype=torch.float32)
    for also in (None, narrow):
        gpu_training.rms_norm(states, weight, 1e-5, torch.bfloat16, also)
    scales = of(5, dtype=torch.float32)
    for of_weight in (False, True):
        for added in (None, states):
            gpu_training.rms_norm_gradient(narrow, states, weight, scales, of_weight=of_weight, also=added)
    for delta in (None, narrow):
        gpu_decoding.add_norm(states, delta, weight, 1e-5, torch.bfloat16)
    assert compiled == ["_norm"] * 2 + ["_norm_gradient"] * 4 + ["_norm"] * 2


@pytest.mark.parametrize("size", [64, 80, 128])
def test_turning(size: int, compiled: list[str]) -> None:
    for angles in STREAMS:
        for back in (False, True):
            gpu_training.turn(
                of(5, 12, size), of(5, 2, size), *(of(5, size, dtype=angles) for _ in range(2)), back=back
            )
    assert compiled == ["_turn"] * 8


def test_gated_products(compiled: list[str]) -> None:
    gate, up = of(5, 8960), of(5, 8960)
    gpu_training.silu_gradient(of(5, 8960), gate, up)
    gpu_forward.silu_product(gate, up)
    joined = of(5, 2 * 8960)
    gpu_forward.silu_product(joined[:, :8960], joined[:, 8960:])
    assert compiled == ["_silu_gradient", "_silu_product", "_silu_product"]


@pytest.mark.parametrize("dtype", STREAMS)
@pytest.mark.parametrize(("heads", "shared", "size"), [(16, 4, 64), (12, 2, 128), (8, 8, 80)])
def test_attention_of_a_step(heads: int, shared: int, size: int, dtype: torch.dtype, compiled: list[str]) -> None:
    joined = of(5, (heads + 2 * shared) * size, dtype=dtype)
    query, key, value = joined.split([heads * size, shared * size, shared * size], 1)
    cache = of(8, shared, 32, size, dtype=dtype), of(8, shared, 32, size, dtype=dtype)
    angles = of(32, size, dtype=torch.float32), of(32, size, dtype=torch.float32)
    positions, norm = torch.zeros(5, dtype=torch.int32), of(size, dtype=torch.float32)
    for norms in (None, (norm, norm)):
        gpu_decoding.rotate_and_store(query, key, value, *cache, angles, positions, norms, 1e-5)
    for window in (None, 16):
        gpu_decoding.attend(query, *cache, positions, 0.1, window)
    assert compiled == ["_rotate_and_store"] * 2 + ["_attend"] * 2
