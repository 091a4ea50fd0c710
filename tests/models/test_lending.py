"""Memory that passes lend each other."""

from __future__ import annotations

import pytest
import torch

from quartet.models.lending import Lender

LIKE = torch.empty(0)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_was_given_back_is_lent_again_in_another_shape() -> None:
    lender = Lender()
    with lender.keeping():
        first = lender.borrowed(LIKE, 6, 8)
        second = lender.borrowed(LIKE, 6, 8)
        assert address(first) != address(second)
        lender.given_back(first)
        again = lender.borrowed(LIKE, 5, 7)
        assert again.shape == (5, 7)
        assert again.is_contiguous()
        assert address(again) == address(first)
        lender.given_back(again)
        assert address(lender.borrowed(LIKE, 6, 8)) == address(first)  # nothing was cut off


def test_the_smallest_that_fits_and_of_those_the_last_given_back() -> None:
    lender = Lender()
    with lender.keeping():
        blocks = [lender.borrowed(LIKE, rows, 4) for rows in (9, 5, 5)]
        lender.given_back(*blocks)
        assert [address(lender.borrowed(LIKE, 5, 4)) for _ in range(3)] == [address(blocks[i]) for i in (2, 1, 0)]


def test_a_block_too_small_makes_way_for_a_larger_one() -> None:
    lender = Lender()
    with lender.keeping():
        small = lender.borrowed(LIKE, 2, 2)
        lender.given_back(small)
        large = lender.borrowed(LIKE, 20, 20)
        assert large.shape == (20, 20)
        assert address(lender.borrowed(LIKE, 2, 2)) != address(small)


def test_no_block_of_another_dtype() -> None:
    lender = Lender()
    with lender.keeping():
        block = lender.borrowed(LIKE, 2, 2)
        lender.given_back(block)
        wide = lender.borrowed(LIKE.double(), 1, 2)
        assert wide.dtype == torch.float64
        assert address(wide) != address(block)


def test_nothing_is_kept_outside_or_after_an_error() -> None:
    lender = Lender()
    kept = lender.borrowed(LIKE, 2, 2)
    lender.given_back(kept)
    assert address(lender.borrowed(LIKE, 2, 2)) != address(kept)

    def fail() -> None:
        with lender.keeping():
            lender.given_back(kept)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert address(lender.borrowed(LIKE, 2, 2)) != address(kept)


def test_an_inner_keeping_ends_nothing_and_forgetting_frees_all() -> None:
    lender = Lender()
    with lender.keeping():
        kept = lender.borrowed(LIKE, 2, 2)
        with lender.keeping():
            lender.given_back(kept)
        again = lender.borrowed(LIKE, 2, 2)
        assert address(again) == address(kept)
        lender.given_back(again)
        lender.forget()
        assert address(lender.borrowed(LIKE, 2, 2)) != address(kept)
