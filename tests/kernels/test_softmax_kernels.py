"""The softmax of logits in parts of the vocabulary against its formula in float64, as it is compiled for each generation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quartet import kernels
from quartet.kernels import library

needs_kernels = pytest.mark.skipif(library.kernel("slopes_f32") is None, reason="no compiler at installation")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 300, 128), (70, 700, 512)]
"""Rows, columns, and where they are cut; the last is shared among threads."""
LEAST = torch.finfo(torch.float32).min


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(rows + columns)
    return (4 * torch.randn(rows, columns + 3)).to(dtype)[:, 1 : columns + 1]


def sums(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((rows,), LEAST), torch.zeros(rows), torch.zeros(rows)


def expected_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    top = logits.double().amax(1)
    below = (logits.double() - top[:, None]) / temperature
    return top, below.exp().sum(1), torch.special.xlogy(below.exp(), below.exp()).sum(1)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_carried_on(
    generation: str, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float, count: int
) -> None:
    rows, columns, cut = shape
    logits = drawn(rows, columns, dtype)
    before, found, alone = logits.clone(), sums(rows), sums(rows)[:2]
    torch.set_num_threads(count)
    for part in (logits[:, :cut], logits[:, cut:]):
        assert kernels.exponentials(part, *found, temperature, written=False)
        assert kernels.exponentials(part, *alone, None, temperature, written=False)
    assert torch.equal(logits, before)
    assert torch.equal(found[0], before.float().amax(1))
    torch.testing.assert_close(
        [t.double() for t in found], list(expected_sums(logits, temperature)), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(alone, found[:2], rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_take_the_place_of_logits(
    generation: str, dtype: torch.dtype, shape: tuple[int, int, int], with_entropy: bool
) -> None:
    rows, columns, _ = shape
    logits = drawn(rows, columns, dtype)
    top, total, weighted = expected_sums(logits, 0.7)
    exponentials, beside = ((logits.double() - top[:, None]) / 0.7).exp(), logits._base
    assert beside is not None
    left, right = beside[:, :1].clone(), beside[:, columns + 1 :].clone()
    found = sums(rows)
    assert kernels.exponentials(logits, *found[:2], found[2] if with_entropy else None, 0.7, written=True)
    precision = 1e-5 if dtype == torch.float32 else 2.0**-8  # of arguments down to -50, rounded in float32
    torch.testing.assert_close(logits.double(), exponentials, rtol=precision, atol=1e-25)
    torch.testing.assert_close(found[1].double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2].double(), weighted if with_entropy else 0 * weighted, rtol=1e-6, atol=1e-6)
    assert torch.equal(beside[:, :1], left)
    assert torch.equal(beside[:, columns + 1 :], right)


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_are_the_derivatives(
    generation: str, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float, with_entropy: bool, count: int
) -> None:
    rows, columns, cut = shape
    logits = drawn(rows, columns, dtype)
    by_logprob, by_entropy, token = torch.randn(rows), torch.randn(rows), torch.randint(0, columns, (rows,))
    exact = logits.double().requires_grad_()
    log_p = (exact / temperature).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = (by_logprob * log_p.gather(1, token[:, None]).squeeze(1)).sum()
    if with_entropy:
        loss = loss + (by_entropy * entropy).sum()
    (expected,) = torch.autograd.grad(loss, exact)
    top, total, _ = (t.float() for t in expected_sums(logits, temperature))
    torch.set_num_threads(count)
    for part, start in ((logits[:, :cut], 0), (logits[:, cut:], cut)):
        weights = by_logprob / temperature, by_entropy / temperature if with_entropy else None
        given = top, total.log(), token - start, *weights, entropy.detach().float(), temperature
        assert kernels.slopes(part, *given)
    precision = 2e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(logits.double(), expected, rtol=precision, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_impossible_token_counts_nowhere(generation: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0, -math.inf, -1e30]], dtype=dtype)
    possible, found = logits[:, 2:4].double(), sums(1)
    for part in (logits[:, :2], logits[:, 2:]):
        assert kernels.exponentials(part, *found, 0.5, written=False)
    top, total, weighted = expected_sums(possible, 0.5)
    torch.testing.assert_close([t.double() for t in found], [top, total, weighted])
    entropy = total.log() - weighted / total
    given = found[0], found[1].log(), torch.tensor([2]), torch.ones(1), torch.ones(1), entropy.float(), 0.5
    assert kernels.slopes(logits, *given)
    assert logits[0, [0, 1, 4, 5]].tolist() == [0.0] * 4
    p = (possible / 0.5).softmax(1)
    expected = torch.tensor([[1.0, 0.0]]) - p - p * (p.log() + entropy)
    torch.testing.assert_close(
        logits[:, 2:4].double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-6
    )


@needs_kernels
@pytest.mark.parametrize("by_entropy", [None, torch.ones(1)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_impossible_token_that_was_chosen_has_a_slope(
    generation: str, dtype: torch.dtype, weight: float, by_entropy: Tensor | None
) -> None:
    """Its probability is 0, so that all of its weight is left to its logit."""
    logits = torch.tensor([[-math.inf, 1.0, 1.0]], dtype=dtype)
    given = torch.ones(1), torch.tensor([math.log(2)]), torch.tensor([0]), torch.tensor([weight])
    assert kernels.slopes(logits, *given, by_entropy, torch.tensor([math.log(2)]), 1.0)
    expected = torch.tensor([[weight, -weight / 2, -weight / 2]])  # the others' entropy is at its largest
    torch.testing.assert_close(logits.float(), expected, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(generation: str, dtype: torch.dtype, bad: float) -> None:
    """A run ends where numbers are not finite, so that no kernel may hide them."""
    logits, found = torch.ones(2, 40, dtype=dtype), sums(2)
    logits[0, 7] = bad
    assert kernels.exponentials(logits, *found, 1.0, written=False)
    assert found[1].isfinite().tolist() == [False, True]
    assert found[2].isfinite().tolist() == [False, True]
    ones = torch.ones(2)
    assert kernels.slopes(logits, found[0], found[1].log(), torch.tensor([3, 3]), ones, None, ones, 1.0)
    assert logits.isfinite().all(1).tolist() == [False, True]


@needs_kernels
def test_tensors_that_no_kernel_reads_are_left_alone() -> None:
    logits, ones, place = torch.ones(4, 6), torch.ones(4), torch.zeros(4, dtype=torch.int64)

    def both(logits: Tensor, ones: Tensor = ones, place: Tensor = place) -> tuple[bool, bool]:
        summed = kernels.exponentials(logits, ones, ones, ones, 1.0, written=True)
        return summed, kernels.slopes(logits, ones, ones, place, ones, ones, ones, 1.0)

    for refused in (logits.double(), logits.half(), torch.ones(6, 4).t(), torch.ones(4), logits.to("meta")):
        assert both(refused) == (False, False)
        assert refused.is_meta or (refused == 1).all()
    for numbers in (torch.ones(3), torch.ones(4, 1), ones.double(), torch.ones(8)[::2]):
        assert both(logits, numbers) == (False, False)
    for places in (place[:3], place.int(), torch.zeros(8, dtype=torch.int64)[::2]):
        assert not kernels.slopes(logits, ones, ones, places, ones, ones, ones, 1.0)
    assert (logits == 1).all()
    assert (ones == 1).all()


@needs_kernels
def test_what_is_written_over_counts_as_changed_and_in_a_plan_nothing_is_computed() -> None:
    logits, ones, place = torch.ones(4, 6), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    assert kernels.exponentials(logits, ones, ones.clone(), None, 1.0, written=False)
    assert (logits._version, ones._version) == (0, 1)
    assert kernels.exponentials(logits, ones, ones.clone(), None, 1.0, written=True)
    assert logits._version == 1
    assert kernels.slopes(logits, ones, ones, place, ones, None, ones, 1.0)
    assert logits._version == 2
    with FakeTensorMode():
        logits, ones, place = torch.ones(4, 6), torch.ones(4), torch.zeros(4, dtype=torch.int64)
        assert kernels.exponentials(logits, ones, ones, ones, 1.0, written=True)
        assert kernels.slopes(logits, ones, ones, place, ones, ones, ones, 1.0)
