"""Fast linear layers against torch's and PEFT's, in float64 where the arithmetic is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import Pipeline
from quartet import kernels
from quartet.config import LoraConfig
from quartet.kernels import multiplying
from quartet.models import adapters, products
from quartet.models.adapters import AdapterSwitch
from quartet.models.linears import FastLinear, FastLoraLinear, lora_linear, restore_linears, use_fast_linears
from quartet.models.precision import autocast
from tiny import TinyRun

CPU = torch.device("cpu")


class Two(nn.Module):
    """One layer over oneDNN's threshold for transposed weights, one over the plain threshold, one small."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 512)
        self.wide = nn.Linear(512, 576, bias=False)
        self.small = nn.Linear(576, 3)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.small(self.wide(torch.tanh(self.up(states))))
        return result


def make(*names: str, dtype: torch.dtype = torch.float32) -> Two:
    torch.manual_seed(0)
    model = Two().to(dtype)
    for name in names:
        model.requires_grad_(False)
        adapters.attach_fresh(model, name, LoraConfig(r=4, alpha=12, target_modules=("up", "wide", "small")), seed=0)
    for name in names:
        for _, parameter in adapters.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.1)
            parameter.requires_grad_(True)
    return model.to(dtype)


def gradients(model: nn.Module, states: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    states = states.detach().requires_grad_()
    result = model(states)
    result.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert states.grad is not None
    return {"result": result.detach(), "states": states.grad} | found


@pytest.mark.parametrize("library", ["MKL", "oneDNN", "kernels"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64)])
@pytest.mark.parametrize("name", [None, "one"])
def test_results_and_gradients_are_those_of_float64(
    name: str | None, shape: tuple[int, ...], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any processor, whichever library it would choose."""
    if library == "kernels" and multiplying.kernel("multiply") is None:
        pytest.skip("no kernels: no compiler was there at installation")
    monkeypatch.setattr(products, "_widest_vectors", lambda: library == "oneDNN")
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: library == "kernels")
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    names = () if name is None else (name, "two")
    states = torch.randn(shape)
    exact, fast = make(*names, dtype=torch.float64), make(*names)
    use_fast_linears(fast)
    assert {type(fast.up), type(fast.wide)} == ({FastLinear} if name is None else {FastLoraLinear})
    with AdapterSwitch(exact).on(name), AdapterSwitch(fast).on(name):
        expected, found = gradients(exact, states.double()), gradients(fast, states)
    assert expected.keys() == found.keys()
    assert name is None or any("lora_A.one" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", [None, "one"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_tokens_have_no_gradient(name: str | None, shape: tuple[int, ...]) -> None:
    fast = make(*(() if name is None else (name, "two")))
    use_fast_linears(fast)
    with AdapterSwitch(fast).on(name):
        found = gradients(fast, torch.randn(shape))
    assert found["states"].shape == shape
    assert found["result"].shape == (*shape[:-1], 3)
    assert not any(value.any() for value in found.values())


def test_shapes_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplying, "kernels_are_faster", lambda: True)
    monkeypatch.setattr(multiplying, "SMALLEST", 0)
    layer = FastLinear(64, 512)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(8, 65))
    assert layer(torch.randn(64)).shape == (512,)


def test_the_low_rank_gradient_is_exact() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weight, bias = random(5, 4), random(5)
    states, down, up = (t.requires_grad_() for t in (random(2, 3, 4), random(2, 4), random(5, 2)))
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.7), (states, down, up))
    expected = states @ (weight + 1.7 * up @ down).t() + bias
    torch.testing.assert_close(lora_linear(states, weight, bias, down, up, 1.7), expected)


def test_under_autocast_the_rounding_is_that_of_bfloat16() -> None:
    states = torch.randn(6, 64)
    with AdapterSwitch(exact := make("one")).on("one"):
        expected = gradients(exact, states)
    plain, fast = make("one"), make("one")
    use_fast_linears(fast)
    errors = []
    for model in (plain, fast):
        with AdapterSwitch(model).on("one"), autocast(CPU, torch.bfloat16):
            found = gradients(model, states)
        assert all(found[key].dtype == torch.float32 for key in found if "lora" in key)
        errors.append(sum(float((found[key] - value).norm() / value.norm()) for key, value in expected.items()))
    assert errors[1] < 1.2 * errors[0]


def test_an_adapter_that_is_off_gets_no_gradient() -> None:
    model = make("one", "two")
    use_fast_linears(model)
    switch = AdapterSwitch(model)
    with switch.on("two"):
        found = gradients(model, torch.randn(4, 64))
    assert any("lora_A.two" in key for key in found)
    assert not any("lora_A.one" in key for key in found)
    with switch.on(None), torch.no_grad():
        torch.testing.assert_close(model(torch.ones(4, 64)), make()(torch.ones(4, 64)))


def test_layers_of_others_stay() -> None:
    model = make()
    model.up.forward = lambda states: states @ torch.ones(64, 512)  # type: ignore[method-assign]
    use_fast_linears(model)
    assert type(model.up) is nn.Linear
    assert type(model.wide) is FastLinear


def test_small_products_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    for wide in (True, False):
        monkeypatch.setattr(products, "_widest_vectors", lambda wide=wide: wide)
        model = make()
        assert [products.has_onednn(layer.weight) for layer in (model.up, model.wide, model.small)] == [
            wide,
            wide,
            False,
        ]


@pytest.mark.parametrize("name", [None, "one"])
def test_a_layer_replaced_later_is_not_taken_apart(name: str | None) -> None:
    model = make(*() if name is None else (name,))
    use_fast_linears(model)
    up: Any = model.up
    with AdapterSwitch(model).on(name):
        assert up.taken_apart() is not None
        up.forward = lambda states: states @ torch.ones(64, 512)
        assert up.taken_apart() is None


def test_restored_layers_are_as_they_were() -> None:
    model = make("one")
    before = {name: type(module) for name, module in model.named_modules()}
    use_fast_linears(model)
    assert {name: type(module) for name, module in model.named_modules()} != before
    restore_linears(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_loaded_backbones_use_them(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run("llama", **{"models.lora": {"r": 4}, "models.sharing": "paired"}))
    kinds = {type(module) for module in pipeline.roles.policy.backbone.model.modules()}
    assert FastLoraLinear in kinds


@pytest.mark.parametrize("trained", [False, True])
def test_without_gradients_a_frozen_adapter_is_bit_for_bit_pefts(trained: bool) -> None:
    plain, fast = make("one"), make("one")
    use_fast_linears(fast)
    for model in (plain, fast):
        for _, parameter in adapters.adapter_parameters(model, "one"):
            parameter.requires_grad_(trained)
    states = torch.randn(6, 64)
    with AdapterSwitch(plain).on("one"), AdapterSwitch(fast).on("one"), torch.no_grad():
        expected, found = plain(states), fast(states)
    torch.testing.assert_close(found, expected)
    assert trained or torch.equal(found, expected)


def test_without_gradients_an_adapter_of_zeros_changes_no_bit() -> None:
    """At the start of a run the policy is its reference."""
    model = make("one")
    use_fast_linears(model)
    for name, parameter in adapters.adapter_parameters(model, "one"):
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    switch, states = AdapterSwitch(model), torch.randn(6, 64)
    with torch.no_grad():
        with switch.on("one"):
            policy = model(states)
        with switch.on(None):
            assert torch.equal(policy, model(states))


class Quantized(nn.Linear):
    """A linear layer by inheritance only, as bitsandbytes has them."""


def test_only_plain_layers_are_taken_apart() -> None:
    model = make("one")
    use_fast_linears(model)
    layers: list[Any] = [model.up, model.wide]
    with AdapterSwitch(model).on("one"):
        assert all(layer.taken_apart().down is layer.lora_A["one"].weight for layer in layers)
        model.wide.base_layer.__class__ = Quantized
        assert layers[1].taken_apart() is None
        found = gradients(model, torch.randn(4, 64))
    assert any("wide.lora_A.one" in key for key in found)


@pytest.mark.parametrize(
    ("capability", "intel", "unused", "slow"),
    [
        ("AVX512", False, True, False),
        ("AVX512", True, False, True),
        ("AVX2", False, False, True),
        ("AVX2", True, False, False),
        ("DEFAULT", False, False, False),
    ],
)
def test_what_mkl_leaves_unused_on_other_makers_processors(
    capability: str, intel: bool, unused: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(multiplying, "is_intel", lambda: intel)
    monkeypatch.setattr(multiplying, "has_wide_vectors", lambda: True)
    monkeypatch.setattr(kernels, "is_intel", lambda: intel)
    assert products._widest_vectors.__wrapped__() is unused
    assert multiplying.kernels_are_faster.__wrapped__() is slow
