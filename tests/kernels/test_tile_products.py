"""Sums of products in bfloat16 by tiles, against float64."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import matrices
from matrices import ORDERS, exact, relative
from quartet import kernels
from quartet.kernels import Term, library, multiplying

NARROW, WIDE = torch.bfloat16, torch.float32
BOUND = {NARROW: 2**-8, WIDE: 1e-6}
"""Relative to the norm of the result: a number in bfloat16 is off by half of 2^-8 of itself at most, one in float32 by the
order of its sum."""


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every size, of however few numbers."""
    monkeypatch.setattr(multiplying, "NARROW", 10**9)
    if not kernels.multiplies(NARROW):
        pytest.skip("this processor has no tiles, or there are no kernels")


matrix = partial(matrices.matrix, dtype=NARROW)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [NARROW, WIDE])
@pytest.mark.parametrize("orders", [(left, right) for left in ORDERS for right in ORDERS], ids="-".join)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (16, 32, 16), (6, 16, 32), (97, 300, 70), (13, 5, 200), (200, 40, 9), (70, 1100, 16), (400, 33, 550)],
)
def test_a_product(shape: tuple[int, int, int], orders: tuple[str, str], dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    rows, width, columns = shape
    term = Term(matrix(rows, width, orders[0]), matrix(width, columns, orders[1], 1))
    out = torch.full((rows, columns), torch.nan, dtype=dtype)
    assert kernels.multiply(out, term)
    assert relative(out, exact(term)) < BOUND[dtype]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [NARROW, WIDE])
@pytest.mark.parametrize("widths", [(40, 3), (256, 16), (1056, 16, 1, 16), (576, 16, 2048, 16)])
def test_sums_of_products(widths: tuple[int, ...], dtype: torch.dtype, add: bool) -> None:
    """Of terms that are scaled, beside which nothing is written; rounded once."""
    rows, columns = 45, 83
    terms = [
        Term(
            matrix(rows, width, ORDERS[n % 3], n),
            matrix(width, columns, ORDERS[n % 2], n + 9),
            (1.0, -2.0, 0.5, 4.0)[n],
        )
        for n, width in enumerate(widths)
    ]
    bias = torch.randn(columns).to(NARROW) if dtype == NARROW else None
    before = torch.randn(rows, columns).to(dtype)
    room = torch.full((rows, columns + 7), 77.0, dtype=dtype)
    out = room[:, 3 : columns + 3].copy_(before)
    assert kernels.multiply(out, *terms, bias=bias, add=add)
    expected = exact(*terms) + (0 if bias is None else bias.double()) + (before.double() if add else 0)
    assert relative(out, expected) < BOUND[dtype]
    if dtype == NARROW:
        near = (out.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4
        assert near.all()
    assert (room[:, :3] == 77).all()
    assert (room[:, columns + 3 :] == 77).all()


def test_a_scaled_left_side_is_rounded_before() -> None:
    left, right = matrix(40, 16), matrix(16, 50, seed=1)
    out = torch.empty(40, 50, dtype=WIDE)
    assert kernels.multiply(out, Term(left, right, 0.3))
    assert relative(out, exact(Term((left * 0.3).to(NARROW), right))) < 1e-6


@pytest.mark.parametrize(("width", "columns"), [(300, 16), (1300, 300), (16, 40), (300, 48)])
def test_a_row_is_bit_for_bit_what_it_is_alone(width: int, columns: int) -> None:
    """Beside any others, in any number of threads."""
    left, right = matrix(700, width), matrix(width, columns, seed=1)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = torch.empty(700, columns, dtype=NARROW)
        assert kernels.multiply(out, Term(left, right))
        found.append(out)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for start, end in ((0, 1), (7, 12), (500, 700)):
        alone = torch.empty(end - start, columns, dtype=NARROW)
        assert kernels.multiply(alone, Term(left[start:end], right))
        assert torch.equal(alone, found[0][start:end])


@pytest.mark.parametrize("grown", [False, True])
def test_what_waits_is_computed_before(grown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in float32 that waits has the address of its room, which one in bfloat16 replaces where it is too small."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    multiplying._kept.__dict__.clear()
    if grown:
        assert kernels.multiply(torch.empty(100, 200, dtype=NARROW), Term(matrix(100, 300), matrix(300, 200)))
    wide = Term(torch.randn(100, 300), torch.randn(300, 200))
    first, second = torch.full((100, 200), torch.nan), torch.full((100, 200), torch.nan, dtype=NARROW)
    with kernels.together(True):
        assert kernels.multiply(first, wide)
        assert first.isnan().all()
        assert kernels.multiply(second, Term(matrix(100, 300), matrix(300, 200)))
        assert relative(first, exact(wide)) < 1e-6
        assert relative(second, exact(Term(matrix(100, 300), matrix(300, 200)))) < BOUND[NARROW]


def test_what_is_no_number_stays_in_its_row_and_column() -> None:
    left, right = matrix(20, 30), matrix(30, 50, seed=1)
    left[3, 4], right[9, 44] = torch.nan, torch.inf
    out = torch.empty(20, 50, dtype=NARROW)
    assert kernels.multiply(out, Term(left, right))
    assert not out[3].isfinite().any()
    assert not out[:, 44].isfinite().any()
    rest = out[torch.arange(20) != 3][:, torch.arange(50) != 44]
    assert rest.isfinite().all()


def test_what_does_not_fit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = matrix(4, 70), matrix(70, 80)
    out = torch.zeros(4, 80, dtype=NARROW)
    assert not kernels.multiply(out, Term(left, right.float()))
    assert not kernels.multiply(out.double(), Term(left, right))
    assert not kernels.multiply(out, Term(left, right), bias=torch.zeros(80))
    assert not kernels.multiply(out.float(), Term(left, right), bias=torch.zeros(80))
    assert not kernels.multiply(out.float(), Term(left, right), bias=torch.zeros(80, dtype=NARROW))
    monkeypatch.setattr(multiplying, "NARROW", 64)
    assert not kernels.multiply(out, Term(left, right))
    assert not out.any()
    assert kernels.multiply(out, Term(left, right), Term(left, right))
    assert kernels.multiply(out.float(), Term(left, right))
    assert kernels.multiply(out[:, :64], Term(left, right[:, :64]))


def test_a_room_is_as_large_as_the_kernel_says() -> None:
    text = (Path(library.__file__).parent / "amx_products.h").read_text()
    deep, across, rows = (
        int(found.group(1))
        for name in ("TILES_DEEP", "TILES_ACROSS", "ROWS_AT_ONCE")
        if (found := re.search(rf"{name} = (\d+)", text)) is not None
    )
    assert 256 * (across * deep + 4 * deep + 4) + rows * across * 16 == multiplying.WITHIN_TILES


@pytest.mark.parametrize(("width", "columns"), [(64, 200), (200, 64), (65, 65), (200, 200), (1, 1)])
def test_whether_a_single_product_is_computed_is_known_before(
    width: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplying, "NARROW", 64)
    left, right = matrix(30, width), matrix(width, columns, seed=1)
    computed = kernels.multiply(torch.empty(30, columns, dtype=NARROW), Term(left, right))
    assert computed is (min(width, columns) <= 64)
    assert kernels.multiplies_alone(left, right) is computed
