"""Models with layers that one pass can compute, and sequences for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from quartet.config import LoraConfig
from quartet.kernels import library
from quartet.models import adapters, decoder_layer
from quartet.models.adapters import AdapterSwitch
from quartet.models.attention import one_sequence_a_row, use_own_attention
from quartet.models.fused import use_fused_layers
from quartet.models.layout import Layout, PackedLayout
from quartet.models.linears import use_fast_linears
from quartet.models.precision import autocast
from quartet.records import Sequences

needs_kernels = pytest.mark.skipif(library.kernel("run") is None, reason="no compiler at installation")
FAMILIES = {
    "llama": lambda **c: hf.LlamaForCausalLM(hf.LlamaConfig(**c)),
    "qwen2": lambda **c: hf.Qwen2ForCausalLM(hf.Qwen2Config(**c)),
    "qwen3": lambda **c: hf.Qwen3ForCausalLM(hf.Qwen3Config(**c)),
    "biased": lambda **c: hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, mlp_bias=True, **c)),
    "gelu": lambda **c: hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, hidden_act="gelu", **c)),
}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
}
PROMPTS, RESPONSES = (9, 2, 5), (7, 11, 1)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": ALL,
    "some": ("q_proj", "v_proj"),
    "late": ("down_proj",),
    "output": ("o_proj",),
}
"""Layers with an adapter; none, and all is trained."""


def model_of(family: str, trained: str = "full") -> Any:
    torch.manual_seed(0)
    model: Any = FAMILIES[family](**SIZES).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
    if TRAINED[trained]:
        model.requires_grad_(False)
        adapters.attach_fresh(model, "one", LoraConfig(r=2, target_modules=TRAINED[trained]), seed=0)
        for _, parameter in adapters.adapter_parameters(model, "one"):
            nn.init.normal_(parameter, std=0.05)
            parameter.requires_grad_(True)
    return model


def fast(model: Any, *, last: bool) -> Any:
    """A copy as training loads it; `last`: the last layer computes only what is read."""
    made = copy.deepcopy(model)
    use_own_attention(made)
    use_fast_linears(made)
    use_fused_layers(made)
    made.model.layers[-1].mlp.is_last = last
    return made


def layout(*, packed: bool = True, multiple: int = 1, device: str = "cpu") -> Layout:
    torch.manual_seed(2)
    ids = torch.randint(0, SIZES["vocab_size"], (len(PROMPTS), 16)).to(device)
    of_rows = torch.tensor(PROMPTS, device=device), torch.tensor(RESPONSES, device=device)
    sequences = Sequences(ids, *of_rows, prompts=PROMPTS, responses=RESPONSES)
    return PackedLayout.of(sequences, multiple) if packed else Layout.padded(sequences)


def states(model: Any, laid_out: Layout, trained: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the tokens that are read."""
    computed = AdapterSwitch(model).on("one" if TRAINED[trained] else None), autocast(model.device, dtype)
    with computed[0], computed[1], one_sequence_a_row(), laid_out.active():
        hidden = model.model(**laid_out.arguments, use_cache=False).last_hidden_state
    found = laid_out.states(hidden)
    places = [laid_out.before_every_step(max(RESPONSES)), laid_out.last[:, None]]
    return found[torch.cat(places, 1)]


def run(model: Any, laid_out: Layout, trained: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """States, and all gradients of a weighted sum of them."""
    found = states(model, laid_out, trained, dtype)
    torch.manual_seed(3)
    model.zero_grad()
    (found * torch.randn(found.shape).to(found.device)).sum().backward()
    return {"": found.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@contextmanager
def in_parts() -> Iterator[None]:
    """No layer in one pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_layer, "_taken_apart", lambda *_, **__: None)
        yield
