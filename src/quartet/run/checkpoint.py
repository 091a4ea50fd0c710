"""Checkpoints of a run: safetensors and JSON only, written beside and renamed, verified before they are read.

Everything random in Quartet is a function of the seed and of running numbers (iteration, episode), so the numbers in
`state.json` are all the random state there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quartet.errors import CheckpointError
from quartet.models.roles import Roles

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands."""

    iteration: int
    """Iterations done."""
    episodes: int
    """Episodes consumed: the data cursor and the key of sampling."""
    kl_coef: float
    """The coefficient in force."""


def save_checkpoint(
    folder: Path, roles: Roles, optimizer: torch.optim.Optimizer, state: RunState, *, keep: int
) -> Path:
    """Write `folder/step-NNNNNN`; older ones beyond `keep` go only after the new one is whole.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state.iteration:06d}"
    temporary = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for role in ("policy", "value"):
            _save(temporary / f"{role}.safetensors", _weights(roles, role))
        _save(temporary / "optimizer.safetensors", _optimizer_tensors(optimizer))
        (temporary / STATE).write_text(json.dumps(asdict(state) | {"format": FORMAT}) + "\n", "utf-8")
        _write_manifest(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {final} could not be written ({getattr(error, 'strerror', None) or error}); earlier checkpoints "
            "are intact, free some space and resume"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def load_checkpoint(folder: Path, roles: Roles, optimizer: torch.optim.Optimizer) -> RunState:
    """Verify and read one checkpoint into models and optimizer.

    Raises:
        CheckpointError: a file is missing, of another size or content, or does not fit the run's configuration.
    """
    verify(folder)
    state = json.loads((folder / STATE).read_text("utf-8"))
    if state.pop("format") != FORMAT:
        raise CheckpointError(f"{folder} was written by another version of Quartet; resume it with that version")
    for role in ("policy", "value"):
        stored, own = load_file(folder / f"{role}.safetensors"), _weights(roles, role)
        if stored.keys() != own.keys() or any(stored[k].shape != own[k].shape for k in own):
            raise CheckpointError(f"{folder} holds other weights than this run's configuration trains ({role})")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(stored[key])
    _load_optimizer(optimizer, load_file(folder / "optimizer.safetensors"))
    return RunState(**state)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the first file that differs.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} is missing or damaged; delete that folder to resume from the checkpoint before it"
        ) from error
    for name, (size, digest) in files.items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise CheckpointError(
                f"{path} is missing, truncated or altered; delete that folder to resume from the checkpoint before it"
            )


def _weights(roles: Roles, role: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in roles.trained_parameters(role)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
    _sync(manifest)
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
