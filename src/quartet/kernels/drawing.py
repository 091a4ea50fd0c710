"""Drawing tokens: tensors looked at, memory handed over."""

from __future__ import annotations

import torch
from torch import Tensor

from quartet.kernels.library import DTYPES, are_real, fit, kernel

BLOCK = 128
"""Tokens whose probabilities are summed before one is looked for among them (`BLOCK` in few_rows.h)."""


def draw(logits: Tensor, uniform: Tensor | None, temperature: float) -> tuple[Tensor, Tensor] | None:
    """A token for each row, by inverting the cumulative distribution, or the most likely one.

    Args:
        logits: `[n, vocabulary]`.
        uniform: float64 `[n]` in [0, 1), or None for the most likely tokens.
        temperature: divides the logits.

    Returns:
        int64 `[n]` tokens, and float32 `[n]` their log-probabilities under softmax(logits / temperature), NaN where a row is
        not finite; None if there is no kernel for these tensors.
    """
    given = [logits] if uniform is None else [logits, uniform]
    if (
        logits.dtype not in DTYPES
        or logits.ndim != 2
        or not logits.is_contiguous()
        or not fit(*given)
        or not are_real(*given)
    ):
        return None
    function = kernel(f"draw_{DTYPES[logits.dtype]}")
    if function is None:
        return None
    rows, vocabulary = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    sums = logprobs.new_empty(rows, -(-vocabulary // BLOCK))
    numbers = None if uniform is None else uniform.double().contiguous()
    pointers = [0 if t is None else t.data_ptr() for t in (logits, numbers, tokens, logprobs, sums)]
    function(*pointers, rows, vocabulary, 1.0 / temperature, torch.get_num_threads())
    return tokens, logprobs
