"""Transformers that are known to compute what a decoding step by kernels computes, and all that it needs of them.

Layers are known by what the source of their forward says, whatever their class is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn

from quartet import kernels
from quartet.models.attention import NAME
from quartet.models.gated import is_silu
from quartet.models.known import ATTENTION, LAYER, MLP, NORM, NORMED_ATTENTION, TRANSFORMER, library_kind
from quartet.models.linears import is_replaced
from quartet.models.rotary import turns_halves
from quartet.rollout.static_cache import Pattern, RowCache

ATTENTIONS = frozenset((NAME, "sdpa", "eager"))
"""Implementations of attention, all of which compute the same."""
STEADY = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary embeddings that are the same however long the sequence has become."""

LinearOf = Callable[[nn.Module, torch.dtype], kernels.Linear | None]
"""What a layer multiplies with in a computation of this dtype; None where it has to be called."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A transformer over a cache, as a decoding step by kernels takes it."""

    layers: list[kernels.Layer]
    last_norm: Tensor
    """Float32 `[hidden]`."""
    angles: tuple[Tensor, Tensor]
    """Cosines and sines of every position, float32 `[columns, size]`."""
    heads: int
    """Of queries."""
    eps: float
    """Of the norms."""
    scaling: float
    """Of the products of queries and keys."""


def recognised(
    transformer: nn.Module,
    patterns: list[Pattern],
    cache: RowCache,
    dtype: torch.dtype,
    linear_of: LinearOf,
    *,
    most: int | None = kernels.FEW,
) -> Recognised | None:
    """What a transformer computes over a cache that holds prompts; None where it has to be computed layer by layer.

    Args:
        dtype: of the computation; that of the cache.
        most: rows of the cache that there are kernels for; None for any number.
    """
    whole: Any = transformer
    first = getattr(transformer, "embed_tokens", None)
    if not isinstance(first, nn.Embedding) or is_replaced(first) or first.weight.dtype not in (torch.float32, dtype):
        return None
    if not TRANSFORMER.describes(transformer) or _hooked(transformer):
        return None
    if whole.config._attn_implementation not in ATTENTIONS or not NORM.describes(whole.norm):
        return None
    if not len(whole.layers) == len(patterns) == len(cache.layers):
        return None
    layers = [_layer(*one, dtype, linear_of) for one in zip(whole.layers, patterns, cache.layers, strict=True)]
    known, angles = [layer for layer in layers if layer is not None], _angles(whole, cache)
    if len(known) < len(layers) or angles is None or not kernels.alike(known, first.weight.shape[1], most=most):
        return None
    eps = {module.variance_epsilon for module in whole.modules() if NORM.describes(module)}
    scaling = {layer.self_attn.scaling for layer in whole.layers}
    size = known[0].keys.shape[-1]
    if len(eps) != 1 or len(scaling) != 1 or angles[0].shape != angles[1].shape or angles[0].shape[1] != size:
        return None
    heads = len(known[0].query.weight) // size
    return Recognised(known, _float(whole.norm), angles, heads, eps.pop(), scaling.pop())


def _angles(transformer: Any, cache: RowCache) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of all positions, float32 `[columns, size]`; None where they depend on more than the position."""
    rotary = transformer.rotary_emb
    if getattr(rotary, "rope_type", None) not in STEADY or is_replaced(rotary):
        return None
    weight = transformer.embed_tokens.weight
    columns = torch.arange(cache.shape[1], device=weight.device)[None]
    cosines, sines = rotary(weight.new_zeros(1), position_ids=columns)
    return cosines[0].float().contiguous(), sines[0].float().contiguous()


def _layer(layer: Any, pattern: Pattern, cache: Any, dtype: torch.dtype, linear_of: LinearOf) -> kernels.Layer | None:
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    normed = NORMED_ATTENTION.describes(attention)
    if not LAYER.describes(layer) or not (normed or ATTENTION.describes(attention)) or not MLP.describes(mlp):
        return None
    if not turns_halves(library_kind(type(attention))) or not is_silu(mlp.act_fn):
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if normed else []
    places = (
        *(getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")),
    )
    linears = [linear_of(module, dtype) for module in places]
    query, key, value, out, gate, up, down = linears
    if query is None or key is None or value is None or out is None or gate is None or up is None or down is None:
        return None
    keys, values = cache.keys, cache.values
    if not all(NORM.describes(norm) for norm in norms) or keys is None or keys.dtype != dtype or values.dtype != dtype:
        return None
    first, second, *of_heads = (_float(norm) for norm in norms)
    of_query, of_key = of_heads or (None, None)
    return kernels.Layer(
        first, second, of_query, of_key, query, key, value, out, gate, up, down, keys, values, pattern.window
    )


def _float(norm: Any) -> Tensor:
    weight: Tensor = norm.weight.detach().float().contiguous()
    return weight


def _hooked(transformer: nn.Module) -> bool:
    """Whether something waits for the call of a module."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
