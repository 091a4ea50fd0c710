"""Which decoder layers are computed in one pass, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.modules.module as global_hooks
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from decoder_layers import (
    SIZES,
    fast,
    layout,
    model_of,
    needs_kernels,
    run,
    states,
)
from quartet.models import decoder_layer, gated_mlp
from quartet.models.decoder_layer import layer_class
from quartet.models.fused import use_fused_layers


@needs_kernels
def test_norms_that_rounding_would_change_are_left_to_the_library(taken: list[bool]) -> None:
    """In bfloat16 the norms of queries and keys give float32 there."""
    model = fast(model_of("qwen3"), last=False)
    run(model, layout(multiple=8), "full", torch.bfloat16)
    assert taken == [False] * 3


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replaced(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)  # type: ignore[method-assign]


class Shifted(LlamaRMSNorm):
    """A norm that does more."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 1.0


def rounded(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.detach().bfloat16())


def with_dropout(module: Any) -> None:
    module.attention_dropout = 0.1
    module.train()


@needs_kernels
@pytest.mark.parametrize(
    ("place", "change"),
    [
        *((place, hooked) for place in ("self_attn", "mlp", "input_layernorm", "self_attn.q_proj", "mlp.down_proj")),
        *((place, replaced) for place in ("self_attn", "mlp", "post_attention_layernorm", "self_attn.o_proj")),
        ("self_attn", with_dropout),
        ("self_attn", lambda attention: setattr(attention, "is_causal", False)),
        ("mlp", lambda mlp: setattr(mlp, "__class__", LlamaMLP)),
        ("input_layernorm", lambda norm: setattr(norm, "__class__", Shifted)),
        ("post_attention_layernorm", rounded),
        ("mlp", lambda mlp: mlp.register_forward_pre_hook(lambda *_: None)),
        ("self_attn", lambda attention: attention.register_full_backward_hook(lambda *_: None)),
        ("self_attn", lambda attention: attention.register_full_backward_pre_hook(lambda *_: None)),
    ],
)
def test_a_layer_to_which_more_was_done_is_called_part_by_part(
    place: str, change: Callable[[nn.Module], None], taken: list[bool]
) -> None:
    model = fast(model_of("llama"), last=False)
    change(model.model.layers[1].get_submodule(place))
    states(model, layout(), "full")
    assert taken == [True, False, True]


@needs_kernels
def test_where_something_waits_for_the_call_of_any_module(taken: list[bool]) -> None:
    layer = fast(model_of("llama"), last=False).model.layers[0]
    packed = layout()
    tokens = packed.arguments["input_ids"].shape[1]
    angles = torch.randn(1, tokens, 16)
    for register in (
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_full_backward_hook,
        global_hooks.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            with packed.active():
                layer(torch.randn(1, tokens, 32), position_embeddings=(angles, angles), attention_mask=None)
        finally:
            handle.remove()
    assert taken == [False] * 4


@needs_kernels
@pytest.mark.parametrize("of", [decoder_layer, gated_mlp])
def test_where_parts_have_no_pass_of_their_own(of: Any, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that turns something else than halves; float32 where oneDNN multiplies."""
    model = fast(model_of("llama"), last=False)
    decoder_layer._known.cache_clear()
    if of is decoder_layer:
        monkeypatch.setattr(of, "turns_halves", lambda _: False)
    else:
        monkeypatch.setattr(of, "has_onednn", lambda _: True)
    states(model, layout(), "full")
    decoder_layer._known.cache_clear()
    assert taken == [False] * 3


@needs_kernels
@pytest.mark.parametrize("changes", [{"head_dim": 8}, {"head_dim": 24}])
def test_heads_without_a_kernel(changes: dict[str, int], taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoder_layers.SIZES", {**SIZES, **changes})
    states(fast(model_of("llama"), last=False), layout(), "full")
    assert taken == [False] * 3


@needs_kernels
def test_what_a_layer_is_given() -> None:
    """One row of states, angles in their dtype, neither mask nor cache; and the attention that knows of sequences."""
    layer = fast(model_of("llama"), last=False).model.layers[0]
    packed = layout()
    tokens = packed.arguments["input_ids"].shape[1]
    given, angles = torch.randn(1, tokens, 32), torch.randn(1, tokens, 16)

    def taken_apart(rows: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> bool:
        turned = (angles.to(dtype), angles.to(dtype))
        with packed.active():
            found = decoder_layer._taken_apart(layer, given.repeat(rows, 1, 1), position_embeddings=turned, **more)
        return found is not None

    assert taken_apart()
    assert not taken_apart(rows=2)
    assert not taken_apart(dtype=torch.float64)
    assert not taken_apart(attention_mask=torch.ones(1, 1, tokens, tokens))
    assert not taken_apart(past_key_values=object())
    assert decoder_layer._taken_apart(layer, given, position_embeddings=(angles, angles)) is None
    layer.self_attn.config._attn_implementation = "sdpa"
    assert not taken_apart()


@needs_kernels
def test_layers_are_made_once() -> None:
    model = fast(model_of("llama"), last=False)
    kinds = [type(module) for module in model.modules()]
    use_fused_layers(model)
    assert [type(module) for module in model.modules()] == kinds


@needs_kernels
def test_only_sequences_side_by_side_without_mask_or_cache(taken: list[bool]) -> None:
    model = fast(model_of("llama"), last=False)
    states(model, layout(packed=False), "full")
    packed = layout()
    with packed.active():
        model.model(**packed.arguments, use_cache=True)
        model.model(**packed.arguments, use_cache=False, output_attentions=False, something="else")
    assert not any(taken)
    assert len(taken) == 9


def test_without_kernels_parts_are_called(without_kernels: None, taken: list[bool]) -> None:
    states(fast(model_of("llama"), last=False), layout(), "full")
    assert taken == [False] * 3


def test_layers_that_are_known() -> None:
    assert all(layer_class(kind) for kind in (LlamaDecoderLayer, Qwen3DecoderLayer))
    others = (Gemma2DecoderLayer, GPT2Block, Olmo2DecoderLayer, LlamaMLP, nn.Linear)
    assert not any(layer_class(kind) for kind in others)
