"""What ZeRO-3's weights and modules share, each by itself and without other processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quartet.distributed.stage3_hooks import SharedHooks, injected_into_few
from quartet.distributed.stage3_weights import COMMON, METHOD, OWN, joined, place_for_shares, sharing_functions


class Converter:
    """Gives weights functions as DeepSpeed does."""

    def convert(self, param: Any) -> None:
        def knows(times: int = 1) -> tuple[Any, ...]:
            return (self, param, times)

        def knows_nothing(*given: Any) -> tuple[Any, ...]:
            return (self, *given)

        for name in OWN:
            setattr(param, name, knows)
        for name in COMMON:
            setattr(param, name, knows_nothing)
        setattr(param, METHOD, knows_nothing.__get__(param))
        param.item = None


def test_functions_of_the_first_weight_act_on_every_weight() -> None:
    convert, one, other = sharing_functions(Converter.convert), Converter(), Converter()
    weights = [nn.Parameter(torch.tensor(float(number))) for number in range(3)]
    for converter, weight in zip((one, one, other), weights, strict=True):
        convert(converter, weight)
    for converter, weight in zip((one, one, other), weights, strict=True):
        held: Any = weight
        for name in OWN:
            found = getattr(held, name)(times=2)
            assert found[0] is converter
            assert found[1] is weight
            assert found[2] == 2
            assert getattr(held, name)()[2] == 1
        assert held.all_gather_coalesced(5) == (converter, 5)
        assert held.ds_summary()[1] is weight
    kept: list[dict[str, Any]] = [vars(weight) for weight in weights]
    for name in (*OWN, METHOD):
        assert kept[0][name].__func__ is kept[1][name].__func__ is not kept[2][name].__func__
    assert kept[0]["all_gather_coalesced"] is kept[1]["all_gather_coalesced"]


def test_a_weights_number_is_that_of_the_whole_weight() -> None:
    weight: Any = nn.Parameter(torch.zeros(()))
    sharing_functions(Converter.convert)(Converter(), weight)

    def fetch() -> None:
        weight.data.fill_(3)

    weight.all_gather = fetch
    assert weight.item() == 3


def test_shares_in_one_tensor_are_told_from_others() -> None:
    weights = [torch.zeros(5), torch.zeros(2, 3)]
    places = list(place_for_shares(weights, 2, torch.device("cpu")).values())
    assert [len(place) for place in places] == [3, 3]
    places[0][:], places[1][:] = 1, 2
    flat = joined(places)
    assert flat is not None
    assert flat.tolist() == [1, 1, 1, 2, 2, 2]
    assert flat.data_ptr() == places[0].data_ptr()
    others: list[list[Tensor]] = [
        places[::-1],
        places[:1],  # not all of it
        places[1:],
        [places[0], torch.zeros(3)],
        [places[0], places[1].view(torch.int32)],
    ]
    for tensors in others:
        assert joined(tensors) is None


def test_shared_hooks_come_off_and_leave_those_of_others() -> None:
    outermost, inside = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda *arguments: calls.append(name)

    inside.register_forward_pre_hook(note("theirs"))
    pre, post = outermost.register_forward_pre_hook, outermost.register_forward_hook
    pre(note("not theirs"))
    forward = [pre(note("fetch")), post(note("release"))]
    backward = [post(note("watch")), pre(note("count"))]
    hooks = SharedHooks(SimpleNamespace(module=outermost, forward_hooks=forward, backward_hooks=backward), [inside])
    inside(torch.zeros(1, 2))
    assert calls == ["theirs", "fetch", "count", "release", "watch"]
    hooks.remove()
    calls.clear()
    inside(torch.zeros(1, 2))
    assert calls == ["theirs"]


def test_modules_without_weights_share_a_dictionary_that_takes_none() -> None:
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict, _inject_parameters

    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.LayerNorm(2, elementwise_affine=False), nn.Dropout())
    injected_into_few(_inject_parameters)(model, ZeROOrderedDict)
    full, empty, without, dropout = model
    assert all(isinstance(module._parameters, ZeROOrderedDict) for module in model.modules())
    assert list(full._parameters) == ["weight", "bias"]
    assert list(without._parameters) == ["weight", "bias"]
    assert empty._parameters is dropout._parameters is model._parameters
    assert full._parameters is not without._parameters
    with pytest.raises(RuntimeError, match="cannot be given scale"):
        empty.scale = nn.Parameter(torch.zeros(1))
    assert model(torch.zeros(1, 2)).shape == (1, 2)
