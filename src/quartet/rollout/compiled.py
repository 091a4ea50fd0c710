"""A decoding step as one call of a kernel, for transformers that are known to compute what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quartet import kernels
from quartet.models.embedding import FastEmbedding
from quartet.models.heads import LogitHead
from quartet.models.linears import is_hooked
from quartet.models.precision import on_cpu
from quartet.rollout.linears import linear_of
from quartet.rollout.recognised import recognised
from quartet.rollout.static_cache import Pattern, RowCache


class CompiledStep:
    """Decoding steps over one cache, for as long as the weights are where they are."""

    def __init__(self, transformer: Any, decoding: kernels.Decoding) -> None:
        self._transformer, self._decoding = transformer, decoding

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append one token to each of the rows 0 to n - 1.

        Args:
            tokens: int64 `[n]`.
            positions: int64 `[n]`, tokens that each row holds already.

        Returns:
            Hidden states `[n, H]` of these tokens.
        """
        states: Tensor = self._transformer.embed_tokens(tokens)
        return self._decoding(states, positions.contiguous()).to(states.dtype)

    def stretch(self, head: LogitHead, temperature: float) -> kernels.Stretch | None:
        """Steps in a row, with the LM head and the drawing of tokens; None where each has to be taken by itself."""
        first, layer = self._transformer.embed_tokens, head.layer
        linear = None if layer is None or is_hooked(layer) else linear_of(layer, self._decoding.dtype)
        if linear is None or type(first) not in (nn.Embedding, FastEmbedding) or first.max_norm is not None:
            return None
        embeddings: Tensor = first.weight.detach()
        if not kernels.stretches(self._decoding, embeddings, linear):
            return None
        return kernels.Stretch(self._decoding, embeddings, linear, temperature=temperature)


def compiled_step(
    transformer: nn.Module, patterns: list[Pattern], cache: RowCache, dtype: torch.dtype
) -> CompiledStep | None:
    """The step of a transformer over a cache that holds prompts; None where it has to be computed layer by layer.

    Args:
        dtype: of the computation; that of the cache.
    """
    first = getattr(transformer, "embed_tokens", None)
    if not isinstance(first, nn.Embedding) or not on_cpu(first.weight) or not kernels.decodes(dtype):
        return None
    found = recognised(transformer, patterns, cache, dtype, linear_of)
    if found is None:
        return None
    decoding = kernels.Decoding(
        found.layers,
        found.last_norm,
        found.angles,
        heads=found.heads,
        eps=found.eps,
        scaling=found.scaling,
        narrow=first.weight.dtype != torch.float32,
    )
    return CompiledStep(transformer, decoding)
