"""Copies in few blocks of page-locked memory; here the blocks are plain memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quartet.models import page_locked
from quartet.models.page_locked import ALIGNED, LARGEST, blocks, page_locked_copies

MIB = 2**20


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([136 * MIB] * 100, 1.14),  # seven of them fill 952 of 1024 MiB, and two are left over
        ([136 * MIB, 45 * MIB, 9 * MIB, 3 * MIB, 7168] * 28, 1.05),
        ([1500 * MIB, 3 * MIB, 4096, 1], 1.37),  # one that is larger than a block has one of its own, rounded up
        ([0, 5], 1024),
    ],
)
def test_blocks_are_powers_of_two_and_filled(sizes: list[int], most: float) -> None:
    found = blocks(sizes)
    assert sorted(index for _, members in found for index in members) == list(range(len(sizes)))
    for size, members in found:
        assert size.bit_count() == 1
        assert size <= LARGEST or len(members) >= 1 == sum(sizes[index] > LARGEST for index in members)
        assert sum(-(-sizes[index] // ALIGNED) * ALIGNED for index in members) <= size
    assert sum(size for size, _ in found) <= most * sum(sizes)


def test_copies_are_equal_and_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_locked, "_block", lambda size: torch.zeros(size, dtype=torch.uint8))
    torch.manual_seed(0)
    given = [
        torch.randn(7, 3),
        torch.randn(5, 64).bfloat16(),
        torch.randint(0, 255, (33,), dtype=torch.uint8),
        torch.randn(6, 4).t(),
        torch.tensor(2.5),
        torch.randn(300, 5),
    ]
    found = page_locked_copies(given)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(given, found, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in found}) < len(given)
    ends = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in found)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    found[0].zero_()
    assert torch.equal(found[-1], given[-1])
