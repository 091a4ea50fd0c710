"""Linear layers with less overhead for the time of a rollout; the weights themselves are only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from quartet import kernels
from quartet.distributed import is_share
from quartet.kernels import gpu
from quartet.kernels.library import are_real
from quartet.models.linears import FastLinear, FastLoraLinear, is_hooked, is_replaced
from quartet.models.low_rank import add_upright, upright, with_low_rank
from quartet.models.precision import on_cpu
from quartet.models.products import has_kernels, linear_product
from quartet.rollout.copies import copy_into, rooms_of

Forward = Callable[[Tensor], Tensor]

_SMALLEST_SIDE = 64
"""Below, as in a LoRA matrix, the call costs more than the product."""
_FEWEST_ROWS = 4
"""Below, a product of a float32 matrix and a few vectors gains nothing."""


@contextmanager
def fast_linears(model: nn.Module, dtype: torch.dtype, adapter: str | None, *, merged: bool = False) -> Iterator[None]:
    """Within, the layers of a model give the same results to rounding, faster; for inference under one adapter state.

    LoRA layers: scale and conversion of the two small matrices are done once and not in every call. Merged, their product is
    added to a copy of the weight, and a call is one product; what they are made of is only read.

    Plain linear layers on the CPU multiply few rows by a kernel that reads the weight once, and many by the kernels of
    training where these are faster, else with oneDNN, or all where there are no kernels. torch multiplies float32 matrices
    with MKL, which is 1.3 to 3 times slower on processors whose widest vectors it leaves unused. Where the weights are
    float32 and the computation is in bfloat16, autocast would convert all weights in every step: here each is converted
    once, and the copy is dropped at the end (2 bytes for each weight meanwhile). On a GPU autocast would keep such copies of
    trained weights too; made here, those of layers with the same states lie one below the other, as do those of merged
    layers, and a decoding step multiplies with them at once.

    Weights that are fetched for each use, quantized layers, GPT-2's Conv1D, LoRA variants and layers whose forward another
    library has replaced stay as they are.

    Args:
        dtype: of the computation.
        adapter: the LoRA adapter that is on.
        merged: hold copies of the weights that have adapters, with the one that is on added.
    """
    changed: list[nn.Module] = []
    inside: set[nn.Module] = set()  # of layers that compute without them
    rooms = rooms_of(model, partial(_copied, dtype=dtype, adapter=adapter if merged else None), dtype)
    try:
        for module in model.modules():
            forward = None
            if is_replaced(module) or module in inside:
                continue
            if isinstance(module, nn.Linear) and type(module) in (nn.Linear, FastLinear):
                forward = _linear_forward(module, dtype, rooms.get(module))
            elif (
                isinstance(module, LoraLinear) and type(module) in (LoraLinear, FastLoraLinear) and adapter is not None
            ):
                forward = _merged_forward(module, dtype, adapter, rooms.get(module)) if merged else None
                if forward is not None:
                    inside.update(module.modules())
                else:
                    forward = _lora_forward(module, dtype, adapter)
            if forward is not None:
                module.__dict__["forward"] = forward
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


class Product:
    """`x W^T + b` with a weight of the computation's dtype: few rows by a kernel, where there is one."""

    def __init__(self, weight: Tensor, bias: Tensor | None, many: Forward) -> None:
        """
        Args:
            many: computes the same for more rows.
        """
        self.layer = kernels.Linear(weight, None if bias is None else bias.detach().float())
        self._most = kernels.FEW * weight.shape[1] if self.layer.fits() else 0
        self._many = many

    def __call__(self, states: Tensor) -> Tensor:
        """Of states `[..., in]`."""
        return kernels.few_rows(states, self.layer) if 0 < states.numel() <= self._most else self._many(states)


class WithAdapter:
    """`base(x) + x A^T B^T`: few rows by kernels, where there are some, else with the sum taken in the matrix product."""

    def __init__(self, base: nn.Module, low: Tensor, high: Tensor) -> None:
        """
        Args:
            low: A.
            high: B, the adapter's scale in it.
        """
        parts = kernels.Linear(low), kernels.Linear(high)
        self.base = base
        self.parts = parts if all(part.fits() for part in parts) else None
        """A and B, where kernels multiply few rows with them."""
        self._most = 0 if self.parts is None else kernels.FEW * low.shape[1]
        self._down, self._up = (upright(low), upright(high)) if self.parts is None else (low.t(), high.t())

    @property
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """A `[r, in]`, and B `[out, r]` with the adapter's scale in it."""
        return self._down.t(), self._up.t()

    def __call__(self, states: Tensor) -> Tensor:
        """Of states `[..., in]`."""
        parts = self.parts if 0 < states.numel() <= self._most else None
        below = self.base.__dict__.get("forward")
        if (
            parts is None
            and isinstance(below, Product)
            and below.layer.weight.dtype == torch.float32
            and has_kernels(below.layer.weight)
            and not is_hooked(self.base)
        ):
            layer = below.layer
            return with_low_rank(states, layer.weight, layer.bias, self._down.t(), self._up.t(), 1.0)[0]
        result: Tensor = self.base(states)
        if parts is not None:
            down, up = parts
            return result.add_(kernels.few_rows(kernels.few_rows(states, down), up))
        add_upright(result, states, self._down, self._up, 1.0)
        return result


