"""Bytes of optimizer state against the optimizers themselves."""

from importlib import import_module
from typing import Any

import pytest
import torch

from quartet.memory.adapter_sizes import TensorSizes

SHAPES = ((5000,), (64, 80), (4095,), (100, 1024), (7,), (7,))
"""Above and below the 4,096 elements from which bitsandbytes keeps 8 bits; whole blocks of 256 and not."""


def state_bytes(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of all tensors of the state after a step, code books aside: all parameters share two of 1 KiB."""
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held: Any = optimizer.state.values()
    return sum(t.nbytes for state in held for n, t in state.items() if torch.is_tensor(t) and not n.startswith("qmap"))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_bytes(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    if name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, fused=True)
    else:
        pytest.importorskip("bitsandbytes")
        library: Any = import_module("bitsandbytes.optim")
        optimizer = library.AdamW8bit(parameters)
    sizes = TensorSizes.of(parameter.numel() for parameter in parameters)
    assert sizes.parameters == 5000 + 5120 + 4095 + 102400 + 14
    assert sizes.state_bytes(name) == state_bytes(optimizer, parameters)
    assert sizes.paged_bytes(name) == 0


def test_paged_state_is_that_of_large_tensors() -> None:
    sizes = TensorSizes.of([99_999, 100_000, 300_000])
    assert sizes.state_bytes("paged_adamw8bit") == sizes.state_bytes("adamw8bit")
    assert sizes.paged_bytes("paged_adamw8bit") == 2 * 400_000


def test_sizes_grow_by_repetition() -> None:
    two, three = TensorSizes.of([4, 4, 9]), TensorSizes.of([4, 4, 4, 9, 5])
    assert two.repeated(three, 10) == TensorSizes.of([4] * 12 + [9] + [5] * 10)
