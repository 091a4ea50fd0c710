"""Device and dtype: what `auto` means, and the autocast that goes with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from quartet.errors import ConfigError

TILE = 32
"""Tokens of which oneDNN's kernels for bfloat16 take a multiple best: of 32 a product over tokens, as of a weight's gradient,
takes up to a third less time than of 16. It compiles a kernel for each shape, in a few milliseconds and half a megabyte."""
CHUNK_TOKENS, CHUNK_TOKENS_GPU = 128, 2048
"""Tokens whose logits exist at once, on a CPU and on a GPU. A trained LM head converts its weight for each chunk and makes a
gradient of the weight's size, rounded to the computation's dtype, which is added to that of the others: on a GPU few chunks are
faster and more exact, and their logits take megabytes of gigabytes. A CPU is as fast with small ones, which its caches hold."""


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is a GPU.

    From then on attention does without cuDNN, which newer GPUs would take first: it plans for every single shape, and the
    shapes of microbatches and of decoding keep changing; under masks its gradients have been seen to be NaN
    (pytorch/pytorch#196678).

    Raises:
        ConfigError: CUDA asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("models.device=cuda, and torch sees no GPU here; use models.device=auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the device multiplies matrices in it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    return torch.bfloat16 if _computes_bfloat16(device) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype, *, keeping: bool = True) -> AbstractContextManager[object]:
    """Autocast to `dtype`; nothing for float32.

    Args:
        keeping: with gradients, keep what was converted until the end.
    """
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=keeping and torch.is_grad_enabled())


def tile_of(device: torch.device, dtype: torch.dtype) -> int:
    """Rows to a multiple of which the update fills up its products, and scoring those of LM heads: all lengths then come to few
    shapes."""
    return TILE if (device.type, dtype) == ("cpu", torch.bfloat16) else 1


def chunk_tokens_of(device: torch.device) -> int:
    """Tokens whose logits exist at once."""
    return CHUNK_TOKENS if device.type == "cpu" else CHUNK_TOKENS_GPU


class _Planned(threading.local):
    kind: str | None = None


_planned = _Planned()


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Let tensors of the CPU stand for those of a device of this kind: code that is for a CPU only is then left out, as
    there."""
    before, _planned.kind = _planned.kind, kind
    try:
        yield
    finally:
        _planned.kind = before


def on_cpu(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is done by a CPU, here or in the run that is planned."""
    return tensor.device.type == "cpu" and _planned.kind in (None, "cpu")


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False
