"""Nested configuration values of tiny runs, and how to change single keys of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

Tree = dict[str, Any]
TinyRun = Callable[..., Tree]


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
