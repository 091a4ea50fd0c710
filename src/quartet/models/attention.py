"""Attention in the layouts of `layout.py`, and of short sequences on the CPU: by a kernel, or without one in bfloat16, where
torch's backward is slow, by plain products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from quartet import kernels
from quartet.models.as_in_training import computes_as_in_training
from quartet.models.causal import as_one_row, causal_attention
from quartet.models.layout import PackedLayout, packed_now
from quartet.models.precision import on_cpu

NAME = "quartet"
LONGEST = 256
"""Tokens up to which plain matrix products beat the fused kernel (forward and backward, bfloat16, measured)."""


def use_own_attention(model: PreTrainedModel) -> None:
    """Let the attention of a model that computes with `sdpa` know sequences side by side.

    Short causal sequences are computed by a kernel on the CPU, where gradients are taken, or without one, in bfloat16, by plain
    matrix products. A decoding step is `sdpa` without copies of keys; all else goes on to it unchanged."""
    if model.config._attn_implementation != "sdpa":
        return
    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, _mask)
        assert NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    model.set_attn_implementation(NAME)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As for `sdpa`; side by side, each sequence is told apart inside the attention, which needs none."""
    mask: Tensor | None = None if packed_now() is not None else sdpa_mask(*args, **kwargs)
    return mask


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that no row packs several sequences.

    Where it is given neither mask nor cache it looks for that in the values of the positions, for which the host has to
    wait in every forward pass.
    """
    _Told.enter()
    try:
        yield
    finally:
        _Told.leave()


class _Told:
    """Whether transformers is told so now, by how many threads."""

    NAME = "find_packed_sequence_indices"
    lock = threading.Lock()
    count = 0
    before: Any = None

    @classmethod
    def enter(cls) -> None:
        with cls.lock:
            cls.count += 1
            if cls.count == 1 and hasattr(masking_utils, cls.NAME):
                cls.before = getattr(masking_utils, cls.NAME)
                setattr(masking_utils, cls.NAME, lambda *_, **__: None)

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.count -= 1
            if cls.count == 0 and cls.before is not None:
                setattr(masking_utils, cls.NAME, cls.before)
                cls.before = None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`short_attention` of sequences in any layout; shapes are those of the layout. A kernel computes it where there is one."""
    packed = packed_now()
    length = query.shape[2] if packed is None else packed.length
    found = None
    if attention_mask is None and length > 1 and _is_plain(module, query, key, kwargs):
        found = _by_kernel(query, key, value, packed, kwargs.get("scaling"))
    if found is not None:
        return found, None
    if packed is None:
        return short_attention(module, query, key, value, attention_mask, **kwargs)
    query, key, value = packed.one_a_row(query), packed.one_a_row(key), packed.one_a_row(value)
    mixed, weights = short_attention(module, query, key, value, attention_mask, **kwargs)
    return packed.side_by_side(mixed), weights


def _is_plain(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether tokens look at all before them and nothing else is asked for, in the numbers of a training pass on a CPU."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    here = on_cpu(query) and computes_as_in_training() and key.shape[2] == query.shape[2]
    return bool(here and causal and not kwargs.get("dropout") and not _special(kwargs))


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedLayout | None, scaling: float | None
) -> Tensor | None:
    """Shapes as in `attention`; None where there is no kernel."""
    rows, _, length, size = query.shape
    dtype = _computed_in(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed is None:
        query, key, value = as_one_row(query), as_one_row(key), as_one_row(value)
        bounds, longest = torch.arange(rows + 1) * length, length
    else:
        bounds, longest = packed.bounds, packed.length
    if not kernels.attention_fits(query, key, value, longest):
        return None
    mixed = causal_attention(query, key, value, bounds, longest, size**-0.5 if scaling is None else scaling)
    return mixed if packed is not None else mixed.view(rows, length, *mixed.shape[2:])


def short_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T * scaling + causal mask) v.

    In a decoding step, in which several heads share a key head, keys and values are not repeated for each, as older versions of
    transformers do in every layer and step where there is a mask.

    Args:
        query: `[n, heads, L, d]`.
        key, value: `[n, key heads, L, d]`; each serves `heads / key heads` query heads.
        attention_mask: None for right-padded sequences.

    Returns:
        `[n, L, heads, d]`, and None for the weights.
    """
    length = query.shape[2]
    asked = {**kwargs, "dropout": dropout, "is_causal": is_causal}
    plain = attention_mask is None and 1 < length <= LONGEST and _is_plain(module, query, key, asked)
    plain = plain and _computed_in(query) == torch.bfloat16
    if _one_token_for_grouped_heads(query, key, attention_mask) and not dropout and not _special(kwargs):
        assert attention_mask is not None
        return _grouped(query, key, value, attention_mask, scaling), None
    if not plain:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return output
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    rows, heads, _, width = query.shape
    shared = key.shape[1]
    # Query heads that share a key head are rows of one product.
    grouped, key, value = (t.reshape(rows * shared, -1, width) for t in (query, key, value))
    future = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1).repeat(heads // shared, 1)
    scale = width**-0.5 if scaling is None else scaling
    # The softmax of bfloat16 numbers is computed in float32 inside and rounded once.
    weights = torch.baddbmm(future, grouped, key.transpose(1, 2), alpha=scale).softmax(-1)
    mixed = torch.bmm(weights, value)
    return mixed.view(rows, heads, length, width).transpose(1, 2).contiguous(), None


def _special(given: dict[str, Any]) -> bool:
    """Whether attention is asked for more than query, key, value and mask say."""
    return any(given.get(name) is not None for name in ("position_bias", "softcap", "cache"))


def _one_token_for_grouped_heads(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    one_mask = mask is not None and mask.ndim == 4 and mask.shape[1] == 1
    return query.shape[2] == 1 and key.shape[1] < query.shape[1] and one_mask and not torch.is_grad_enabled()


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """One token of each row, `[n, 1, heads, d]`: the query heads that share a key head stand where tokens would."""
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)
    mixed = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(rows, 1, heads, -1)


def _computed_in(query: Tensor) -> torch.dtype:
    """Rotary embeddings may leave queries in float32, which autocast would convert."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
