"""Whole models whose attention a kernel computes, against the same models with torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config, Qwen3Config

from quartet import kernels
from quartet.models import attention
from quartet.models.as_in_training import as_in_training
from quartet.models.attention import use_own_attention
from quartet.models.layout import Layout, PackedLayout
from quartet.records import Sequences
from rollout_policies import GROUPED, SIZES, make_policy

WIDE = {"num_attention_heads": 2, "hidden_size": 32}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED | WIDE | {"num_key_value_heads": 1}),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "gpt2": lambda: GPT2Config(**SIZES | WIDE, n_inner=48, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES | WIDE),
    "phi3": lambda: Phi3Config(**GROUPED | WIDE | {"num_key_value_heads": 2}),
}
"""Heads of 16; of some families query, key and value are parts of one wider tensor."""
PROMPTS, RESPONSES = (3, 9, 1), (5, 2, 11)


def sequences() -> Sequences:
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 67, (3, max(lengths)), generator=generator)
    return Sequences(ids, torch.tensor(PROMPTS), torch.tensor(RESPONSES), prompts=PROMPTS, responses=RESPONSES)


def states_and_gradients(
    family: str, layout: str, dtype: torch.dtype, checkpointing: bool
) -> tuple[Tensor, list[Tensor]]:
    """The states that are read, and the gradients of their weighted sum."""
    policy = make_policy(FAMILIES[family](), trainable=True, dtype=dtype)
    backbone = policy.backbone
    use_own_attention(backbone.model)
    if checkpointing:
        backbone.enable_checkpointing()
    given = sequences()
    laid = PackedLayout.of(given, 8) if layout == "packed" else Layout.padded(given)
    found = backbone.hidden(laid, None)[laid.before_every_step(max(RESPONSES))].float()
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((found * weight).sum(), parameters, allow_unused=True)
    return found.detach(), [g for g in gradients if g is not None]


@pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_as_near_as_with_torchs_attention(
    family: str, layout: str, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, own = [], attention.causal_attention

    def noting(*given: Any) -> Tensor:
        calls.append(given[0].dtype)
        return own(*given)

    monkeypatch.setattr(attention, "causal_attention", noting)
    found = states_and_gradients(family, layout, dtype, checkpointing)
    assert set(calls) == {dtype}
    monkeypatch.setattr(attention, "_by_kernel", lambda *_: None)
    theirs = states_and_gradients(family, layout, dtype, checkpointing)
    exact = states_and_gradients(family, layout, torch.float32, checkpointing)
    rounding = 2e-5 if dtype == torch.float32 else 0.03
    for one, other, true in zip(*([states, *gradients] for states, gradients in (found, theirs, exact)), strict=True):
        allowed = 1.5 * float((other - true).norm()) + rounding * float(true.norm()) + 1e-6
        assert float((one - true).norm()) <= allowed


@pytest.mark.skipif(not kernels.decodes(torch.float32), reason="no compiler at installation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_as_in_training_has_the_numbers_of_one_with_gradients(dtype: torch.dtype) -> None:
    """Padded as scoring lays sequences out, and side by side as the update does."""
    policy = make_policy(FAMILIES["llama"](), trainable=True, dtype=dtype)
    use_own_attention(policy.backbone.model)
    given = sequences()
    padded, packed = Layout.padded(given), PackedLayout.of(given)
    updated = policy.backbone.hidden(packed, None)[packed.before_every_step(2)]
    with torch.no_grad(), as_in_training():
        compared = policy.backbone.hidden(padded, None)[padded.before_every_step(2)]
    torch.testing.assert_close(compared, updated, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.02)
