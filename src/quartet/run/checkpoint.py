"""Checkpoints of a run: safetensors and JSON only, written beside and renamed, verified before they are read.

Everything random in Quartet is a function of the seed and of running numbers (iteration, episode), so the numbers in
`state.json` are all the random state there is.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quartet.errors import CheckpointError, brief, cause_of
from quartet.models.roles import Roles
from quartet.run.checkpoint_folder import list_checkpoints, remove_checkpoint, verify, written_whole
from quartet.run.trust import resume_command

STATE = "state.json"
FILES = ("policy.safetensors", "value.safetensors", "optimizer.safetensors", STATE)
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
    bad_steps: int = 0
    """Optimizer steps in a row up to now that were not taken, because a loss or the gradient was not finite."""


def save_checkpoint(
    folder: Path, roles: Roles, optimizer: torch.optim.Optimizer, state: RunState, *, keep: int
) -> Path:
    """Write `folder/step-NNNNNN`; older ones beyond `keep` go only after the new one is whole.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state.iteration:06d}"
    try:
        with written_whole(final) as temporary:
            for role in ("policy", "value"):
                _save(temporary / f"{role}.safetensors", _weights(roles, role))
            _save(temporary / "optimizer.safetensors", _optimizer_tensors(optimizer))
            write_state(temporary, state)
        finish_checkpoint(folder, keep)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {final} could not be written ({cause_of(error)}); earlier checkpoints "
            f"are intact, free some space and go on with: {resume_command(folder.parent)}"
        ) from error
    return final


def write_state(folder: Path, state: RunState) -> None:
    """Write state.json."""
    (folder / STATE).write_text(json.dumps(asdict(state) | {"format": FORMAT}) + "\n", "utf-8")


def finish_checkpoint(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in list_checkpoints(folder)[:-keep]:
        remove_checkpoint(old)


def load_checkpoint(folder: Path, roles: Roles, optimizer: torch.optim.Optimizer) -> RunState:
    """Verify and read one checkpoint into models and optimizer.

    Raises:
        CheckpointError: a file is missing, of another size or content, or does not fit the run's configuration.
    """
    state = load_weights(folder, roles)
    try:
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of Quartet ({brief(error)}); restore it from a copy"
        ) from error
    _load_optimizer(optimizer, moments)
    return state


def load_weights(folder: Path, roles: Roles) -> RunState:
    """Verify one checkpoint and read what policy and value have of it.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    verify(folder, FILES)
    state = read_state(folder)
    try:
        # Mapped from the files, so that no second copy of all weights is in memory.
        weights = {role: load_file(folder / f"{role}.safetensors") for role in ("policy", "value")}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of Quartet ({brief(error)}); restore it from a copy"
        ) from error
    for role, stored in weights.items():
        own = _weights(roles, role)
        if stored.keys() != own.keys() or any(stored[k].shape != own[k].shape for k in own):
            raise CheckpointError(f"{folder} holds other weights than this run's configuration trains ({role})")
    with torch.no_grad():
        for role, stored in weights.items():
            for key, tensor in _weights(roles, role).items():
                tensor.copy_(stored[key])
    return state


def read_state(folder: Path) -> RunState:
    """Read state.json.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        version = state.pop("format")
        if version != FORMAT:
            raise CheckpointError(f"{folder} was written by another version of Quartet; resume it with that version")
        state = RunState(**state)
        numbers = (state.iteration, state.episodes, state.bad_steps)
        if any(type(n) is not int or n < 0 for n in numbers) or not math.isfinite(state.kl_coef):
            raise ValueError(f"numbers out of range: {state}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / STATE} is not the state of a run ({brief(error)}); restore it from a copy"
        ) from error
    return state


def _weights(roles: Roles, role: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in roles.trained_parameters(role)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as tensors of their own; whole numbers (the step of 8-bit Adam) become int64 scalars."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
            shared = tensor.untyped_storage().data_ptr() in seen  # 8-bit Adam's code book
            seen.add(tensor.untyped_storage().data_ptr())
            found[f"{index}.{key}"] = tensor.clone() if shared else tensor
    return found


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        whole_number = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(index), {})[name] = int(value) if whole_number else value
    whole = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    if getattr(optimizer, "is_paged", False):
        _load_paged(optimizer, whole)
    else:
        optimizer.load_state_dict(whole)


def _load_paged(optimizer: Any, whole: dict[str, Any]) -> None:
    """bitsandbytes would load all state into plain memory of the GPU, which paging is there to save: what it pages, its own
    `get_state_buffer` knows."""
    optimizer.load_state_dict(whole, move_to_device=False)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                continue
            entry[name] = value.to(parameter.device)
            if name in ("state1", "state2"):
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                if getattr(buffer, "is_paged", False):
                    entry[name] = buffer.copy_(value)


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
