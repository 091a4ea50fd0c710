"""Kernels as they are compiled for several generations of processors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from quartet.kernels import library

GENERATIONS = {"this": [], "older": ["-DOLDER_THAN_V4"], "any": ["-DCLONES="]}
"""This processor's own vectors and tiles; those of the generation before; and what every compiler makes of it."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The library as it is compiled for a generation."""
    known: dict[str, ctypes.CDLL] = {}
    folder, own = library.FILE.parent, tmp_path_factory.mktemp("kernels")
    shared = own.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # of all workers of this run

    def make(name: str) -> ctypes.CDLL:
        if name not in known:
            made, linked, built = own / f"{name}.o", own / f"{name}.so", shared / f"kernels-{name}.so"
            flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-w", '-DBUILT_FROM=""']
            source = str(folder / "kernels.c")
            if not built.exists():
                subprocess.run(["cc", *flags, *GENERATIONS[name], "-c", source, "-o", str(made)], check=True)
                subprocess.run(["cc", "-shared", str(made), "-o", str(linked), "-lm"], check=True)
                linked.replace(built)
            threads = library._threads_of_torch()
            assert threads is not None
            ctypes.CDLL(threads, ctypes.RTLD_GLOBAL)
            known[name] = ctypes.CDLL(str(built))
        return known[name]

    return make


@pytest.fixture(params=GENERATIONS)
def generation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled: Callable[[str], ctypes.CDLL]
) -> Iterator[str]:
    """Compute as a generation of processors does."""
    if shutil.which("cc") is None:
        pytest.skip("no compiler here")
    name: str = request.param
    monkeypatch.setattr(library, "_library", lambda: compiled(name))
    library.kernel.cache_clear()
    yield name
    library.kernel.cache_clear()
