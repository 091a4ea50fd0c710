"""The kernel of sums of products against float64, as several generations of processors compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from matrices import ORDERS, at_the_end, exact, matrix, ordered, relative
from quartet import kernels
from quartet.kernels import Term, library, multiplying

faster = multiplying.kernels_are_faster.__wrapped__


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor, and at every size."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("orders", [(left, right) for left in ORDERS for right in ORDERS], ids="-".join)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (6, 16, 32),
        (97, 300, 70),
        (13, 5, 200),
        (200, 40, 9),
        (40, 600, 16),
        (11, 290, 1100),
        (1100, 900, 420),
    ],
)
def test_a_product(generation: str, shape: tuple[int, int, int], orders: tuple[str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    rows, width, columns = shape
    term = Term(matrix(rows, width, orders[0]), matrix(width, columns, orders[1], 1))
    out = torch.full((rows, columns), torch.nan)
    assert kernels.multiply(out, term)
    assert relative(out, exact(term)) < 1e-6


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(35, 53), (75, 117)])
@pytest.mark.parametrize("widths", [(40, 3), (280, 16), (286, 4, 1), (576, 16, 300, 16)])
def test_sums_of_products(
    generation: str, widths: tuple[int, ...], rows: int, columns: int, biased: bool, add: bool
) -> None:
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


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 16, 32, 33])
@pytest.mark.parametrize("columns", [64, 96, 1056, 1057])
def test_few_rows_that_lie_upright(generation: str, columns: int, rows: int, threads: int) -> None:
    """The gradients of adapters: whole tiles of the other matrix are read where they are, its columns beside them are not."""
    torch.set_num_threads(threads)
    beside = torch.full((200, columns + 20), torch.nan)
    beside[:, 4 : columns + 4] = matrix(200, columns)
    term = Term(matrix(rows, 200, "columns", 1), beside[:, 4 : columns + 4], -0.5)
    out = torch.full((rows, columns), torch.nan)
    assert kernels.multiply(out, term)
    assert relative(out, exact(term)) < 1e-6
    alone = torch.empty(rows, columns)
    torch.set_num_threads(1)
    assert kernels.multiply(alone, term)
    assert torch.equal(out, alone)
    assert kernels.multiply(out, term, add=True)
    assert relative(out, 2 * exact(term)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("width", "columns"), [(300, 16), (300, 300), (16, 40), (300, 48), (1300, 300)])
def test_a_row_is_bit_for_bit_what_it_is_alone(generation: str, width: int, columns: int, scale: float) -> None:
    """Beside any others, in any number of threads."""
    left, right = matrix(41, width), matrix(width, columns, seed=1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = torch.empty(41, columns)
        assert kernels.multiply(out, Term(left, right, scale))
        assert relative(out, exact(Term(left, right, scale))) < 1e-6
        found.append(out)
    assert torch.equal(*found)
    for start, end in ((0, 1), (7, 12), (40, 41)):
        alone = torch.empty(end - start, columns)
        assert kernels.multiply(alone, Term(left[start:end], right, scale))
        assert torch.equal(alone, found[0][start:end])


def far_apart(rows: int, columns: int) -> Tensor:
    """Numbers of all 24 digits, over eighty powers of two."""
    return torch.randn(rows, columns) * torch.randint(-40, 41, (rows, columns)).float().exp2()


@pytest.mark.parametrize("orders", [(left, right) for left in ORDERS for right in ORDERS], ids="-".join)
def test_no_digit_of_float32_is_lost(generation: str, orders: tuple[str, str]) -> None:
    """Ones and zeros give back what they multiply, bit for bit, on either side."""
    numbers, ones = far_apart(90, 128), torch.eye(128)
    left, right, out = torch.empty(90, 128), torch.empty(128, 90), torch.empty(90, 128)
    assert kernels.multiply(left, Term(ordered(numbers, orders[0]), ordered(ones, orders[1])))
    assert torch.equal(left, numbers)
    assert kernels.multiply(right, Term(ordered(ones, orders[0]), ordered(numbers.t(), orders[1])))
    assert torch.equal(right, numbers.t())
    assert kernels.multiply(out, Term(ordered(numbers, orders[0]), ordered(ones, orders[1]), -0.3))
    assert torch.equal(out, -0.3 * numbers)


@pytest.mark.parametrize("width", [64, 500, 3000])
def test_sums_are_as_exact_as_torch_computes_them(generation: str, width: int) -> None:
    """Of what the terms are in size; the sums of a few thousand numbers are off by their order."""
    for left, right in (
        (torch.randn(96, width), torch.randn(width, 80)),
        (torch.rand(96, width), torch.rand(width, 80)),
        (far_apart(96, width), far_apart(width, 80)),
    ):
        out = torch.empty(96, 80)
        assert kernels.multiply(out, Term(left, right))
        expected, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        off, of_torch = (((found.double() - expected).abs() / size).max() for found in (out, left @ right))
        assert off < 2 * of_torch
        assert off < 2**-20


def test_the_smallest_numbers_count_as_nothing_at_most(generation: str) -> None:
    """Where a number's last digits are below 2^-126 a processor may leave them out, and nothing else."""
    numbers = torch.randn(64, 64) * 2.0 ** torch.randint(-126, -100, (64, 64))
    out = torch.empty(64, 64)
    assert kernels.multiply(out, Term(numbers, torch.eye(64)))
    assert (out - numbers).abs().max() <= 2.0**-125


