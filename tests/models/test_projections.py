"""Queries, keys and values in one pass, against the formula and the layers by themselves."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoConfig, OlmoForCausalLM
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from checkpoints import Library
from quartet.config import LoraConfig
from quartet.models import adapters
from quartet.models.adapters import AdapterSwitch
from quartet.models.fused import use_fused_layers
from quartet.models.gradients import IN_PLACE
from quartet.models.linears import READY, FastLinear, use_fast_linears
from quartet.models.precision import autocast
from quartet.models.projections import Projections, projected_once, projects, with_projections

pytestmark = pytest.mark.usefixtures("computed_by")
HIDDEN, WIDTHS, SCALES = 12, (8, 4, 6), [2.0, 0.5, 1.5]
IDS = torch.tensor([[5, 9, 30, 40, 41, 7], [64, 65, 66, 67, 68, 3]])


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def layer(width: int, *, bias: bool, rank: int, trained: bool) -> list[Tensor | None]:
    """Weight, bias, A and B."""
    low = (random(rank, HIDDEN, grad=True), random(width, rank, grad=True)) if rank else (None, None)
    return [random(width, HIDDEN, grad=trained), random(width, grad=trained) if bias else None, *low]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (2, 3, 2), (2, 0, 3), (0, 2, 0)])
@pytest.mark.parametrize("trained", [(False,) * 3, (True,) * 3, (False, True, False)])
@pytest.mark.parametrize("by_states", [False, True])
def test_the_formula_and_its_gradients(
    ranks: tuple[int, ...], trained: tuple[bool, ...], bias: bool, by_states: bool
) -> None:
    torch.manual_seed(0)
    layers = [layer(w, bias=bias, rank=r, trained=t) for w, r, t in zip(WIDTHS, ranks, trained, strict=True)]
    states = random(2, 5, HIDDEN, grad=by_states)
    expected = []
    for (weight, add, down, up), scale in zip(layers, SCALES, strict=True):
        assert weight is not None
        low = 0.0 if down is None or up is None else scale * states @ down.t() @ up.t()
        expected.append(states @ weight.t() + (0.0 if add is None else add) + low)
    tensors = list(itertools.chain(*layers))
    found = Projections.apply(states, SCALES, *tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    leaves = [t for t in (states, *tensors) if t is not None and t.requires_grad]
    if not leaves:
        return
    slopes = [random(*result.shape) for result in expected]
    total = sum((result * slope).sum() for result, slope in zip(expected, slopes, strict=True))
    by_formula = torch.autograd.grad(total, leaves)
    ours = sum((result * slope).sum() for result, slope in zip(found, slopes, strict=True))
    for one, other in zip(torch.autograd.grad(ours, leaves), by_formula, strict=True):
        torch.testing.assert_close(one, other)


def test_families_that_give_three_layers_their_states() -> None:
    assert all(projects(kind) for kind in (LlamaAttention, Qwen2Attention, Qwen3Attention, CohereAttention))
    assert not any(projects(kind) for kind in (GPTNeoXAttention, Phi3Attention, LlamaMLP, nn.Linear))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers of each pass that was taken."""
    found: list[int] = []
    apply = Projections.apply
    monkeypatch.setattr(Projections, "apply", lambda *given: found.append(len(given[1])) or apply(*given))
    return found


