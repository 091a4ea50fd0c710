"""Linear layers for passes with gradients on the CPU: the same numbers to rounding, with fewer passes over memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet import kernels
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.converted import CONVERTED
from quartet.models.embedding import FastEmbedding
from quartet.models.gradients import IN_PLACE
from quartet.models.low_rank import add_low_rank, by_low_rank, low_rank_gradients, through, with_low_rank
from quartet.models.products import by_transposed, computed_in, has_kernels, has_onednn, is_plain, linear_product


def use_fast_linears(model: nn.Module) -> None:
    """Give linear layers, embeddings and LoRA layers passes of their own.

    What frozen roles compute stays bit for bit what torch and PEFT compute: they stay identical to their checkpoints.

    Gradients of trained weights can be added in place (`gradients.py`). On processors with AVX-512 that are not Intel's,
    float32 products with gradients go through oneDNN: MKL, with which torch multiplies them, leaves their widest vectors
    unused. On those with AVX2, and on Intel's with AVX-512, compiled kernels multiply, where they are there. A LoRA layer
    adds its low-rank part inside matrix products, forward and backward, where PEFT takes three more passes over its output.

    Only plain layers change (class `Linear` and `Embedding` of torch, `Linear` of PEFT); GPT-2's Conv1D, quantized layers
    and LoRA variants stay as they are, and so does every layer whose forward another library has replaced.
    """
    for module in model.modules():
        if is_replaced(module):
            continue
        if type(module) is nn.Linear and is_plain(module.weight):
            _change(module, FastLinear)
        elif type(module) is nn.Embedding and is_plain(module.weight):
            _change(module, FastEmbedding)
        elif type(module) is LoraLinear and isinstance(module.base_layer, nn.Linear):
            _change(module, FastLoraLinear)


def restore_linears(model: nn.Module) -> None:
    """Undo `use_fast_linears`: for engines that take the weights of single layers apart."""
    for module in model.modules():
        if type(module) is FastLinear:
            _change(module, nn.Linear)
        elif type(module) is FastEmbedding:
            _change(module, nn.Embedding)
        elif type(module) is FastLoraLinear:
            _change(module, LoraLinear)


def is_replaced(module: nn.Module) -> bool:
    """Whether another library has given this module a forward of its own."""
    return "forward" in vars(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for the call of this module, or for a gradient that comes to it."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _change(module: nn.Module, kind: type[nn.Module]) -> None:
    """Another forward for the same parameters; copies of the module take it along."""
    module.__class__ = kind


@dataclass(frozen=True, slots=True)
class Weights:
    """What a linear layer computes with: `x W^T + b + s x A^T B^T`."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0


def weights_of(layer: nn.Module) -> Weights | None:
    """The tensors of a linear layer, for those who compute for it; None where it has to be called, because its kind has more to
    it or a hook waits for the call."""
    return layer.taken_apart() if isinstance(layer, FastLinear | FastLoraLinear) and not is_hooked(layer) else None


class Ready(threading.local):
    """What layers give, computed beforehand together with others; of each thread."""

    def __init__(self) -> None:
        self._states: Tensor | None = None
        self._results: dict[nn.Module, Tensor] = {}

    @contextmanager
    def holding(self, states: Tensor, results: dict[nn.Module, Tensor]) -> Iterator[None]:
        """In the block each of these layers gives its result, once, when it is called with just these states."""
        before = self._states, self._results
        self._states, self._results = states, results
        try:
            yield
        finally:
            self._states, self._results = before

    def take(self, layer: nn.Module, states: Tensor) -> Tensor | None:
        """The layer's result; None where it is to compute."""
        return self._results.pop(layer, None) if self._results and states is self._states else None


READY = Ready()


class FastLinear(nn.Linear):
    """`nn.Linear`, with a gradient that is added in place where that is asked for, and with products in float32 through
    oneDNN or kernels where these are faster; anything else as it was."""

    def forward(self, input: Tensor) -> Tensor:
        """`x W^T + b`."""
        if not computes_as_in_training():
            return super().forward(input)
        ready = READY.take(self, input)
        if ready is not None:
            return ready
        return linear(input, self.weight, self.bias)

    def taken_apart(self) -> Weights | None:
        """The layer's tensors, for those who compute for it; None where another library computes."""
        return None if is_replaced(self) else Weights(self.weight, self.bias)


