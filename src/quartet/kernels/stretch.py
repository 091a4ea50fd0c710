"""Decoding steps in a row, until a response ends: tensors looked at, memory handed over."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quartet.kernels.decoding import Decoding, Linear, filled_up, room_of_rows
from quartet.kernels.drawing import BLOCK
from quartet.kernels.library import DTYPES, are_real, fit, kernel


class Live(NamedTuple):
    """The rows 0 to n - 1 of a cache: int64 `[n]` each, contiguous, carried on by every step."""

    token: Tensor
    """The last one, not in the cache yet."""
    position: Tensor
    """Tokens in the cache."""
    sampled: Tensor
    """Tokens of the response, the last one included."""
    response: Tensor
    """Its place among the responses; stays as it is."""


class Responses(NamedTuple):
    """What is kept of all responses, `[responses, length]` each, contiguous."""

    tokens: Tensor
    """int64"""
    logprobs: Tensor
    """float32, nats"""
    mask: Tensor
    """bool: tokens that there are."""
    uniforms: Tensor | None
    """float64 in [0, 1): the numbers that decide the tokens; None for the most likely ones."""


_WHOLE = ("most", "done", "vocabulary", "length", "stop", "threads")
_POINTERS = (
    *(
        "embeddings",
        "head",
        "bias",
        "token",
        "position",
        "sampled",
        "response",
        "uniforms",
        "tokens",
        "logprobs",
        "mask",
    ),
    *("logits", "sums", "packed", "numbers", "picked", "picked_logprobs"),
)


class _Stretch(ctypes.Structure):
    """`stretch` in few_rows.h."""

    _fields_ = [
        *((name, ctypes.c_long) for name in _WHOLE),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("by", ctypes.c_float),
    ]


class Stretch:
    """Steps of a transformer, its LM head and the drawing of tokens, one after the other."""

    def __init__(self, decoding: Decoding, embeddings: Tensor, head: Linear, *, temperature: float) -> None:
        """
        Args:
            embeddings: `[vocabulary, hidden]`, in the dtype of the residual stream.
            head: for which `stretches` says True.
        """
        self._decoding, self._embeddings, self._head = decoding, embeddings, head
        self._by = 1.0 / temperature
        self._function: Any = kernel(f"decode_stretch_{DTYPES[head.weight.dtype]}")
        self._rooms: dict[str, Tensor] = {}

    def __call__(self, live: Live, kept: Responses, *, stop: int | None, most: int) -> int:
        """Take steps until a row's token is `stop`, but no more than `most`, for which cache and responses have room; say how
        many."""
        rows, threads = len(live.token), torch.get_num_threads()
        step, head = self._decoding.step(rows), self._head
        asked = _Stretch(
            most=most, vocabulary=len(head.weight), length=kept.tokens.shape[1], stop=-1 if stop is None else stop,
            threads=threads, by=self._by,
        )  # fmt: skip
        given = {
            "embeddings": self._embeddings, "head": head.weight, "bias": head.bias,
            **live._asdict(), **kept._asdict(), **self._room(rows, threads),
        }  # fmt: skip
        for name, tensor in given.items():
            setattr(asked, name, None if tensor is None else tensor.data_ptr())
        self._function(ctypes.addressof(step), self._decoding.table.data_ptr(), ctypes.addressof(asked))
        return int(asked.done)

    def _room(self, rows: int, threads: int) -> dict[str, Tensor]:
        """Memory that every call uses again: there are never more rows than at first, but for what comes in again."""
        weight = self._head.weight
        vocabulary, hidden = weight.shape
        sizes = {
            "logits": (rows * vocabulary, weight.dtype),
            "sums": (rows * -(-vocabulary // BLOCK), torch.float32),
            "packed": (threads * room_of_rows(weight.dtype, filled_up(rows), hidden), torch.float32),
            "numbers": (rows, torch.float64),
            "picked": (rows, torch.int64),
            "picked_logprobs": (rows, torch.float32),
        }
        if any(name not in self._rooms or self._rooms[name].numel() < size for name, (size, _) in sizes.items()):
            self._rooms = {name: torch.empty(size, dtype=dtype, device="cpu") for name, (size, dtype) in sizes.items()}
        return self._rooms


def stretches(decoding: Decoding, embeddings: Tensor, head: Linear) -> bool:
    """Whether there is a kernel for steps in a row with these embeddings, and this LM head, which is one linear layer."""
    dtype = head.weight.dtype
    wide = torch.bfloat16 if decoding.narrow else torch.float32
    fits = head.down is None and head.fits() and dtype == decoding.dtype and head.weight.shape[1] == decoding.hidden
    fits = fits and fit(embeddings) and are_real(embeddings) and embeddings.is_contiguous() and embeddings.dtype == wide
    fits = fits and embeddings.shape[1] == decoding.hidden and len(embeddings) >= len(head.weight)  # of any token drawn
    return fits and kernel(f"decode_stretch_{DTYPES[dtype]}") is not None
