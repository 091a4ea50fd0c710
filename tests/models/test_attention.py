"""Plain attention for short bfloat16 sequences agrees with a float64 reference, and everything else goes to sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from quartet.models import attention
from quartet.models.attention import LONGEST, NAME, short_attention, use_own_attention


def reference(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(q k^T * scaling + causal mask) v in float64, a head at a time."""
    rows, heads, length, _ = query.shape
    group = heads // key.shape[1]
    output = torch.empty(rows, length, heads, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            q, k, v = (t.double() for t in (query[row, head], key[row, head // group], value[row, head // group]))
            scores = (q @ k.t() * scaling).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
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


@pytest.mark.parametrize(("scaling", "factor"), [(None, 8**-0.5), (0.7, 0.7)])
def test_output_and_gradients_agree_with_float64(
    scaling: float | None, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    ours = inputs(19, torch.bfloat16)
    theirs = tuple(t.detach().clone().double().requires_grad_() for t in ours)
    weight = torch.randn(2, 19, 6, 8)
    output, _ = short_attention(layer(), *ours, None, scaling=scaling)
    (output.float() * weight).sum().backward()
    expected = reference(*theirs, factor)
    (expected * weight).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=0.05, atol=0.05)


ASKED: dict[str, dict[str, Any]] = {
    "not causal": {"is_causal": False},
    "dropout": {"dropout": 0.1},
    **{name: {name: 1.0} for name in ("softcap", "position_bias", "cache")},
}


@pytest.mark.parametrize("case", ["float32", "long", "mask", "no gradient", "a layer that is not causal", *ASKED])
def test_everything_else_goes_to_sdpa(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def sdpa(_: Any, query: Tensor, *given: Any, **more: Any) -> tuple[Tensor, None]:
        settings = zip(("dropout", "scaling", "is_causal"), given[3:], strict=True)
        seen.append((query.shape[2], dict(settings) | more))
        return query, None

    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa)
    length = LONGEST + 1 if case == "long" else 5
    tensors = inputs(length, torch.float32 if case == "float32" else torch.bfloat16)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool) if case == "mask" else None
    module = layer()
    module.is_causal = case != "a layer that is not causal"  # type: ignore[assignment]
    asked = ASKED.get(case, {})
    with torch.set_grad_enabled(case != "no gradient"):
        short_attention(module, *tensors, mask, scaling=0.7, **asked)
    assert seen == [(length, {"dropout": 0.0, "scaling": 0.7, "is_causal": None, **asked})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_decoded_shares_keys_without_copies(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 with a copy of keys and values for each head."""
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    torch.manual_seed(0)
    query, mask = torch.randn(3, 6, 1, 8).to(dtype), torch.zeros(3, 1, 1, 16, dtype=dtype)
    key, value = torch.randn(2, 3, 2, 16, 8).to(dtype)
    for row, columns in enumerate((16, 5, 1)):
        mask[row, ..., columns:] = torch.finfo(dtype).min
    with torch.no_grad():
        found, weights = short_attention(layer(), query, key, value, mask, scaling=0.3)
    each = [tensor.double().repeat_interleave(3, 1) for tensor in (key, value)]
    expected = (query.double() @ each[0].mT * 0.3 + mask.double()).softmax(-1) @ each[1]
    accuracy = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=accuracy, atol=accuracy)
    assert weights is None


@pytest.mark.parametrize("case", ["gradient", "mask a head", "bias", "dropout", "a head each", "two tokens"])
def test_other_steps_are_the_librarys(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: ("theirs", None))
    query = torch.randn(3, 6, 2 if case == "two tokens" else 1, 8)
    key = torch.randn(3, 6 if case == "a head each" else 2, 16, 8)
    mask = torch.zeros(3, 6 if case == "mask a head" else 1, 1, 16)
    more: dict[str, Any] = {"bias": {"position_bias": mask}, "dropout": {"dropout": 0.1}}.get(case, {})
    with torch.set_grad_enabled(case == "gradient"):
        found: Any = short_attention(layer(), query, key, key, mask, **more)
    assert found == ("theirs", None)


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
