"""Triton, in which the kernels for GPUs are written: importable where there is none."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.library import are_real

triton: Any = None
tl: Any = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except Exception as error:  # one that is broken stops nobody who has no GPU
    if not isinstance(error, ImportError):
        logging.getLogger("quartet").warning("Triton does not load, its kernels are not used: %s", error)


def jit(kernel: Any) -> Any:
    """The kernel that Triton makes of a function, when it is first called; the function itself where there is no Triton."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def _nothing():
    pass


def available() -> bool:
    """Whether Triton is there, with a GPU or its interpreter to run on."""
    return triton is not None and (torch.cuda.is_available() or is_interpreted())


def is_interpreted() -> bool:
    """Whether Triton runs kernels by its interpreter (`TRITON_INTERPRET=1`), as in tests: those of the CPU too."""
    return triton is not None and not isinstance(_nothing, triton.runtime.JITFunction)


def usable(tensor: Tensor) -> bool:
    """Whether these kernels compute with a tensor: on a GPU that multiplies in bfloat16; under the interpreter anywhere."""
    if not available() or not are_real(tensor):
        return False
    if is_interpreted():
        return True
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def power_of_two(count: int) -> int:
    """The next power of two, one at the least."""
    return 1 << (count - 1).bit_length()
