"""Kernels that take more threads than torch's operations: the same numbers, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quartet import kernels
from quartet.kernels import Term, library, multiplying
from quartet.kernels.threads import more_threads, threads_now
from quartet.models.causal import causal_attention

needs_kernels = pytest.mark.skipif(library.kernel("rms_norm_f32") is None, reason="no compiler at installation")
ROWS, COLUMNS = 150, 256
"""Enough for a second thread everywhere."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def of_silu(dtype: torch.dtype) -> list[Tensor]:
    gate, up, by = (drawn(ROWS, COLUMNS, dtype=dtype) for _ in range(3))
    out, by_gate, by_up = (torch.empty_like(gate) for _ in range(3))
    assert kernels.silu_product(gate, up, out)
    assert kernels.silu_gradient(by, gate, up, by_gate, by_up, None)
    return [out, by_gate, by_up]


def of_add(dtype: torch.dtype) -> list[Tensor]:
    sums = drawn(ROWS, COLUMNS, dtype=dtype)
    assert kernels.add(sums, drawn(ROWS, COLUMNS, dtype=dtype))
    return [sums]


def of_norms(dtype: torch.dtype) -> list[Tensor]:
    states, weight, by = (drawn(*shape, dtype=dtype) for shape in ((ROWS, COLUMNS), (COLUMNS,), (ROWS, COLUMNS)))
    found = kernels.rms_norm(states, weight, 1e-6)
    assert found is not None
    kept = []
    for of_weight in (False, True):
        back = kernels.rms_norm_gradient(by, states, weight, found[1], of_weight=of_weight)
        assert back is not None
        kept += [one for one in back if one is not None]
    assert len(kept) == 3
    return [*found, *kept]


def of_rotary(dtype: torch.dtype) -> list[Tensor]:
    states = drawn(1, ROWS, 8, 64, dtype=dtype).transpose(1, 2)
    return [kernels.rotary(states, drawn(1, ROWS, 64), drawn(1, ROWS, 64), back=back) for back in (False, True)]


def of_attention(dtype: torch.dtype) -> list[Tensor]:
    given = [drawn(1, ROWS, heads, 32, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (8, 4, 4)]
    bounds = torch.tensor([0, 60, 63, ROWS])
    mixed = causal_attention(given[0], given[1], given[2], bounds, ROWS - 63, 0.2)
    return [mixed.detach(), *torch.autograd.grad(mixed, given, drawn(*mixed.shape, dtype=dtype))]


def of_softmax(dtype: torch.dtype) -> list[Tensor]:
    logits = drawn(ROWS, COLUMNS, dtype=dtype)
    top, total, weighted = torch.full((ROWS,), torch.finfo(torch.float32).min), torch.zeros(ROWS), torch.zeros(ROWS)
    assert kernels.exponentials(logits, top, total, weighted, 1.0, written=False)
    place = torch.arange(ROWS)
    assert kernels.slopes(logits, top, total.log(), place, drawn(ROWS), drawn(ROWS), drawn(ROWS), 1.0)
    return [top, total, weighted, logits]


def of_products(dtype: torch.dtype) -> list[Tensor]:
    """Upright and not, summed up over few and many numbers."""
    if not kernels.multiplies(dtype):
        pytest.skip(f"no kernels multiply in {dtype} here")
    found = []
    for rows, width, columns in ((ROWS, 300, COLUMNS), (ROWS, 1100, 48), (16, 700, 300)):
        left, right = drawn(rows, width, dtype=dtype), drawn(columns, width, dtype=dtype)
        up, wide = drawn(width, rows, dtype=dtype), drawn(width, columns, dtype=dtype)
        for term in (Term(left, right.t()), Term(up.t(), wide), Term(left, wide)):
            out = torch.empty(rows, columns, dtype=dtype)
            assert kernels.multiply(out, term, Term(left, wide, 0.5))
            found.append(out)
    if dtype == torch.float32:  # single products, of few rows that lie upright and of few columns
        for left, right in ((drawn(700, 16).t(), drawn(700, COLUMNS)), (drawn(ROWS, 700), drawn(32, 700).t())):
            out = torch.empty(len(left), right.shape[1])
            assert kernels.multiply(out, Term(left, right))
            found.append(out)
    return found


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [of_silu, of_add, of_norms, of_rotary, of_attention, of_softmax, of_products])
def test_the_same_bits(
    of: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    asked = 0

    def more() -> int:
        nonlocal asked
        asked += 1
        return 2

    torch.manual_seed(0)
    expected = of(dtype)
    torch.manual_seed(0)
    with more_threads(more):
        found = of(dtype)
    assert asked
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_of_the_thread_that_says_so_and_only_in_its_block() -> None:
    other: list[int] = []
    with more_threads(lambda: 3):
        assert threads_now() == 4
        thread = threading.Thread(target=lambda: other.append(threads_now() - torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 1
        with more_threads(lambda: 1):
            assert threads_now() == 2
        assert threads_now() == 4
    assert other == [0]
    assert threads_now() == 1
