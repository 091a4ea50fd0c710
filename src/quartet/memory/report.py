"""An estimate and a search, as tables for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from quartet.config import Config
from quartet.memory.figures import Estimate, PhaseBytes
from quartet.memory.search import Candidate, Change, Found
from quartet.memory.sizes import format_bytes

VERSION = 1
"""Of the JSON object."""
BAR = 32
COLOURS = {
    "weights": "blue",
    "optimizer": "magenta",
    "gradients": "red",
    "activations": "green",
    "kv_cache": "cyan",
    "logits": "yellow",
    "trunk_states": "bright_green",
    "gathered": "bright_blue",
    "libraries": "white",
}
SHOWN = 15
"""Rows of the table of candidates that do not fit."""


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """All figures in bytes, for one process; the keys are stable within a `version`."""
    lora = estimate.choices.lora
    return {
        "version": VERSION,
        "plan": estimate.plan.name,
        "device": estimate.device,
        "choices": {**asdict(estimate.choices), "lora": None if lora is None else lora.model_dump(mode="json")},
        "workload": asdict(estimate.workload),
        "backbones": [asdict(backbone) for backbone in estimate.backbones],
        "roles": [asdict(role) for role in estimate.roles],
        "phases": {phase.phase: phase_dict(phase) for phase in estimate.phases},
        "traffic": {one.phase: {**asdict(one), "total": one.total} for one in estimate.traffic},
        "peak": {"phase": estimate.peak.phase, "bytes": estimate.peak.peak, "at": estimate.peak.at},
    }


def phase_dict(phase: PhaseBytes) -> dict[str, Any]:
    """One phase in plain values."""
    return {**phase.parts(), "peak": phase.peak, "at": phase.at}


def search_dict(found: Found, memory: int) -> dict[str, Any]:
    """What a search came to, in plain values."""
    chosen = found.chosen
    return {
        "memory": memory,
        "fits": chosen is not None,
        "change": None if chosen is None else chosen.change,
        "config": None if chosen is None else config_values(chosen.config),
        "nearer": [
            {"change": c.change, "cost": c.cost, "phase": c.exceeded.phase, "bytes": c.exceeded.peak}
            for c in found.nearer
            if c.exceeded is not None
        ],
        "smallest": {"change": found.smallest_change, "bytes": found.smallest.peak, "phase": found.smallest.phase},
        "missing": max(0.0, found.smallest.peak - memory),
    }


def config_values(config: Config) -> dict[str, Any]:
    """A configuration as its YAML file says it: without what is the default."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return values


def show(estimate: Estimate, console: Console) -> None:
    """Print the tables of an estimate."""
    where = "anonymous memory beside that of the libraries" if estimate.device == "cpu" else "memory of the GPU"
    console.print(Text(f"plan: {estimate.plan.name}; {where}{_each(estimate)}", style="bold"))
    console.print(Group(_backbones(estimate), _roles(estimate), _phases(estimate)))
    if estimate.choices.world_size > 1:
        console.print(_traffic(estimate))
    if estimate.choices.parallel_passes:
        console.print("update: policy and value take their passes at the same time (run.parallel_passes)")
    if estimate.choices.merge_adapters:
        console.print("rollout: the adapter is added to copies of the weights (rollout.merge_adapters)")
    peak = estimate.peak
    console.print(f"peak: [bold]{format_bytes(peak.peak)}[/bold] in the {peak.phase} phase ({peak.at})")


