"""`quartet eval` and `quartet export`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from quartet.errors import printable
from quartet.run.reopen import Evaluation, evaluate, export_checkpoint

_SHOWN = 3
"""Samples printed."""
_CHARACTERS = 300
_LINES = (
    ("score", "reward/score"),
    ("standard deviation", "reward/score_std"),
    ("KL, nats a response", "kl/reference"),
    ("length, tokens", "response/length"),
    ("stopped by themselves", "response/stopped_fraction"),
)


def run_eval(options: argparse.Namespace) -> int:
    """Print what `evaluate` finds, as text or as one JSON object; raises as it does."""
    found = evaluate(
        options.run, say=_notice, prompts=options.prompts, count=options.count, start=options.start, trust=options.trust
    )
    print(json.dumps(_as_dict(found)) if options.json else _as_text(found))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Export, and say what went where; raises as `export_checkpoint`."""
    name = export_checkpoint(options.run, options.out, say=_notice, start=options.start, trust=options.trust)
    print(f"{name}\npolicy: {options.out / 'policy'}\nvalue: {options.out / 'value'}")
    return 0


def _notice(sentence: str) -> None:
    print(f"quartet: {printable(sentence)}", file=sys.stderr)


def _as_dict(found: Evaluation) -> dict[str, object]:
    samples = [asdict(sample) for sample in found.samples]
    return {"checkpoint": found.checkpoint, "iteration": found.iteration, **found.figures(), "samples": samples}


def _as_text(found: Evaluation) -> str:
    figures = found.figures()
    lines = [f"{found.checkpoint}, {len(found.samples)} prompts"]
    lines += [f"  {label:<22} {figures[name]:10.3f}" for label, name in _LINES]
    for sample in found.samples[:_SHOWN]:
        lines += ["", f"prompt    {_one_line(sample.prompt)}", f"response  {_one_line(sample.response)}"]
        lines.append(f"score     {sample.score:.3f}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Text of a model may hold what moves a terminal's cursor."""
    return printable(" ".join(text.split())[:_CHARACTERS])
