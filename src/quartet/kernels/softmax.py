"""Softmax of logits in parts of the vocabulary: tensors looked at, memory handed over."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from quartet.kernels.library import DTYPES, are_real, fit, kernel
from quartet.kernels.threads import threads_now


def exponentials(
    logits: Tensor, top: Tensor, total: Tensor, weighted: Tensor | None, temperature: float, *, written: bool
) -> bool:
    """Carry on a softmax over some columns (arXiv 1805.02867): the largest logit of each row so far, the sum of
    `e = exp((logit - largest) / temperature)` and that of `e log e`.

    Args:
        logits: `[rows, columns]`.
        top: float32 `[rows]`; the smallest number of its dtype at the start.
        total: float32 `[rows]`; 0 at the start.
        weighted: the same; None where it is not asked for.
        written: e takes the place of the logits, below the largest of these columns and those before.

    Returns:
        Whether it was computed.
    """
    sums = [top, total] if weighted is None else [top, total, weighted]
    if not _fit(logits, sums):
        return False
    function = kernel(f"exponentials_{DTYPES[logits.dtype]}")
    if function is None:
        return False
    if are_real(logits, top):
        pointers = [0 if t is None else t.data_ptr() for t in (logits, top, total, weighted)]
        rows, columns = logits.shape
        function(*pointers, rows, columns, logits.stride(0), 1.0 / temperature, written, threads_now())
    increment_version([*sums, logits] if written else sums)
    return True


def slopes(
    logits: Tensor,
    top: Tensor,
    log_total: Tensor,
    place: Tensor,
    by_logprob: Tensor,
    by_entropy: Tensor | None,
    entropy: Tensor,
    temperature: float,
) -> bool:
    """Write over some columns' logits the gradient of a weighted sum of each row's log-probability and entropy:
    `g (1[token] - p) - a p (log p + entropy)`, with `log p = (logit - top) / temperature - log_total`.

    Args:
        logits: `[rows, columns]`.
        top, log_total: float32 `[rows]`, as all that follow.
        place: int64 `[rows]`: the token's column; outside of these columns for tokens that are not among them.
        by_logprob: g, divided by the temperature.
        by_entropy: a, likewise; None for 0.
        entropy: of each row; anything where `by_entropy` is None.

    Returns:
        Whether it was computed.
    """
    given = [top, log_total, by_logprob] if by_entropy is None else [top, log_total, by_logprob, by_entropy, entropy]
    whole = fit(place) and place.dtype == torch.int64 and place.is_contiguous() and place.shape == logits.shape[:1]
    if not whole or not _fit(logits, given):
        return False
    function = kernel(f"slopes_{DTYPES[logits.dtype]}")
    if function is None:
        return False
    if are_real(logits, top):
        of_entropy = (None, None) if by_entropy is None else (by_entropy, entropy)
        tensors = (logits, top, log_total, by_logprob, *of_entropy, place)
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        function(*pointers, *logits.shape, logits.stride(0), 1.0 / temperature, threads_now())
    increment_version(logits)
    return True


def _fit(logits: Tensor, numbers: list[Tensor]) -> bool:
    """Whether a kernel reads these logits and float32 numbers, one for each row."""
    plain = logits.dtype in DTYPES and logits.ndim == 2 and logits.stride(1) == 1
    alike = all(t.dtype == torch.float32 and t.is_contiguous() and t.shape == logits.shape[:1] for t in numbers)
    return plain and alike and fit(logits, *numbers)