def run(model: nn.Module, adapter: str | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits and all gradients."""
    model.zero_grad()
    with AdapterSwitch(model).on(adapter), autocast(torch.device("cpu"), dtype):
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.float().square().mean().backward()
    return [logits.detach().double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]


def model_of(library: Library, family: str, lora: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(library.path(family, "sft"))
    if lora:
        torch.manual_seed(0)
        model.requires_grad_(False)
        adapters.attach_fresh(model, "one", LoraConfig(r=2, target_modules=("q_proj", "v_proj", "o_proj")), seed=0)
        for _, parameter in adapters.adapter_parameters(model, "one"):
            nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_the_library_computes(
    family: str, lora: bool, dtype: torch.dtype, library: Library, seen: list[int]
) -> None:
    plain = model_of(library, family, lora)
    fast = copy.deepcopy(plain)
    use_fast_linears(fast)
    use_fused_layers(fast)
    adapter = "one" if lora else None
    exact = run(copy.deepcopy(plain).double(), adapter)
    assert not seen
    theirs, ours = run(plain, adapter, dtype), run(fast, adapter, dtype)
    assert seen == [3] * plain.config.num_hidden_layers
    assert len(ours) == len(exact)
    if dtype == torch.bfloat16:
        found, library_found, right = (torch.cat([t.flatten() for t in all_of]) for all_of in (ours, theirs, exact))
        assert (found - right).norm() <= 1.2 * (library_found - right).norm()
    else:
        assert all((one - right).norm() <= 1e-4 * right.norm() + 1e-7 for one, right in zip(ours, exact, strict=True))
    seen.clear()
    with torch.no_grad(), AdapterSwitch(plain).on(None), AdapterSwitch(fast).on(None):
        assert torch.equal(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert not seen


def test_an_attention_may_write_into_what_it_gets(seen: list[int]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = OlmoForCausalLM(OlmoConfig(**sizes, vocab_size=80, pad_token_id=1, clip_qkv=0.01))
    fast = copy.deepcopy(plain)
    use_fast_linears(fast)
    use_fused_layers(fast)
    for one, other in zip(run(fast, None), run(plain, None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert seen == [3, 3]


class Sharing(nn.Module):
    """Some layers of Gemma3n's and Gemma4's have the keys and values of others."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.q_proj = own, FastLinear(HIDDEN, 4)
        if own:
            self.k_proj, self.v_proj = FastLinear(HIDDEN, 4), FastLinear(HIDDEN, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query: Tensor = self.q_proj(hidden_states)
        return query + self.k_proj(hidden_states) + self.v_proj(hidden_states) if self.own else query


def test_an_attention_without_keys_of_its_own(seen: list[int]) -> None:
    states = torch.randn(2, 5, HIDDEN)
    assert projects(Sharing)
    forward = with_projections(Sharing.forward)
    for own, passes in ((True, [3]), (False, [3])):
        attention = Sharing(own)
        torch.testing.assert_close(forward(attention, hidden_states=states), attention(states))
        assert seen == passes


def three() -> list[nn.Module]:
    torch.manual_seed(0)
    return [FastLinear(HIDDEN, width) for width in WIDTHS]


def test_results_are_given_once_and_to_these_states_only(seen: list[int]) -> None:
    layers, states = three(), torch.randn(2, 5, HIDDEN)
    alone = [one(states) for one in layers]
    with projected_once(states, layers):
        assert seen == [3]
        other = layers[0](states.clone())
        results = [one(states) for one in layers]
        again = layers[1](states)
    assert results[0].grad_fn is results[1].grad_fn is not again.grad_fn
    assert other.grad_fn is not results[0].grad_fn
    for one, expected in zip((*results, other, again), (*alone, alone[0], alone[1]), strict=True):
        torch.testing.assert_close(one, expected)
    assert layers[2](states).grad_fn is not results[2].grad_fn
    with pytest.raises(KeyError), projected_once(states, layers):
        raise KeyError
    assert READY.take(layers[0], states) is None


@pytest.mark.parametrize("name", ["a hook", "another library", "no gradients", "a plain layer"])
def test_layers_that_have_to_be_called_are_called(name: str, seen: list[int]) -> None:
    layers, states, called = three(), torch.randn(2, 5, HIDDEN), []
    if name == "a hook":
        layers[1].register_forward_hook(lambda *_: called.append(1))
    elif name == "another library":
        own: Callable[[Tensor], Tensor] = layers[1].forward
        layers[1].forward = lambda x: called.append(1) or own(x)  # type: ignore[method-assign, assignment]
    elif name == "a plain layer":
        layers[1] = nn.Linear(HIDDEN, 4)
    with torch.set_grad_enabled(name != "no gradients"), projected_once(states, layers):
        for one in layers:
            one(states)
    assert not seen
    assert called == ([1] if name in ("a hook", "another library") else [])


def test_trained_weights_get_their_gradient_in_place(seen: list[int]) -> None:
    layers, states = three(), torch.randn(2, 5, HIDDEN)

    def gradients() -> list[Tensor]:
        for one in layers:
            one.weight.grad = None
        for number in (1.0, 2.0):
            given = number * states
            with projected_once(given, layers):
                sum(one(given).square().sum() for one in layers).backward()
        return [one.weight.grad.clone() for one in layers]

    expected = gradients()
    with IN_PLACE.added():
        found = gradients()
        assert all(id(one.weight) in IN_PLACE._placed for one in layers)
    torch.testing.assert_close(found, expected)
    assert seen == [3] * 4


def test_one_onednn_layer_is_left_to_itself(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    monkeypatch.setattr("quartet.models.gated_mlp.has_onednn", lambda weight: weight.shape[0] == WIDTHS[0])
    states = torch.randn(2, 5, HIDDEN)
    with projected_once(states, three()):
        pass
    assert not seen
