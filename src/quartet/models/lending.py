"""Host memory that passes lend each other: what one has given back the next takes, without asking the system for it.

Fresh memory of some megabytes comes page by page, each cleared first, which takes longer than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Lender:
    """Blocks of memory, kept between `borrowed` and `given_back` for as long as `keeping` lasts; plain memory otherwise.

    What is borrowed and never given back is freed like any tensor.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what is given back until the end, where it goes to the system."""
        if self._free is not None:
            yield
            return
        self._free = []
        try:
            yield
        finally:
            self._free = None

    def forget(self) -> None:
        """Free all that is kept at this moment."""
        if self._free is not None:
            self._free.clear()

    def borrowed(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """`[rows, columns]` in the dtype and on the device of `like`, holding anything."""
        count = rows * columns
        fitting = [block for block in reversed(self._of(like)) if block.numel() >= count]
        if self._free is None or not fitting:
            self._drop_one(like)
            return like.new_empty(count).view(rows, columns)
        block = min(fitting, key=torch.Tensor.numel)  # of several the last given back: the caches may still hold it
        self._free = [other for other in self._free if other is not block]
        return block[:count].view(rows, columns)

    def given_back(self, *tensors: Tensor) -> None:
        """Nobody will look at these tensors again; each has the whole of its memory to itself."""
        if self._free is not None:
            self._free += [tensor.new_empty(0).set_(tensor.untyped_storage()) for tensor in tensors]

    def _of(self, like: Tensor) -> list[Tensor]:
        return [block for block in self._free or () if block.dtype == like.dtype and block.device == like.device]

    def _drop_one(self, like: Tensor) -> None:
        """A block too small goes when a larger one is asked for: sizes that grow must not leave a pile behind."""
        blocks = self._of(like)
        if self._free is not None and blocks:
            largest = max(blocks, key=torch.Tensor.numel)
            self._free = [other for other in self._free if other is not largest]


LENDER = Lender()
"""Of this process: gradients are taken by one thread at a time."""
