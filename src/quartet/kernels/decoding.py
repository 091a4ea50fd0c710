"""Linear layers on few rows, and a decoding step of a whole transformer: tensors looked at, memory handed over."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quartet.kernels.library import DTYPES, are_real, fit, kernel

FEW = 128
"""Rows up to which a kernel that reads weights once beats the libraries' products, or nearly (measured on the CPU)."""
BLOCK = 16
"""Rows that are packed together."""
APART = 16
"""Numbers between rows whose width is a power of two, so that they do not meet in the same places of a cache."""


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
    """B^T with the adapter's scale in it, `[r, out]`, in the weight's dtype."""

    def fits(self) -> bool:
        """Whether there are kernels for these tensors."""
        given = [t for t in (self.weight, self.down, self.up) if t is not None]
        plain = self.weight.dtype in DTYPES and all(t.is_contiguous() and t.dtype == self.weight.dtype for t in given)
        floats = self.bias is None or (self.bias.dtype == torch.float32 and self.bias.is_contiguous() and fit(self.bias))
        return plain and floats and fit(*given) and are_real(*given) and decodes(self.weight.dtype)

    def words(self) -> list[int]:
        """As the kernels know it (`linear` in few_rows.h)."""
        tensors = (self.weight, self.bias, self.down, self.up)
        rank = 0 if self.down is None else len(self.down)
        return [0 if t is None else t.data_ptr() for t in tensors] + [*self.weight.shape, rank]


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


_WHOLE = ("layers", "rows", "hidden", "heads", "shared", "size", "columns", "threads", "narrow")
_STRIDES = ("given_row", "low_row", "scores_row", "packed_row")
_ROOMS = ("states", "given", "queries", "keys", "values", "gates", "ups", "low", "scores", "packed")
_GIVEN = ("cosines", "sines", "last_norm", "positions")


class _Step(ctypes.Structure):
    """`step` in few_rows.h."""

    _fields_ = [  # noqa: RUF012
        *((name, ctypes.c_long) for name in _WHOLE + _STRIDES),
        *((name, ctypes.c_void_p) for name in _ROOMS + _GIVEN),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
    ]


class Decoding:
    """Decoding steps of a transformer of RMS norms, rotary attention and SiLU-gated MLPs over one cache."""

    def __init__(
        self, layers: Sequence[Layer], last_norm: Tensor, *, heads: int, eps: float, scaling: float, narrow: bool
    ) -> None:
        """
        Args:
            last_norm: float32 `[hidden]`.
            heads: of queries.
            eps: of the norms.
            scaling: of the products of queries and keys.
            narrow: the residual stream is bfloat16, as the weights are.
        """
        first = layers[0]
        self._kept = layers, last_norm  # what the tables point to
        self._table = torch.tensor([layer.words() for layer in layers])
        self._threads = 0
        self._room = last_norm.new_empty(0)
        rows, shared, columns, size = first.keys.shape
        self._step = _Step(
            layers=len(layers), rows=rows, hidden=len(last_norm), heads=heads, shared=shared, size=size,
            columns=columns, narrow=narrow, last_norm=last_norm.data_ptr(), eps=eps, scaling=scaling,
        )  # fmt: skip
        self._function: Any = kernel(f"decode_{DTYPES[first.query.weight.dtype]}")

    def __call__(self, states: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """One token for each of the rows 0 to n - 1 of the cache.

        Args:
            states: embeddings `[n, hidden]`.
            positions: int64 `[n]`, tokens that each row holds already.
            cosines, sines: float32 `[n, size]` of the positions.

        Returns:
            Float32 `[n, hidden]` after the last norm.
        """
        step, rows = self._step, len(states)
        self._make_room(torch.get_num_threads())
        step.rows = rows
        self._states[:rows] = states
        step.cosines, step.sines, step.positions = cosines.data_ptr(), sines.data_ptr(), positions.data_ptr()
        self._function(ctypes.addressof(step), self._table.data_ptr())
        return self._given[:rows, : step.hidden].clone()

    def _make_room(self, threads: int) -> None:
        """Memory that every step uses again, for all rows of the cache."""
        if threads == self._threads:
            return
        step, (layers, _) = self._step, self._kept
        rows, first = layers[0].keys.shape[0], layers[0]
        linears = [[l.query, l.key, l.value] for l in layers] + [[l.gate, l.up] for l in layers]
        linears += [[one] for l in layers for one in (l.out, l.down)]
        ranks = max(sum(0 if one.down is None else len(one.down) for one in group) for group in linears)
        widest = max(one.weight.shape[1] for group in linears for one in group)
        mixed, inner = step.heads * step.size, len(first.gate.weight)
        step.threads, step.low_row = threads, max(ranks, 1)
        step.given_row = max(step.hidden, mixed) + APART
        step.scores_row = step.heads // step.shared * step.columns
        step.packed_row = -(-rows // BLOCK) * BLOCK * widest // 2
        sizes = {
            "states": rows * step.hidden,
            "given": rows * step.given_row,
            "queries": rows * max(step.hidden, mixed),
            "keys": rows * step.shared * step.size,
            "values": rows * step.shared * step.size,
            "gates": rows * inner,
            "ups": rows * inner,
            "low": rows * step.low_row,
            "scores": threads * step.scores_row,
            "packed": threads * step.packed_row if first.query.weight.dtype == torch.bfloat16 else 0,
        }
        self._room = torch.empty(sum(sizes.values()))
        rooms = dict(zip(sizes, self._room.split(list(sizes.values())), strict=True))
        for name, room in rooms.items():
            setattr(step, name, room.data_ptr())
        self._states = rooms["states"].view(rows, -1)
        self._given = rooms["given"].view(rows, -1)
        self._threads = threads


def decodes(dtype: torch.dtype) -> bool:
    """Whether there are kernels for few rows and weights of this dtype."""
    return dtype in DTYPES and kernel(f"decode_{DTYPES[dtype]}") is not None


def few_rows(states: Tensor, layer: Linear) -> Tensor:
    """`x W^T + b` of a layer that fits and has no adapter, in the weight's dtype.

    Args:
        states: x, `[..., in]`; not more than a few rows, since the kernel reads the weight once for all of them.
    """
    weight, bias, threads = layer.weight, layer.bias, torch.get_num_threads()
    features, width = weight.shape
    rows = states.numel() // width
    given = states.reshape(rows, width).to(weight.dtype).float().contiguous()
    out = given.new_empty(*states.shape[:-1], features)
    room = given.new_empty(threads * -(-rows // BLOCK) * BLOCK * width // 2 if weight.dtype == torch.bfloat16 else 0)
    function: Any = kernel(f"few_rows_{DTYPES[weight.dtype]}")
    pointers = [0 if t is None else t.data_ptr() for t in (given, weight, bias, out, room)]
    function(*pointers, rows, width, features, threads)
    return out.to(weight.dtype)
