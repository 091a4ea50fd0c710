"""Gradients of weights, added to where they lie.

Autograd makes the gradient of every weight anew for each microbatch and adds it to what is there in a pass of its own; of a
weight that is used twice, such as tied embeddings, it makes two and adds them into a third. Fresh memory of that size costs
more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from quartet import kernels
from quartet.kernels import Term
from quartet.kernels.library import are_real
from quartet.models.lending import LENDER
from quartet.models.precision import on_cpu
from quartet.models.products import add_product, product, product_into, wide_product

WIDE = 512
"""Columns of a product in bfloat16 from which a left side that lies upright is turned first: the copy takes less than it saves
(measured with 832 tokens at 256 to 3072 features)."""
LENT = 2**20
"""Numbers of a product from which its memory is borrowed: less comes from the C library without asking the system."""
SUMS_UP = torch.__version__ >= "2.10"
"""Whether torch adds a product in bfloat16 to a matrix in float32: before, it asks for one dtype (pytorch/pytorch#167931)."""


def add_narrow_product(gradient: Tensor, left: Tensor, right: Tensor, *, filled: bool) -> None:
    """Add `left @ right`, of a narrower dtype, to a gradient; over what it holds where it is not filled. Where no kernel
    computes it, the product is rounded to its own dtype in between."""
    if on_cpu(gradient) and kernels.multiply(gradient, Term(left, right), add=filled):
        return
    turn = gradient.shape[1] >= WIDE and left.stride(0) == 1
    if gradient.numel() < LENT:
        part = (left.contiguous() if turn else left) @ right
        gradient.add_(part) if filled else gradient.copy_(part)
        return
    rooms = [LENDER.borrowed(left, *gradient.shape)]
    if turn:
        rooms.append(LENDER.borrowed(left, *left.shape))
        left = rooms[1].copy_(left)
    part = torch.mm(left, right, out=rooms[0])
    gradient.add_(part) if filled else gradient.copy_(part)
    LENDER.given_back(*rooms)


def add_wide_product(gradient: Tensor, left: Tensor, right: Tensor, *, filled: bool) -> None:
    """The same on a GPU, where the product is summed up in the gradient's float32, and not rounded before."""
    if not are_real(left):
        return  # in a plan: there is nothing to make
    if not left.is_cuda:
        part = left @ right
        gradient.add_(part) if filled else gradient.copy_(part)
    elif filled and not SUMS_UP:
        gradient.add_(torch.mm(left, right, out_dtype=gradient.dtype))
    elif filled:
        torch.addmm(gradient, left, right, out_dtype=gradient.dtype, out=gradient)
    else:
        torch.mm(left, right, out_dtype=gradient.dtype, out=gradient)


class GradientsInPlace:
    """Where passes add to the gradients of weights themselves; off unless asked for.

    Autograd is given None in their place, and tells those who wait for a gradient that it is there.
    """

    def __init__(self) -> None:
        self._on = False
        self._placed: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        """Weights whose gradients lie where they were placed, by `id`; those of an update may be there for the next one."""
        self._spare: dict[Tensor, Tensor] = {}

    @contextmanager
    def added(self, wanted: bool = True) -> Iterator[None]:
        """Add in place in the block, if wanted."""
        before, self._on = self._on, wanted
        try:
            yield
        finally:
            self._on = before
            if not before:
                self._spare.clear()

    def reset(self, parameters: Iterable[nn.Parameter], *, reuse: bool) -> None:
        """Leave the parameters without a gradient.

        Args:
            reuse: let the next gradients have the memory of those that were added in place; it is not free until then.
        """
        self._spare.clear()
        for parameter in parameters:
            if reuse and id(parameter) in self._placed and parameter.grad is not None:
                self._spare[parameter] = parameter.grad
            parameter.grad = None
        self._placed.clear()

    def forget(self) -> None:
        """Free what is kept for the next gradients."""
        self._spare.clear()

    def takes(self, weight: Tensor, *, by_gpu: bool = False) -> bool:
        """Whether the gradient of a weight is to be added in place. Ask for the weight itself: what a backward pass finds
        among its saved tensors may be a copy.

        Args:
            by_gpu: the caller's pass is that of a GPU. The others are for a CPU, and for none that stands for a GPU in a plan.
        """
        mine = weight.is_leaf and weight.requires_grad and (by_gpu or on_cpu(weight))
        return self._on and mine and not weight._backward_hooks

    def place(self, weight: Tensor, *, by_gpu: bool = False) -> tuple[Tensor, bool] | None:
        """Where the gradient of a weight is to be added, and whether anything is there yet: if not, what the memory holds is
        to be overwritten. None where the gradient goes through autograd."""
        if not self.takes(weight, by_gpu=by_gpu):
            return None
        self._placed[id(weight)] = weight
        if weight.grad is not None:
            return weight.grad, True
        spare = self._spare.pop(weight, None)
        weight.grad = torch.empty_like(weight) if spare is None else spare
        return weight.grad, False

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """Add `left @ right` to a weight's gradient; where it goes through autograd, which converts it, it is returned."""
        place = self.place(weight)
        if place is None:
            return product(left, right)
        gradient, filled = place
        if left.dtype != gradient.dtype:
            add_narrow_product(gradient, left, right, filled=filled)
        elif filled:
            add_product(gradient, left, right)
        else:
            product_into(gradient, left, right)
        return None

    def add_wide_product(self, weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
        """The same in the pass of a GPU, where the sum is not rounded to the dtype of the two sides."""
        place = self.place(weight, by_gpu=True)
        if place is None:
            return wide_product(left, right)
        add_wide_product(place[0], left, right, filled=place[1])
        return None

    def add_rows(self, weight: Tensor, rows: Tensor, parts: Tensor) -> Tensor | None:
        """Add to some rows of a weight's gradient, to the same one several times where it is named so.

        Args:
            rows: int64 `[n]`.
            parts: `[n, features]`.
        """
        place = self.place(weight)
        if place is None:
            return torch.zeros_like(weight).index_add_(0, rows, parts.to(weight.dtype))
        gradient, filled = place
        if not filled:
            gradient.zero_()
        gradient.index_add_(0, rows, parts.to(weight.dtype))
        return None


IN_PLACE = GradientsInPlace()
"""Of this process; the gradients of a weight are taken by one thread at a time."""
