"""Nested configuration values of tiny runs, and how to change single keys of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
TinyRun = Callable[..., Tree]


def edit_config(run: Path, changes: Tree) -> None:
    """As a user would: in the run's config.yaml."""
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), changes)))


def as_if_started_with(run: Path, changes: Tree) -> None:
    """The run folder of a run whose configuration was another."""
    edit_config(run, changes)
    inputs = json.loads((run / "inputs.json").read_text())
    inputs["configuration"] = changed(inputs["configuration"], changes)
    (run / "inputs.json").write_text(json.dumps(inputs))


def changed(tree: Tree, changes: Tree) -> Tree:
    """A copy with values set by dotted key."""
    tree = copy.deepcopy(tree)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree
