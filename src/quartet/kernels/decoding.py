"""Linear layers on few rows, and a decoding step of a whole transformer: tensors looked at, memory handed over."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.library import DTYPES, are_real, fit, has_tile_products, kernel

FEW = 128
"""Most rows (`MOST` in few_rows.h)."""
LONGEST = 512
"""Most numbers of a head (`LONGEST` in few_rows.h)."""
OF_A_THREAD = 64
"""Features below which another thread waits more than it computes: half a dozen times a layer all wait for each other."""
SIDE = 16
"""Rows are filled up to a multiple of so many (`SIDE` in few_rows.h)."""
PIECES = 3
"""Numbers of bfloat16 that make one of float32 where tiles multiply (`PIECES` in few_rows.h)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """What a linear layer computes with on few rows: `x W^T + b + (x A^T) B^T`."""

    weight: Tensor
    """`[out, in]`, in the dtype of the computation."""
    bias: Tensor | None = None
    """Float32 `[out]`."""
    down: Tensor | None = None
    """A, `[r, in]`, in the weight's dtype."""
    up: Tensor | None = None
    """B with the adapter's scale in it, `[out, r]`, in the weight's dtype."""

    def fits(self) -> bool:
        """Whether there are kernels for these tensors."""
        given = [t for t in (self.weight, self.down, self.up) if t is not None]
        plain = self.weight.dtype in DTYPES and all(t.is_contiguous() and t.dtype == self.weight.dtype for t in given)
        floats = self.bias is None or (
            self.bias.dtype == torch.float32 and self.bias.is_contiguous() and fit(self.bias)
        )
        return plain and floats and fit(*given) and are_real(*given) and decodes(self.weight.dtype)

    def words(self) -> list[int]:
        """As the kernels know it (`linear` in few_rows.h)."""
        tensors = (self.weight, self.bias, self.down, self.up)
        return [0 if t is None else t.data_ptr() for t in tensors] + [*self.weight.shape, self.rank]

    @property
    def rank(self) -> int:
        """Of the adapter; 0 without one."""
        return 0 if self.down is None else len(self.down)


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: norms float32 `[hidden]` and, of heads, `[size]` or None."""

    first_norm: Tensor
    second_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    keys: Tensor
    """Of the cache: `[rows, key heads, columns, size]`, in the dtype of the weights."""
    values: Tensor
    window: int | None
    """Tokens that attention looks at; None for all."""

    def groups(self) -> list[list[Linear]]:
        """The linear layers with the same input."""
        return [[self.query, self.key, self.value], [self.out], [self.gate, self.up], [self.down]]

    def words(self) -> list[int]:
        """As the kernels know it (`layer` in few_rows.h)."""
        found: list[int] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Linear):
                found += value.words()
            else:
                found.append(value.data_ptr() if isinstance(value, Tensor) else value or 0)
        return found


def alike(layers: Sequence[Layer], hidden: int, *, most: int | None = FEW) -> bool:
    """Whether the shapes of all layers are those of one transformer, which the kernel takes them for.

    Args:
        hidden: numbers of a state.
        most: rows that the kernel computes; None for any number.
    """
    first = layers[0]
    rows, shared, columns, size = first.keys.shape
    mixed, inner = len(first.query.weight), len(first.gate.weight)
    weights = [
        (mixed, hidden),
        *[(shared * size, hidden)] * 2,
        (hidden, mixed),
        *[(inner, hidden)] * 2,
        (hidden, inner),
    ]
    fit = mixed % (shared * size) == 0 and (most is None or rows <= most) and size <= LONGEST and size % 2 == 0
    for layer in layers:
        found = [tuple(one.weight.shape) for group in layer.groups() for one in group]
        caches = {tuple(layer.keys.shape), tuple(layer.values.shape)} == {(rows, shared, columns, size)}
        norms = [len(layer.first_norm), len(layer.second_norm)] == [hidden, hidden]
        of_heads = all(norm is None or len(norm) == size for norm in (layer.query_norm, layer.key_norm))
        fit = fit and found == weights and caches and norms and of_heads and layer.keys.is_contiguous()
        fit = fit and layer.values.is_contiguous()
    return fit


_WHOLE = ("layers", "rows", "side", "hidden", "heads", "shared", "size", "columns", "threads", "narrow")
_STRIDES = ("scores_row", "packed_row")
_ROOMS = ("states", "given", "queries", "keys", "values", "gates", "ups", "low", "scores", "packed")
_GIVEN = ("cosines", "sines", "last_norm", "positions")


class _Step(ctypes.Structure):
    """`step` in few_rows.h."""

    _fields_ = [
        *((name, ctypes.c_long) for name in _WHOLE + _STRIDES),
        *((name, ctypes.c_void_p) for name in _ROOMS + _GIVEN),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
    ]


class Decoding:
    """Decoding steps of a transformer of RMS norms, rotary attention and SiLU-gated MLPs over one cache."""

    def __init__(
        self,
        layers: Sequence[Layer],
        last_norm: Tensor,
        angles: tuple[Tensor, Tensor],
        *,
        heads: int,
        eps: float,
        scaling: float,
        narrow: bool,
    ) -> None:
        """
        Args:
            last_norm: float32 `[hidden]`.
            angles: cosines and sines of every position, float32 `[columns, size]`.
            heads: of queries.
            eps: of the norms.
            scaling: of the products of queries and keys.
            narrow: the residual stream is bfloat16, as the weights are.
        """
        first = layers[0]
        self._kept = layers, last_norm, angles  # what the tables point to
        self._table = torch.tensor([layer.words() for layer in layers], dtype=torch.int64, device="cpu")
        self._threads = 0
        self._rooms: dict[str, Tensor] = {}
        rows, shared, columns, size = first.keys.shape
        self._step = _Step(
            layers=len(layers), rows=rows, hidden=len(last_norm), heads=heads, shared=shared, size=size,
            columns=columns, narrow=narrow, last_norm=last_norm.data_ptr(), eps=eps, scaling=scaling,
            cosines=angles[0].data_ptr(), sines=angles[1].data_ptr(),
        )  # fmt: skip
        self.dtype = first.query.weight.dtype
        """Of the weights."""
        self.hidden, self.narrow = len(last_norm), narrow
        self._function: Any = kernel(f"decode_{DTYPES[self.dtype]}")

    def __call__(self, states: Tensor, positions: Tensor) -> Tensor:
        """One token for each of the rows 0 to n - 1 of the cache.

        Args:
            states: embeddings `[n, hidden]`.
            positions: int64 `[n]`, tokens that each row holds already.

        Returns:
            Float32 `[n, hidden]` after the last norm.

        Raises:
            ValueError: more rows than the cache has.
        """
        rows = len(states)
        step = self.step(rows)
        given = self._side_by_side("states")
        given[:, :rows], given[:, rows:] = states.t(), 0.0
        step.positions = positions.data_ptr()
        self._function(ctypes.addressof(step), self._table.data_ptr())
        return self._side_by_side("given")[:, :rows].t().contiguous()

    @property
    def table(self) -> Tensor:
        """The layers, as the kernels know them."""
        return self._table

    def step(self, rows: int) -> Any:
        """What a kernel is told of a step of the rows 0 to n - 1 (`step` in few_rows.h), with the memory that it works in.

        Raises:
            ValueError: more rows than the cache has.
        """
        step = self._step
        if rows > self._kept[0][0].keys.shape[0]:
            raise ValueError(f"a step of {rows} rows over a cache of {self._kept[0][0].keys.shape[0]}")
        step.rows, step.side = rows, filled_up(rows)
        self._make_room(max(1, min(torch.get_num_threads(), step.hidden // OF_A_THREAD)))
        return step

    def _side_by_side(self, name: str) -> Tensor:
        """States `[hidden, side]` in a room."""
        step = self._step
        return self._rooms[name][: step.hidden * step.side].view(step.hidden, step.side)

    def _make_room(self, threads: int) -> None:
        """Memory that every step uses again, for all rows of the cache."""
        if threads == self._threads:
            return
        step, layers = self._step, self._kept[0]
        first, side = layers[0], filled_up(layers[0].keys.shape[0])
        inputs = [group for one in layers for group in one.groups()]
        mixed, inner = step.heads * step.size, len(first.gate.weight)
        step.scores_row = filled_up(step.columns) + SIDE  # what follows lies at a whole cache line
        step.packed_row = room_of_rows(self.dtype, side, max(group[0].weight.shape[1] for group in inputs))
        sizes = {
            "states": side * step.hidden,
            "given": side * max(step.hidden, mixed),
            "queries": side * max(step.hidden, mixed),
            "keys": side * step.shared * step.size,
            "values": side * step.shared * step.size,
            "gates": side * inner,
            "ups": side * inner,
            "low": side * max(sum(one.rank for one in group) for group in inputs),
            "scores": threads * step.scores_row,
            "packed": threads * step.packed_row,
        }
        # Zeros: of rows that only fill up, something finite is computed.
        whole = first.first_norm.new_zeros(sum(sizes.values()))
        self._rooms = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))
        for name, room in self._rooms.items():
            setattr(step, name, room.data_ptr())
        step.threads = self._threads = threads


def filled_up(rows: int) -> int:
    """The rows that are computed for so many."""
    return -(-rows // SIDE) * SIDE


def room_of_rows(dtype: torch.dtype, side: int, width: int) -> int:
    """Numbers of float32 that a thread's copy takes of rows as tiles multiply them (`room_of_rows` in linear.h)."""
    return (PIECES if dtype == torch.float32 else 1) * side * width // 2 if has_tile_products() else 0


