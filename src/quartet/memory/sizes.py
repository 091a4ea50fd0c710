"""Memory sizes as people write them, to bytes and back."""

from __future__ import annotations

import re

from quartet.errors import ConfigError

_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS = {letter + tail: size for letter, size in _BINARY.items() for tail in ("", "ib") if letter or not tail}
_UNITS |= {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of `24GiB` (2**30), `24GB` (10**9), `80g` (a bare letter is binary), `512` (bytes); case does not matter.

    Raises:
        ConfigError: not a number with one of these units, or not above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise ConfigError(f"the memory size {text!r} is not understood; write it like 24GiB, 24GB or 80g")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """Three digits and a binary unit: `0 B`, `812 KiB`, `1.46 GiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or abs(size) >= 100 else 1 if abs(size) >= 10 else 2
    return f"{size:.{digits}f} {unit}"
