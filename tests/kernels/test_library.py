"""How the compiled kernels are built, found and loaded, and what happens without them."""

from __future__ import annotations

import ast
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet import kernels
from quartet.kernels import elementwise, library

ROOT = Path(__file__).parents[2]
OWN = f"{Path(torch.__file__).resolve().parent}/lib/libgomp.so.1"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")


@needs_compiler
def test_they_are_there_where_a_compiler_is() -> None:
    assert library.FILE.exists(), "install again: pip install -e ."
    assert all(
        library.kernel(name) is not None
        for name in ("rms_norm_f32", "rotary_f32_f32", "rotary_bf16_bf16", "silu_gradient_bf16")
    )


@needs_compiler
def test_they_share_the_threads_of_torch() -> None:
    """A second OpenMP in the process would have threads of its own, which get in each other's way."""
    found = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp.so" in line}
    assert len(found) == 1


def test_without_a_library_torch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FILE", tmp_path / "none.so")
    assert library._library.__wrapped__() is None
    monkeypatch.setattr(elementwise, "kernel", lambda _: None)
    x = torch.ones(2, 4)
    assert not kernels.silu_product(x, x, x)
    assert kernels.rms_norm(x, x[0], 1e-6) is None


def test_a_library_that_does_not_load_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_text("not a library")
    monkeypatch.setattr(library, "FILE", broken)
    with caplog.at_level(logging.WARNING, "quartet"):
        assert library._library.__wrapped__() is None
    assert str(broken) in caplog.text


@needs_compiler
def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a change of version without an installation: its functions may have other arguments."""
    for file in library.FILE.parent.glob("kernels.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(library, "FILE", tmp_path / "kernels.so")
    with caplog.at_level(logging.WARNING, "quartet"):
        assert library._library.__wrapped__() is None
    assert "install Quartet again" in caplog.text


@pytest.mark.parametrize(
    ("loaded", "found"),
    [
        ([], None),
        (["/usr/lib/libgomp.so.1"], "/usr/lib/libgomp.so.1"),
        (["/home/my user/lib/libgomp.so.1"], "/home/my user/lib/libgomp.so.1"),
        (["/usr/lib/libgomp.so.1", "/usr/lib/libiomp5.so"], None),
        (["/usr/lib/libgomp.so.1", OWN], OWN),
    ],
)
def test_which_threads_are_torchs(loaded: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"7f00-7f01 r-xp 00000000 00:00 1    {name}" for name in loaded for _ in range(2)]
    monkeypatch.setattr(Path, "read_text", lambda _: "\n".join(lines))
    assert library._threads_of_torch() == found


def built(root: Path, path: str, *, target: str = "wheel", compiler: str = "") -> tuple[dict[str, Any], str]:
    """What the hook adds to the build of a checkout, and what it says."""
    pytest.importorskip("hatchling")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import hatch_build
class Said:
    def display_warning(self, text): print(text, file=sys.stderr)
hook = hatch_build.CustomBuildHook({str(root)!r}, {{}}, None, None, {str(root)!r}, {target!r}, Said())
data = {{"artifacts": []}}
hook.initialize("standard", data)
print(data)
"""
    environment = {"PATH": path, "CC": compiler}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    data: dict[str, Any] = ast.literal_eval(done.stdout)
    return data, done.stderr


def checkout(place: Path, *, broken: bool = False) -> Path:
    folder = place / "src" / "quartet" / "kernels"
    folder.mkdir(parents=True)
    for file in (*library.FILE.parent.glob("*.[ch]"), library.FILE.parent / "sources.py"):
        shutil.copy(file, folder)
    if broken:
        (folder / "kernels.c").write_text("this is no C")
    return folder


@pytest.mark.parametrize(
    ("path", "said"), [("/nowhere", "no C compiler found"), ("/usr/bin:/bin", "they do not compile")]
)
def test_an_installation_goes_on_without_them(tmp_path: Path, path: str, said: str) -> None:
    if said == "they do not compile" and shutil.which("cc", path=path) is None:
        pytest.skip("no compiler here")
    folder = checkout(tmp_path, broken=True)
    files = sorted(file.name for file in folder.iterdir())
    data, warning = built(tmp_path, path)
    assert said in warning
    assert data == {"artifacts": []}
    assert sorted(file.name for file in folder.iterdir()) == files


@needs_compiler
@pytest.mark.parametrize("old", [False, True])
def test_an_installation_compiles_them(tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old compiler does not know how to compile for several generations of processors."""
    folder = checkout(tmp_path)
    compiler = "cc -O1"
    if old:
        (tmp_path / "old").write_text(
            '#!/bin/sh\ncase "$*" in *-DCLONES=*|*-shared*) exec cc "$@";; *) exit 1;; esac\n'
        )
        (tmp_path / "old").chmod(0o755)
        compiler = str(tmp_path / "old")
    data, warning = built(tmp_path, "/usr/bin:/bin", compiler=compiler)
    assert not warning
    assert data["artifacts"] == ["src/quartet/kernels/kernels.so"]
    assert data["tag"].startswith("py3-none-linux")
    assert not data["pure_python"]
    monkeypatch.setattr(library, "FILE", folder / "kernels.so")
    assert library._library.__wrapped__() is not None
    assert len(list(folder.iterdir())) == len(list(folder.glob("*.[ch]"))) + 2  # sources.py and the library


def test_a_source_archive_leaves_the_kernels_of_an_installation_alone(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (folder / "kernels.so").write_text("of the installation")
    assert built(tmp_path, "/usr/bin:/bin", target="sdist") == ({"artifacts": []}, "")
    assert (folder / "kernels.so").read_text() == "of the installation"
