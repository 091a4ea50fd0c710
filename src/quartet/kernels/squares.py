"""The norm of many tensors together: tensors looked at, memory handed over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quartet.kernels.library import are_real, fit, kernel

BLOCK = 65536
"""Numbers whose squares are one sum (`SQUARES_BLOCK` in squares.h)."""


def norm_of_all(tensors: Sequence[Tensor]) -> Tensor | None:
    """The 2-norm of all numbers together: float32, no dimension. Threads do not change its bits, up to 2e9 numbers.

    Args:
        tensors: float32, of any shapes. From 1.8e19 on a number's square is infinite, and so is the norm.

    Returns:
        None if there is no kernel for these tensors.
    """
    function = kernel("squares_f32")
    if function is None or not tensors or not fit(*tensors) or not are_real(*tensors):
        return None
    if not all(one.dtype == torch.float32 and one.is_contiguous() for one in tensors):
        return None
    blocks = [-(-one.numel() // BLOCK) for one in tensors]
    sums, place, threads = torch.empty(sum(blocks), dtype=torch.float64), 0, torch.get_num_threads()
    start = sums.data_ptr()
    for one, count in zip(tensors, blocks, strict=True):
        function(one.data_ptr(), start + place * sums.element_size(), one.numel(), threads)
        place += count
    return sums.sum().sqrt().float()
