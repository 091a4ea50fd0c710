"""The kernels of causal attention against the formula in float64, as several generations of processors compute them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quartet import kernels
from quartet.models.causal import as_one_row, causal_attention

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def made(tokens: int, heads: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """`[1, heads, tokens, size]` as projections give them: the heads of a token side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)


def formula(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float) -> Tensor:
    """Sequence by sequence, `[1, tokens, heads, size]`."""
    group, parts = query.shape[1] // key.shape[1], []
    for start, end in pairwise(bounds):
        q, k, v = query[0, :, start:end], key[0, :, start:end], value[0, :, start:end]
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        shares = scores.masked_fill(future, -torch.inf).softmax(-1)
        parts.append((shares @ v.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(parts)[None]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(
    ("heads", "shared", "size", "lengths"),
    [(2, 2, 32, [13, 1, 48, 2]), (4, 2, 64, [30, 17]), (6, 1, 16, [5, 90]), (1, 1, 48, [33]), (2, 1, 128, [16, 11])],
)
def test_attention_and_its_gradients(
    generation: str, heads: int, shared: int, size: int, lengths: list[int], dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = bounds[-1]
    given = [made(tokens, count, size, dtype, seed) for seed, count in enumerate((heads, shared, shared))]
    by_mixed = made(tokens, heads, size, dtype, 9).transpose(1, 2).contiguous()
    own = [t.detach().requires_grad_() for t in given]
    assert kernels.attention_fits(*own, max(lengths))  # type: ignore[misc]
    found = causal_attention(*own, torch.tensor(bounds), max(lengths), 0.2)  # type: ignore[misc]
    gradients = torch.autograd.grad(found, own, by_mixed)
    exact = [t.double().detach().requires_grad_() for t in given]
    expected = formula(*exact, bounds, 0.2)  # type: ignore[misc]
    assert found.dtype == dtype
    assert relative(found, expected) < ERRORS[dtype]
    for one, other in zip(gradients, torch.autograd.grad(expected, exact, by_mixed.double()), strict=True):
        assert relative(one, other) < 2 * ERRORS[dtype]


def test_scores_that_lie_far_apart(generation: str) -> None:
    """By more than float32 has exponentials for: what they are taken of lies below the largest, wherever that is."""
    query, key, value = (made(70, 2, 32, torch.float32, seed) for seed in range(3))
    given = 60.0 * query, key, value
    scores = given[0] @ key.transpose(2, 3) * 0.2
    assert (scores.amax(-1) - scores[..., 0]).max() > 89.0
    found = causal_attention(*given, torch.tensor([0, 70]), 70, 0.2)
    assert relative(found, formula(*(t.double() for t in given), [0, 70], 0.2)) < 1e-4


def test_tokens_of_no_sequence_have_no_part(generation: str) -> None:
    """What fills a row up is neither looked at nor given a gradient."""
    given = [made(25, 2, 16, torch.float32, seed).requires_grad_() for seed in range(3)]
    bounds = torch.tensor([0, 9, 20])
    found = causal_attention(*given, bounds, 11, 0.3)  # type: ignore[misc]
    assert not found[:, 20:].any()
    gradients = torch.autograd.grad(found.sum(), given)
    for gradient in gradients:
        assert gradient[:, :, :20].any()
        assert not gradient[:, :, 20:].any()


@pytest.mark.parametrize("dtype", ERRORS)
def test_a_sequence_is_the_same_alone(generation: str, dtype: torch.dtype) -> None:
    """Bit for bit, beside others or padded: what is compared with a training pass is computed so."""
    given = [made(60, 2, 32, dtype, seed) for seed in range(3)]
    together = causal_attention(*given, torch.tensor([0, 20, 60]), 40, 0.2)  # type: ignore[misc]
    alone = causal_attention(*(t[:, :, :20] for t in given), torch.tensor([0, 20]), 20, 0.2)  # type: ignore[misc]
    padded = causal_attention(*(t[:, :, :47] for t in given), torch.tensor([0, 47]), 47, 0.2)  # type: ignore[misc]
    assert torch.equal(alone, together[:, :20])
    assert torch.equal(padded[:, :20], together[:, :20])


def test_not_a_number_reaches_those_that_look_at_it(generation: str) -> None:
    given = [made(20, 1, 16, torch.float32, seed) for seed in range(3)]
    given[1][0, 0, 7, 3] = torch.nan
    found = causal_attention(*given, torch.tensor([0, 20]), 20, 0.2)  # type: ignore[misc]
    assert found.isnan().any(-1).flatten().tolist() == [False] * 7 + [True] * 13


def test_what_does_not_fit_is_left_to_torch() -> None:
    query, key, value = (made(8, 2, 32, torch.float32, seed) for seed in range(3))
    assert not kernels.attention_fits(query.double(), key.double(), value.double(), 8)
    assert not kernels.attention_fits(query, key.bfloat16(), value, 8)
    assert not kernels.attention_fits(*(made(8, 2, 12, torch.float32, seed) for seed in range(3)), 8)  # type: ignore[misc]
    assert not kernels.attention_fits(query, key, value, 5000)
    assert not kernels.attention_fits(query.to("meta"), key, value, 8)


def test_rows_are_one_after_the_other_without_a_copy_where_they_lie_so() -> None:
    rows = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 4).transpose(1, 2)
    expected = torch.cat([rows[0], rows[1]], 1)[None]
    assert torch.equal(as_one_row(rows), expected)
    assert as_one_row(rows).data_ptr() == rows.data_ptr()
    part = torch.arange(2 * 5 * 3 * 8.0).view(2, 5, 3, 8)[..., 4:].transpose(1, 2)
    assert torch.equal(as_one_row(part), torch.cat([part[0], part[1]], 1)[None])
    assert torch.equal(as_one_row(rows.contiguous()), expected)
