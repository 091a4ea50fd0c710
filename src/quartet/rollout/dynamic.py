"""Generation with transformers' growing cache: works for every decoder that takes one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quartet.models.roles import LanguageView
from quartet.records import Prompts, Rollout
from quartet.rollout.engine import SamplingSettings
from quartet.rollout.sampling import episode_uniforms, pick


@dataclass
class _Group:
    """Rows that are decoded together; rows that stopped are taken out."""

    rows: Tensor
    """int64 `[n]`: their places in the rollout."""
    attention: Tensor
    """int64 `[n, L]`: 1 on real tokens; prompts are padded on the left."""
    cache: DynamicCache
    next_input: Tensor
    """int64 `[n, l]`: tokens not yet in the cache."""


@dataclass
class _Output:
    """The rollout's tensors while they fill."""

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    stopped: Tensor
    decode_steps: int = 0
    uniforms: Tensor = field(default_factory=lambda: torch.empty(0))


class DynamicEngine:
    """Decodes groups of rows of like prompt length; a group shrinks as its rows stop."""

    def __init__(self, policy: LanguageView, settings: SamplingSettings) -> None:
        self._policy = policy
        self._settings = settings
        self._takes_positions = "position_ids" in inspect.signature(policy.backbone.transformer.forward).parameters

    @torch.no_grad()
    def generate(self, prompts: Prompts, *, greedy: bool = False) -> Rollout:
        """Sample (or decode greedily) one response for each prompt; see `RolloutEngine`."""
        settings, device = self._settings, self._policy.backbone.device
        count, width = len(prompts), settings.response_length
        out = _Output(
            tokens=torch.full((count, width), settings.pad_id, device=device),
            logprobs=torch.zeros((count, width), device=device),
            lengths=torch.zeros(count, dtype=torch.int64, device=device),
            stopped=torch.zeros(count, dtype=torch.bool, device=device),
        )
        if not greedy:
            out.uniforms = episode_uniforms(settings.seed, prompts.episodes, width).to(device)
        order = sorted(range(count), key=lambda row: -len(prompts.tokens[row]))
        with self._policy.active():
            for start in range(0, count, settings.batch_rows):
                self._decode(self._group(prompts, order[start : start + settings.batch_rows]), out, greedy)
        steps = torch.arange(width, device=device)
        return Rollout(
            prompts=prompts,
            tokens=out.tokens,
            response_mask=steps < out.lengths[:, None],
            logprobs=out.logprobs,
            stopped=out.stopped,
            decode_steps=out.decode_steps,
        )

    def _group(self, prompts: Prompts, rows: list[int]) -> _Group:
        device = self._policy.backbone.device
        longest = max(len(prompts.tokens[row]) for row in rows)
        ids = torch.full((len(rows), longest), self._settings.pad_id)
        attention = torch.zeros((len(rows), longest), dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens = prompts.tokens[row]
            ids[place, longest - len(tokens) :] = tokens
            attention[place, longest - len(tokens) :] = 1
        cache = DynamicCache(config=self._policy.backbone.model.config)
        return _Group(torch.tensor(rows, device=device), attention.to(device), cache, ids.to(device))

    def _decode(self, group: _Group, out: _Output, greedy: bool) -> None:
        settings = self._settings
        for step in range(settings.response_length):
            logits = self._logits(group)
            out.decode_steps += step > 0
            uniform = None if greedy else out.uniforms[group.rows, step]
            tokens, logprobs = pick(logits, uniform, temperature=settings.temperature, top_p=settings.top_p)
            out.tokens[group.rows, step] = tokens
            out.logprobs[group.rows, step] = logprobs
            out.lengths[group.rows] = step + 1
            if settings.stop_id is not None:
                going = tokens != settings.stop_id
                out.stopped[group.rows] = ~going
                kept = going.nonzero().squeeze(-1)
                if not len(kept):
                    return
                if len(kept) < len(going):
                    tokens = _drop_rows(group, kept, tokens)
            group.next_input = tokens[:, None]
            group.attention = torch.cat([group.attention, group.attention.new_ones(len(tokens), 1)], dim=1)

    def _logits(self, group: _Group) -> Tensor:
        """Logits `[n, vocabulary]` of the next token of every row."""
        arguments: dict[str, Any] = {
            "input_ids": group.next_input,
            "attention_mask": group.attention,
            "past_key_values": group.cache,
            "use_cache": True,
        }
        if self._takes_positions:
            positions = (group.attention.cumsum(-1) - 1).clamp_(min=0)
            arguments["position_ids"] = positions[:, -group.next_input.shape[1] :]
        hidden: Tensor = self._policy.backbone.transformer(**arguments).last_hidden_state
        return self._policy.head(hidden[:, -1])


def _drop_rows(group: _Group, kept: Tensor, tokens: Tensor) -> Tensor:
    group.rows = group.rows[kept]
    group.attention = group.attention[kept]
    group.cache.batch_select_indices(kept)
    return tokens[kept]
