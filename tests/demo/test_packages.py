"""Fetching, verifying and caching, with made-up packages and an injected downloader and converter."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quartet.demo import packages
from quartet.demo.conversion import weights_digest
from quartet.errors import CheckpointError, DataError


def _wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(packages.GGUF_MEMBER), b"gguf bytes")


def _convert(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == b"gguf bytes"
    folder.mkdir()
    save_file({"weight": torch.tensor([1.0, 2.0])}, folder / "model.safetensors")


class Index:
    """A downloader that serves made-up files and counts."""

    def __init__(self) -> None:
        self.served: list[str] = []

    def __call__(self, package: packages.Package, folder: Path) -> None:
        self.served.append(package.file)
        if package.source:
            (folder / package.file).write_bytes(b"ratings")
        else:
            _wheel(folder / package.file)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """A downloader; the committed sums are those of the files it serves."""
    _wheel(tmp_path / "wheel")
    wheel_sum = hashlib.sha256((tmp_path / "wheel").read_bytes()).hexdigest()
    ratings_sum = hashlib.sha256(b"ratings").hexdigest()
    monkeypatch.setattr(packages, "MODEL_PACKAGE", replace(packages.MODEL_PACKAGE, sha256=wheel_sum))
    monkeypatch.setattr(packages, "RATINGS_PACKAGE", replace(packages.RATINGS_PACKAGE, sha256=ratings_sum))
    _convert_to_digest = tmp_path / "converted"
    (tmp_path / "x.gguf").write_bytes(b"gguf bytes")
    _convert(tmp_path / "x.gguf", _convert_to_digest)
    monkeypatch.setattr(packages, "WEIGHTS_SHA256", weights_digest(_convert_to_digest))
    return Index()


def test_both_packages_are_fetched_verified_and_the_model_converted(tmp_path: Path, index: Index) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    files = packages.fetch(cache, said.append, download=index, convert=_convert)
    assert files.ratings.read_bytes() == b"ratings"
    assert (files.model / "model.safetensors").is_file()
    assert sum("SHA-256" in line and "verified" in line for line in said) == 3
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [packages.MODEL_NAME, packages.MODEL_PACKAGE.file, packages.RATINGS_PACKAGE.file]
    )


def test_a_second_run_fetches_and_converts_nothing(tmp_path: Path, index: Index) -> None:
    def never(*_: object) -> None:
        raise AssertionError("called again")

    first = packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=_convert)
    assert len(index.served) == 2
    assert packages.fetch(tmp_path / "cache", lambda _: None, download=never, convert=never) == first


def test_a_damaged_file_in_the_cache_is_named_with_both_sums(tmp_path: Path, index: Index) -> None:
    files = packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=_convert)
    files.ratings.write_bytes(b"other")
    with pytest.raises(CheckpointError) as caught:
        packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=_convert)
    for part in (str(files.ratings), hashlib.sha256(b"ratings").hexdigest(), hashlib.sha256(b"other").hexdigest()):
        assert part in str(caught.value)


def test_a_wrong_download_never_enters_the_cache(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "RATINGS_PACKAGE", replace(packages.RATINGS_PACKAGE, sha256="f" * 64))
    with pytest.raises(CheckpointError, match="f" * 64):
        packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=_convert)
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_that_are_not_the_expected_ones_are_refused(tmp_path: Path, index: Index) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        save_file({"weight": torch.tensor([1.0, 2.5])}, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"the weights in .* have the SHA-256"):
        packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=convert)
    assert not (tmp_path / "cache" / packages.MODEL_NAME).exists()


def test_the_digest_counts_tensors_and_not_the_files_metadata(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([[1.0], [2.0]]), "a": torch.tensor(3.0, dtype=torch.bfloat16)}
    expected = hashlib.sha256()
    expected.update(b"a torch.bfloat16 []\n" + bytes.fromhex("4040"))
    expected.update(b"b torch.float32 [2, 1]\n" + bytes.fromhex("0000803f00000040"))
    for name, metadata in (("one", None), ("two", {"written by": "another library"})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata=metadata)
        assert weights_digest(tmp_path / name) == expected.hexdigest()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        weights_digest(tmp_path)


def _pip_that_fails(monkeypatch: pytest.MonkeyPatch, stderr: str) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_a_failing_pip_is_one_sentence_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for x.\n"
    commands = _pip_that_fails(monkeypatch, stderr)
    with pytest.raises(DataError) as caught:
        packages.pip_download(packages.RATINGS_PACKAGE, tmp_path)
    message = str(caught.value)
    assert "No matching distribution found for x; check the network" in message
    assert "put vaderSentiment-3.3.2.tar.gz into" in message
    assert "\n" not in message
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]


def test_a_sum_that_pip_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "0123456789abcdef" * 4
    _pip_that_fails(monkeypatch, f"ERROR: THESE PACKAGES DO NOT MATCH\n  Expected sha256 aa\n       Got    {found}\n")
    with pytest.raises(CheckpointError, match=found):
        packages.pip_download(packages.MODEL_PACKAGE, tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "chosen"))
    assert packages.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("QUARTET_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(packages.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache_folder() == tmp_path / "xdg" / "quartet"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert packages.cache_folder() == tmp_path / ".cache" / "quartet"
    monkeypatch.setattr(packages.sys, "platform", "darwin")
    assert packages.cache_folder() == tmp_path / "Library" / "Caches" / "quartet"
