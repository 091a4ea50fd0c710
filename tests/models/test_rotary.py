"""Rotary embeddings by a kernel, within the library's attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from checkpoints import Library
from quartet import kernels
from quartet.models import rotary
from quartet.models.fused import use_fused_layers
from quartet.models.precision import autocast

IDS = torch.tensor([[5, 9, 30, 40, 41, 7], [64, 65, 66, 67, 68, 3]])


@pytest.mark.parametrize("kind", [LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention])
def test_families_that_turn_halves_of_a_head(kind: type[nn.Module]) -> None:
    own = rotary.turning_class(kind)
    assert own is not None
    assert issubclass(own, kind)
    assert own.forward.__code__ is kind.forward.__code__


@pytest.mark.parametrize("kind", [GlmAttention, GPTNeoXAttention, nn.Linear])
def test_families_that_do_not(kind: type[nn.Module]) -> None:
    """GLM turns neighbours, GPT-NeoX a part of each head."""
    assert rotary.turning_class(kind) is None


def gradients(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    model.zero_grad()
    with autocast(torch.device("cpu"), dtype):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return [logits.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.skipif(kernels.elementwise.kernel("rotary_f32_f32") is None, reason="no kernels")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_what_the_library_computes(
    family: str, dtype: torch.dtype, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(library.path(family, "sft"))
    turned = copy.deepcopy(plain)
    with monkeypatch.context() as patch:  # nothing but the attention
        patch.setattr("quartet.models.fused._gated_class", lambda _: None)
        patch.setattr("quartet.models.fused._norm_class", lambda _: None)
        patch.setattr("quartet.models.fused._kinds", {})
        use_fused_layers(turned)
    seen = []
    monkeypatch.setattr(
        "quartet.models.rotary.kernels.rotary", lambda *x, **o: seen.append(1) or kernels.elementwise.rotary(*x, **o)
    )
    exact = gradients(copy.deepcopy(plain).double(), torch.float32)
    expected, found = gradients(plain, dtype), gradients(turned, dtype)
    for one, other, right in zip(expected, found, exact, strict=True):
        theirs, ours = ((t.double() - right).norm() for t in (one, other))
        assert ours <= 1.5 * theirs + 1e-6 * right.norm()
    layers = plain.config.num_hidden_layers
    assert len(seen) == 4 * layers
    with torch.no_grad():
        assert torch.equal(turned(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert len(seen) == 4 * layers
