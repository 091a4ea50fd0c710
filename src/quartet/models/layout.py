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

from quartet.models.transfer import to_device
from quartet.records import Sequences

CELLS = 8
"""Cells of a row that are filled up together: attention takes time with their square."""


def filled_up(places: Tensor, multiple: int) -> Tensor:
    """`[n]` places with the first of them again until there are a multiple of so many; none stay none."""
    return torch.cat([places, places[:1].expand(-len(places) % multiple)])


@dataclass(frozen=True, slots=True)
class Places:
    """Which rows of a long tensor a short one holds."""

    in_long: Tensor
    """int64 `[short + filler]`: the row of the long tensor that each row of the short one is."""
    in_short: Tensor
    """int64 `[long]`: the reverse; any row where the short tensor has none."""
    missing: Tensor
    """int64 `[long - short]`: rows of the long tensor that the short one has not."""
    filler: int = 0
    """Rows at the end of the short tensor that are no row of the long one: they repeat its first, and pass on no gradient."""

    @staticmethod
    def of(held: np.ndarray, device: torch.device, multiple: int = 1) -> Places:
        """The short tensor holds the rows where `held` is True, in order; the host does not wait for the device.

        Args:
            multiple: the short tensor is filled up to a multiple of so many rows.
        """
        flat = held.ravel()
        in_short = np.maximum(flat.cumsum() - 1, 0)
        in_long = np.flatnonzero(flat)
        filler = -len(in_long) % multiple
        found = (np.append(in_long, np.repeat(in_long[:1], filler)), in_short, np.flatnonzero(~flat))
        long, short, missing = (to_device(torch.tensor(places), device) for places in found)
        return Places(long, short, missing, filler)

    def shorten(self, rows: Tensor) -> Tensor:
        """`[long, ...]` to `[short + filler, ...]`."""
        apply: Callable[..., Tensor] = _Shortened.apply
        return apply(rows, self)

    def shortened(self, gradient: Tensor) -> Tensor:
        """The gradient of what `lengthen` was given, by that of what it gave."""
        short = gradient.index_select(0, self.in_long)
        short[len(short) - self.filler :] = 0
        return short

    def lengthen(self, rows: Tensor) -> Tensor:
        """`[short + filler, ...]` to `[long, ...]`, zeros where the short tensor has no row."""
        apply: Callable[..., Tensor] = _Lengthened.apply
        return apply(rows, self)

    def lengthened(self, rows: Tensor) -> Tensor:
        """The same without a gradient; that of what `shorten` was given, by that of what it gave."""
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
        return ctx.places.lengthened(gradient), None


class _Lengthened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places.lengthened(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.places.shortened(gradient), None


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
    """n sequences side by side in one row. Attention alone tells them apart; the last layer's MLP and the heads see only
    the tokens whose states are read: from each prompt's last token on."""

    tokens: Tensor
    """int64 `[tokens]`: their places among the `[n * L]` of the sequences, the filler's too."""
    length: int
    """Cells of a row: L, or more to fill it up."""
    cells: Places
    """The tokens among the cells `[n * length]` of one sequence a row."""
    read: Places
    """The tokens whose last states are read, among all tokens."""
    bounds: Tensor
    """int64 `[n + 1]`, on the host: the place of each sequence's first token, and after the last sequence's last."""
    starts: Tensor
    """The same in int32 on the device, as kernels of a GPU read it."""

    @staticmethod
    def of(sequences: Sequences, multiple: int = 1) -> PackedLayout:
        """Side by side; the host must know the lengths.

        Args:
            multiple: the tokens, and those that are read, are filled up to a multiple of so many, the cells of a row to one
                of `CELLS` at most.
        """
        assert sequences.prompts is not None
        assert sequences.responses is not None
        ids, device = sequences.input_ids, sequences.input_ids.device
        prompts, responses = np.array(sequences.prompts), np.array(sequences.responses)
        rows, length = ids.shape
        columns = length + -length % min(multiple, CELLS)
        column = np.broadcast_to(np.arange(columns), (rows, columns))
        real = column < (prompts + responses)[:, None]
        cells = Places.of(real, device, multiple)
        none = np.zeros(cells.filler, dtype=np.int64)
        read = Places.of(np.append((column >= prompts[:, None] - 1)[real], none > 0), device, multiple)
        positions = to_device(torch.tensor(np.append(column[real], none)), device)
        last = to_device(torch.tensor((responses + 1).cumsum() - 1), device)
        found = np.flatnonzero(real[:, :length])
        tokens = to_device(torch.tensor(np.append(found, none)), device)
        arguments = {
            "input_ids": ids.flatten().index_select(0, tokens).unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
        }
        first = last - sequences.response_lengths
        bounds = torch.tensor(np.append(0, (prompts + responses).cumsum()))
        starts = to_device(bounds.int(), device)
        return PackedLayout(sequences, arguments, first, last, tokens, columns, cells, read, bounds, starts)

    def active(self) -> AbstractContextManager[None]:
        """Attention and the last MLP find the layout."""
        return packed_as(self)

    def trunk(self, name: str) -> Tensor | None:
        """As `Layout.trunk`."""
        states = self.sequences.trunks.get(name)
        return None if states is None else states.flatten(0, 1).index_select(0, self.tokens).unsqueeze(0)

    def states(self, hidden: Tensor) -> Tensor:
        """As `Layout.states`, of the tokens that are read."""
        return self.read.shorten(hidden.squeeze(0))

    def one_a_row(self, heads: Tensor) -> Tensor:
        """`[1, heads, tokens, d]` to `[n, heads, length, d]`."""
        width = heads.shape[-1]
        rows = self.cells.lengthen(heads.squeeze(0).transpose(0, 1).flatten(1))
        return rows.view(-1, self.length, heads.shape[1], width).transpose(1, 2)

    def side_by_side(self, mixed: Tensor) -> Tensor:
        """`[n, length, heads, d]` to `[1, tokens, heads, d]`."""
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