@pytest.mark.parametrize(("width", "columns"), [(30, 50), (70, 90)])
def test_what_is_no_number_stays_in_its_row_and_column(generation: str, width: int, columns: int) -> None:
    left, right = matrix(20, width), matrix(width, columns, seed=1)
    left[3, 4], right[9, 44], left[7, 5] = torch.nan, torch.inf, -torch.inf
    left.view(torch.int32)[8, 6] = 0x7FFFFFFF  # a NaN too
    out = torch.empty(20, columns)
    assert kernels.multiply(out, Term(left, right))
    bad = torch.tensor([3, 7, 8])
    assert not out[bad].isfinite().any()
    assert not out[:, 44].isfinite().any()
    rest = out[~torch.isin(torch.arange(20), bad)][:, torch.arange(columns) != 44]
    assert rest.isfinite().all()


def test_tiles_multiply_where_the_processor_has_them(generation: str) -> None:
    """Seen by the one thing that only they do: an infinite number is split into pieces that are none."""
    for width, by_tiles in ((96, library.has_tile_products()), (70, False)):  # few rows: multiples of 32 numbers
        left = torch.ones(70, width)
        left[3, 4] = torch.inf
        out = torch.empty(70, 70)
        assert kernels.multiply(out, Term(left, torch.ones(width, 70)))
        assert bool(out[3].isnan().all()) == library.has_tile_products()
        found = kernels.few_rows(left, kernels.Linear(torch.ones(32, width)))
        assert bool(found[3].isnan().all()) == by_tiles


@pytest.mark.parametrize("orders", [(left, right) for left in ORDERS[:2] for right in ORDERS[:2]], ids="-".join)
@pytest.mark.parametrize("shape", [(97, 301, 71), (65, 64, 200), (3, 40, 1)])
def test_nothing_beyond_a_matrix_is_read(generation: str, shape: tuple[int, int, int], orders: tuple[str, str]) -> None:
    rows, width, columns = shape
    left, right = matrix(rows, width, orders[0]), matrix(width, columns, orders[1], 1)
    with at_the_end(left) as first, at_the_end(right) as second:
        out = torch.empty(rows, columns)
        assert kernels.multiply(out, Term(first, second))
        assert relative(out, exact(Term(left, right))) < 1e-6


def test_what_does_not_fit_is_left_to_torch(generation: str) -> None:
    left, right, out = matrix(4, 5), matrix(5, 6), torch.zeros(4, 6)
    assert not kernels.multiply(out, Term(left.double(), right))
    assert not kernels.multiply(out.bfloat16(), Term(left, right))
    assert not kernels.multiply(torch.zeros(6, 4).t(), Term(left, right))
    assert not kernels.multiply(out, Term(left.to("meta"), right))
    assert not kernels.multiply(out, Term(left, right), bias=torch.zeros(12)[::2])
    assert not out.any()
    assert kernels.multiply(out, Term(left, right), bias=torch.zeros(6))


