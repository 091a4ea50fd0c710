"""What engines hold beside a process's shares, by hand for small sizes; benchmarks/scaling.py measures it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quartet.memory.choices import Choices
from quartet.memory.sharding import HOOKS, Pieces, extra_bytes, loading_bytes, resting_gradients

PIECES = Pieces(
    policy_bytes=4000,
    width=4,
    layer=100,
    outside={"policy": 300, "reference": 300, "value": 180, "reward": 180},
    head=120,
    largest=130,
    largest_in_layer=40,
    trained=1500,
    largest_trained=130,
    full=True,
    tensors=10,
)


def choices(engine: str, **changes: Any) -> Choices:
    return Choices("separate", None, "float32", False, 1, 2, world_size=4, engine=engine, **changes)


@pytest.mark.parametrize(
    ("engine", "rollout", "scoring", "update"),
    [
        ("none", 0, 0, 0),
        # Everything that is trained fits into one bucket: 1500 numbers of 4 bytes.
        ("ddp", 0, 0, 6000),
        ("zero2", 0, 0, 12000),
        # The policy beside the bucket; a weight and its parts and the LM head beside it; the sum of a bucket as well.
        # DeepSpeed's hooks everywhere.
        (
            "zero3",
            4000 + 6000 + 10 * HOOKS,
            2 * 130 * 4 + 6000 + 10 * HOOKS,
            2 * 130 * 4 + 12000 + 10 * HOOKS,
        ),
        # At the first layer: outside of the layers and a layer, each twice.
        ("fsdp2", 4000, (2 * 300 + 2 * 100) * 4, (2 * 300 + 2 * 100) * 4),
    ],
)
def test_beside_the_shares(engine: str, rollout: float, scoring: float, update: float) -> None:
    asked = choices(engine, gather_for_rollout=engine in ("zero3", "fsdp2"))
    found = [extra_bytes(phase, asked, PIECES, cuda=False) for phase in ("rollout", "scoring", "update")]
    assert found == [rollout, scoring, update]


@pytest.mark.parametrize(
    ("at", "numbers"),
    [
        ("forward policy first layer", 2 * 300 + 2 * 100),
        ("forward policy last layer", 300 + 2 * 100),
        ("forward policy logits", 300 + 120),
        ("backward policy logits", 300 + 120),  # the head's gradient waits for that of the embeddings
        ("backward policy last layer", 300 + 120 + 2 * 100 + 2 * 100),
        ("backward policy embeddings", 300 + 120 + 100),
        ("backward value embeddings", 180 + 100),
        ("backward value first layer", 180 + 2 * 100 + 2 * 100),
        ("forward value last layer", 180 + 2 * 100),
    ],
)
def test_fsdp2_holds_whole_weights_and_gradients(at: str, numbers: int) -> None:
    """A layer and the next one, the gradients of this and of the one before; what is outside throughout."""
    assert extra_bytes("update", choices("fsdp2"), PIECES, cuda=False, at=at) == 4 * numbers


def test_fsdp2_holds_the_last_gradients_again_while_they_are_summed() -> None:
    """The gradient of large embeddings, which the trace sees once: in the buffer to be sent, in gloo's copy, and a share."""
    large = replace(PIECES, outside={"value": 3000})
    held = [
        extra_bytes("update", choices("fsdp2"), large, cuda=cuda, at="backward value embeddings")
        for cuda in (False, True)
    ]
    assert held == [4 * (2.25 * 3000 - 3000), 4 * (3000 + 100)]


def test_fsdp2_sends_gradients_in_float32() -> None:
    half = replace(PIECES, width=2)
    held = extra_bytes("update", choices("fsdp2"), half, cuda=False, at="backward value first layer")
    assert held == 2 * (180 + 3 * 100) + 4 * 100
    adapters = replace(PIECES, full=False)
    held = extra_bytes("update", choices("fsdp2"), adapters, cuda=False, at="backward value first layer")
    assert held == 4 * (180 + 2 * 100)


@pytest.mark.parametrize(
    ("at", "numbers"),
    [
        ("forward policy embeddings", 2 * 130),
        ("forward policy first layer", 2 * 40),
        ("forward policy logits", 2 * 120),
        ("backward policy start", 2 * 40),
        ("backward value embeddings", 2 * 130),
        ("backward policy logits", 2 * 120 + 2 * 130),
        ("backward policy last layer", 2 * 40),
    ],
)
def test_zero3_holds_one_weight_whole(at: str, numbers: int) -> None:
    """Itself and its parts; at the LM head the value's embeddings and their gradient as well."""
    beside = 6000 + 10 * HOOKS  # a bucket of gradients, and hooks
    held = [
        extra_bytes(phase, choices("zero3"), replace(PIECES, full=full), cuda=False, at=at) - beside
        for phase, full in (("scoring", True), ("scoring", False))
    ]
    assert held == [4 * numbers, 4 * (240 if at == "backward policy logits" else numbers)]
    tied = replace(PIECES, head=0)
    assert (
        extra_bytes("scoring", choices("zero3"), tied, cuda=False, at="forward policy logits") - beside == 4 * 2 * 130
    )


def test_on_a_gpu_weights_are_fetched_ahead() -> None:
    """DeepSpeed's prefetch of 50 million numbers; its hooks are in host memory."""
    held = [extra_bytes("scoring", choices("zero3"), PIECES, cuda=cuda) for cuda in (False, True)]
    assert held[1] - held[0] == 50_000_000 * 4 - 10 * HOOKS


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_gradients_are_summed_in_the_backward_pass(engine: str) -> None:
    """All of them fit into one bucket, which is full at the end; smaller buckets are summed before."""
    stretches = [
        "forward policy logits",
        "backward policy start",
        "backward policy last layer",
        "backward policy first layer",
    ]
    one, many = PIECES, replace(PIECES, trained=50_000_000)
    there = [
        [extra_bytes("update", choices(engine), pieces, cuda=False, at=at) > 0 for at in stretches]
        for pieces in (one, many)
    ]
    assert there == [[False, False, False, True], [False, False, True, True]]


def test_while_loading() -> None:
    # Stage 2 copies its share and makes gradients; stage 3 makes gradients for one group, before the frozen rest.
    assert loading_bytes(choices("zero2"), 100, 0, 1, cuda=False) == 200
    assert loading_bytes(choices("zero3"), 100, 0, 1, cuda=False) == 100 + HOOKS
    assert loading_bytes(choices("zero3"), 100, 60, 2, cuda=False) == 40 + 2 * HOOKS
    assert loading_bytes(choices("zero3"), 100, 500, 1, cuda=False) == HOOKS
    assert loading_bytes(choices("fsdp2"), 100, 0, 1, cuda=False) == 0
    assert (resting_gradients(choices("zero2"), 7), resting_gradients(choices("zero3"), 7)) == (0, 7)
