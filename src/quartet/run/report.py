"""`report.html` of a run: one file without scripts or links, made of metrics.jsonl and samples.jsonl.

Prompts and responses are text of a model and may hold markup; the template escapes everything it is given, and the page's
content policy forbids scripts and outside sources besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quartet.errors import CheckpointError
from quartet.run.charts import Points, line_chart
from quartet.run.folder import RunFolder, write_atomically, writing
from quartet.run.metrics import read_metrics
from quartet.run.samples import read_samples
from quartet.run.stored_config import read_config

REPORT_FILE = "report.html"
_COLUMNS = 4
"""Most iterations whose samples stand side by side."""
_CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Score of an episode", {"score": "reward/score", "with KL penalty": "reward/total"}),
    ("KL to the reference, nats a response", {"KL": "kl/reference"}),
    ("Response length, tokens", {"length": "response/length"}),
    ("Responses that stopped by themselves", {"share": "response/stopped_fraction"}),
    ("Entropy, nats a token", {"entropy": "policy/entropy"}),
    ("Clipped tokens", {"policy": "policy/clip_fraction", "value": "value/clip_fraction"}),
    ("Explained variance of the critic", {"explained variance": "value/explained_variance"}),
    ("Optimizer steps not taken", {"steps": "gradient/skipped_steps"}),
)


def write_report(run: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        CheckpointError: no run there, no metrics yet, a damaged file, or a full disk.
    """
    folder = RunFolder(run)
    read_config(folder.path)
    records = read_metrics(folder.metrics)
    if not records:
        raise CheckpointError(f"{folder.metrics} has no iteration yet; run on and ask again")
    path = folder.path / REPORT_FILE
    with writing(path):
        write_atomically(path, render(folder.path.resolve().name, records, read_samples(folder.samples)))
    return path


def render(title: str, records: Sequence[Mapping[str, float]], samples: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    charts = [Markup(chart) for chart in _charts(records)]  # made of numbers and of the names above
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)
    iterations, rows = _side_by_side(samples)
    return template.render(title=title, last=records[-1], charts=charts, iterations=iterations, rows=rows)


def _charts(records: Sequence[Mapping[str, float]]) -> list[str]:
    def over_iterations(name: str, factor: float = 1.0) -> Points:
        return [(record["iteration"], factor * record[name]) for record in records if name in record]

    stages = sorted({name for record in records for name in record if name.startswith("time/")})
    found = [line_chart(t, {k: over_iterations(v) for k, v in s.items()}, x_label="iteration") for t, s in _CHARTS]
    points = [(r["kl/reference"], r["reward/score"]) for r in records if {"kl/reference", "reward/score"} <= r.keys()]
    found.insert(0, line_chart("Score against KL", {"score": points}, x_label="KL to the reference, nats a response"))
    seconds = {name.removeprefix("time/"): over_iterations(name) for name in stages}
    found.append(line_chart("Seconds of each stage", seconds, x_label="iteration"))
    memory = {"peak": over_iterations("memory/peak_bytes", 2.0**-30)}
    return [*found, line_chart("Peak memory, GiB", memory, x_label="iteration")]


def _side_by_side(samples: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
    """A few iterations, first and last among them, and for each prompt its samples at them."""
    known = sorted({int(sample["iteration"]) for sample in samples})
    last = len(known) - 1
    chosen = sorted({known[round(place * last / (_COLUMNS - 1))] for place in range(_COLUMNS)}) if known else []
    rows: list[dict[str, Any]] = []
    at = {iteration: [s for s in samples if s["iteration"] == iteration] for iteration in chosen}
    for number, first in enumerate(at[chosen[0]] if chosen else []):
        cells = [at[iteration][number] if number < len(at[iteration]) else None for iteration in chosen]
        rows.append({"prompt": first["prompt"], "cells": cells})
    return chosen, rows


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1em; }
svg { width: 100%; font-size: 11px; } svg .title { font-size: 13px; font-weight: 600; }
.frame { fill: none; stroke: #999; } .grid { stroke: #e4e4e4; } .line { fill: none; stroke-width: 1.4; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { border: 1px solid #ccc; padding: 6px; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td pre { white-space: pre-wrap; margin: 0 0 4px; font: inherit; } small { color: #666; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ "%d"|format(last["iteration"]) }} iterations, {{ "%d"|format(last["episodes"]) }} episodes.</p>
<div class="charts">{% for chart in charts %}<div>{{ chart }}</div>
{% endfor %}</div>
{% if rows %}<h2>The fixed evaluation prompts</h2>
<table>
<tr><th>prompt</th>{% for iteration in iterations %}<th>iteration {{ iteration }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td><pre>{{ row.prompt }}</pre></td>
{% for cell in row.cells %}<td>{% if cell %}<pre>{{ cell.response }}</pre>
<small>score {{ "%.3f"|format(cell.score) }}, KL {{ "%.2f"|format(cell.kl) }}, {{ cell.tokens }} tokens</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</table>
{% endif %}</body>
</html>
"""
