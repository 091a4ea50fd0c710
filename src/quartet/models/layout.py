"""How sequences lie in a forward pass: one a row, right-padded, or side by side in a single row, without padding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quartet.records import Sequences


@dataclass(frozen=True, slots=True)
class Places:
    """Which rows of a long tensor a short one holds."""

    in_long: Tensor
    """int64 `[short]`: the row of the long tensor that each row of the short one is."""
    in_short: Tensor
    """int64 `[long]`: the reverse; any row where the short tensor has none."""
    missing: Tensor
    """int64 `[long - short]`: rows of the long tensor that the short one has not."""

    @staticmethod
    def of(held: np.ndarray, device: torch.device) -> Places:
        """The short tensor holds the rows where `held` is True, in order; the host does not wait for the device."""
        flat = held.ravel()
        in_short = np.maximum(flat.cumsum() - 1, 0)
        found = (np.flatnonzero(flat), in_short, np.flatnonzero(~flat))
        return Places(*(torch.tensor(places).to(device, non_blocking=True) for places in found))

    def shorten(self, rows: Tensor) -> Tensor:
        """`[long, ...]` to `[short, ...]`."""
        apply: Callable[..., Tensor] = _Shortened.apply
        return apply(rows, self)

    def lengthen(self, rows: Tensor) -> Tensor:
        """`[short, ...]` to `[long, ...]`, zeros where the short tensor has no row."""
        apply: Callable[..., Tensor] = _Lengthened.apply
        return apply(rows, self)

    def _lengthened(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.in_short).index_fill_(0, self.missing, 0.0)


class _Shortened(torch.autograd.Function):
    """torch's own gradient of a selection adds row by row, since it cannot know that no row is chosen twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return rows.index_select(0, places.in_long)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.places._lengthened(gradient), None


class _Lengthened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places._lengthened(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.places.in_long), None


@dataclass(frozen=True, slots=True)
class Layout:
    """n sequences, each in a row of its own, right-padded to the longest.

    Right padding needs no mask under causal attention: a real token never looks at what follows it. Without a mask the
    attention takes its fast causal path.
    """

    sequences: Sequences
    arguments: dict[str, Tensor]
    """What the transformer is given."""
    first: Tensor
    """int64 `[n]`: place among the states of the token before each response's first."""
    last: Tensor
    """int64 `[n]`: place of each sequence's last token."""

    @staticmethod
    def padded(sequences: Sequences) -> Layout:
        """One sequence a row."""
        ids = sequences.input_ids
        first = torch.arange(len(ids), device=ids.device) * ids.shape[1] + sequences.prompt_lengths - 1
        return Layout(sequences, {"input_ids": ids}, first, first + sequences.response_lengths)

    def active(self) -> AbstractContextManager[None]:
        """What a forward pass of this layout runs in."""
        return nullcontext()

    def trunk(self, name: str) -> Tensor | None:
        """The states of a backbone's trunk, as this layout's layers would give them, where they are known."""
        return self.sequences.trunks.get(name)

    def states(self, hidden: Tensor) -> Tensor:
        """Last hidden states as the transformer gives them, to the `[m, H]` of which the places speak."""
        return hidden.flatten(0, 1)

    def before(self, row: Tensor, step: Tensor) -> Tensor:
        """Places of the tokens before the given response positions."""
        return self.first[row] + step

    def before_every_step(self, steps: int) -> Tensor:
        """Places of the tokens before the response positions 0 to `steps` - 1: `[n, steps]`; past the end of a sequence
        that of its last token."""
        step = torch.arange(steps, device=self.first.device)
        return torch.minimum(self.first[:, None] + step, self.last[:, None])


@dataclass(frozen=True, slots=True)
class PackedLayout(Layout):
    """n sequences side by side in one row. Attention alone sees them one a row; the last layer's MLP and the heads see only
    the tokens whose states are read: from each prompt's last token on."""

    cells: Places
    """The tokens among the cells `[n * L]` of the padded layout."""
    read: Places
    """The tokens whose last states are read, among all tokens."""

    @staticmethod
    def of(sequences: Sequences) -> PackedLayout:
        """Side by side; the host must know the lengths."""
        assert sequences.prompts is not None
        assert sequences.responses is not None
        ids, device = sequences.input_ids, sequences.input_ids.device
        prompts, responses = np.array(sequences.prompts), np.array(sequences.responses)
        column = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        real = column < (prompts + responses)[:, None]
        cells = Places.of(real, device)
        read = Places.of((column >= prompts[:, None] - 1)[real], device)
        positions = torch.tensor(column[real]).to(device, non_blocking=True)
        last = torch.tensor((responses + 1).cumsum() - 1).to(device, non_blocking=True)
        arguments = {
            "input_ids": ids.flatten().index_select(0, cells.in_long).unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
        }
        return PackedLayout(sequences, arguments, last - sequences.response_lengths, last, cells, read)

    def active(self) -> AbstractContextManager[None]:
        """Attention and the last MLP find the layout."""
        return packed_as(self)

    def trunk(self, name: str) -> Tensor | None:
        """As `Layout.trunk`."""
        states = self.sequences.trunks.get(name)
        return None if states is None else states.flatten(0, 1).index_select(0, self.cells.in_long).unsqueeze(0)

    def states(self, hidden: Tensor) -> Tensor:
        """As `Layout.states`, of the tokens that are read."""
        return self.read.shorten(hidden.squeeze(0))

    def one_a_row(self, heads: Tensor) -> Tensor:
        """`[1, heads, tokens, d]` to `[n, heads, L, d]`."""
        width = heads.shape[-1]
        rows = self.cells.lengthen(heads.squeeze(0).transpose(0, 1).flatten(1))
        shape = self.sequences.input_ids.shape
        return rows.view(*shape, -1, width).transpose(1, 2)

    def side_by_side(self, mixed: Tensor) -> Tensor:
        """`[n, L, heads, d]` to `[1, tokens, heads, d]`."""
        return self.cells.shorten(mixed.flatten(2).flatten(0, 1)).view(1, -1, *mixed.shape[2:])


class _Current(threading.local):
    """Of each thread, because two may run two models at once."""

    packed: PackedLayout | None = None


_current = _Current()


def packed_now() -> PackedLayout | None:
    """The layout of the forward pass that runs now in this thread, where it is a packed one."""
    return _current.packed


@contextmanager
def packed_as(layout: PackedLayout | None) -> Iterator[None]:
    """Run (or run again, in a backward pass) under a packed layout, or under none."""
    before, _current.packed = _current.packed, layout
    try:
        yield
    finally:
        _current.packed = before
