"""The demo's folders: what cannot be used is said in one sentence, before anything takes its time."""

from __future__ import annotations

from pathlib import Path

import pytest

from quartet.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("cache", ["file", "file/x", "/dev/null", "/proc/nope", "x" * 300])
def test_a_cache_that_is_no_folder(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / cache))
    said = refused(capsys, "--out", str(tmp_path / "out" / "demo"))
    assert f"the cache folder {tmp_path / cache}"[:150] in said
    assert "set QUARTET_CACHE to another folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("out", ["file/x", "/proc/nope", "x" * 300])
def test_a_run_folder_that_cannot_be_made_is_refused_first(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("quartet.demo.run.fetch", never)
    (tmp_path / "file").touch()
    said = refused(capsys, "--out", str(tmp_path / out))
    assert "cannot be written" in said
    assert "name another one with --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
