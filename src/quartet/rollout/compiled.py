"""A decoding step as one call of a kernel, for transformers that are known to compute what it computes."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.modules.module as global_hooks
import transformers
from torch import Tensor, nn

from quartet import kernels
from quartet.models.attention import NAME
from quartet.models.fused import GATED, RMS_NORM, library_kind
from quartet.models.gated import is_silu
from quartet.models.linears import is_replaced
from quartet.models.precision import on_cpu
from quartet.models.rotary import turns_halves
from quartet.rollout.linears import linear_of
from quartet.rollout.static_cache import Pattern, RowCache


@dataclass(frozen=True, slots=True)
class _Known:
    """What a forward says, line by line, and all that it takes from its module."""

    lines: tuple[str, ...]
    names: frozenset[str]
    mentions: tuple[tuple[str, int], ...] = ()
    """How often it mentions what it computes: once more, and it does more to it than the lines say."""

    def describes(self, module: Any) -> bool:
        """Whether the source of a module's forward says so, and it is what a call runs."""
        source = _source(getattr(library_kind(type(module)), "forward", None))
        lines = bool(source) and all(line in source for line in self.lines)
        often = all(len(re.findall(rf"\b{word}\b", source)) == times for word, times in self.mentions)
        return lines and often and self.names.issuperset(SELF.findall(source)) and not is_replaced(module)


@cache
def _source(forward: Any) -> str:
    """The source of a forward without comments; none where another library's function stands around it."""
    try:
        inner = inspect.unwrap(forward, stop=lambda one: not _is_librarys(one))
        return re.sub(r" *#.*", "", inspect.getsource(inner)) if _is_librarys(inner) else ""
    except (AttributeError, OSError, TypeError):
        return ""


def _is_librarys(function: Any) -> bool:
    """Whether a function was written in transformers: what stands around another takes its name and module along."""
    return Path(function.__code__.co_filename).is_relative_to(TRANSFORMERS)


TRANSFORMERS = Path(transformers.__file__).resolve().parent
SELF = re.compile(r"\bself\.(\w+)")
TRANSFORMER = _Known(
    (
        " = self.embed_tokens(input_ids)\n",
        "hidden_states = inputs_embeds\n",
        "position_embeddings = self.rotary_emb(hidden_states, position_ids",
        "self.layers[: self.config.num_hidden_layers]",
        "hidden_states = self.norm(hidden_states)\n",
    ),
    frozenset(("embed_tokens", "rotary_emb", "layers", "norm", "config", "has_sliding_layers")),
    (("hidden_states", 7), ("position_embeddings", 3)),
)
"""The forward of a transformer; then those of its parts."""
LAYER = _Known(
    (
        "residual = hidden_states\n",
        "hidden_states = self.input_layernorm(hidden_states)\n",
        "hidden_states, _ = self.self_attn(\n",
        "hidden_states = residual + hidden_states\n",
        "hidden_states = self.post_attention_layernorm(hidden_states)\n",
        "hidden_states = self.mlp(hidden_states)\n",
    ),
    frozenset(("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")),
    (("hidden_states", 17), ("residual", 4)),
)
_ATTENTION = (
    "hidden_shape = (*input_shape, -1, self.head_dim)\n",
    "value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n",
    "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n",
    "key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)\n",
    "dropout=0.0 if not self.training else self.attention_dropout,\n",
    "scaling=self.scaling,\n",
    "attn_output = self.o_proj(attn_output)\n",
)
_OF_ATTENTION = frozenset(
    (
        *("head_dim", "layer_idx", "config", "training", "attention_dropout", "scaling", "sliding_window"),
        *("q_proj", "k_proj", "v_proj", "o_proj"),
    )
)
_STATES = (
    *(("query_states", 4), ("key_states", 6), ("value_states", 4), ("attn_output", 6), ("cos", 2), ("sin", 2)),
    *(("hidden_states", 5), ("position_embeddings", 2)),
)
ATTENTION = _Known(
    (
        *_ATTENTION,
        "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n",
        "key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n",
    ),
    _OF_ATTENTION,
    _STATES,
)
NORMED_ATTENTION = _Known(
    (
        *_ATTENTION,
        "query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n",
        "key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n",
    ),
    _OF_ATTENTION | {"q_norm", "k_norm"},
    _STATES,
)
MLP = _Known((GATED,), frozenset(("gate_proj", "up_proj", "down_proj", "act_fn")))
NORM = _Known(RMS_NORM, frozenset(("weight", "variance_epsilon")))

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
