"""Evaluation on fixed prompts: the same prompts and the same random numbers each time, so that only the policy differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quartet.records import Prompts, Rollout, Scored


@dataclass(frozen=True, slots=True)
class Sample:
    """One evaluation prompt with its response."""

    iteration: int
    prompt: str
    response: str
    score: float
    kl: float
    """Log-probability of the response under the policy minus that under the reference, nats."""
    tokens: int
    stopped: bool


def evaluation_prompts(prompts: Prompts) -> Prompts:
    """The same prompts with episode numbers that training never uses."""
    return Prompts(tuple(-1 - number for number in range(len(prompts))), prompts.texts, prompts.tokens)


def evaluate(
    iteration: int,
    prompts: Prompts,
    *,
    generate: Callable[[Prompts], Rollout],
    score: Callable[[Rollout], Scored],
    decode: Callable[[Tensor], str],
) -> list[Sample]:
    """Sample a response to every prompt and score it."""
    scored = score(generate(prompts))
    rollout = scored.rollout
    log_ratio = (rollout.logprobs - scored.ref_logprobs).where(rollout.response_mask, 0.0).sum(-1).tolist()
    lengths: list[int] = rollout.response_mask.sum(-1).tolist()
    return [
        Sample(
            iteration=iteration,
            prompt=text,
            response=decode(rollout.tokens[row, : lengths[row]]),
            score=float(scored.scores[row]),
            kl=log_ratio[row],
            tokens=lengths[row],
            stopped=bool(rollout.stopped[row]),
        )
        for row, text in enumerate(rollout.prompts.texts)
    ]


def append_samples(path: Path, samples: list[Sample]) -> None:
    """Add samples to samples.jsonl."""
    with path.open("a", encoding="utf-8") as stream:
        for sample in samples:
            entry = {name: getattr(sample, name) for name in Sample.__slots__}
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def keep_samples(path: Path, *, through: int) -> None:
    """For resuming: drop the samples of iterations that are about to be computed again, and a line torn by a crash."""
    if not path.is_file():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _iteration(line) <= through]
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def _iteration(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All samples of a run, in order."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]
