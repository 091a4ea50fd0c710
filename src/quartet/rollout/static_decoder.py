"""One decoding step of any transformer over a `RowCache`, and the check that the model can be driven so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quartet.errors import brief
from quartet.kernels import Live, Responses, Stretch
from quartet.models.as_in_training import as_in_training
from quartet.models.heads import LogitHead
from quartet.models.precision import on_cpu
from quartet.models.roles import LanguageView
from quartet.rollout.compiled import CompiledStep, compiled_step
from quartet.rollout.gpu_step import GpuStep, gpu_step
from quartet.rollout.linears import fast_linears
from quartet.rollout.static_cache import NotDrivable, RowCache, decode_masks, layer_patterns

COLUMN_STEP = 16
"""Attention runs over a multiple of so many columns, so that its shapes repeat."""
TOLERANCES = {torch.float32: 1e-3}
"""Relative error of hidden states that `check` puts down to rounding; 0.1 in lower precisions."""


class Decoder:
    """Runs a policy's transformer over a `RowCache`."""

    def __init__(self, policy: LanguageView) -> None:
        backbone = policy.backbone
        self._transformer = backbone.transformer
        self._patterns = layer_patterns(backbone.model.config)
        self._dtype = backbone.dtype
        self._steps: WeakKeyDictionary[RowCache, CompiledStep | GpuStep | None] = WeakKeyDictionary()
        self.compiles = True
        """Take a compiled step where there is one."""
        if "position_ids" not in inspect.signature(self._transformer.forward).parameters:
            raise NotDrivable("it takes no position_ids")

    def new_cache(self, rows: int, columns: int) -> RowCache:
        """An empty cache in the computation dtype."""
        return RowCache(self._patterns, rows, rounded(columns), self._dtype)

    def prefill(self, cache: RowCache, first: int, ids: Tensor, lengths: Tensor) -> Tensor:
        """Put prompts into the rows from `first` on.

        Args:
            ids: int64 `[m, L]`, padded on the right with anything: no token looks at what follows it.
            lengths: int64 `[m]`.

        Returns:
            Hidden states `[m, H]` of the last token of each prompt.
        """
        cache.prefill(first)
        by_kernels = self._dtype == torch.float32 and on_cpu(ids)
        with as_in_training() if by_kernels else nullcontext():
            output: Any = self._transformer(input_ids=ids, past_key_values=cache, use_cache=True)
        states: Tensor = output.last_hidden_state
        return states[torch.arange(len(ids), device=ids.device), lengths - 1]

    def step(self, cache: RowCache, tokens: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Append one token to each of the rows 0 to n - 1.

        Args:
            tokens: int64 `[n]`.
            positions: int64 `[n]`, tokens that each row holds already.
            columns: attended over; more than every position.

        Returns:
            Hidden states `[n, H]` of these tokens.
        """
        compiled = self._compiled(cache)
        if compiled is not None:
            return compiled(tokens, positions)
        cache.decode(positions, columns)
        output: Any = self._transformer(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=decode_masks(self._patterns, positions, columns, self._dtype),
            past_key_values=cache,
            use_cache=True,
        )
        states: Tensor = output.last_hidden_state
        return states[:, -1]

    def stretch(self, cache: RowCache, head: LogitHead, temperature: float) -> Stretch | None:
        """Steps in a row over a cache that holds prompts, with the LM head and the drawing of tokens; None where each has to be
        taken by itself."""
        compiled = self._compiled(cache)
        return compiled.stretch(head, temperature) if isinstance(compiled, CompiledStep) else None

    def prepare(self, cache: RowCache) -> None:
        """Make what steps over a cache that holds prompts need, before one of them is recorded."""
        self._compiled(cache)

    def _compiled(self, cache: RowCache) -> CompiledStep | GpuStep | None:
        """The step over a cache in few kernels, where there is one; looked for when the cache is first decoded over."""
        if not self.compiles:
            return None
        if cache not in self._steps:
            given = self._transformer, self._patterns, cache, self._dtype
            self._steps[cache] = compiled_step(*given) or gpu_step(*given)
        return self._steps[cache]


@contextmanager
def generating(policy: LanguageView, *, merged: bool = False) -> Iterator[None]:
    """Run as the policy for many forward passes without gradients, each with as little overhead as can be.

    In evaluation mode: in training mode, gradient checkpointing takes the cache away unasked. What autocast converts is
    kept until the end; it must not outlive it, since a copy made without gradients would swallow the next backward's.
    Of weights that come and go nothing is kept: it would be a second policy in memory.

    Args:
        merged: multiply with copies of the weights to which the policy's adapter is added.
    """
    backbone = policy.backbone
    model, dtype = backbone.model, backbone.dtype
    training = [module for module in model.modules() if module.training]
    lower = dtype != torch.float32
    whole = backbone.weights.are_whole
    keeping = (
        torch.autocast(backbone.device.type, dtype=dtype, cache_enabled=True) if lower and whole else nullcontext()
    )
    faster = fast_linears(model, dtype, policy.adapter, merged=merged) if whole else nullcontext()
    try:
        model.eval()
        with torch.no_grad(), policy.active(), keeping, faster:
            yield
    finally:
        torch.clear_autocast_cache()
        for module in training:
            module.training = True


def check(decoder: Decoder, policy: LanguageView) -> None:
    """Decode a few tokens in rows of unequal length and compare with a plain forward pass.

    Raises:
        NotDrivable: the model fails, or gives other hidden states.
    """
    device = policy.backbone.device
    vocabulary = policy.backbone.model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(3 * 7, device=device).reshape(3, 7) * 7 + 3) % vocabulary
    lengths = torch.tensor([5, 2, 3], device=device)
    row = torch.arange(2, device=device)
    plain: Tensor = policy.backbone.transformer(input_ids=ids, use_cache=False).last_hidden_state
    try:
        cache = decoder.new_cache(2, 7)
        found = [decoder.prefill(cache, 0, ids[:2, :5], lengths[:2])]
        found.append(decoder.step(cache, ids[row, lengths[:2]], lengths[:2], rounded(6)))
        cache.move(row[1:], row[:1], 3)  # the second row takes the place of the first, a third prompt comes in
        found.append(decoder.prefill(cache, 1, ids[2:, :3], lengths[2:]))
        found.append(decoder.step(cache, ids[row + 1, lengths[1:] + 1 - row], lengths[1:] + 1 - row, rounded(4)))
    except Exception as error:
        raise NotDrivable(f"a decoding step fails with {type(error).__name__}: {brief(error)}") from error
    places = [(0, 4), (1, 1), (0, 5), (1, 2), (2, 2), (1, 3), (2, 3)]
    expected = torch.stack([plain[place] for place in places]).float()
    error_size = (torch.cat(found).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = float(error_size.max())
    if not worst <= TOLERANCES.get(policy.backbone.dtype, 0.1):
        raise NotDrivable(f"decoding rows of unequal length changes its hidden states by {worst:.0%}")
    _check_stretch(decoder, policy, ids[:2, :5], lengths[:2])


def _check_stretch(decoder: Decoder, policy: LanguageView, ids: Tensor, lengths: Tensor) -> None:
    """Take two steps in a row, each to the most likely token, and compare with the logits of a plain forward pass.

    Raises:
        NotDrivable: they give something else.
    """
    rows = torch.arange(len(ids), device=ids.device)
    cache = decoder.new_cache(len(ids), ids.shape[1] + 2)
    decoder.prefill(cache, 0, ids, lengths)
    stretch = decoder.stretch(cache, policy.head, 1.0)
    if stretch is None:
        return
    first, shape = ids[rows, lengths - 1], (len(ids), 3)
    live = Live(first.clone(), lengths.clone(), torch.ones_like(rows), rows)
    kept = Responses(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape).bool(), None)
    stretch(live, kept, stop=None, most=2)
    whole = torch.nn.functional.pad(ids, (0, 2))
    whole[rows, lengths], whole[rows, lengths + 1] = first, kept.tokens[:, 1]
    plain: Tensor = policy.backbone.transformer(input_ids=whole, use_cache=False).last_hidden_state
    places = torch.stack([lengths, lengths + 1], 1)
    expected = policy.head(plain[rows[:, None], places].flatten(0, 1)).float().log_softmax(-1).amax(-1)
    worst = float((kept.logprobs[:, 1:].flatten() - expected).abs().max())
    if not worst <= TOLERANCES.get(policy.backbone.dtype, 0.1):
        raise NotDrivable(f"decoding steps in a row give log-probabilities that are off by {worst:.2g} nats")


def rounded(columns: int) -> int:
    """The columns that are attended over where so many are needed."""
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
