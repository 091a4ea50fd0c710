"""Copies in page-locked host memory, which torch hands out in powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2**30
"""Bytes of a block that several tensors share, at most."""
ALIGNED = 512
"""Bytes of which places in a block are a multiple."""


def page_locked_copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of the tensors, laid into few blocks: each in one of its own would take up to twice its bytes."""
    copies: dict[int, Tensor] = {}
    for size, members in blocks([tensor.nbytes for tensor in tensors]):
        block, used = _block(size), 0
        for index in members:
            tensor = tensors[index]
            place = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[index] = place.copy_(tensor)
            used += _aligned(tensor.nbytes)
    return [copies[index] for index in range(len(tensors))]


def blocks(sizes: list[int]) -> list[tuple[int, list[int]]]:
    """Bytes of each block, a power of two, and which tensors of these sizes lie in it, in order."""
    left = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    found = []
    while left:
        biggest, total = _aligned(sizes[left[0]]), sum(_aligned(sizes[index]) for index in left)
        whole = _power_of_two(total)
        # All that is left in one block, unless much of it would stay empty; then a block of half of that, filled.
        size = whole if total >= 0.85 * whole else whole // 2
        size = max(min(size, LARGEST), _power_of_two(biggest))
        used, members = 0, []
        for index in left:
            if used + _aligned(sizes[index]) <= size:
                members.append(index)
                used += _aligned(sizes[index])
        found.append((size, members))
        taken = set(members)
        left = [index for index in left if index not in taken]
    return found


def _block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _aligned(size: int) -> int:
    return max(1, -(-size // ALIGNED)) * ALIGNED


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
