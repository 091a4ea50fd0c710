"""Linear layers with less overhead for the time of a rollout; the weights themselves are only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from quartet.distributed import is_share
from quartet.models.linears import FastLinear, FastLoraLinear, add_upright, is_replaced, upright
from quartet.models.precision import on_cpu

_SMALLEST_SIDE = 64
"""Below, as in a LoRA matrix, the call costs more than the product."""
_FEWEST_ROWS = 4
"""Below, a product of a float32 matrix and a few vectors gains nothing."""


@contextmanager
def fast_linears(model: nn.Module, dtype: torch.dtype, adapter: str | None) -> Iterator[None]:
    """Within, the layers of a model give the same results to rounding, faster; for inference under one adapter state.

    LoRA layers: scale and conversion of the two small matrices are done once and not in every call.

    Plain linear layers on the CPU multiply with oneDNN. torch multiplies float32 matrices with MKL, which is 1.3 to 3
    times slower on processors whose widest vectors it leaves unused. Where the weights are float32 and the computation
    is in bfloat16, autocast would convert all weights in every step: here each is converted once, into oneDNN's own
    layout, and the copy is dropped at the end (2 bytes for each weight meanwhile).

    Weights that are fetched for each use, quantized layers, GPT-2's Conv1D, LoRA variants and layers whose forward another
    library has replaced stay as they are.

    Args:
        dtype: of the computation.
        adapter: the LoRA adapter that is on.
    """
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            forward = None
            if is_replaced(module):
                continue
            if isinstance(module, nn.Linear) and type(module) in (nn.Linear, FastLinear):
                forward = _linear_forward(module, dtype)
            elif (
                isinstance(module, LoraLinear) and type(module) in (LoraLinear, FastLoraLinear) and adapter is not None
            ):
                forward = _lora_forward(module, dtype, adapter)
            if forward is not None:
                module.__dict__["forward"] = forward
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _linear_forward(module: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    weight = module.weight
    if not _is_here(weight):
        return None
    if not on_cpu(weight) or weight.dtype != torch.float32 or min(weight.shape) < _SMALLEST_SIDE:
        return None
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    if dtype == torch.float32:
        return partial(_float32, module)
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        return partial(_packed, packed, None if module.bias is None else module.bias.detach().to(dtype))
    return None


def _is_here(weight: Tensor) -> bool:
    """Whether this process holds the weight in numbers: not where it is a share, quantized or a stand-in without any."""
    return type(weight) is nn.Parameter and not is_share(weight)


def _float32(module: nn.Linear, states: Tensor) -> Tensor:
    if states.dtype != torch.float32 or states.numel() < _FEWEST_ROWS * module.in_features:
        return nn.functional.linear(states, module.weight, module.bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, module.weight, module.bias, "none", [], "")
    return result


def _packed(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(torch.bfloat16), weight, bias, "none", [], "")
    return result


def _lora_forward(module: LoraLinear, dtype: torch.dtype, adapter: str) -> Callable[[Tensor], Tensor] | None:
    if adapter not in module.lora_A or adapter in module.lora_variant:
        return None
    low: Any = module.lora_A[adapter]
    high: Any = module.lora_B[adapter]
    if high.bias is not None or is_share(low.weight):
        return None
    if isinstance(module.base_layer, nn.Linear) and type(module.base_layer) not in (nn.Linear, FastLinear):
        return None  # a quantized one
    down = upright(low.weight.detach().to(dtype))
    up = upright((high.weight.detach() * module.scaling[adapter]).to(dtype))
    return partial(_with_lora, module.base_layer, down, up)


def _with_lora(base: nn.Module, down: Tensor, up: Tensor, states: Tensor) -> Tensor:
    """`base(x) + x A^T B^T`, the sum taken in the matrix product; `down` is A^T, `up` is B^T."""
    result: Tensor = base(states)
    add_upright(result, states, down, up, 1.0)
    return result
