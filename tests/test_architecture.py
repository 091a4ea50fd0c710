"""Rules of the source tree: the direction of imports, sizes, documented and used configuration, quiet imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

import quartet
from quartet.config import ppo as ppo_schema
from quartet.config import rollout as rollout_schema
from quartet.config import schema
from quartet.config.load import known_keys

ROOT = Path(quartet.__file__).parent
LAYERS = (
    "errors",
    "allocator",
    "config",
    "records",
    "ops",
    "kernels",
    "distributed",
    "models",
    "rewards",
    "rollout",
    "stages",
    "memory",
    "run",
    "trainer",
    "demo",
    "cli",
)
"""Each may import those before it; `__init__` and `__main__` may import all."""
FILES = sorted(ROOT.rglob("*.py"))
NAMED = vars(schema) | vars(rollout_schema) | vars(ppo_schema)
SECTIONS = [value for value in NAMED.values() if isinstance(value, type) and issubclass(value, schema.Section)]
FIELDS = sorted({(section.__name__, field) for section in SECTIONS for field in section.model_fields})


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of this package, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            modules = [
                f"{node.module}.{alias.name}" if node.module == "quartet" else str(node.module) for alias in node.names
            ]
        else:
            continue
        yield from ((node.lineno, module) for module in modules if module.split(".")[0] == "quartet")


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(path) for path in FILES} - {"__init__", "__main__"} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(path)
    if own in ("__init__", "__main__"):
        return
    allowed = set(LAYERS[: LAYERS.index(own) + 1])
    wrong = []
    for line, module in imported(path):
        parts = module.split(".")
        if len(parts) > 1 and parts[1] in LAYERS and parts[1] not in allowed:
            wrong.append(f"line {line}: {module}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 300
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    long = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines >= 60} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_left_to_write(path: Path) -> None:
    text = path.read_text("utf-8")
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    assert "NotImplementedError" not in names
    assert not [word for word in ("TODO", "FIXME", "XXX", "type: ignore") if word in text]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_and_public_names_have_docstrings(path: Path) -> None:
    if path.name == "__init__.py" and not path.read_text("utf-8").strip():
        return
    assert ast.get_docstring(tree(path)), "module"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree(path).body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def attributes_read() -> set[str]:
    """Names read as attributes anywhere but in the configuration itself."""
    found = set()
    for path in FILES:
        if layer_of(path) == "config":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def test_no_key_of_the_configuration_is_left_out_here() -> None:
    assert {key.rpartition(".")[2] for key in known_keys()} == {field for _, field in FIELDS}


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_configuration_field_is_explained_and_read(section: str, field: str) -> None:
    model = NAMED[section]
    assert issubclass(model, BaseModel)
    assert model.model_fields[field].description
    assert field in attributes_read()


def test_configuration_sections_are_frozen_and_closed() -> None:
    for section in SECTIONS:
        assert section.model_config["frozen"]
        assert section.model_config["extra"] == "forbid"


def test_distributed_is_the_only_importer_of_process_groups() -> None:
    for path in FILES:
        if layer_of(path) == "distributed":
            continue
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [n for n in names if n.startswith(("torch.distributed", "deepspeed"))], name_of(path)


def test_importing_does_nothing() -> None:
    """No handler, level, warning filter, environment variable, socket or thread comes of importing every module."""
    modules = sorted(
        "quartet." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in FILES
        if path.name not in ("__main__.py",) and path != ROOT / "__init__.py"
    )
    script = f"""
import logging, os, socket, sys, threading, warnings
import torch, transformers, peft, datasets, rich.live, omegaconf, pydantic
import transformers.utils.logging
state = lambda: (
    list(logging.root.handlers), logging.root.level, transformers.utils.logging.get_verbosity(),
    transformers.utils.logging.is_progress_bar_enabled(), dict(os.environ), threading.active_count(),
    torch.get_num_threads(), torch.get_rng_state().sum().item(), torch.is_grad_enabled(),
)
def refuse(*arguments, **options):
    raise AssertionError("a socket is opened")
socket.socket = socket.create_connection = refuse
heavy = lambda: {{"deepspeed", "bitsandbytes", "vllm", "tensorboard", "gguf"}} & set(sys.modules)
before, loaded = state(), heavy()
import importlib
for name in {modules!r}:
    importlib.import_module(name)
assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
assert heavy() == loaded, heavy()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_package_is_light() -> None:
    script = "import sys, quartet; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_huge_pages_are_asked_for_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if before is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = before
    script = "import quartet, os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == after


def test_the_map_of_the_code_names_every_file_in_its_layer() -> None:
    text = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    block = text.partition("src/quartet/\n")[2].partition("```")[0]
    layers = dict(re.findall(r"^  (\w+)(?:/|\.py)(.*(?:\n {6}.*)*)", block, flags=re.MULTILINE))
    for layer in LAYERS:
        files = {path.stem for path in ROOT.glob(f"{layer}/*.py")} - {"__init__"}
        assert files <= set(re.findall(r"\w+", layers[layer])), layer
