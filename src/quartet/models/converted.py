"""Trained weights in the dtype of the computation, converted once for all microbatches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ConvertedWeights:
    """Copies of weights, kept while `keeping` lasts until `forget` says that they are out of date; plain conversions otherwise.

    torch's fused optimizers leave no trace on a weight that they write to, so that a copy cannot know it by itself.
    A backward pass needs a layer's copy until it has come to the layer, so that at the end of every forward pass all copies
    are in memory anyway, unless activations are computed again: then they should not be kept. That of an LM head, which is
    computed in blocks, is there for the sake of time alone.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] | None = None

    @contextmanager
    def keeping(self, wanted: bool = True) -> Iterator[None]:
        """Keep copies in the block, if wanted."""
        before, self._kept = self._kept, {} if wanted else None
        try:
            yield
        finally:
            self._kept = before

    def forget(self) -> None:
        """Free all copies: before the weights are written to, and where memory runs out."""
        if self._kept is not None:
            self._kept.clear()

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another dtype, for passes that take its gradient themselves; itself in its own."""
        if weight.dtype == dtype:
            return weight
        kept = self._kept
        if kept is None or not self._keeps(weight):
            return weight.to(dtype)
        copy = kept.get(weight)
        if copy is None or copy.dtype != dtype:
            copy = kept[weight] = weight.detach().to(dtype)
        return copy

    def rows(self, weight: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight in another dtype; where no copy is kept, no others are converted."""
        if weight.dtype == dtype:
            return weight[rows]
        if self._keeps(weight):
            return self.of(weight, dtype)[rows]
        return weight[rows].to(dtype)

    def _keeps(self, weight: Tensor) -> bool:
        """Ask for the weight itself: what a backward pass finds among its saved tensors may be a copy."""
        return self._kept is not None and weight.is_leaf and weight.requires_grad


CONVERTED = ConvertedWeights()
"""Of this process; a weight is used by one thread at a time."""
