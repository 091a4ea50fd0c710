"""A decoding step as one call of a kernel, for transformers that are known to compute what it computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn

from quartet import kernels
from quartet.models.attention import NAME
from quartet.models.gated import is_silu
from quartet.models.known import ATTENTION, LAYER, MLP, NORM, NORMED_ATTENTION, TRANSFORMER, library_kind
from quartet.models.linears import is_replaced
from quartet.models.precision import on_cpu
from quartet.models.rotary import turns_halves
from quartet.rollout.linears import linear_of
from quartet.rollout.static_cache import Pattern, RowCache

ATTENTIONS = frozenset((NAME, "sdpa", "eager"))
"""Implementations of attention, all of which compute the same."""
STEADY = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary embeddings that are the same however long the sequence has become."""


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


def compiled_step(
    transformer: nn.Module, patterns: list[Pattern], cache: RowCache, dtype: torch.dtype
) -> CompiledStep | None:
    """The step of a transformer over a cache that holds prompts; None where it has to be computed layer by layer.

    Layers are known by what the source of their forward says, whatever their class is called.

    Args:
        dtype: of the computation; that of the cache.
    """
    whole: Any = transformer
    first = getattr(transformer, "embed_tokens", None)
    if not isinstance(first, nn.Embedding) or not on_cpu(first.weight) or not kernels.decodes(dtype):
        return None
    if not TRANSFORMER.describes(transformer) or _hooked(transformer) or is_replaced(first):
        return None
    if first.weight.dtype not in (torch.float32, dtype) or whole.config._attn_implementation not in ATTENTIONS:
        return None
    if not len(whole.layers) == len(patterns) == len(cache.layers) or not NORM.describes(whole.norm):
        return None
    layers = [_layer(*one, dtype) for one in zip(whole.layers, patterns, cache.layers, strict=True)]
    known, angles = [layer for layer in layers if layer is not None], _angles(whole, cache)
    if len(known) < len(layers) or angles is None or not kernels.alike(known, first.weight.shape[1]):
        return None
    eps = {module.variance_epsilon for module in whole.modules() if NORM.describes(module)}
    scaling = {layer.self_attn.scaling for layer in whole.layers}
    size = known[0].keys.shape[-1]
    if len(eps) != 1 or len(scaling) != 1 or angles[0].shape != angles[1].shape or angles[0].shape[1] != size:
        return None
    decoding = kernels.Decoding(
        known,
        _float(whole.norm),
        angles,
        heads=len(known[0].query.weight) // size,
        eps=eps.pop(),
        scaling=scaling.pop(),
        narrow=first.weight.dtype != torch.float32,
    )
    return CompiledStep(whole, decoding)


def _angles(transformer: Any, cache: RowCache) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of all positions, float32 `[columns, size]`; None where they depend on more than the position."""
    rotary = transformer.rotary_emb
    if getattr(rotary, "rope_type", None) not in STEADY or is_replaced(rotary):
        return None
    columns = torch.arange(cache.shape[1])[None]
    cosines, sines = rotary(transformer.embed_tokens.weight.new_zeros(1), position_ids=columns)
    return cosines[0].float().contiguous(), sines[0].float().contiguous()


def _layer(layer: Any, pattern: Pattern, cache: Any, dtype: torch.dtype) -> kernels.Layer | None:
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
