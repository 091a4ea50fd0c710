"""The softmax of one chunk of logits and its derivatives, in memory that the next chunk uses again.

What costs time here is traffic over `[chunk, V]`, so everything large is computed in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Workspace:
    """Two `[chunk, V]` tensors that every chunk uses again.

    Fresh memory of this size comes from the system page by page, which takes longer than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors of the shape of `logits`, float32 at least, holding anything."""
        if self._pair is None or len(self._pair[0]) < len(logits):
            first = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
            self._pair = first, torch.empty_like(first)
        return self._pair[0][: len(logits)], self._pair[1][: len(logits)]

    def clear(self) -> None:
        """Give the memory back; the next use asks for it again."""
        self._pair = None


@dataclass(frozen=True, slots=True)
class ChunkSoftmax:
    """One chunk's softmax; the two large tensors lie in the workspace."""

    logprobs: Tensor
    """`[n]`: of the chosen tokens."""
    entropies: Tensor
    """`[n]`, or `[0]` where not asked for."""
    probabilities: Tensor
    """`[n, V]`."""
    weighted: Tensor
    """`[n, V]`: probabilities times the shifted logits; anything where the entropy was not asked for."""


@torch.no_grad()
def softmax_of_chunk(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool, workspace: Workspace
) -> ChunkSoftmax:
    """Softmax of one chunk with a single pass of exponentials.

    The largest logit, shifted to 0, has probability `1 / Z`: so `log Z` is read off the probabilities.
    """
    shifted, probabilities = workspace.of(logits)
    top = logits.amax(-1, keepdim=True).to(shifted.dtype)
    torch.sub(logits, top, out=shifted)
    if temperature != 1.0:
        shifted.div_(temperature)
    torch.softmax(shifted, -1, out=probabilities)
    log_normaliser = -probabilities.amax(-1).log()
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(-1) - log_normaliser
    if not with_entropy:
        return ChunkSoftmax(logprobs, logprobs.new_empty(0), probabilities, shifted)
    # A logit of -inf has probability 0, and 0 times -inf would be NaN.
    weighted = shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(probabilities)
    return ChunkSoftmax(logprobs, log_normaliser - weighted.sum(-1), probabilities, weighted)


@torch.no_grad()
def logprobs_of_chunk(logits: Tensor, tokens: Tensor, temperature: float, workspace: Workspace) -> Tensor:
    """Log-probabilities of the chosen tokens `[n]`, bit for bit those of `torch.log_softmax`: the normaliser that
    `softmax_of_chunk` reads off the probabilities may differ in the last place."""
    found, scaled = workspace.of(logits)
    scaled.copy_(logits)
    if temperature != 1.0:
        scaled.div_(temperature)
    torch.log_softmax(scaled, -1, out=found)
    return found.gather(-1, tokens[:, None]).squeeze(-1)


def to_logprob_slope(probabilities: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
    """`scale * d logprob / d (logits / temperature) = scale * (one-hot - p)`, written over the probabilities."""
    return probabilities.mul_(-scale[:, None]).scatter_add_(1, tokens[:, None], scale[:, None])


def to_entropy_slope(weighted: Tensor, probabilities: Tensor, scale: Tensor) -> Tensor:
    """`scale * d entropy / d (logits / temperature)`, written over `weighted`.

    That is `-p * (log p + entropy)`; with w = p * (shifted logit), `-(w - p * sum(w))`.
    """
    total = weighted.sum(-1, keepdim=True)
    return weighted.addcmul_(probabilities, total, value=-1.0).mul_(-scale[:, None])
