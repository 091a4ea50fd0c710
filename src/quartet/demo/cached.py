"""Folders in the demo's cache: they appear whole, they are checked, and what a killed demo left behind goes."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quartet.errors import CheckpointError, brief, cause_of

SUMS_FILE = "SHA256SUMS"
LEFTOVERS = (".convert-*", ".download-*", ".reward-model-*")
"""Temporary folders; whoever makes one removes it, unless it is killed."""
_DAY = 24 * 60 * 60


@contextmanager
def using(cache: Path) -> Iterator[None]:
    """Work on the cache's files.

    Raises:
        CheckpointError: the system refuses to read or write them.
    """
    try:
        yield
    except BrokenPipeError:  # the output's, whose reader has ended
        raise
    except OSError as error:
        raise CheckpointError(
            f"the cache folder {brief(cache)} cannot be used ({cause_of(error)}); free some space or set QUARTET_CACHE to "
            "another folder"
        ) from error


def remove_leftovers(cache: Path) -> None:
    """Remove temporary folders that are older than a day: no demo takes so long."""
    for pattern in LEFTOVERS:
        for folder in cache.glob(pattern):
            if folder.lstat().st_mtime < time.time() - _DAY:
                shutil.rmtree(folder, ignore_errors=True)


def put(folder: Path, target: Path) -> None:
    """Give a finished folder its name; one that another demo gave that name in the meantime stays."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def write_sums(folder: Path, *, without: str) -> None:
    """Leave the SHA-256 of every file of the folder in it, as `sha256sum` does, but that of `without`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != without)
    (folder / SUMS_FILE).write_text("".join(f"{_sum(path)}  {path.name}\n" for path in files), encoding="utf-8")


def sums_hold(folder: Path) -> bool:
    """Whether every file named in the folder's sums is there and has its sum."""
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        return all(_sum(folder / name) == expected for expected, _, name in (line.partition("  ") for line in lines))
    except (OSError, ValueError):
        return False


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