@pytest.mark.parametrize(
    ("left", "right", "bias"), [((4, 6), (5, 6), 6), ((3, 5), (5, 6), 6), ((4, 5), (5, 7), 6), ((4, 5), (5, 6), 5)]
)
def test_shapes_that_do_not_go_together_are_left_to_torch(
    generation: str, left: tuple[int, int], right: tuple[int, int], bias: int
) -> None:
    out = torch.zeros(4, 6)
    assert not kernels.multiply(out, Term(matrix(*left), matrix(*right)), bias=torch.zeros(bias))
    assert not out.any()


@pytest.mark.parametrize(("rows", "width", "columns"), [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
def test_nothing_is_left_to_torch(generation: str, rows: int, width: int, columns: int) -> None:
    assert not kernels.multiply(torch.zeros(rows, columns), Term(matrix(rows, width), matrix(width, columns)))


def test_a_few_columns_of_a_scaled_term(generation: str) -> None:
    term = Term(matrix(40, 600), matrix(600, 16, seed=1), -1.5)
    out = torch.empty(40, 16)
    assert kernels.multiply(out, term)
    assert relative(out, exact(term)) < 1e-6


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads(generation: str, threads: int) -> None:
    """Each takes a rectangle of the result."""
    torch.set_num_threads(threads)
    for rows, columns in ((300, 300), (30, 900), (900, 30)):
        term = Term(matrix(rows, 200), matrix(200, columns, seed=1))
        out = torch.full((rows, columns), torch.nan)
        assert kernels.multiply(out, term)
        assert relative(out, exact(term)) < 1e-6


def test_a_room_is_of_float32_whatever_the_default() -> None:
    """And so large that the kernel stays within it."""
    multiplying._kept.__dict__.clear()
    term, out = Term(matrix(100, 300), matrix(300, 100, seed=1)), torch.empty(100, 100)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            if not kernels.multiply(out, term):
                pytest.skip("no kernels: no compiler was there at installation")
    finally:
        torch.set_default_dtype(before)
    assert multiplying._kept.room.dtype == torch.float32
    assert multiplying._kept.room.device.type == "cpu"
    assert relative(out, exact(term)) < 1e-6


def test_without_code_for_wide_vectors_torch_multiplies(generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it depends on the processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(multiplying, "is_intel", lambda: False)
    assert library.has_wide_vectors() is (generation != "any" and _has_avx2())
    assert faster() is library.has_wide_vectors()


def _has_avx2() -> bool:
    return all(name in Path("/proc/cpuinfo").read_text().split() for name in ("avx2", "fma", "bmi2", "movbe"))


def test_the_result_counts_as_changed() -> None:
    out = torch.zeros(4, 6)
    before = out._version
    if not kernels.multiply(out, Term(matrix(4, 5), matrix(5, 6))):
        pytest.skip("no kernels: no compiler was there at installation")
    assert out._version == before + 1


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplying, "SMALLEST", 4 * 5 * 6 + 1)
    assert not kernels.multiply(torch.zeros(4, 6), Term(matrix(4, 5), matrix(5, 6)))


def test_a_room_is_as_large_as_the_kernel_says() -> None:
    text = (Path(library.__file__).parent / "terms.h").read_text()
    lines = [
        line.removeprefix("#define ").split("/*")[0].split(maxsplit=1)
        for line in text.splitlines()
        if "#define" in line
    ]
    numbers: dict[str, int] = {}
    for name, value in lines:
        for known, number in numbers.items():
            value = value.replace(known, str(number))
        assert set(value) <= set("0123456789()*+ ")
        numbers[name] = eval(value)
    assert numbers["WITHIN"] == multiplying.WITHIN
    assert numbers["HIGH"] % 12 == 0
