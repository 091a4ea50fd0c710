"""The compiled kernels: found, and loaded so that they share torch's threads."""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from quartet.kernels.sources import source_hash

FILE = Path(__file__).parent / "kernels.so"
"""Compiled from the C files beside it at installation (hatch_build.py); not there if there was no compiler."""
ARGUMENTS = {
    "silu_product": 9,
    "silu_gradient": 15,
    "add": 5,
    "rms_norm": 9,
    "rms_norm_gradient": 10,
    "rotary": 18,
    "few_rows": 9,
    "decode": 2,
    "decode_stretch": 3,
    "multiply": 1,
    "multiply_tiles": 1,
    "run": 1,
    "draw": 9,
    "exponentials": 10,
    "slopes": 12,
    "squares": 4,
    "attention": 5,
    "attention_gradient": 9,
}
"""Of each kernel: pointers and whole numbers, `long` all of them, but for these."""
FLOATS = {"rms_norm": 7, "draw": 7, "exponentials": 7, "slopes": 10}
"""The argument of a kernel that is a float."""
BYTES = {"multiply", "multiply_tiles", "run"}
"""Kernels that are given one block of numbers, packed."""
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""Kernels for one of these dtypes are named so."""

_log = logging.getLogger("quartet")


@cache
def kernel(name: str) -> Callable[..., None] | None:
    """A kernel by its name, at the end of which stand its dtypes'; None where there are none."""
    library = _library()
    if library is None:
        return None
    function: Any = getattr(library, name)
    bare = without_dtypes(name)
    kinds: list[Any] = [ctypes.c_long] * ARGUMENTS[bare]
    if bare in BYTES:
        kinds = [ctypes.c_char_p]
    if bare in FLOATS:
        kinds[FLOATS[bare]] = ctypes.c_float
    function.argtypes, function.restype = kinds, None
    found: Callable[..., None] = function
    return found


def without_dtypes(name: str) -> str:
    """A kernel's name but for its dtypes."""
    return re.sub("(_b?f[0-9]+)+$", "", name)


def are_there() -> bool:
    """Whether this process computes with compiled kernels."""
    return _library() is not None


def has_wide_vectors() -> bool:
    """Whether the kernels hold code for this processor's vectors: not where the compiler knew one generation only."""
    library = _library()
    if library is None:
        return False
    library.has_wide_vectors.restype = ctypes.c_long
    return bool(library.has_wide_vectors())


def has_tile_products() -> bool:
    """Whether the kernels multiply by tiles of AMX: where processor and system have them."""
    library = _library()
    return library is not None and _has_tile_products(library)


@cache
def _has_tile_products(library: ctypes.CDLL) -> bool:
    library.has_tile_products.restype = ctypes.c_long
    return bool(library.has_tile_products())


def fit(*tensors: Tensor) -> bool:
    """Whether these are plain tensors in the memory of this machine, or stand for such in a plan."""
    for tensor in tensors:  # asked for at every call of a kernel: a loop takes a quarter of the time of `all`
        kind = type(tensor)
        if kind is FakeTensor:
            if tensor.device.type != "cpu":
                return False
        elif not (kind is Tensor or kind is nn.Parameter) or not tensor.is_cpu:
            return False
    return True


def are_real(*tensors: Tensor) -> bool:
    """Whether these tensors hold numbers: none only stands for one in a plan of memory."""
    return FakeTensor not in map(type, tensors)


@cache
def _library() -> ctypes.CDLL | None:
    """The library, after the one that holds torch's threads: a second one would have threads of its own."""
    threads = _threads_of_torch()
    if not FILE.exists() or threads is None:
        return None
    try:
        ctypes.CDLL(threads, ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(FILE))
        library.built_from.restype = ctypes.c_char_p
        built_from = library.built_from().decode()
    except (OSError, AttributeError) as error:
        _log.warning(
            "The compiled kernels in %s do not load (%s): torch's operations compute in their place", FILE, error
        )
        return None
    if built_from != source_hash(FILE.parent):
        _log.warning(
            "%s was compiled from other files than those beside it, and is not used: install Quartet again", FILE
        )
        return None
    return library


def _threads_of_torch() -> str | None:
    """The file with the OpenMP that torch computes with: its own, or the only one that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line or "libiomp" in line}
    own = {file for file in files if Path(file).is_relative_to(Path(torch.__file__).resolve().parent)}
    candidates = own or files
    return candidates.pop() if len(candidates) == 1 else None
