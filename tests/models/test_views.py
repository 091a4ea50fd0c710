"""What a view computes: which token a number belongs to, and that neither padding nor neighbours nor dropout matter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import EOS, FAMILIES, edit_json
from pipeline import Pipeline, hidden_of, sequences
from tiny import TinyRun

PROMPTS = [[5, 9, 30, 31, 32], [7], [64, 65]]
RESPONSES = [[40, 41, 42, 43], [50, 51], [60, 61, 257]]
SINGLE: dict[str, Any] = {"reward": "reward-lora", "models.lora": {"r": 5}, "models.sharing": "single"}


def look(pipeline: Pipeline, prompts: list[list[int]], responses: list[list[int]]) -> list[list[torch.Tensor]]:
    """For each episode: log-probabilities and entropies of its tokens, values before them, and its score."""
    batch, mask = sequences(prompts, responses)
    roles = pipeline.roles
    with torch.no_grad():
        logprobs, entropy = roles.policy(batch, mask, temperature=1.0, with_entropy=True)
        assert entropy is not None
        values, scores = roles.value(batch, mask), roles.reward.scores(batch)
    for numbers in (logprobs, entropy, values):
        assert torch.equal(numbers[~mask], torch.zeros(int((~mask).sum())))
    return [
        [logprobs[row][mask[row]], entropy[row][mask[row]], values[row][mask[row]], scores[row]]
        for row in range(len(prompts))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_neighbours_matter(family: str, tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run(family, **SINGLE))
    together = look(pipeline, PROMPTS, RESPONSES)
    for row, numbers in enumerate(together):
        alone = look(pipeline, [PROMPTS[row]], [RESPONSES[row]])[0]
        for one, other in zip(alone, numbers, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_value_does_not_know_the_token_it_comes_before(tiny_run: TinyRun) -> None:
    """values[t] judges the state before token t, and so do the log-probabilities' distributions."""
    pipeline = Pipeline(tiny_run())
    for step in range(4):
        changed = [list(response) for response in RESPONSES]
        changed[0][step] = 99
        before, after = look(pipeline, PROMPTS, RESPONSES)[0], look(pipeline, PROMPTS, changed)[0]
        assert torch.equal(before[2][: step + 1], after[2][: step + 1])
        assert torch.equal(before[1][: step + 1], after[1][: step + 1])
        assert (before[2][step + 1 :] != after[2][step + 1 :]).all()
        assert before[3] != after[3]


def test_temperature_divides_the_logits(tiny_run: TinyRun) -> None:
    pipeline = Pipeline(tiny_run())
    batch, mask = sequences(PROMPTS[:1], RESPONSES[:1])
    view = pipeline.roles.policy
    with torch.no_grad():
        logits = view.head(hidden_of(view.backbone, batch.input_ids, None)[0]).double()
        for temperature in (0.7, 1.0, 2.0):
            expected = torch.log_softmax(logits[4:8] / temperature, -1)[range(4), RESPONSES[0]]
            seen = view(batch, mask, temperature=temperature)[0][0]
            torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["separate", "single"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_dropout_is_off_in_training_mode_too(family: str, plan: str, tiny_run: TinyRun, library: Any) -> None:
    changes = SINGLE if plan == "single" else {"models.lora": None}
    pipeline = Pipeline(tiny_run(family, **changes))
    rates = ("attn_pdrop", "resid_pdrop", "embd_pdrop") if family == "gpt2" else ("hidden_dropout", "attention_dropout")
    assert all(getattr(pipeline.inputs.sft.config, rate) == 0.1 for rate in rates)
    evaluated = look(pipeline, PROMPTS, RESPONSES)
    for backbone in pipeline.roles.backbones.values():
        backbone.model.train()
    for _ in range(2):
        for one, other in zip(evaluated, look(pipeline, PROMPTS, RESPONSES), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_adapter_dropout_is_off(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(library.path("llama", "sft-lora"), tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", lora_dropout=0.5)
    pipeline = Pipeline(tiny_run(**{"models.sft": str(adapter), "models.lora": {}, "models.sharing": "paired"}))
    batch, mask = sequences(PROMPTS, RESPONSES)
    for view in (pipeline.roles.policy, pipeline.roles.reference):
        view.backbone.model.train()
        with torch.no_grad():
            one, other = (view(batch, mask, temperature=1.0)[0] for _ in range(2))
        assert torch.equal(one, other)


def test_pad_equal_to_eos_hides_no_token(tiny_run: TinyRun, library: Any, tmp_path: Path) -> None:
    """The stop token counts, in the mask and in the score, whatever the tokenizer pads with."""
    folder = Path(shutil.copytree(library.path("llama", "sft"), tmp_path / "sft"))
    edit_json(folder / "tokenizer_config.json", pad_token="<eos>")
    pipeline, usual = Pipeline(tiny_run(**{"models.sft": str(folder)})), Pipeline(tiny_run())
    assert pipeline.inputs.tokenizer.pad_token_id == EOS
    for one, other in zip(look(pipeline, PROMPTS, RESPONSES), look(usual, PROMPTS, RESPONSES), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    prompts = pipeline.inputs.prompts.batch(0, 64, 1)
    rollout, expected = pipeline.loaded.rollout.generate(prompts), usual.loaded.rollout.generate(prompts)
    assert rollout.stopped.any()
    last = rollout.tokens.gather(1, rollout.response_mask.sum(-1, keepdim=True) - 1).squeeze(1)
    assert torch.equal(last == EOS, rollout.stopped)
    assert torch.equal(rollout.response_mask, expected.response_mask)
    assert torch.equal(pipeline.score(rollout).scores, usual.score(expected).scores)
