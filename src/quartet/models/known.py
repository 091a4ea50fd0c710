"""Layers that are known by what the source of their forward says, whatever their class is called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from quartet.models.linears import is_replaced


def own_class(kind: type[nn.Module], forward: Callable[..., Any], **attributes: object) -> type[nn.Module]:
    """A class of the same name with another forward, which stands in for a library's."""
    names = {"forward": forward, "stands_for": kind, "__module__": __name__, **attributes}
    return type(kind.__name__, (kind,), names)


def library_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """The library's class, for which this may be one that stands in."""
    known: type[nn.Module] = vars(kind).get("stands_for", kind)
    return known


@dataclass(frozen=True, slots=True)
class Known:
    """What a forward says, line by line, and all that it takes from its module."""

    lines: tuple[str, ...]
    names: frozenset[str]
    mentions: tuple[tuple[str, int], ...] = ()
    """How often it mentions what it computes: once more, and it does more to it than the lines say."""

    def describes(self, module: Any) -> bool:
        """Whether the source of a module's forward says so, and it is what a call runs."""
        return self.fits(type(module)) and not is_replaced(module)

    def fits(self, kind: type[Any]) -> bool:
        """Whether the source of the forward of a class says so, or that of the class for which it stands in."""
        return _says(self, getattr(library_kind(kind), "forward", None))


@cache
def _says(known: Known, forward: Any) -> bool:
    """Whether a forward is what is known: asked for at every pass of a layer."""
    source = _source(forward)
    lines = bool(source) and all(line in source for line in known.lines)
    often = all(len(re.findall(rf"\b{word}\b", source)) == times for word, times in known.mentions)
    return lines and often and known.names.issuperset(SELF.findall(source))


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


GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What the forward of a gated MLP computes, in the source of every family that has one."""
RMS_NORM = (
    "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
    "hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
    "return self.weight * hidden_states.to(input_dtype)",
)
TRANSFORMERS = Path(transformers.__file__).resolve().parent
SELF = re.compile(r"\bself\.(\w+)")
TRANSFORMER = Known(
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
LAYER = Known(
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
ATTENTION = Known(
    (
        *_ATTENTION,
        "query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n",
        "key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n",
    ),
    _OF_ATTENTION,
    _STATES,
)
NORMED_ATTENTION = Known(
    (
        *_ATTENTION,
        "query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n",
        "key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)\n",
    ),
    _OF_ATTENTION | {"q_norm", "k_norm"},
    _STATES,
)
MLP = Known((GATED,), frozenset(("gate_proj", "up_proj", "down_proj", "act_fn")))
NORM = Known(RMS_NORM, frozenset(("weight", "variance_epsilon")))
