"""The trace counts what a real allocator would hold, by hand-counted bytes."""

import torch
from torch import nn

from quartet.memory.trace import ACTIVATIONS, GRADIENTS, KINDS, LOGITS, FakeTensors, MemoryTrace, at_depth


def test_peak_of_a_stretch_counts_what_is_alive_at_once() -> None:
    with FakeTensors() as mode:
        known = torch.empty(100)
        trace = MemoryTrace([known], vocabulary=-1)
        with mode.counted_by(trace):
            trace.enter("first")
            one = known + 1  # 400 bytes
            two = one * 2  # 800 alive
            del one
            trace.enter("second")
            three = two.view(10, 10).t()  # a view costs nothing
            four = three + 1  # 800 alive
            del two, three, four
            trace.enter("third")
            known.add_(1)  # in place, and counted elsewhere
    assert {label: sum(held.values()) for label, held in trace.peaks.items()} == {
        "first": 800,
        "second": 800,
        "third": 0,
    }


def test_what_an_operation_is_made_of_inside_does_not_count() -> None:
    """torch runs silu's backward on shapes as a chain of operations, whose results no kernel holds."""
    peaks = []
    for stacked in (False, True):
        with FakeTensors() as mode:
            gradient, inputs = torch.empty(100), torch.empty(100)
            trace = MemoryTrace([gradient, inputs], vocabulary=-1)
            with trace if stacked else mode.counted_by(trace):
                trace.enter("only")
                torch.ops.aten.silu_backward(gradient, inputs)
        peaks.append(sum(trace.peaks["only"].values()))
    assert peaks == [400, 400]


def test_saved_tensors_stay_until_backward_and_gradients_are_told_apart() -> None:
    with FakeTensors() as mode:
        layer = nn.Linear(10, 20, bias=False)
        trace = MemoryTrace(list(layer.parameters()), vocabulary=20)
        with mode.counted_by(trace):
            trace.enter("forward")
            inputs = torch.empty(5, 10)  # 200 bytes, saved for the weight's gradient
            logits = layer(inputs)  # 400 bytes, freed once squared and saved
            del inputs
            loss = logits.square().sum()  # 400 and 4 bytes
            del logits
            handle = layer.weight.register_post_accumulate_grad_hook(lambda p: trace.mark([p.grad], GRADIENTS))
            trace.enter("backward")
            loss.backward()
            handle.remove()
            del loss
            trace.enter("after")
    forward = trace.peaks["forward"]
    assert (forward[ACTIVATIONS], forward[LOGITS]) == (204, 800)
    assert trace.peaks["after"] == dict.fromkeys(KINDS, 0) | {GRADIENTS: 800}


def test_depth_is_extrapolated_label_by_label() -> None:
    def held(count: float) -> dict[str, float]:
        return dict.fromkeys(KINDS, 0.0) | {ACTIVATIONS: count}

    small = {"forward policy first layer": held(10), "backward policy last layer": held(100)}
    large = small | {
        "forward policy first layer": held(50),
        "backward policy last layer": held(101),
        "forward policy middle layer": held(9000),
    }
    found = at_depth(small, [(large, 10.0)])
    # The first is smaller at both depths and larger at the third: only a line for each label finds that.
    assert {label: kinds[ACTIVATIONS] for label, kinds in found.items()} == {
        "forward policy first layer": 410,
        "backward policy last layer": 110,
    }


def test_products_in_bfloat16_count_in_every_form() -> None:
    """oneDNN compiles a kernel for each, whether its result is new, given or added to."""
    left, right = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
    result = left @ right
    with MemoryTrace([], vocabulary=-1) as trace:
        torch.mm(left, right, out=result)
        assert len(trace.products) == 1
        result.addmm_(left, right)
        assert len(trace.products) == 2
        result.addmm_(left, right)
        left.float() @ right.float()
        assert len(trace.products) == 2
        across = (
            right.t().contiguous().t()
        )  # as a linear layer multiplies, where its backward pass has the weight upright
        torch.mm(left, across)
        assert len(trace.products) == 3
