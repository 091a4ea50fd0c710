"""Kernels of decoding steps against their formulas in float64, as several generations of processors compute them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding_layers import DTYPES, made, weights
from matrices import at_the_end
from quartet import kernels

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums of some hundred numbers, rounded to the dtype."""
    error = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error * float(expected.abs().mean()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(8, 5), (64, 16), (257, 50), (512, 300), (96, 1), (96, 50)])
def test_few_rows(generation: str, width: int, features: int, dtype: torch.dtype, threads: int) -> None:
    """Any number of rows and features; with and without a bias."""
    torch.set_num_threads(threads)
    weight, bias = made(features, width, dtype=dtype), made(features)
    for rows in (1, 3, 16, 17, 32, 41, kernels.FEW):
        states = made(rows, width, dtype=dtype)
        expected = states.double() @ weight.double().t()
        close(kernels.few_rows(states, kernels.Linear(weight)), expected, dtype)
        found = kernels.few_rows(states, kernels.Linear(weight, bias))
        assert found.dtype == dtype
        close(found, expected + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 15, 17, 33, 65])
def test_nothing_beyond_the_weights_is_read(generation: str, features: int, dtype: torch.dtype) -> None:
    states, weight = made(3, 96, dtype=dtype), made(features, 96, dtype=dtype)
    with at_the_end(weight) as there:
        close(kernels.few_rows(states, kernels.Linear(there)), states.double() @ weight.double().t(), dtype)


