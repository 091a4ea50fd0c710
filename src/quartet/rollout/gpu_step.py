"""A decoding step on a GPU in few kernels, for transformers that are known to compute what it computes.

Between the matrix products of a layer run five kernels (`kernels/gpu_decoding.py`) where a library's layer runs dozens. All
that a step needs is known before it starts, so that it can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quartet import kernels
from quartet.kernels import gpu, gpu_decoding, gpu_forward
from quartet.rollout.copies import as_one
from quartet.rollout.linears import weights_in
from quartet.rollout.recognised import Recognised, recognised
from quartet.rollout.static_cache import Pattern, RowCache


class SideBySide:
    """Linear layers with the same input: one product where their weights are rows of one matrix."""

    def __init__(self, layers: Sequence[kernels.Linear]) -> None:
        self._heights = [len(layer.weight) for layer in layers]
        whole = as_one([layer.weight for layer in layers])
        biases = [_bias(layer) for layer in layers]
        if whole is None:
            self._products = [(layer.weight, bias) for layer, bias in zip(layers, biases, strict=True)]
        else:
            self._products = [(whole, _joined(biases, layers))]
        low = [layer.down for layer in layers if layer.down is not None]
        self._down = torch.cat(low).t() if low else None
        self._ranks = [layer.rank for layer in layers]
        self._up = [None if layer.up is None else layer.up.t() for layer in layers]

    def __call__(self, states: Tensor) -> list[Tensor]:
        """What the layers give, `[n, out]` each, which may be columns of one matrix.

        Args:
            states: `[n, in]`, in the dtype of the weights.
        """
        parts = [nn.functional.linear(states, weight, bias) for weight, bias in self._products]
        if len(parts) < len(self._heights):
            parts = list(parts[0].split(self._heights, 1))
        if self._down is not None:
            low = (states @ self._down).split(self._ranks, 1)
            for part, below, up in zip(parts, low, self._up, strict=True):
                if up is not None:
                    part.addmm_(below, up)
        return parts


class _Layer:
    """A decoder layer's weights as a step takes them."""

    def __init__(self, layer: kernels.Layer) -> None:
        self.first_norm, self.second_norm = layer.first_norm, layer.second_norm
        of_query, of_key = layer.query_norm, layer.key_norm
        self.norms = None if of_query is None or of_key is None else (of_query, of_key)
        self.projections, self.out, self.gates, self.down = (SideBySide(group) for group in layer.groups())
        self.keys, self.values, self.window = layer.keys, layer.values, layer.window


class GpuStep:
    """Decoding steps over one cache, for as long as the weights are where they are; copies of them go with it."""

    def __init__(self, transformer: Any, found: Recognised, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: of the computation; that of cache and weights.
        """
        self._transformer, self._dtype = transformer, dtype
        self._layers = [_Layer(layer) for layer in found.layers]
        self._last_norm, self._angles, self._eps, self._scaling = (
            found.last_norm,
            found.angles,
            found.eps,
            found.scaling,
        )

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append one token to each row, as `CompiledStep` does: int64 tokens and positions `[n]` to hidden states `[n, H]`."""
        states: Tensor = self._transformer.embed_tokens(tokens)  # the residual stream, which layers add to
        here = positions.to(torch.int32)  # in memory of its own, which lies alike for any number of rows
        added: Tensor | None = None
        for layer in self._layers:
            given = gpu_decoding.add_norm(states, added, layer.first_norm, self._eps, self._dtype)
            query, key, value = layer.projections(given)
            cache = layer.keys, layer.values
            gpu_decoding.rotate_and_store(query, key, value, *cache, self._angles, here, layer.norms, self._eps)
            (added,) = layer.out(gpu_decoding.attend(query, *cache, here, self._scaling, layer.window))
            given = gpu_decoding.add_norm(states, added, layer.second_norm, self._eps, self._dtype)
            gate, up = layer.gates(given)
            (added,) = layer.down(gpu_forward.silu_product(gate, up))
        return gpu_decoding.add_norm(states, added, self._last_norm, self._eps, states.dtype)


def gpu_step(transformer: nn.Module, patterns: list[Pattern], cache: RowCache, dtype: torch.dtype) -> GpuStep | None:
    """The step of a transformer over a cache that holds prompts; None where it has to be computed layer by layer.

    Args:
        dtype: of the computation; that of the cache.
    """
    first = getattr(transformer, "embed_tokens", None)
    if not isinstance(first, nn.Embedding) or not gpu.usable(first.weight):
        return None
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    found = recognised(transformer, patterns, cache, dtype, weights_in, most=None)
    if found is None or not _lies_together(found, first.weight.device):
        return None
    return GpuStep(transformer, found, dtype)


def _lies_together(found: Recognised, device: torch.device) -> bool:
    """Whether everything is on one device."""
    tensors = [*found.angles, found.last_norm]
    for layer in found.layers:
        tensors += [layer.keys, layer.values, layer.first_norm, layer.second_norm]
        tensors += [part.weight for group in layer.groups() for part in group]
    return all(tensor.device == device for tensor in tensors)


def _bias(layer: kernels.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(layer.weight.dtype)


def _joined(biases: list[Tensor | None], layers: Sequence[kernels.Linear]) -> Tensor | None:
    """The biases of layers side by side; zeros for one that has none, unless none has."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, layers, strict=True)
    return torch.cat([layer.weight.new_zeros(len(layer.weight)) if bias is None else bias for bias, layer in pairs])
