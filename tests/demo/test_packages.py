"""Fetching, verifying and caching, with made-up packages and an injected downloader and converter."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quartet.demo import packages
from quartet.demo.cached import put
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


@pytest.mark.parametrize("content", [None, b"{"], ids=["gone", "damaged"])
@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
def test_a_damaged_model_in_the_cache_is_converted_again(
    tmp_path: Path, index: Index, file: str, content: bytes | None
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        _convert(gguf, folder)
        (folder / "tokenizer.json").write_bytes(b"{}")

    cache = tmp_path / "cache"
    model = packages.fetch(cache, lambda _: None, download=index, convert=convert).model
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    assert packages.fetch(cache, lambda _: None, download=index, convert=convert).model == model
    assert {path.name: path.read_bytes() for path in model.iterdir()} == whole
    assert len(list(cache.iterdir())) == 3


def test_of_two_first_demos_the_slower_takes_what_the_faster_made(tmp_path: Path, index: Index) -> None:
    cache = tmp_path / "cache"

    def convert(gguf: Path, folder: Path) -> None:
        packages.fetch(cache, lambda _: None, download=index, convert=_convert)
        _convert(gguf, folder)

    files = packages.fetch(cache, lambda _: None, download=index, convert=convert)
    assert packages.fetch(cache, lambda _: None, download=index, convert=convert) == files
    assert len(list(cache.iterdir())) == 3


def test_what_another_demo_named_in_the_meantime_stays(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    put(tmp_path / "mine", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "file").read_text() == "theirs"
    with pytest.raises(NotADirectoryError):
        put(tmp_path / "mine", tmp_path / "theirs" / "file")


def test_what_a_killed_demo_left_is_removed_a_day_later(tmp_path: Path, index: Index) -> None:
    now = time.time()
    for name, age in ((".convert-old", 90_000), (".convert-new", 60), (".reward-model-old", 90_000), ("mine", 90_000)):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "model.gguf").write_bytes(b"x")
        os.utime(tmp_path / "cache" / name, (now - age, now - age))
    packages.fetch(tmp_path / "cache", lambda _: None, download=index, convert=_convert)
    assert {".convert-new", "mine"} == {path.name for path in (tmp_path / "cache").iterdir()} - {
        *(packages.MODEL_NAME, packages.MODEL_PACKAGE.file, packages.RATINGS_PACKAGE.file)
    }


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
