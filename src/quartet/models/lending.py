"""Host memory that passes lend each other: what one has given back the next takes, without asking the system for it.

Fresh memory of some megabytes comes page by page, each cleared first, which takes longer than the arithmetic on it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Lender:
    """Blocks of memory, kept between `borrowed` and `given_back` for as long as `keeping` lasts; plain memory otherwise.

    What is borrowed and never given back is freed like any tensor. Each thread borrows what it has given back itself.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[Tensor]] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what any thread gives back until the end, where it goes to the system."""
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def forget(self) -> None:
        """Free all that is kept at this moment; no other thread may be borrowing."""
        if self._kept is not None:
            self._kept.clear()

    def borrowed(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """`[rows, columns]` in the dtype and on the device of `like`, holding anything."""
        count, free = rows * columns, self._free
        alike = [block for block in reversed(free or ()) if block.dtype == like.dtype and block.device == like.device]
        fitting = [block for block in alike if block.numel() >= count]
        if free is None or not fitting:
            if free is not None and alike:  # sizes that grow must not leave a pile behind
                _remove(free, max(alike, key=torch.Tensor.numel))
            return like.new_empty(count).view(rows, columns)
        block = min(fitting, key=torch.Tensor.numel)  # of several the last given back: the caches may still hold it
        _remove(free, block)
        return block[:count].view(rows, columns)

    def given_back(self, *tensors: Tensor) -> None:
        """Nobody will look at these tensors again; each has the whole of its memory to itself."""
        free = self._free
        if free is not None:
            free += [tensor.detach().as_strided((_size(tensor),), (1,), 0) for tensor in tensors]

    @property
    def _free(self) -> list[Tensor] | None:
        """This thread's own blocks."""
        return None if self._kept is None else self._kept.setdefault(threading.get_ident(), [])


def _size(tensor: Tensor) -> int:
    """Numbers that the whole of its memory holds."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _remove(blocks: list[Tensor], block: Tensor) -> None:
    del blocks[next(place for place, other in enumerate(blocks) if other is block)]


LENDER = Lender()
"""Of this process."""
