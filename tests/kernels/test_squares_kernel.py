"""The norm of many tensors, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quartet import kernels
from quartet.distributed import SingleProcess
from quartet.kernels.squares import BLOCK

SIZES = ((3,), (1,), (2, 7), (BLOCK,), (BLOCK + 1,), (3, BLOCK + 5), (0,))


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    # The fewer, the larger, so that each would be missed.
    found = [torch.randn(*size) * 1e3 / max(math.prod(size), 1) ** 0.5 for size in SIZES]
    for one in found:
        one.flatten()[-1:].fill_(500.0)  # and the last number of each
    return found


def exact(given: list[Tensor]) -> float:
    return float(torch.cat([one.flatten().double() for one in given]).norm())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_is_that_of_all_numbers_whatever_the_threads(generation: str, threads: int) -> None:
    given = tensors()
    alone = kernels.norm_of_all(given)
    torch.set_num_threads(threads)
    found = kernels.norm_of_all(given)
    assert found is not None
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert float(found) == pytest.approx(exact(given), rel=1e-6)
    assert found.equal(alone)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_shows(generation: str, number: float) -> None:
    given = tensors()
    given[5][2, BLOCK + 4] = number
    found = kernels.norm_of_all(given)
    assert found is not None
    assert not found.isfinite()


def test_other_tensors_are_left_to_torch() -> None:
    one = torch.ones(4, 6)
    for other in (one.double(), one.bfloat16(), one.t(), one[:, :3]):
        assert kernels.norm_of_all([one, other]) is None
    assert kernels.norm_of_all([]) is None


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_gradients_are_scaled_to_it(share: float, without: bool, request: pytest.FixtureRequest) -> None:
    if without:
        request.getfixturevalue("without_kernels")
    given = tensors()
    assert (kernels.norm_of_all(given) is None) is without
    whole = exact(given)
    parameters = [torch.nn.Parameter(torch.zeros_like(one)) for one in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.clone()
    norm = SingleProcess().clip_gradients(parameters, share * whole)
    assert float(norm) == pytest.approx(whole, rel=1e-6)
    for parameter, gradient in zip(parameters, given, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * min(share, 1.0), rtol=1e-5, atol=0.0)


def test_not_a_number_is_passed_on_by_clipping() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, torch.nan, 2.0])
    assert SingleProcess().clip_gradients([parameter], 1.0).isnan()
    assert parameter.grad.isnan().all()
