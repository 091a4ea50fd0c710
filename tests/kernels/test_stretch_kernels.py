"""Decoding steps in a row: those that are taken one by one, bit for bit, as they are compiled for each generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decoding_layers import DTYPES, made, weights
from quartet import kernels
from quartet.kernels import Live, Responses

ROWS, RESPONSES, LENGTH, VOCABULARY, HIDDEN = 18, 21, 9, 1000, 128
"""Enough for a second thread in a step, in the LM head and in drawing, and for several blocks of probabilities."""
needs_kernels = pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")


def made_decoding(dtype: torch.dtype, rank: int, narrow: bool) -> tuple[kernels.Decoding, list[Any]]:
    layers, size = weights(dtype, rank, hidden=HIDDEN)
    angles = made(size["columns"], size["size"], seed=4), made(size["columns"], size["size"], seed=5)
    return (
        kernels.Decoding(
            layers, made(HIDDEN, seed=9), angles, heads=size["heads"], eps=1e-5, scaling=0.3, narrow=narrow
        ),
        layers,
    )


def start(uniform: bool) -> tuple[Live, Responses]:
    """Rows at different places of their prompts and their responses, which lie in an order of their own."""
    generator = torch.Generator().manual_seed(1)
    live = Live(
        torch.randint(VOCABULARY, (ROWS,), generator=generator),
        torch.randint(20, (ROWS,), generator=generator),
        torch.randint(1, 4, (ROWS,), generator=generator),
        torch.randperm(RESPONSES, generator=generator)[:ROWS],
    )
    shape = RESPONSES, LENGTH
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64) if uniform else None
    kept = Responses(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), torch.zeros(shape).bool(), uniforms)
    return live, kept


def one_by_one(
    decoding: kernels.Decoding, embeddings: Tensor, head: kernels.Linear, live: Live, kept: Responses, count: int
) -> None:
    for _ in range(count):
        hidden = decoding(embeddings[live.token], live.position)
        place = live.response, live.sampled.clone()
        uniform = None if kept.uniforms is None else kept.uniforms[place]
        drawn = kernels.draw(kernels.few_rows(hidden, head), uniform, 0.7)
        assert drawn is not None
        kept.tokens[place], kept.logprobs[place], kept.mask[place] = *drawn, torch.tensor(True)
        live.token.copy_(drawn[0])
        live.position.add_(1)
        live.sampled.add_(1)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_in_a_row(
    generation: str, dtype: torch.dtype, narrow: bool, rank: int, threads: int, uniform: bool
) -> None:
    if narrow and dtype == torch.float32:
        pytest.skip("no narrower dtype than that of the states")
    torch.set_num_threads(threads)
    head = kernels.Linear(made(VOCABULARY, HIDDEN, dtype=dtype, seed=7), made(VOCABULARY, seed=8))
    embeddings = made(VOCABULARY, HIDDEN, dtype=torch.bfloat16 if narrow else torch.float32, seed=6)
    (decoding, layers), (expected, right) = made_decoding(dtype, rank, narrow), start(uniform)
    one_by_one(decoding, embeddings, head, expected, right, 5)
    caches = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    assert len(right.tokens[right.mask].unique()) > 5

    (decoding, layers), (live, kept) = made_decoding(dtype, rank, narrow), start(uniform)
    assert kernels.stretches(decoding, embeddings, head)
    stretch = kernels.Stretch(decoding, embeddings, head, temperature=0.7)
    assert stretch(live, kept, stop=None, most=2) == 2
    assert stretch(live, kept, stop=None, most=3) == 3
    for found, other in zip((*live, *kept), (*expected, *right), strict=True):
        assert found is other is None or torch.equal(found, other)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@needs_kernels
def test_they_end_with_a_response() -> None:
    head, embeddings = kernels.Linear(made(VOCABULARY, HIDDEN, seed=7)), made(VOCABULARY, HIDDEN, seed=6)
    decoding, _ = made_decoding(torch.float32, 0, narrow=False)
    stretch = kernels.Stretch(decoding, embeddings, head, temperature=0.7)
    live, kept = start(uniform=True)
    assert stretch(live, kept, stop=None, most=5) == 5
    first = start(uniform=True)[0].sampled
    drawn = torch.stack([kept.tokens[live.response, first + step] for step in range(5)])
    stop = next(one for one in drawn[2].tolist() if one not in drawn[:2])
    again, others = start(uniform=True)
    decoding, _ = made_decoding(torch.float32, 0, narrow=False)
    stretch = kernels.Stretch(decoding, embeddings, head, temperature=0.7)
    assert stretch(again, others, stop=stop, most=5) == 3
    assert torch.equal(again.token, drawn[2])
    assert others.mask.sum() == 3 * ROWS


@needs_kernels
def test_fewer_rows_and_more_again() -> None:
    """As rows stop, and prompts come in; and more threads than at first."""
    head, embeddings = kernels.Linear(made(VOCABULARY, HIDDEN, seed=7)), made(VOCABULARY, HIDDEN, seed=6)
    found = []
    for counts, threads in (((ROWS,), (2,)), ((3, ROWS), (1, 2))):
        decoding, _ = made_decoding(torch.float32, 0, narrow=False)
        stretch = kernels.Stretch(decoding, embeddings, head, temperature=0.7)
        for count, number in zip(counts, threads, strict=True):
            torch.set_num_threads(number)
            live, kept = start(uniform=True)
            some = Live(*(one[:count] for one in live))
            assert stretch(some, kept, stop=None, most=4) == 4
        found.append(kept)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].logprobs, found[1].logprobs)


@needs_kernels
def test_what_there_is_no_kernel_for() -> None:
    decoding, _ = made_decoding(torch.float32, 0, narrow=False)
    head, embeddings = kernels.Linear(made(VOCABULARY, HIDDEN)), made(VOCABULARY, HIDDEN)
    assert kernels.stretches(decoding, embeddings, head)
    assert not kernels.stretches(decoding, embeddings.bfloat16(), head)
    assert not kernels.stretches(decoding, made(HIDDEN, VOCABULARY).t(), head)
    assert not kernels.stretches(decoding, made(VOCABULARY, 32), head)
    assert not kernels.stretches(decoding, embeddings[1:], head)  # a token that can be drawn has none
    assert kernels.stretches(decoding, made(VOCABULARY + 1, HIDDEN), head)
    assert not kernels.stretches(decoding, embeddings.to("meta"), head)
    assert not kernels.stretches(decoding, embeddings, kernels.Linear(made(VOCABULARY, 32)))
    assert not kernels.stretches(decoding, embeddings, kernels.Linear(made(VOCABULARY, HIDDEN).bfloat16()))
    adapted = kernels.Linear(made(VOCABULARY, HIDDEN), None, made(2, HIDDEN), made(VOCABULARY, 2))
    assert not kernels.stretches(decoding, embeddings, adapted)
