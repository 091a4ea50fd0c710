"""A checkpoint whose responses end early, for the case in which an implementation may save what it does not compute.

The policy is trained until it counts down: the last token of a prompt chooses a number from 5 to 60, the response is that
many tokens, the last of them the end token. So both sides get responses of the same lengths, up to chance.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORTEST, LONGEST = 5, 60
KNOWN = 32
"""Prompts it learns to answer: the first ones, which are those of the iteration benchmark."""
ROWS, RATE, MOST_STEPS, ENOUGH = 8, 1e-3, 600, 0.02
IGNORED = -100


def response_of(prompt: list[int], counters: list[int], end: int) -> list[int]:
    """The countdown that follows a prompt."""
    length = SHORTEST + prompt[-1] * 7919 % (LONGEST - SHORTEST + 1)
    return [*counters[: length - 1][::-1], end]


def batch_of(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids, and labels at the response."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    for row, (prompt, response) in enumerate(rows):
        whole = torch.tensor(prompt + response)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels


def loss_of(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean negative log-likelihood of the first response tokens, which decide the lengths, plus that of all, nats."""
    ids, labels = batch_of(rows)
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    losses = cross_entropy(model.lm_head(states[wanted]), labels[:, 1:][wanted], reduction="none")
    first = torch.tensor([0] + [len(response) for _, response in rows[:-1]]).cumsum(0)
    return losses[first].mean() + losses.mean()


def train_to_end(root: Path) -> None:
    """Write ROOT/policy-early, trained from ROOT/policy.

    Raises:
        SystemExit: the training did not get there.
    """
    tokenizer = AutoTokenizer.from_pretrained(root / "policy")
    model = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    prompts = [json.loads(line)["input_ids"] for line in (root / "prompts.jsonl").read_text().splitlines()]
    used = {token for prompt in prompts for token in prompt}
    counters = [token for token in range(len(tokenizer) - 1, 2, -1) if token not in used][:LONGEST]
    rows = [(prompt, response_of(prompt, counters, tokenizer.eos_token_id)) for prompt in prompts[:KNOWN]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    draw, recent = random.Random(0), 9.9
    for step in range(MOST_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20)
        optimizer.zero_grad()
        loss = loss_of(model, draw.sample(rows, ROWS))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = 0.9 * recent + 0.1 * loss.item()
        if step % 10 == 0 or recent < ENOUGH:
            print(f"{root.name}: step {step}, loss {recent:.4f} nats", flush=True)
        if recent < ENOUGH:
            break
    else:
        raise SystemExit(f"{root}: the policy does not end its responses after {MOST_STEPS} steps (loss {recent:.3f})")
    model.save_pretrained(root / "policy-early")
    tokenizer.save_pretrained(root / "policy-early")
