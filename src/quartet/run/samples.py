"""Evaluation on fixed prompts: the same prompts and the same random numbers each time, so that only the policy differs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quartet.errors import CheckpointError, brief
from quartet.records import Prompts, Scored
from quartet.run.folder import put_on_disk, writing


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


def samples_of(iteration: int, scored: Scored, decode: Callable[[Tensor], str]) -> list[Sample]:
    """What is kept of the scored responses to the evaluation prompts."""
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
    """Add samples to samples.jsonl.

    Raises:
        CheckpointError: the disk is full.
    """
    entries = ({name: getattr(sample, name) for name in Sample.__slots__} for sample in samples)
    with writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        put_on_disk(stream)


def keep_samples(path: Path, *, through: int) -> int:
    """For resuming: drop the samples of iterations that are about to be computed again, and a line torn by a crash.

    Returns:
        How many samples of iteration `through` there are.

    Raises:
        CheckpointError: the disk is full.
    """
    if not path.is_file():
        return 0
    numbered = [(line, _iteration(line)) for line in path.read_bytes().splitlines(keepends=True)]
    temporary = path.with_suffix(".tmp")
    with writing(path):
        with temporary.open("wb") as stream:
            stream.write(b"".join(line.rstrip() + b"\n" for line, iteration in numbered if iteration <= through))
            put_on_disk(stream)
        temporary.replace(path)
    return sum(iteration == through for _, iteration in numbered)


def _iteration(line: bytes) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_samples(path: Path) -> list[dict[str, Any]]:
    """All samples of a run, in order; none where there is no file. A last line that is not whole is ignored, because a
    killed run may leave one.

    Raises:
        CheckpointError: a line is damaged.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append({name: json.loads(line)[name] for name in Sample.__slots__})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no line's end follows
                break
            raise CheckpointError(f"line {number} of {path} is damaged ({brief(error)}); remove that line") from error
    return found
