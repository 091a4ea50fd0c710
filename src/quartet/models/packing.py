"""Which models may compute sequences side by side, without padding: seen on two short sequences rather than known by name."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from quartet.errors import ConfigError
from quartet.models.attention import NAME
from quartet.models.backbone import Backbone
from quartet.models.branch import layer_list
from quartet.models.layout import Layout, PackedLayout
from quartet.models.roles import Roles
from quartet.records import Sequences

PROMPTS, RESPONSES = (4, 2), (3, 1)
LONGEST_TRIED = 7
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the largest state; a token that looks into another sequence, or has another position, is off by its own size."""


@torch.no_grad()
def allow_packing(roles: Roles) -> None:
    """Let policy and value compute sequences side by side in training, if that gives the states of the padded layout.

    Called once the weights are where they will be used; all processes of an engine take part.
    """
    roles.use("policy", "value")
    for view in (roles.policy, roles.value):
        longest = longest_packed(view.backbone)
        if longest >= LONGEST_TRIED and not view.backbone.packs_up_to:
            assume_packing(view.backbone, longest)
            if not _agrees(view.backbone, view.adapter):
                assume_packing(view.backbone, 0)


def _agrees(backbone: Backbone, adapter: str | None) -> bool:
    prompts, responses = (torch.tensor(counts, device=backbone.device) for counts in (PROMPTS, RESPONSES))
    ids = torch.arange(2 * LONGEST_TRIED, device=backbone.device).view(2, -1) % 8
    sequences = Sequences(ids, prompts, responses, prompts=PROMPTS, responses=RESPONSES)
    padded, packed = Layout.padded(sequences), PackedLayout.of(sequences)
    found = []
    for layout in (padded, packed):
        with backbone.weights.done():
            states = backbone.hidden(layout, adapter)
        found.append(
            torch.cat([states[layout.before_every_step(max(RESPONSES))], states[layout.last, None]], 1).float()
        )
    difference = (found[1] - found[0]).abs().max()
    return bool(difference <= TOLERANCE[backbone.dtype] * found[0].abs().max())


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
