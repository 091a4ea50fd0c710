"""Decoder layers that are known well enough to be computed in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn

from quartet import kernels
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.attention import NAME
from quartet.models.gated import is_silu
from quartet.models.gated_mlp import by_kernels, in_one_pass
from quartet.models.gpu_check import works
from quartet.models.gpu_layer import GpuLayerPass, fits_gpu
from quartet.models.known import ATTENTION, LAYER, MLP, NORM, NORMED_ATTENTION, library_kind, own_class
from quartet.models.layer_pass import LayerPass, Rest
from quartet.models.layout import PackedLayout, packed_now
from quartet.models.linears import Weights, is_hooked, is_replaced, weights_of
from quartet.models.precision import on_cpu
from quartet.models.products import computed_in
from quartet.models.rotary import turns_halves

PLACES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
"""Linear layers of an attention and of an MLP."""
IGNORED = frozenset(("position_ids", "use_cache", "cache_position"))
"""What a layer is given that changes nothing where there is no cache."""


def layer_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that stands in for that of a decoder layer; None where the layer is not known."""
    if not LAYER.fits(kind):
        return None
    library: Callable[..., Tensor] = kind.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken = None if args else _taken_apart(self, hidden_states, **kwargs)
        if taken is None:
            return library(self, hidden_states, *args, **kwargs)
        passing = LayerPass if on_cpu(hidden_states) else GpuLayerPass
        apply: Callable[..., Tensor] = passing.apply
        return apply(hidden_states, *kwargs["position_embeddings"], *taken)

    return own_class(kind, forward)


def _taken_apart(
    layer: Any,
    states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Any, ...] | None:
    """The arguments of the pass after states and angles; None where the parts have to be called."""
    packed = packed_now()
    if packed is None or not computes_as_in_training() or not IGNORED.issuperset(kwargs) or _somebody_waits():
        return None
    if attention_mask is not None or past_key_values is not None or position_embeddings is None:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    normed = _known(attention.__class__, mlp.__class__)
    if normed is None or attention.config._attn_implementation != NAME or not attention.is_causal:
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if normed else []
    if any(is_hooked(part) or is_replaced(part) for part in (attention, mlp, *norms)):
        return None
    if not all(map(NORM.describes, norms)):
        return None
    parts = [getattr(at, name) for at, names in zip((attention, mlp), PLACES, strict=True) for name in names]
    linears = [found for found in map(weights_of, parts) if found is not None]
    if len(linears) < len(parts) or (attention.training and attention.attention_dropout):
        return None
    weights_of_norms = [norm.weight for norm in norms]
    if on_cpu(states):
        fits = in_one_pass(states, linears) and _fits(
            states, attention, linears, weights_of_norms, position_embeddings, packed
        )
    else:
        fits = is_silu(mlp.act_fn) and _fits_gpu(states, attention, linears, position_embeddings)
    if not fits:
        return None
    rest = Rest(
        normed=normed,
        eps=tuple(norm.variance_epsilon for norm in norms),
        size=attention.head_dim,
        scaling=attention.scaling,
        scales=[weights.scale for weights in linears],
        activation=mlp.act_fn,
        bounds=packed.bounds,
        starts=packed.starts,
        longest=packed.length,
        read=packed.read if mlp.is_last else None,
        by_kernels=computed_in(states) == torch.float32 and is_silu(mlp.act_fn) and by_kernels(linears),
        kept=torch.is_grad_enabled(),
    )
    tensors = [tensor for weights in linears for tensor in (weights.weight, weights.bias, weights.down, weights.up)]
    return rest, *(norm.weight for norm in norms), *tensors


def _fits_gpu(states: Tensor, attention: Any, linears: Sequence[Weights], angles: tuple[Tensor, Tensor]) -> bool:
    """Whether the pass on a GPU can be taken: all in bfloat16, whatever the weights are kept in."""
    tensors = [t for layer in linears for t in (layer.weight, layer.bias, layer.down, layer.up) if t is not None]
    if len(states) != 1 or computed_in(states) != torch.bfloat16 or any(t.device != states.device for t in tensors):
        return False
    size = attention.head_dim
    like = (1, states.shape[1], size)
    if not states.is_contiguous() or not all(one.shape == like and one.is_contiguous() for one in angles):
        return False  # kernels go by rows
    heads, key_heads = (len(layer.weight) // size for layer in linears[:2])
    fits = fits_gpu(states, torch.bfloat16, heads, key_heads, size)
    return fits and (not states.is_cuda or works(states.device))


@cache
def _known(attention: type[nn.Module], mlp: type[nn.Module]) -> bool | None:
    """Whether queries and keys have norms; None where the parts of a layer are not known."""
    normed = NORMED_ATTENTION.fits(attention)
    known = (normed or ATTENTION.fits(attention)) and turns_halves(library_kind(attention)) and MLP.fits(mlp)
    return normed if known and hasattr(mlp, "is_last") else None


def _somebody_waits() -> bool:
    """Whether something waits for the call of any module."""
    forward = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
    return bool(forward or global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)


def _fits(
    states: Tensor,
    attention: Any,
    linears: Sequence[Weights],
    norms: Sequence[Tensor],
    angles: tuple[Tensor, Tensor],
    packed: PackedLayout,
) -> bool:
    """Whether there are kernels for norms, rotary embedding and attention."""
    of_layer, of_head = norms[:2], norms[2:]
    if len(states) != 1 or not all(kernels.norms(states, weight) for weight in of_layer):
        return False
    head = states.new_empty(attention.head_dim, dtype=computed_in(states))
    query, key = (head.expand(1, len(at.weight) // attention.head_dim, states.shape[1], -1) for at in linears[:2])
    return (
        all(kernels.norms(head, weight) for weight in of_head)
        and kernels.rotary_fits(query, *angles)
        and kernels.attention_fits(query, key, key, packed.length)
    )
