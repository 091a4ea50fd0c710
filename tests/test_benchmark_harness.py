"""Benchmarks on machines that lack what they do not need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmark(name): one of the scripts as a module, for the test only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_a_package_that_is_not_installed_is_said_to_be_so(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = benchmark("harness")

    def installed(name: str) -> str:
        if name in ("bitsandbytes", "quartet-rlhf"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(harness, "version", installed)
    found = harness.own_versions()
    assert found["torch"] == version("torch")
    assert found["bitsandbytes"] == found["quartet-rlhf"] == "not installed"


def test_what_cannot_be_measured_is_known_before_models_are_made(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = benchmark("gpu")

    def refused() -> dict[str, str]:
        raise SystemExit("no versions here")

    monkeypatch.setattr(gpu, "own_versions", refused)
    monkeypatch.setattr(gpu, "make_models", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--peer", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no versions here"):
        gpu.main()


def test_a_peak_that_cannot_be_reset_is_the_one_since_the_start(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = benchmark("probe")
    monkeypatch.setattr(probe, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    probe.reset_peak()
    assert probe.status_bytes("VmHWM") > 0