def decodes(dtype: torch.dtype) -> bool:
    """Whether there are kernels for few rows and weights of this dtype."""
    return dtype in DTYPES and kernel(f"decode_{DTYPES[dtype]}") is not None


def few_rows(states: Tensor, layer: Linear) -> Tensor:
    """`x W^T + b` of a layer that fits and has no adapter, in the weight's dtype.

    Args:
        states: x, `[..., in]`, at most `FEW` rows.

    Raises:
        ValueError: more rows, or a layer with an adapter.
    """
    weight, bias, threads = layer.weight, layer.bias, torch.get_num_threads()
    features, width = weight.shape
    rows = states.numel() // width
    if rows > FEW or layer.down is not None:
        raise ValueError(
            f"{rows} rows by a layer with an adapter of rank {layer.rank}: the kernel is for {FEW} and none"
        )
    given = states.reshape(rows, width).to(weight.dtype).float().contiguous()
    out = given.new_empty(*states.shape[:-1], features, dtype=weight.dtype)
    side = filled_up(rows)
    room = given.new_empty(side * width + threads * room_of_rows(weight.dtype, side, width))
    function: Any = kernel(f"few_rows_{DTYPES[weight.dtype]}")
    pointers = [0 if t is None else t.data_ptr() for t in (given, weight, bias, out, room)]
    function(*pointers, rows, width, features, threads)
    return out
