"""Plain attention for short bfloat16 sequences agrees with a float64 reference, and everything else goes to sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from quartet.models import attention
from quartet.models.attention import LONGEST, NAME, short_attention, use_own_attention


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + causal mask) v in float64, a head at a time."""
    rows, heads, length, width = query.shape
    group = heads // key.shape[1]
    output = torch.empty(rows, length, heads, width, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            q, k, v = (t.double() for t in (query[row, head], key[row, head // group], value[row, head // group]))
            scores = (q @ k.t() / width**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            output[row, :, head] = scores.softmax(-1) @ v
    return output


def inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(2, 6, length, 8).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, length, 8).to(dtype).requires_grad_() for _ in range(2))
    return query, key, value


def layer() -> nn.Module:
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.num_key_value_groups = 3  # type: ignore[assignment]
    return module


def test_output_and_gradients_agree_with_float64() -> None:
    ours = inputs(19, torch.bfloat16)
    theirs = tuple(t.detach().clone().double().requires_grad_() for t in ours)
    weight = torch.randn(2, 19, 6, 8)
    output, _ = short_attention(layer(), *ours, None)
    (output.float() * weight).sum().backward()
    expected = reference(*theirs)
    (expected * weight).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", ["float32", "long", "mask", "no gradient"])
def test_everything_else_goes_to_sdpa(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def sdpa(*arguments: Any, **_: Any) -> tuple[Tensor, None]:
        seen.append(arguments[1].shape[2])
        return arguments[1], None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    length = LONGEST + 1 if case == "long" else 5
    tensors = inputs(length, torch.float32 if case == "float32" else torch.bfloat16)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool) if case == "mask" else None
    with torch.set_grad_enabled(case != "no gradient"):
        short_attention(layer(), *tensors, mask)
    assert seen == [length]


def test_only_models_on_sdpa_are_touched() -> None:
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    use_own_attention(eager)
    assert eager.config._attn_implementation == "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    ids = torch.arange(6)[None]
    before = model(ids).logits
    use_own_attention(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(ids).logits, before)
