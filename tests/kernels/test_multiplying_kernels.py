"""The kernel of sums of products against float64, as several generations of processors compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quartet import kernels
from quartet.kernels import Term, library, multiplying

ORDERS = ("rows", "columns", "apart")
"""Numbers of a row side by side, of a column, or neither."""


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor, and at every size."""
    monkeypatch.setattr(multiplying, "library_is_slow", lambda: True)
    monkeypatch.setattr(multiplying, "LEAST", 0)


def matrix(rows: int, columns: int, order: str = "rows", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if order == "columns":
        return values.t().contiguous().t()
    if order == "apart":
        return torch.stack([values, values], -1)[..., 0]
    return values


def exact(*terms: Term) -> Tensor:
    return sum((scale * (left.double() @ right.double()) for left, right, scale in terms), torch.zeros(()).double())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("orders", [(left, right) for left in ORDERS for right in ORDERS], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 16, 32), (97, 300, 70), (13, 5, 200), (200, 40, 9), (11, 290, 1100)])
def test_a_product(generation: str, shape: tuple[int, int, int], orders: tuple[str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    rows, width, columns = shape
    term = Term(matrix(rows, width, orders[0]), matrix(width, columns, orders[1], 1))
    out = torch.full((rows, columns), torch.nan)
    assert kernels.multiply(out, term)
    assert relative(out, exact(term)) < 1e-6


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [(40, 3), (280, 16), (286, 4, 1), (576, 16, 300, 16)])
def test_sums_of_products(generation: str, widths: tuple[int, ...], biased: bool, add: bool) -> None:
    rows, columns = 35, 53
    terms = [
        Term(
            matrix(rows, width, ORDERS[n % 3], n),
            matrix(width, columns, ORDERS[n % 2], n + 9),
            (1.0, -2.5, 0.3, 2.0)[n],
        )
        for n, width in enumerate(widths)
    ]
    bias = torch.randn(columns) if biased else None
    before = torch.randn(rows, columns)
    room = torch.full((rows, columns + 7), 77.0)
    out = room[:, 3 : columns + 3].copy_(before)
    assert kernels.multiply(out, *terms, bias=bias, add=add)
    expected = exact(*terms) + (bias.double() if biased and bias is not None else 0) + (before.double() if add else 0)
    assert relative(out, expected) < 1e-6
    assert (room[:, :3] == 77).all()
    assert (room[:, columns + 3 :] == 77).all()


@pytest.mark.parametrize(("width", "columns"), [(300, 16), (300, 300), (16, 40)])
def test_a_row_is_bit_for_bit_what_it_is_alone(generation: str, width: int, columns: int) -> None:
    """Beside any others, in any number of threads."""
    left, right = matrix(41, width), matrix(width, columns, seed=1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.empty(41, columns)
        assert kernels.multiply(out, Term(left, right))
        found.append(out)
    assert torch.equal(*found)
    for start, end in ((0, 1), (7, 12), (40, 41)):
        alone = torch.empty(end - start, columns)
        assert kernels.multiply(alone, Term(left[start:end], right))
        assert torch.equal(alone, found[0][start:end])


def test_what_is_no_number_stays_in_its_row_and_column(generation: str) -> None:
    left, right = matrix(20, 30), matrix(30, 50, seed=1)
    left[3, 4], right[9, 44] = torch.nan, torch.inf
    out = torch.empty(20, 50)
    assert kernels.multiply(out, Term(left, right))
    assert not out[3].isfinite().any()
    assert not out[:, 44].isfinite().any()
    rest = out[torch.arange(20) != 3][:, torch.arange(50) != 44]
    assert rest.isfinite().all()


def test_what_does_not_fit_is_left_to_torch(generation: str) -> None:
    left, right, out = matrix(4, 5), matrix(5, 6), torch.zeros(4, 6)
    assert not kernels.multiply(out, Term(left.double(), right))
    assert not kernels.multiply(out.bfloat16(), Term(left, right))
    assert not kernels.multiply(torch.zeros(6, 4).t(), Term(left, right))
    assert not kernels.multiply(out, Term(left.to("meta"), right))
    assert not kernels.multiply(out, Term(left, right), bias=torch.zeros(12)[::2])
    assert not out.any()
    assert kernels.multiply(out, Term(left, right), bias=torch.zeros(6))


def test_the_result_counts_as_changed() -> None:
    out = torch.zeros(4, 6)
    before = out._version
    if not kernels.multiply(out, Term(matrix(4, 5), matrix(5, 6))):
        pytest.skip("no kernels: no compiler was there at installation")
    assert out._version == before + 1


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplying, "LEAST", 4 * 5 * 6 + 1)
    assert not kernels.multiply(torch.zeros(4, 6), Term(matrix(4, 5), matrix(5, 6)))


def test_a_room_is_as_large_as_the_kernel_says() -> None:
    text = (Path(library.__file__).parent / "terms.h").read_text()
    numbers = {
        words[1]: words[2] for line in text.splitlines() if len(words := line.split()) > 2 and words[0] == "#define"
    }
    deep, high, across = (int(numbers[name]) for name in ("DEEP", "HIGH", "ACROSS"))
    assert deep * (high + across + 32) == multiplying.WITHIN