class FastLoraLinear(LoraLinear):
    """PEFT's LoRA layer with one adapter on, or none."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x W^T + b + s x A^T B^T`."""
        ready = READY.take(self, x)
        if ready is not None:
            return ready
        found = None if args or kwargs else self.taken_apart()
        if found is None or found.down is None or found.up is None:
            general: Tensor = super().forward(x, *args, **kwargs)
            return general
        if computes_as_in_training():
            return lora_linear(x, found.weight, found.bias, found.down, found.up, found.scale)
        if not found.down.requires_grad:  # a frozen role: as PEFT computes it
            frozen: Tensor = super().forward(x)
            return frozen
        result: Tensor = self.base_layer(x)
        add_low_rank(result, x, found.down, found.up, found.scale)
        return result

    def taken_apart(self) -> Weights | None:
        """The tensors that the layer computes with now; None where only PEFT knows."""
        base: Any = self.base_layer
        names = self.active_adapters
        if type(base) not in (nn.Linear, FastLinear):  # quantized layers are linear layers by inheritance only
            return None
        if is_replaced(self) or is_replaced(base) or self.merged or base.weight.requires_grad:
            return None
        if self.disable_adapters or not names:
            return Weights(base.weight, base.bias)
        name, downs = names[0], self.lora_A
        if (
            len(names) > 1
            or name not in downs
            or name in self.lora_variant
            or type(self.lora_dropout[name]) is not nn.Identity
        ):
            return None
        down: Any = downs[name]
        up: Any = self.lora_B[name]
        if up.bias is not None:
            return None
        return Weights(base.weight, base.bias, down.weight, up.weight, self.scaling[name])


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, with the gradient of a trained weight in place, and in float32 through oneDNN or kernels where these
    are faster."""
    trained = IN_PLACE.takes(weight)
    wide = states.dtype == weight.dtype == torch.float32
    ours = wide and states.dim() > 1 and (has_onednn(weight) or has_kernels(weight))
    if trained or (ours and not torch.is_autocast_enabled("cpu")):
        apply: Callable[..., Tensor] = LinearPass.apply
        return apply(states, weight, bias)
    return nn.functional.linear(states, weight, bias)


def lora_linear(states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """A frozen linear layer and its adapter: `x W^T + b + s x A^T B^T` (arXiv 2106.09685).

    Args:
        states: x, `[..., in]`.
        weight: W, `[out, in]`; gets no gradient.
        down: A, `[r, in]`.
        up: B, `[out, r]`.
        scale: s.
    """
    apply: Callable[..., Tensor] = LoraPass.apply
    return apply(states, weight, bias, down, up, scale)


class LinearPass(torch.autograd.Function):
    """A linear layer; the gradient of the weight is left to torch, which takes MKL in float32: as fast there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = computed_in(states)
        ctx.weight, ctx.states_dtype = weight, states.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        states, converted = states.to(dtype), CONVERTED.of(weight, dtype)
        ctx.save_for_backward(states if weight.requires_grad else None, converted)
        return linear_product(states, converted, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        by_states = by_transposed(gradient, weight).to(ctx.states_dtype) if ctx.needs_input_grad[0] else None
        flat = gradient.flatten(0, -2)
        by_weight, by_bias = None, None
        if ctx.needs_input_grad[1]:
            by_weight = IN_PLACE.add_product(ctx.weight, flat.t(), states.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            kernels.caught_up()
            by_bias = flat.sum(0).to(ctx.bias_dtype)
        return by_states, by_weight, by_bias


class LoraPass(torch.autograd.Function):
    """A frozen linear layer with an adapter. Saves its input and the low-rank states only."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype = computed_in(states)
        ctx.states_dtype, ctx.adapter_dtype, ctx.scale = states.dtype, down.dtype, scale
        states, down, up = states.to(dtype), down.to(dtype), up.to(dtype)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        with kernels.together(dtype == torch.float32 and has_kernels(weight)):
            result, low = with_low_rank(states, weight, bias, down, up, scale)
        ctx.save_for_backward(states, weight, down, up, low)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, down, up, low = ctx.saved_tensors
        by_states = None
        with kernels.together(weight.dtype == torch.float32 and has_kernels(weight)):
            low_gradient = by_low_rank(gradient.flatten(0, -2), up, ctx.scale)
            if ctx.needs_input_grad[0]:
                by_states = through(gradient, weight.to(gradient.dtype), (down, low_gradient))
            by_down, by_up = low_rank_gradients(gradient, low_gradient, states, low, ctx.scale)
        if by_states is not None:
            by_states = by_states.to(ctx.states_dtype)
        return by_states, None, None, by_down.to(ctx.adapter_dtype), by_up.to(ctx.adapter_dtype), None
