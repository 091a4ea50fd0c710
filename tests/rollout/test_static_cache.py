"""The row cache, the masks of a decoding step and the groups of a prefill, on literal numbers."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from quartet.rollout.static import PREFILL_TOKENS, like_length
from quartet.rollout.static_cache import Pattern, RowCache, decode_masks


def test_prefill_groups_hold_prompts_of_like_length() -> None:
    assert like_length([], 10) == []
    assert like_length([10, 10, 10], 1) == [3]
    assert like_length([40, 40, 4, 4, 4], 10) == [2, 3]
    assert like_length([40, 40, 4, 4, 4], 109) == [5]  # 200 places and a call are less than 92 and two
    assert like_length([40, 40, 4, 4, 4], 107) == [2, 3]
    assert like_length([PREFILL_TOKENS + 1, PREFILL_TOKENS, 8], 10**6) == [1, 1, 1]


@pytest.mark.parametrize("call", [1, 7, 30, 200])
def test_no_other_groups_cost_less(call: int) -> None:
    """Against all ways to part eight prompts."""
    generator = torch.Generator().manual_seed(call)
    for _ in range(20):
        lengths = sorted(torch.randint(1, 60, (8,), generator=generator).tolist(), reverse=True)

        def cost(groups: tuple[int, ...], lengths: list[int] = lengths) -> int:
            starts = [sum(groups[:place]) for place in range(len(groups))]
            return sum(size * lengths[start] + call for size, start in zip(groups, starts, strict=True))

        ways = [
            tuple(b - a for a, b in pairwise((0, *cuts, 8)))
            for count in range(8)
            for cuts in combinations(range(1, 8), count)
        ]
        found = like_length(lengths, call)
        assert sum(found) == 8
        assert cost(tuple(found)) == min(map(cost, ways))


def test_masks_of_one_step() -> None:
    full, window = Pattern("full_attention", None), Pattern("sliding_attention", 2)
    low = torch.finfo(torch.float32).min
    masks = decode_masks([full, window, full], torch.tensor([0, 3]), 5, torch.float32)
    assert isinstance(masks, dict)
    assert masks["full_attention"][:, 0, 0].tolist() == [[0, low, low, low, low], [0, 0, 0, 0, low]]
    assert masks["sliding_attention"][:, 0, 0].tolist() == [[0, low, low, low, low], [low, low, 0, 0, low]]
    only = decode_masks([full], torch.tensor([1]), 2, torch.float32)
    assert isinstance(only, Tensor)
    assert only.shape == (1, 1, 1, 2)


def test_cache_rows_are_written_at_their_own_positions() -> None:
    cache = RowCache([Pattern("full_attention", None)], rows=3, columns=4, dtype=torch.float32)
    cache.prefill(1)
    prompt = torch.arange(1.0, 5.0).reshape(2, 1, 2, 1)
    given = cache.update(prompt, -prompt, 0)
    assert given[0] is prompt
    cache.decode(torch.tensor([0, 1, 2]), 3)
    new = torch.tensor([7.0, 8.0, 9.0]).reshape(3, 1, 1, 1)
    keys, values = cache.update(new, -new, 0)
    assert keys[:, 0, :, 0].tolist() == [[7, 0, 0], [1, 8, 0], [3, 4, 9]]
    assert torch.equal(values, -keys)
    cache.move(torch.tensor([2]), torch.tensor([0]), 3)
    assert keys[0].flatten().tolist() == [3, 4, 9]
