"""Inputs that differ from those a run was started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quartet.errors import CheckpointError
from quartet.run.fingerprint import refuse_changed

STARTED = {"models.sft": "a", "models.reward": "b", "data.prompts": "c", "data.eval_prompts": "d"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """As a run writes it, its configuration beside the hashes."""
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps(STARTED | {"configuration": {"run": {"seed": 1}}}))
    return path


def test_the_same_inputs_are_taken(file: Path) -> None:
    refuse_changed(file, STARTED)


@pytest.mark.parametrize("key", STARTED)
def test_an_input_that_is_gone_is_named(key: str, file: Path) -> None:
    rest = {name: value for name, value in STARTED.items() if name != key}
    with pytest.raises(CheckpointError, match=rf"^{key} is not what this run was started with"):
        refuse_changed(file, rest)
    refuse_changed(file, rest, whole=False)


@pytest.mark.parametrize("whole", [True, False])
def test_an_input_that_is_new_or_another_is_named(whole: bool, file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^data\.more is not"):
        refuse_changed(file, STARTED | {"data.more": "e"}, whole=whole)
    with pytest.raises(CheckpointError, match=r"^models\.reward is not"):
        refuse_changed(file, {"models.sft": "a", "models.reward": "e"}, whole=whole)
