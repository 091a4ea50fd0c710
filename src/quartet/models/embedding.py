"""Token embeddings whose gradient touches only the rows of the tokens at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quartet.models.gradients import IN_PLACE


class FastEmbedding(nn.Embedding):
    """`nn.Embedding`, with a gradient that is added in place where that is asked for; anything else as it was."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the weight: `[..., features]`."""
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if plain and torch.is_grad_enabled() and IN_PLACE.takes(self.weight):
            apply: Callable[..., Tensor] = _Lookup.apply
            return apply(input, self.weight, self.padding_idx)
        return super().forward(input)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.padding = weight, padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        rows, parts = tokens.flatten(), gradient.flatten(0, -2)
        if ctx.padding is not None:
            parts = parts.masked_fill((rows == ctx.padding)[:, None], 0.0)
        return None, IN_PLACE.add_rows(ctx.weight, rows, parts), None