def weights_in(module: nn.Module, dtype: torch.dtype) -> kernels.Linear | None:
    """What a layer computes with under `fast_linears`, wherever that lies; None where it has to be called."""
    forward = module.__dict__.get("forward")
    found = None
    if isinstance(forward, Product):
        found = forward.layer
    elif isinstance(forward, WithAdapter):
        base = weights_in(forward.base, dtype)
        if base is not None and base.down is None:
            found = kernels.Linear(base.weight, base.bias, *forward.low_rank)
    elif forward is None and isinstance(module, nn.Linear) and type(module) in (nn.Linear, FastLinear):
        weight, bias = module.weight, module.bias
        if _is_here(weight) and weight.dtype == dtype:
            found = kernels.Linear(weight.detach(), None if bias is None else bias.detach().float())
    return found if found is not None and found.weight.dtype == dtype else None


def linear_of(module: nn.Module, dtype: torch.dtype) -> kernels.Linear | None:
    """The same, where there are kernels for it on the CPU."""
    found = weights_in(module, dtype)
    return found if found is not None and found.fits() else None


def _linear_forward(module: nn.Linear, dtype: torch.dtype, room: Tensor | None) -> Forward | None:
    weight = module.weight
    if not are_real(weight):  # in a plan; a layer with a forward of its own is computed by itself there, as in the run
        return partial(nn.Linear.forward, module) if dtype == torch.float32 and _is_wide(weight) else None
    if not _is_here(weight) or weight.dtype not in (torch.float32, dtype):
        return None
    if _is_converted(weight, dtype):
        narrow = copy_into(room, weight.detach(), dtype)
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return Product(narrow, bias, partial(_plain, narrow, bias))
    return _product(weight.detach(), module.bias, dtype)


def _product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Forward | None:
    """The product with a weight, where a kernel or oneDNN is there for it and pays, and the weight is no stand-in."""
    if type(weight) is not Tensor or not on_cpu(weight) or not _is_wide(weight):
        return None
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if dtype == torch.float32 and weight.dtype == dtype:
        if onednn or kernels.decodes(dtype):
            many = _by_onednn if onednn and not has_kernels(weight) else linear_product
            return Product(weight, bias, partial(many, weight=weight, bias=bias))
        return None
    if dtype != torch.bfloat16 or not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    bias = None if bias is None else bias.detach().to(dtype)
    if kernels.decodes(dtype):
        narrow = weight.to(dtype)
        return Product(narrow, bias, partial(_plain, narrow, bias))
    if weight.dtype == dtype:
        return None  # as torch computes it
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
    return partial(_packed, packed, bias)


def _merged_forward(module: LoraLinear, dtype: torch.dtype, adapter: str, room: Tensor | None = None) -> Forward | None:
    """The layer as one product, with `W + s B A` in place of W (arXiv 2106.09685)."""
    base: Any = module.base_layer
    found = _mergeable(module, adapter)
    if found is None:
        return None
    low, high = found
    with torch.autocast(base.weight.device.type, enabled=False):
        whole = torch.addmm(
            base.weight.detach().float(), high.detach().float(), low.detach().float(), alpha=module.scaling[adapter]
        )
        whole = copy_into(room, whole, dtype)
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    return _product(whole, bias, dtype) or Product(whole, bias, partial(_plain, whole, bias))


def _mergeable(module: LoraLinear, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A and B of an adapter that can be added to a copy of the layer's weight."""
    base: Any = module.base_layer
    if type(base) not in (nn.Linear, FastLinear) or is_replaced(base) or is_share(base.weight):
        return None
    return _plain_adapter(module, adapter)


def _copied(module: nn.Module, dtype: torch.dtype, adapter: str | None) -> Tensor | None:
    """The weight that a layer on a GPU multiplies with a copy of; None where it does with none.

    Args:
        adapter: added to copies.
    """
    if is_replaced(module):
        return None
    if isinstance(module, nn.Linear) and type(module) in (nn.Linear, FastLinear):
        return module.weight if _is_here(module.weight) and _is_converted(module.weight, dtype) else None
    if adapter is None or not isinstance(module, LoraLinear) or type(module) not in (LoraLinear, FastLoraLinear):
        return None
    base: Any = module.base_layer
    return base.weight if _mergeable(module, adapter) and gpu.usable(base.weight) else None


def _is_converted(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies with a copy in bfloat16: of weights of which autocast would keep one, which are trained."""
    narrowed = dtype == torch.bfloat16 and weight.dtype == torch.float32
    return narrowed and weight.requires_grad and gpu.usable(weight)


def _plain(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return nn.functional.linear(states.to(weight.dtype), weight, bias)


def _is_wide(weight: Tensor) -> bool:
    return min(weight.shape) >= _SMALLEST_SIDE


def _is_here(weight: Tensor) -> bool:
    """Whether this process holds the weight in numbers: not where it is a share, quantized or a stand-in without any."""
    return type(weight) is nn.Parameter and not is_share(weight)


def _by_onednn(states: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    if states.dtype != torch.float32 or states.numel() < _FEWEST_ROWS * weight.shape[1]:
        return nn.functional.linear(states, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return result


def _packed(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states.to(torch.bfloat16), weight, bias, "none", [], "")
    return result


def _lora_forward(module: LoraLinear, dtype: torch.dtype, adapter: str) -> Forward | None:
    found = _plain_adapter(module, adapter)
    if found is None:
        return None
    low, high = found
    if isinstance(module.base_layer, nn.Linear) and type(module.base_layer) not in (nn.Linear, FastLinear):
        return None  # a quantized one
    scaled = (high.detach() * module.scaling[adapter]).to(dtype)
    return WithAdapter(module.base_layer, low.detach().to(dtype), scaled)


def _plain_adapter(module: LoraLinear, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A and B of an adapter that is nothing but these."""
    if adapter not in module.lora_A or adapter in module.lora_variant:
        return None
    low: Any = module.lora_A[adapter]
    high: Any = module.lora_B[adapter]
    if high.bias is not None or is_share(low.weight):
        return None
    return low.weight, high.weight
