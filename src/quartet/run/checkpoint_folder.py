"""The folder of one checkpoint: whole or absent, with every byte accounted for in its manifest.

A checkpoint is written beside its place, each file is put on the disk (fsync), then the manifest, then the folder is
renamed. So whatever moment a run is killed at, a folder named `step-NNNNNN` is whole. What a manifest says is checked
before a file is opened, and nothing outside the folder is ever read or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quartet.errors import CheckpointError
from quartet.run.trust import resume_command

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-\d{6,}")
_UNFINISHED = (".writing-", ".removing-")


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and not path.is_symlink()]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def choose_checkpoint(folder: Path, name: str | None) -> Path:
    """The checkpoint of a run called `name` (`step-000020`), or the newest.

    Raises:
        CheckpointError: there is none, or none of that name.
    """
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder.parent} has no checkpoint to resume from, though it got further; start the run again in a new folder"
        )
    if name is None:
        return found[-1]
    for path in found:
        if path.name == name:
            return path
    raise CheckpointError(
        f"{folder.parent} has no checkpoint {name!r}; choose one of those it has: {', '.join(p.name for p in found)}"
    )


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """Gives a temporary folder to write a checkpoint's files into; on leaving, it becomes `final`, whole and on the disk.

    After an exception nothing is left of it, and what `final` was before stays.
    """
    temporary = final.with_name(f".writing-{final.name}")
    final.parent.mkdir(parents=True, exist_ok=True)
    _clear_unfinished(final.parent)
    temporary.mkdir()
    try:
        yield temporary
        _write_manifest(temporary)
        if final.exists():
            remove_checkpoint(final)
        temporary.replace(final)
        sync(final.parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that no moment leaves a part of it under its name."""
    leaving = path.with_name(f".removing-{path.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    path.replace(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def verify(folder: Path, needed: tuple[str, ...]) -> None:
    """Compare every file with the manifest, which has to name `needed` at least.

    Raises:
        CheckpointError: names the first file that differs, and the checkpoint before.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is missing or damaged; {_remedy(folder)}") from error
    strange = [name for name in files if Path(name).name != name or name in ("", ".", "..")]
    absent = [name for name in needed if name not in files]
    if strange or absent:
        problem = f"names {strange[0]!r}, which is no file of this folder" if strange else f"does not name {absent[0]}"
        raise CheckpointError(f"{folder / MANIFEST} {problem}; {_remedy(folder)}")
    for name, (size, digest) in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise CheckpointError(f"{path} is missing, truncated or altered; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    run = folder.parent.parent
    before = [path for path in list_checkpoints(folder.parent) if step_of(path) < step_of(folder)]
    if not before:
        return "there is no checkpoint before it, so restore it from a copy or start the run again in a new folder"
    return f"go on from the checkpoint before it with: {resume_command(run)} --from {before[-1].name}"


def sync(path: Path) -> None:
    """Have the system put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", "utf-8")
    sync(manifest)
    sync(folder)


def _clear_unfinished(folder: Path) -> None:
    """Remove what a killed run left."""
    for path in folder.iterdir():
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