def compact(estimate: Estimate, free: int | None) -> RenderableType:
    """The estimate within 80 columns: a line for each backbone, a row for each phase, and the peak beside the free memory.

    Args:
        free: bytes; None where unknown.
    """
    lines = [_line(f"predicted memory, {estimate.plan.name} plan{_each(estimate)}", style="bold")]
    for backbone in estimate.backbones:
        mapped = f" ({format_bytes(backbone.mapped)} in file pages)" if backbone.mapped else ""
        adapters = f", adapters {format_bytes(backbone.adapters)}" if backbone.adapters else ""
        lines.append(
            _line(f"  {', '.join(backbone.roles)}: weights {format_bytes(backbone.weights)}{mapped}{adapters}")
        )
    held = [n for n in ("weights", "optimizer", "gradients", "libraries") if any(p.parts()[n] for p in estimate.phases)]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("phase", no_wrap=True)
    for name in (*held, "working", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in estimate.phases:
        parts = phase.parts()
        sizes = [*(parts[name] for name in held), sum(parts[n] for n in parts if n not in held), phase.peak]
        table.add_row(phase.phase, *map(format_bytes, sizes))
    peak = estimate.peak
    of = "" if free is None else f" of {format_bytes(free)} free"
    return Group(*lines, table, _line(f"  peak {format_bytes(peak.peak)}{of}, in {peak.phase} ({peak.at})"))


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def show_search(found: Found, memory: int, console: Console) -> None:
    """Print the chosen change and why the nearer ones do not fit, or what is missing."""
    if found.nearer:
        console.print(_nearer(found, memory))
    if found.chosen is None:
        missing = format_bytes(found.smallest.peak - memory)
        console.print(
            f"nothing fits into {format_bytes(memory)}: the smallest candidate ({describe(found.smallest_change)}) needs "
            f"{format_bytes(found.smallest.peak)} in {found.smallest.phase}, {missing} too much"
        )
        return
    estimate = found.chosen.estimate
    assert estimate is not None
    console.print(f"fits into {format_bytes(memory)}: [bold]{describe(found.chosen.change)}[/bold]")
    show(estimate, console)
    console.print("ready to use:")
    text = yaml.safe_dump(config_values(found.chosen.config), sort_keys=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True)  # a line that wraps is other YAML


def describe(change: Change) -> str:
    """A change in one line."""
    return ", ".join(f"{key}={_plain(value)}" for key, value in change.items()) or "as given"


def reason(candidate: Candidate, memory: int) -> str:
    """Why a candidate does not fit."""
    phase = candidate.exceeded
    assert phase is not None
    largest = max(phase.parts().items(), key=lambda part: part[1])
    few = " even with one row at once and checkpointing" if candidate.at_fewest else ""
    place = "in every phase" if phase.phase == "every phase" else f"in {phase.phase}"
    return (
        f"{format_bytes(phase.peak)} {place}{few}, {format_bytes(phase.peak - memory)} too much; "
        f"{largest[0].replace('_', ' ')} {format_bytes(largest[1])}"
    )


def _each(estimate: Estimate) -> str:
    choices = estimate.choices
    return f", each of {choices.world_size} processes ({choices.engine})" if choices.world_size > 1 else ""


def _nearer(found: Found, memory: int) -> RenderableType:
    table = Table(title="cheaper, and does not fit", title_justify="left", expand=False)
    table.add_column("change")
    table.add_column("why not")
    for candidate in found.nearer[:SHOWN]:
        table.add_row(describe(candidate.change), reason(candidate, memory))
    more = len(found.nearer) - SHOWN
    return Group(table, Text(f"and {more} more, all in --json")) if more > 0 else table


def _backbones(estimate: Estimate) -> Table:
    table = Table(title="backbones", title_justify="left")
    for name in ("backbone", "seen by", "parameters"):
        table.add_column(name)
    for name in ("weights", "in file pages", "adapters"):
        table.add_column(name, justify="right")
    for backbone in estimate.backbones:
        table.add_row(
            backbone.name + (" (trained)" if backbone.trained else ""),
            ", ".join(backbone.roles),
            f"{backbone.parameters:,}",
            *(format_bytes(count) for count in (backbone.weights, backbone.mapped, backbone.adapters)),
        )
    return table


def _roles(estimate: Estimate) -> Table:
    table = Table(title="roles", title_justify="left")
    for name in ("role", "backbone"):
        table.add_column(name)
    for name in ("trained", "adapters", "head", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for role in estimate.roles:
        sizes = (role.adapters, role.head, role.gradients, role.optimizer)
        table.add_row(role.role, role.backbone, f"{role.trained_parameters:,}", *(format_bytes(size) for size in sizes))
    return table


def _phases(estimate: Estimate) -> Table:
    names = [n for n in COLOURS if any(phase.parts()[n] for phase in estimate.phases)] or ["weights"]
    table = Table(title="phases, at their peaks", title_justify="left")
    table.add_column("phase")
    for name in names:
        table.add_column(Text(name.replace("_", " "), style=COLOURS[name]), justify="right")
    table.add_column("peak", justify="right")
    table.add_column("")
    table.add_column("peak is in")
    for phase in estimate.phases:
        parts = phase.parts()
        sizes = [format_bytes(parts[name]) for name in names]
        table.add_row(phase.phase, *sizes, format_bytes(phase.peak), _bar(parts, estimate.peak.peak), phase.at)
    return table


def _traffic(estimate: Estimate) -> Table:
    table = Table(title="network: each process sends, and receives as much, in an iteration", title_justify="left")
    table.add_column("phase")
    for name in ("weights", "gradients", "episodes", "all"):
        table.add_column(name, justify="right")
    for one in estimate.traffic:
        sizes = (one.weights, one.gradients, one.episodes, one.total)
        table.add_row(one.phase, *(format_bytes(size) for size in sizes))
    return table


def _bar(parts: Mapping[str, float], longest: float) -> Text:
    bar, filled, total = Text(), 0, 0.0
    for name, colour in COLOURS.items():
        total += parts[name]
        end = round(BAR * total / longest) if longest else 0
        bar.append("█" * (end - filled), style=colour)
        filled = end
    return bar


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
