"""Frozen backbones in 4 or 8 bit through bitsandbytes or torchao, with their traps closed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet.errors import ConfigError

BLOCK = 64
"""Weights that share one scale in nf4; a row must be whole blocks."""


LIBRARIES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "torchao-int8": "torchao"}


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` needs to quantize while it loads: nf4 with double quantization, LLM.int8, or int8 weights.

    Heads stay as they are: transformers leaves output embeddings and classification heads alone.

    Args:
        kind: 4bit, 8bit or torchao-int8.
        dtype: of the matrix products.

    Raises:
        ConfigError: the library is not installed.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    library = LIBRARIES[kind]
    if find_spec(library) is None:
        raise ConfigError(
            f"models.quantization={kind} needs {library}, which is not installed; pip install quartet-rlhf[quantization]"
        )
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def seal(model: nn.Module, kind: str) -> None:
    """Check a freshly quantized model, and close its traps.

    On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward without gradients (any rollout) to a
    kernel that has no backward, after which gradients of the layers below vanish silently. That kernel is turned off.
    torchao's layers keep their whole weight for the backward pass, in floating point; they get a pass that makes it again.

    Raises:
        ConfigError: nothing was quantized, or a layer's rows are not whole blocks of 64.
    """
    layers = _quantized_layers(model, kind)
    if not layers:
        raise ConfigError(
            f"models.quantization={kind} found no linear layer to quantize in {type(model).__name__}; "
            "use models.quantization=null"
        )
    if kind == "torchao-int8":
        for module in model.modules():
            if type(module) is nn.Linear and _of_torchao(module.weight):
                module.__class__ = DequantizingLinear
    if kind == "8bit":
        # It says at every product of every layer that float32 is rounded by way of float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind != "4bit":
        return
    for name, layer in layers:
        refuse_partial_blocks(name, layer.in_features)
        layer.support_avx512bf16_for_cpu = False


class DequantizingLinear(nn.Linear):
    """A linear layer over torchao's weights, which are in floating point only while they are multiplied with."""

    def forward(self, input: Tensor) -> Tensor:
        """`x W^T + b`."""
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        apply: Callable[..., Tensor] = _Dequantizing.apply
        return apply(input, self.weight, self.bias)


class _Dequantizing(torch.autograd.Function):
    """The library's own product, and the gradient of its input; the weight has none."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, states.dtype
        return nn.functional.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole: Tensor = ctx.weight.dequantize().to(gradient.dtype)
        return (gradient @ whole).to(ctx.dtype), None, None


def refuse_partial_blocks(name: str, inputs: int) -> None:
    """nf4 needs rows of whole blocks.

    Raises:
        ConfigError: the layer's rows are not.
    """
    if inputs % BLOCK:
        raise ConfigError(
            f"models.quantization=4bit needs rows of whole blocks of {BLOCK} weights, and {name} has {inputs} inputs; "
            "use models.quantization=8bit"
        )


def _quantized_layers(model: nn.Module, kind: str) -> list[tuple[str, Any]]:
    if LIBRARIES[kind] == "torchao":
        weights = [(name, getattr(module, "weight", None)) for name, module in model.named_modules()]
        return [(name, weight) for name, weight in weights if _of_torchao(weight)]
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    wanted = Linear4bit if kind == "4bit" else Linear8bitLt
    return [(name, module) for name, module in model.named_modules() if isinstance(module, wanted)]


def _of_torchao(weight: object) -> bool:
    return type(weight).__module__.startswith("torchao.")
