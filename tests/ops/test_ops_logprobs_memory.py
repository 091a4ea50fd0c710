"""Chunked log-probabilities hold one chunk of logits at a time, and none afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small_heads import H, N, V, make
from torch.autograd.graph import saved_tensors_hooks

from quartet.ops.logprobs import chunked_logprobs


class Packed:
    """A tensor that autograd saved, alive as long as the graph that saved it."""

    def __init__(self, tensor):
        self.tensor = tensor


def live_tensors():
    """Sizes of all tensors that Python can reach."""
    gc.collect()
    # `isinstance` would ask each object for its class, and some deprecated ones answer with a warning.
    return [each.numel() for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


@pytest.mark.parametrize("mode", ["frozen", "frozen_entropy_grad", "trainable", "trainable_entropy_grad"])
def test_no_logits_survive_the_forward_pass(mode):
    """Neither autograd nor anything else holds a tensor as large as a chunk of logits, nor after the backward."""
    trainable, entropy_grad = mode.startswith("trainable"), mode.endswith("entropy_grad")
    head, hidden, tokens, _, _ = make("capped", trainable=trainable)
    chunk = 7
    least = (N - chunk) * V
    assert least > N * H, "the logits of the last chunk must be larger than the hidden states"
    saved = weakref.WeakSet()

    def pack(tensor):
        packed = Packed(tensor)
        saved.add(packed)
        return packed

    before = live_tensors()
    with saved_tensors_hooks(pack, lambda packed: packed.tensor):
        results = chunked_logprobs(
            hidden,
            head,
            tokens,
            temperature=1.0,
            chunk_tokens=chunk,
            with_entropy=True,
            head_trainable=trainable,
            entropy_grad=entropy_grad,
        )
    after = live_tensors()
    assert results[0].requires_grad
    sizes = [packed.tensor.numel() for packed in saved if packed.tensor.numel()]
    if mode == "frozen":
        # All that is kept: the derivative by the hidden states.
        assert sizes == [N * H]
    assert max(sizes, default=0) <= N * H
    sum(each.sum() for each in results if each.requires_grad).backward()
    for parameter in (hidden, *head.parameters()):
        parameter.grad = None
    for sizes in (after, live_tensors()):
        assert sorted(size for size in sizes if size >= least) == sorted(size for size in before if size >= least)


@pytest.mark.parametrize("mode", ["no_grad", "frozen", "trainable"])
def test_the_head_never_sees_more_than_one_chunk(mode):
    head, hidden, tokens, _, _ = make(trainable=mode == "trainable")
    rows = []

    def counting(states):
        rows.append(len(states))
        return head(states)

    with torch.set_grad_enabled(mode != "no_grad"):
        logprobs, _ = chunked_logprobs(
            hidden,
            counting,
            tokens,
            temperature=1.0,
            chunk_tokens=4,
            with_entropy=False,
            head_trainable=mode == "trainable",
        )
    assert rows == [4, 4, 3]
    if mode == "no_grad":
        return
    logprobs.sum().backward()
    # A frozen head is not asked again in the backward pass; a trainable one is recomputed once.
    assert sorted(rows) == sorted([4, 4, 3] * (1 if mode == "frozen" else 2))
