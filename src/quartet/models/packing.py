"""Which models may compute sequences side by side, without padding: seen on two short sequences rather than known by name."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from quartet.errors import ConfigError
from quartet.models.attention import NAME
from quartet.models.backbone import Backbone
from quartet.models.branch import layer_list
from quartet.models.layout import Layout, PackedLayout
from quartet.models.roles import LanguageView, Roles, ScalarView
from quartet.records import Sequences

PROMPTS, RESPONSES = (4, 1), (3, 2)
LONGEST_TRIED = 7
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the largest state, between the two layouts; a token at another position is off by its own size."""
LEAK = {torch.float32: 1e-5, torch.bfloat16: 0.0}
"""The same for a sequence beside two others. The products have the same shapes both times, so that nothing else changes their
rounding but what other tokens do to an expert's batch or a quantized layer's scale."""


@torch.no_grad()
def allow_packing(roles: Roles) -> None:
    """Let policy and value compute sequences side by side in training, if that gives the states of the padded layout, and none
    depend on what lies beside.

    Called once the weights are where they will be used; all processes of an engine take part.
    """
    roles.use("policy", "value")
    trained: dict[int, list[LanguageView | ScalarView]] = {}
    for view in (roles.policy, roles.value):
        trained.setdefault(id(view.backbone), []).append(view)
    for views in trained.values():
        backbone = views[0].backbone
        longest = longest_packed(backbone)
        if longest >= LONGEST_TRIED and not backbone.packs_up_to:
            assume_packing(backbone, longest)
            if not all(_agrees(backbone, view.adapter) for view in views):
                assume_packing(backbone, 0)


def _agrees(backbone: Backbone, adapter: str | None) -> bool:
    ids = torch.arange(2 * LONGEST_TRIED, device=backbone.device).view(2, -1) % 8
    padded, packed = Layout.padded(_sequences(ids)), PackedLayout.of(_sequences(ids), backbone.tile)
    expected = _states(backbone, padded, adapter)
    ids = ids.clone()
    ids[0] = (ids[0] + 3) % 8
    try:
        found = _states(backbone, packed, adapter)
        beside_another = _states(backbone, PackedLayout.of(_sequences(ids), backbone.tile), adapter)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a family whose code makes a mask of its own, say
        return False
    size = expected.abs().max()
    apart = (found - expected).abs().max() <= TOLERANCE[backbone.dtype] * size
    alone = (beside_another[1] - found[1]).abs().max() <= LEAK[backbone.dtype] * size
    return bool(apart & alone)


def _sequences(ids: Tensor) -> Sequences:
    prompts, responses = (torch.tensor(counts, device=ids.device) for counts in (PROMPTS, RESPONSES))
    return Sequences(ids, prompts, responses, prompts=PROMPTS, responses=RESPONSES)


def _states(backbone: Backbone, layout: Layout, adapter: str | None) -> Tensor:
    """Float32 `[2, steps + 1, H]`: the states that are read; the second sequence's from its first token on."""
    with backbone.weights.done():
        states = backbone.hidden(layout, adapter)
    return torch.cat([states[layout.before_every_step(max(RESPONSES))], states[layout.last, None]], 1).float()


def longest_packed(backbone: Backbone) -> int:
    """Tokens of a sequence up to which this kind of model may be packed, as far as its code and configuration tell; 0 for not
    at all. Within its sliding window attention needs no mask."""
    model, arguments = backbone.model, inspect.signature(backbone.transformer.forward).parameters
    if model.config._attn_implementation != NAME or "position_ids" not in arguments:
        return 0
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=sys.maxsize)


def assume_packing(backbone: Backbone, longest: int) -> None:
    """Pack sequences up to a length; the last layer's MLP, where it is one that can be told, then computes only tokens whose
    states are read."""
    backbone.packs_up_to = longest
    try:
        _, layers = layer_list(backbone.transformer, "packing")
    except ConfigError:
        return  # its last layer is not known
    last: Any = layers[-1]
    for child in last.children():
        if hasattr(type(child), "is_last"):
            child.is_last = longest > 0