@pytest.mark.parametrize("rows", [1, 40])
def test_no_digit_of_float32_is_lost(generation: str, rows: int) -> None:
    """Ones and zeros give back what they multiply, bit for bit."""
    numbers = torch.randn(rows, 96) * torch.randint(-40, 41, (rows, 96)).float().exp2()
    assert torch.equal(kernels.few_rows(numbers, kernels.Linear(torch.eye(96))), numbers)
    weight = torch.randn(48, 96) * torch.randint(-40, 41, (48, 96)).float().exp2()
    found = kernels.few_rows(torch.eye(96)[:rows], kernels.Linear(weight))
    assert torch.equal(found, weight.t()[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone(generation: str, dtype: torch.dtype) -> None:
    """What a row gives does not depend on who is computed beside it."""
    states, layer = made(37, 160, dtype=dtype), kernels.Linear(made(70, 160, dtype=dtype))
    together = kernels.few_rows(states, layer)
    for rows in (slice(0, 1), slice(5, 21), slice(20, 37)):
        assert torch.equal(kernels.few_rows(states[rows], layer), together[rows])


def test_shapes_in_front_are_kept(generation: str) -> None:
    states, weight = made(2, 1, 3, 8), made(4, 8)
    close(kernels.few_rows(states, kernels.Linear(weight)), states.double() @ weight.double().t(), torch.float32)


@needs_compiler
def test_what_does_not_fit_is_not_computed() -> None:
    weight = made(6, 8)
    assert kernels.Linear(weight).fits()
    assert not kernels.Linear(weight.half()).fits()
    assert not kernels.Linear(weight.t()).fits()
    assert not kernels.Linear(weight, made(6).bfloat16()).fits()
    assert not kernels.Linear(weight, None, made(2, 8).bfloat16(), made(6, 2)).fits()
    assert not kernels.Linear(weight.to("meta")).fits()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_by_the_cumulative_distribution(
    generation: str, dtype: torch.dtype, temperature: float
) -> None:
    """In float64 the running sum before a token is at most u, and with it above u, to rounding."""
    logits = made(40, 300, dtype=dtype) * 3
    logits[:, 7], logits[0, :200] = -torch.inf, -torch.inf
    uniform = torch.linspace(0, 1 - 2**-53, 40, dtype=torch.float64)
    found = kernels.draw(logits, uniform, temperature)
    assert found is not None
    tokens, logprobs = found
    exact = (logits.double() / temperature).softmax(-1)
    upto = exact.cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
    chosen = exact.gather(1, tokens[:, None]).squeeze(1)
    assert (upto > uniform - 1e-6).all()
    assert (upto - chosen <= uniform + 1e-6).all()
    assert (chosen > 0).all()
    torch.testing.assert_close(logprobs.double(), chosen.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_most_likely_token_is_the_first_of_the_largest(generation: str, dtype: torch.dtype) -> None:
    logits = made(5, 260, dtype=dtype)
    logits[2, 100] = logits[2, 200] = 9.0
    found = kernels.draw(logits, None, 0.8)
    assert found is not None
    assert torch.equal(found[0], logits.argmax(-1))
    assert found[0][2] == 100
    expected = (logits.double() / 0.8).log_softmax(-1).amax(-1)
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_has_no_probability(generation: str, bad: float) -> None:
    logits = made(3, 140)
    logits[1, 50] = bad
    for uniform in (None, torch.full((3,), 0.5, dtype=torch.float64)):
        found = kernels.draw(logits, uniform, 1.0)
        assert found is not None
        assert found[1].isnan().tolist() == [False, True, False]
        assert ((found[0] >= 0) & (found[0] < 140)).all()


@needs_compiler
def test_a_certain_token_is_drawn_whatever_the_number() -> None:
    """Its neighbours have no probability at all, so that rounding at either end leads nowhere else."""
    logits = torch.full((3, 300), -1e4)
    logits[:, 150] = 5.0
    found = kernels.draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert found is not None
    assert found[0].tolist() == [150] * 3
    assert found[1].tolist() == [0.0] * 3


def reference(layers: list[Any], last: Tensor, angles: Any, states: Tensor, positions: Tensor, eps: float) -> Tensor:
    """The step of float64 numbers, row by row (RMS norms arXiv 1910.07467, rotary 2104.09864, grouped heads 2305.13245)."""
    states = states.double()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()

    def by(layer: kernels.Linear, x: Tensor) -> Tensor:
        found = x @ layer.weight.double().t() + (0 if layer.bias is None else layer.bias.double())
        return found if layer.down is None else found + x @ layer.down.double().t() @ layer.up.double().t()  # type: ignore[union-attr]

    def turned(x: Tensor, position: int) -> Tensor:
        half = x.shape[-1] // 2
        other = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles[0][position].double() + other * angles[1][position].double()

    rows = []
    for row, position in enumerate(positions.tolist()):
        x = states[row]
        for layer in layers:
            size = layer.keys.shape[-1]
            given = normed(x, layer.first_norm)
            query, key = (by(one, given).view(-1, size) for one in (layer.query, layer.key))
            if layer.query_norm is not None:
                query, key = normed(query, layer.query_norm), normed(key, layer.key_norm)
            keys, values = layer.keys[row].double(), layer.values[row].double()
            keys[:, position], values[:, position] = turned(key, position), by(layer.value, given).view(-1, size)
            start = 0 if layer.window is None else max(0, position + 1 - layer.window)
            group = len(query) // len(keys)
            mixed = [
                (turned(query[head], position) @ keys[head // group, start : position + 1].t() * 0.3).softmax(-1)
                @ values[head // group, start : position + 1]
                for head in range(len(query))
            ]
            x = x + by(layer.out, torch.cat(mixed))
            given = normed(x, layer.second_norm)
            gate = by(layer.gate, given)
            x = x + by(layer.down, gate * gate.sigmoid() * by(layer.up, given))
        rows.append(normed(x, last))
    return torch.stack(rows)


@needs_compiler
def test_more_rows_than_the_kernels_are_for_are_refused() -> None:
    layer = kernels.Linear(made(6, 8))
    with pytest.raises(ValueError, match="129 rows"):
        kernels.few_rows(made(kernels.FEW + 1, 8), layer)
    with pytest.raises(ValueError, match="adapter of rank 2"):
        kernels.few_rows(made(3, 8), kernels.Linear(made(6, 8), None, made(2, 8), made(6, 2)))
    layers, size = weights(torch.float32, 0)
    angles = made(size["columns"], size["size"]), made(size["columns"], size["size"])
    decoding = kernels.Decoding(
        layers, made(size["hidden"]), angles, heads=size["heads"], eps=1e-5, scaling=0.3, narrow=False
    )
    with pytest.raises(ValueError, match="21 rows over a cache of 20"):
        decoding(made(21, size["hidden"]), torch.zeros(21, dtype=torch.int64))


@needs_compiler
def test_layers_are_of_one_shape() -> None:
    layers, size = weights(torch.float32, 3)
    assert kernels.alike(layers, size["hidden"])
    assert not kernels.alike(layers, size["hidden"] + 1)
    other, _ = weights(torch.float32, 3, inner=71)
    assert not kernels.alike([layers[0], other[1]], size["hidden"])
    other, _ = weights(torch.float32, 3, shared=4)
    assert not kernels.alike([layers[0], other[1]], size["hidden"])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"hidden": 128, "size": 32, "inner": 160, "shared": 1}])
def test_a_step_of_a_transformer(
    generation: str, dtype: torch.dtype, rank: int, threads: int, sizes: dict[str, int]
) -> None:
    """Grouped heads, a window, norms of heads, a bias and adapters, against float64; the cache holds what is new."""
    torch.set_num_threads(threads)
    layers, size = weights(dtype, rank, **sizes)
    last, rows = made(size["hidden"], seed=9), 18
    angles = made(size["columns"], size["size"], seed=4), made(size["columns"], size["size"], seed=5)
    states, positions = made(rows, size["hidden"], seed=6, dtype=dtype), torch.arange(rows) % size["columns"]
    positions[3] = size["columns"] - 1
    expected = reference(layers, last, angles, states, positions, 1e-5)
    kept = [layer.keys.clone() for layer in layers]
    narrow = dtype == torch.bfloat16 and rank == 0
    decoding = kernels.Decoding(layers, last, angles, heads=size["heads"], eps=1e-5, scaling=0.3, narrow=narrow)
    found = decoding(states, positions)
    error = 2e-5 if dtype == torch.float32 else 0.05
    assert float((found - expected).norm() / expected.norm()) < error
    for layer, before in zip(layers, kept, strict=True):
        changed = (layer.keys != before).any(-1).any(1).nonzero()
        assert changed.tolist() == [[row, position] for row, position in enumerate(positions.tolist())]
