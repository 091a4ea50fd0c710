"""Checkpoints that every process writes its own part of, and that any number of processes, under any engine, reads.

A trained weight is laid out flat, and a process's part of it is a range of its numbers; so are the optimizer's states for
it. `shard-00001-of-00004.safetensors` holds one process's ranges, and where each begins stands in the file's metadata. Who
resumes looks up which files overlap with its own ranges, whatever these are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quartet.distributed import Piece, ProcessEngine
from quartet.errors import CheckpointError, brief, cause_of
from quartet.models.roles import Roles
from quartet.run.checkpoint import FILES, STATE, RunState, finish_checkpoint, load_checkpoint, read_state, write_state
from quartet.run.checkpoint_folder import verify, written_whole
from quartet.run.trust import resume_command


def save_shards(
    folder: Path,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    engine: ProcessEngine,
    state: RunState,
    *,
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN`, each process its own file; every process calls this.

    Raises:
        CheckpointError: a disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder / f"step-{state.iteration:06d}"
    with ExitStack() as stack:
        temporary = final.with_name(f".writing-{final.name}")

        def begin() -> None:
            if engine.rank == 0:
                stack.enter_context(written_whole(final))

        def own() -> None:
            tensors, metadata = _own_part(roles, optimizer, engine)
            save_file(tensors, temporary / _file(engine.rank, engine.world_size), metadata=metadata)

        def finish() -> None:
            if engine.rank == 0:
                write_state(temporary, state)
                stack.close()
                finish_checkpoint(folder, keep)

        for act in (begin, own, finish):
            engine.agree(partial(_checked, act, final))
    return final


def load_any(folder: Path, roles: Roles, optimizer: torch.optim.Optimizer, engine: ProcessEngine) -> RunState:
    """Verify and read one checkpoint, of shards or whole, into this process's part of the weights.

    Raises:
        CheckpointError: a file is missing, of another size or content, or does not fit the run's configuration.
    """
    shards = sorted(path.name for path in folder.glob("shard-*.safetensors"))
    if not shards and not engine.shares_state:
        return engine.agree(lambda: load_checkpoint(folder, roles, optimizer))
    needed = [_file(rank, len(shards)) for rank in range(len(shards))] if shards else list(FILES)
    # The main process reads every byte to compare it with the manifest; the others trust its word.
    engine.agree(lambda: verify(folder, (*needed, STATE)) if engine.rank == 0 else None)
    stored: _Stored = _Shards(folder, shards) if shards else _Whole(folder)
    state = read_state(folder)
    number = 0
    with torch.no_grad():
        for role in ("policy", "value"):
            for name, parameter in roles.trained_parameters(role):
                piece = engine.piece(parameter, optimizer)
                try:
                    stored.fill(piece, role, name, number)
                except (KeyError, SafetensorError, RuntimeError) as error:
                    raise CheckpointError(
                        f"{folder} holds other weights than this run's configuration trains ({role}: {name}, {brief(error)})"
                    ) from error
                number += 1
    engine.restored()
    return state


def _checked(act: Callable[[], None], final: Path) -> None:
    try:
        act()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {final} could not be written ({cause_of(error)}); earlier checkpoints "
            f"are intact, free some space and go on with: {resume_command(final.parent.parent)}"
        ) from error


def _file(rank: int, count: int) -> str:
    return f"shard-{rank + 1:05d}-of-{count:05d}.safetensors"


def _own_part(
    roles: Roles, optimizer: torch.optim.Optimizer, engine: ProcessEngine
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    steps: dict[str, float] = {}
    for place, parameter in _trained(roles):
        piece = engine.piece(parameter, optimizer)
        steps[place] = float(piece.step)
        if piece.own and piece.stop > piece.start:
            starts[place] = piece.start
            tensors |= {f"{place}/{key}": tensor.contiguous() for key, tensor in piece.tensors.items()}
    return tensors, {"starts": json.dumps(starts), "steps": json.dumps(steps)}


def _trained(roles: Roles) -> Iterator[tuple[str, nn.Parameter]]:
    for role in ("policy", "value"):
        for name, parameter in roles.trained_parameters(role):
            yield f"{role}/{name}", parameter


class _Stored:
    """A checkpoint's tensors."""

    def fill(self, piece: Piece, role: str, name: str, number: int) -> None:
        """Write the numbers of a weight, which is the optimizer's `number`-th, into the piece."""
        raise AssertionError("abstract")


@dataclass(frozen=True)
class _Range:
    file: Path
    start: int
    count: int


class _Shards(_Stored):
    def __init__(self, folder: Path, names: list[str]) -> None:
        self._ranges: dict[str, list[_Range]] = {}
        self._steps: Mapping[str, float] = {}
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                metadata = file.metadata()
                self._steps = json.loads(metadata["steps"])
                for place, start in json.loads(metadata["starts"]).items():
                    count = file.get_slice(f"{place}/weight").get_shape()[0]
                    self._ranges.setdefault(place, []).append(_Range(folder / name, start, count))

    def fill(self, piece: Piece, role: str, name: str, number: int) -> None:
        place = f"{role}/{name}"
        piece.step.fill_(self._steps[place])
        filled = 0
        for stored in self._ranges[place]:
            start, stop = max(piece.start, stored.start), min(piece.stop, stored.start + stored.count)
            if start >= stop:
                continue
            with safe_open(stored.file, framework="pt") as file:
                for key, tensor in piece.tensors.items():
                    part = file.get_slice(f"{place}/{key}")[start - stored.start : stop - stored.start]
                    tensor[start - piece.start : stop - piece.start].copy_(part)
            filled += stop - start
        if filled != piece.stop - piece.start:
            raise KeyError(f"{piece.stop - piece.start - filled} numbers missing")


class _Whole(_Stored):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._optimizer = folder / "optimizer.safetensors"

    @cached_property
    def _stepped(self) -> set[str]:
        """Numbers of the weights that the optimizer has a state for."""
        with safe_open(self._optimizer, framework="pt") as opened:
            return {key.partition(".")[0] for key in opened.keys()}  # noqa: SIM118, no mapping

    def fill(self, piece: Piece, role: str, name: str, number: int) -> None:
        stepped = str(number) in self._stepped  # else the state stays as it was made: zero
        for key, tensor in piece.tensors.items():
            if key == "weight":
                file, stored = self._folder / f"{role}.safetensors", name
            elif stepped:
                file, stored = self._optimizer, f"{number}.{key}"
            else:
                continue
            with safe_open(file, framework="pt") as opened:
                whole = opened.get_tensor(stored).flatten()  # mapped: only what is copied is read
            if piece.stop > len(whole):
                raise KeyError(f"{len(whole)} numbers")
            tensor.copy_(whole[piece.start : piece.stop])
        if stepped:
            with safe_open(self._optimizer, framework="pt") as opened:
                piece.step.copy_(opened.get_tensor(f"{number}.step"))
