"""Gated MLPs and RMS norms against the library's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from checkpoints import write_model
from quartet.config import LoraConfig
from quartet.models import adapters
from quartet.models.adapters import AdapterSwitch
from quartet.models.fused import rms_norm, use_fused_layers
from quartet.models.gated import gated, gated_down
from quartet.models.linears import FastLinear, use_fast_linears
from quartet.models.precision import autocast

pytestmark = pytest.mark.usefixtures("computed_by")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
LAYERS = {
    "llama mlp": lambda: LlamaMLP(LlamaConfig(**SMALL)),
    "qwen3 mlp": lambda: Qwen3MLP(Qwen3Config(**SMALL)),
    "gemma2 mlp": lambda: Gemma2MLP(Gemma2Config(**SMALL)),
    "llama norm": lambda: LlamaRMSNorm(16),
    "qwen3 norm": lambda: Qwen3RMSNorm(16),
}


def gradients(layer: nn.Module, states: Tensor) -> list[Tensor]:
    states = states.detach().requires_grad_()
    result = layer(states)
    result.square().sum().backward()
    grads = [states.grad, *(p.grad for p in layer.parameters())]
    return [result.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_the_librarys(name: str, linears: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = LAYERS[name]().to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    fused = copy.deepcopy(plain)
    if linears:
        use_fast_linears(fused)
    use_fused_layers(fused)
    assert type(fused) is not type(plain)
    states = torch.randn(3, 5, 16, dtype=dtype)
    expected, found = gradients(plain, states), gradients(fused, states)
    assert len(expected) == len(found) == 1 + 1 + len(list(plain.parameters()))
    exact = gradients(copy.deepcopy(plain).double(), states.double())
    for one, other, right in zip(expected, found, exact, strict=True):
        assert one.dtype == other.dtype
        if dtype == torch.float32:
            torch.testing.assert_close(other, one)
        # Where the library rounds more often than a kernel its gradients are no measure, but the exact ones are.
        theirs, ours = ((t.double() - right).norm() / right.norm() for t in (one, other))
        assert ours <= max(1.5 * theirs, 1e-6)
    with torch.no_grad():
        assert torch.equal(fused(states), plain(states))


@pytest.mark.parametrize("linears", [False, True])
def test_less_is_kept(linears: bool) -> None:
    kept: dict[str, int] = {}
    for name in ("plain", "fused"):
        layer = LlamaMLP(LlamaConfig(**SMALL))
        if name == "fused":
            if linears:
                use_fast_linears(layer)
            use_fused_layers(layer)
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(3, 5, 16, requires_grad=True))
        kept[name] = sum(seen.values())
    # The activation of the gate, and its product where the layer after it is one of ours.
    assert kept["plain"] - kept["fused"] == (1 + linears) * 3 * 5 * 24 * 4


def with_adapters(dtype: torch.dtype) -> LlamaMLP:
    torch.manual_seed(0)
    layer = LlamaMLP(LlamaConfig(**SMALL)).to(dtype).requires_grad_(False)
    for name in ("one", "two"):
        adapters.attach_fresh(layer, name, LoraConfig(r=4, alpha=12, target_modules=("down_proj", "up_proj")), seed=0)
        for _, parameter in adapters.adapter_parameters(layer, name):
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(True)
    return layer.to(dtype)


@pytest.mark.parametrize("adapter", [None, "one"])
def test_adapters_are_the_librarys_in_float64(adapter: str | None) -> None:
    exact, fused = with_adapters(torch.float64), with_adapters(torch.float32)
    use_fast_linears(fused)
    use_fused_layers(fused)
    states = torch.randn(3, 5, 16)
    with AdapterSwitch(exact).on(adapter), AdapterSwitch(fused).on(adapter):
        expected, found = gradients(exact, states.double()), gradients(fused, states)
    assert len(expected) == len(found) == 2 + (0 if adapter is None else 4)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.double(), one, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_rounding_is_that_of_bfloat16() -> None:
    states = torch.randn(8, 50, 16)
    with AdapterSwitch(exact := with_adapters(torch.float64)).on("one"):
        expected = gradients(exact, states.double())
    plain, fused = with_adapters(torch.float32), with_adapters(torch.float32)
    use_fast_linears(fused)
    use_fused_layers(fused)
    errors = []
    for layer in (plain, fused):
        with AdapterSwitch(layer).on("one"), autocast(torch.device("cpu"), torch.bfloat16):
            found = gradients(layer, states)
        assert all(gradient.dtype == torch.float32 for gradient in found[1:])
        errors.append(sum(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)))
    assert 0 < errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("activation", [nn.functional.silu, torch.relu, torch.sigmoid, torch.tanh, nn.functional.gelu])
def test_exact_gradients_to_the_hidden_size(activation: Callable[[Tensor], Tensor]) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    down = FastLinear(4, 5, dtype=torch.float64)

    def trained(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        del down.weight, down.bias
        down.weight, down.bias = weight, bias  # type: ignore[assignment]
        return gated_down(gate, up, activation, down)

    assert torch.autograd.gradcheck(trained, (random(2, 3, 4), random(2, 3, 4), random(5, 4), random(5)))


def test_exact_gradients() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, nn.functional.silu), (gate, up))


def test_norm_against_its_formula() -> None:
    torch.manual_seed(0)  # the bound is float32's own rounding: always the same numbers
    states, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    wide = states.detach().double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.detach().double()
    found = rms_norm(states, weight, 1e-6)
    torch.testing.assert_close(found.double(), exact)
    exact.square().sum().backward()
    found.square().sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_norms_of_another_form_stay() -> None:
    layer = Gemma2RMSNorm(16)
    use_fused_layers(layer)
    assert type(layer) is Gemma2RMSNorm


def test_a_layer_replaced_by_another_library_stays() -> None:
    layer = LlamaRMSNorm(16)
    layer.forward = lambda states: states  # type: ignore[method-assign]
    use_fused_layers(layer)
    assert type(layer) is LlamaRMSNorm


def test_saving_a_model_knows_nothing_of_it(tmp_path: pytest.TempPathFactory) -> None:
    write_model(tmp_path / "model", "llama", task="lm")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    names = list(model.state_dict())
    use_fused_layers(model)
    assert list(model.state_dict()) == names
    assert type(copy.deepcopy(model).model.norm) is type(model.model.norm)
