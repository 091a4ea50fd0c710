"""Quantized linear layers, as far as memory goes: their bytes, and a stand-in that makes the temporary tensors they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes: weights that share a scale, and scales that share a scale of scales."""


def quantized_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of one linear layer's weight `[out, in]`.

    4bit is nf4 with double quantization (arXiv 2305.14314): half a byte a weight, an 8-bit scale a block of 64, a float32
    scale for 256 of those, the two code books (16 and 256 float32) and an offset. 8bit is a byte a weight and a float32
    scale a row (arXiv 2208.07339); torchao-int8 likewise, with a zero point of a byte beside each scale.
    """
    count = math.prod(shape)
    if kind == "8bit":
        return count + 4 * shape[0]
    if kind == "torchao-int8":
        return count + 5 * shape[0]
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * (16 + 256 + 1)


class _Dequantizing(torch.autograd.Function):
    """x W^T where W in the computation's dtype exists only while it is multiplied with, forward and backward.

    With `keep`, x stays until the graph is gone, not only until its backward, as in bitsandbytes' 8-bit layers.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: int, keep: bool) -> Tensor:
        ctx.shape = (rows, states.shape[-1])
        ctx.kept = states if keep else None
        return states @ states.new_empty(ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class StandIn(nn.Linear):
    """A linear layer whose weight is counted elsewhere."""

    kind = "4bit"

    def forward(self, states: Tensor) -> Tensor:
        """As bitsandbytes computes it, and PEFT's copy of the result for 4 bit."""
        apply: Callable[..., Tensor] = _Dequantizing.apply
        result = apply(states.to(self.weight.dtype), self.out_features, self.kind == "8bit")
        if self.bias is not None:
            result = result + self.bias
        return result.clone() if self.kind == "4bit" else result


def quantize(model: nn.Module, kind: str) -> None:
    """Replace the linear layers of the transformer, not the head's."""
    trunk: Any = model.base_model
    assert isinstance(trunk, nn.Module)
    for path, module in list(trunk.named_modules()):
        if type(module).__name__ not in ("Linear", "Conv1D"):
            continue
        weight: Any = module.weight
        inputs, outputs = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
        stand_in = StandIn(
            inputs, outputs, bias=getattr(module, "bias", None) is not None, device=weight.device, dtype=weight.dtype
        )
        stand_in.kind = kind
        parent, _, child = path.rpartition(".")
        setattr(trunk.get_submodule(parent), child, stand_in)
