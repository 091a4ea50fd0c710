"""Compiles the kernels at installation where there is a C compiler; without one torch's operations compute in their place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src") / "quartet" / "kernels"
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-fopenmp"]


class CustomBuildHook(BuildHookInterface):
    """Puts kernels.so beside kernels.c and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files of the wheel are gathered."""
        folder = Path(self.root) / FOLDER
        library = folder / "kernels.so"
        library.unlink(missing_ok=True)
        if self.target_name != "wheel" or not self._compiled(folder / "kernels.c", library):
            return
        build_data["artifacts"].append(str(FOLDER / "kernels.so"))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")

    def _compiled(self, source: Path, library: Path) -> bool:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            self.app.display_warning("no C compiler found: training on a CPU goes without compiled kernels")
            return False
        # Linked without OpenMP: the names are found in the one that torch has loaded, whose threads the kernels share.
        made, built = library.with_suffix(".o"), library.with_suffix(".tmp")
        steps = [[compiler, *FLAGS, "-c", source, "-o", made], [compiler, "-shared", made, "-o", built, "-lm"]]
        try:
            for step in steps:
                subprocess.run([str(part) for part in step], check=True, capture_output=True, text=True)
            built.replace(library)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            self.app.display_warning(f"the kernels were not compiled, training on a CPU goes without them: {said}")
            return False
        finally:
            made.unlink(missing_ok=True)
            built.unlink(missing_ok=True)
        return True
