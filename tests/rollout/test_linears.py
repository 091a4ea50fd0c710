"""Replaced linear layers give what the original ones give, and are gone afterwards."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from quartet.config import LoraConfig
from quartet.kernels import multiplying
from quartet.models import adapters
from quartet.models.adapters import AdapterSwitch
from quartet.models.precision import autocast
from quartet.rollout.linears import fast_linears


class Small(nn.Module):
    """A large layer, a small one, and a layer of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.small = nn.Linear(64, 5)
        self.other = Conv1D(3, 5)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.other(self.small(self.down(self.up(states).relu())))
        return result


def make(*names: str) -> Small:
    torch.manual_seed(0)
    model = Small()
    for name in names:
        adapters.attach_fresh(model, name, LoraConfig(r=4, alpha=12, target_modules=("up", "small")), seed=0)
        for _, parameter in adapters.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.3)
    return model


def replaced(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def plain_layers(dtype: torch.dtype) -> set[str]:
    """The plain layers that are replaced: in bfloat16 only where the processor multiplies matrices in it."""
    known = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {"up", "down"} if known else set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 3, 64), (40, 64)])
def test_results_are_the_same_to_rounding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = make()
    states = torch.randn(shape)
    exact = model.double()(states.double())
    model.float()
    with torch.no_grad(), autocast(torch.device("cpu"), dtype):
        before = model(states)
        with fast_linears(model, dtype, None):
            assert replaced(model) == plain_layers(dtype)
            within = model(states)
    assert replaced(model) == set()
    assert within.dtype == before.dtype
    assert within.shape == before.shape
    assert (within - exact).abs().max() <= 2 * (before - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", ["one", "two"])
def test_the_adapter_that_is_on_is_added(dtype: torch.dtype, on: str) -> None:
    model = make("one", "two")
    switch = AdapterSwitch(model)
    states = torch.randn(6, 64)
    with torch.no_grad(), switch.on(on), autocast(torch.device("cpu"), dtype):
        expected = model(states)
        with fast_linears(model, dtype, on):
            assert {"up", "small"} <= replaced(model)
            torch.testing.assert_close(model(states), expected, rtol=0.1, atol=0.03 if dtype != torch.float32 else 1e-5)


def test_without_an_adapter_none_is_added() -> None:
    model = make("one")
    states = torch.randn(6, 64)
    switch = AdapterSwitch(model)
    with torch.no_grad(), switch.on(None):
        expected = model(states)
        with fast_linears(model, torch.float32, None):
            torch.testing.assert_close(model(states), expected)


def test_layers_come_back_after_an_error_and_foreign_forwards_stay() -> None:
    model = make("one")
    foreign = model.down.forward
    model.down.__dict__["forward"] = foreign
    with pytest.raises(RuntimeError), fast_linears(model, torch.float32, "one"):
        model(torch.randn(6, 63))
    assert replaced(model) == {"down"}
    assert model.down.__dict__["forward"] is foreign


def test_weights_are_only_read() -> None:
    model = make("one")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    bfloat16 = autocast(torch.device("cpu"), torch.bfloat16)
    with torch.no_grad(), bfloat16, fast_linears(model, torch.bfloat16, "one"):
        model(torch.randn(6, 64))
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", ["one", "two"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_merged_layers_give_the_same_with_one_product(
    dtype: torch.dtype, on: str, held: torch.dtype, computed_by: str
) -> None:
    """Against the layer in float64; what is rounded once more is the sum of weight and adapter."""
    model = make("one", "two")
    for layer in (model.up, model.small):
        base: Any = layer.base_layer
        base.to(held)
    switch, states = AdapterSwitch(model), torch.randn(6, 64)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    exact = deepcopy(model).double()
    with torch.no_grad(), AdapterSwitch(exact).on(on):
        expected = exact(states.double())
    counter = Products()
    with (
        torch.no_grad(),
        switch.on(on),
        autocast(torch.device("cpu"), dtype),
        fast_linears(model, dtype, on, merged=True),
    ):
        assert "up" in replaced(model)
        assert "up.base_layer" not in replaced(model)
        with counter:
            found = model(states)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 == held else 0.2)
    # One for each layer, three of which a kernel computes; torch does a plain one if it has no fast products in bfloat16.
    slow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert counter.count == (4 if computed_by == "torch" else 1 + slow)
    assert replaced(model) == set()
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("rows", [6, 200])
def test_a_hook_on_a_base_layer_waits_for_few_rows_and_many(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where kernels would compute a layer and its adapter in one product."""
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    model, states = make("one"), torch.randn(rows, 64)
    seen: list[torch.Size] = []
    up: Any = model.up
    with torch.no_grad(), AdapterSwitch(model).on("one"):
        expected = model(states)
        up.base_layer.register_forward_hook(lambda *given: seen.append(given[2].shape))
        with fast_linears(model, torch.float32, "one"):
            torch.testing.assert_close(model(states), expected, rtol=1e-4, atol=1e-4)
    assert seen == [torch.Size((rows, 96))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_layers_of_a_plan_are_computed_by_themselves_as_in_the_run(dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.no_grad():
        model, states = make(), torch.randn(200, 64)
        with fast_linears(model, dtype, None):
            assert replaced(model) == ({"up", "down"} if dtype == torch.float32 else set())
            assert model(states).shape == (200, 3)


def test_what_cannot_be_merged_stays_apart() -> None:
    """A layer whose base another library computes."""
    model = make("one")
    up: Any = model.up
    up.base_layer.__dict__["forward"] = foreign = up.base_layer.forward
    states = torch.randn(6, 64)
    with torch.no_grad(), AdapterSwitch(model).on("one"):
        expected = model(states)
        with fast_linears(model, torch.float32, "one", merged=True):
            assert up.base_layer.__dict__["forward"] is foreign
            torch.testing.assert_close(model(states), expected)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    NAMES = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise")

    def __init__(self) -> None:
        start: Any = super().__init__
        start()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in self.NAMES
        return func(*args, **(kwargs or {}))
