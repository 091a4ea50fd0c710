"""What the C files of the kernels are known by. Imports nothing of Quartet or torch: the installation runs it too."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """SHA-256 of the C files in a folder, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.[ch]")):
        found.update(file.read_bytes())
    return found.hexdigest()
