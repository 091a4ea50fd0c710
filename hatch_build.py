"""Compiles the kernels at installation where there is a C compiler; without one torch's operations compute in their place."""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src") / "quartet" / "kernels"
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-fopenmp", "-Wno-psabi"]
NO_CLONES = "-DCLONES="
"""For compilers that cannot compile a function for several generations of processors at once: GCC before 12."""


class CustomBuildHook(BuildHookInterface):
    """Puts kernels.so beside kernels.c and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files of the wheel are gathered."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / FOLDER
        library = folder / "kernels.so"
        library.unlink(missing_ok=True)
        said = _compiled(folder, library)
        if said is not None:
            self.app.display_warning(f"training and rollouts on a CPU go without compiled kernels: {said}")
            return
        build_data["artifacts"].append(str(FOLDER / "kernels.so"))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _compiled(folder: Path, library: Path) -> str | None:
    """Compile; the reason if it does not work."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        return "no C compiler found"
    built_from = runpy.run_path(str(folder / "sources.py"))["source_hash"](
        folder
    )  # as the library is asked for when loaded
    said = ""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, built = Path(place) / "kernels.o", Path(place) / "kernels.so"
        compile_one = [
            *compiler,
            *FLAGS,
            f'-DBUILT_FROM="{built_from}"',
            "-c",
            folder / "kernels.c",
            "-o",
            made,
        ]
        # Linked without OpenMP: the names are found in the one that torch has loaded, whose threads the kernels share.
        link = [*compiler, "-shared", made, "-o", built, "-lm"]
        for flags in ([], [NO_CLONES]):
            try:
                for step in ([*compile_one, *flags], link):
                    subprocess.run([str(part) for part in step], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
                continue
            if b"__kmpc" in built.read_bytes():
                return f"{compiler[0]} calls another OpenMP than torch's"
            built.replace(library)
            return None
    return f"they do not compile: {said}"
