"""Checkpoints in the older pickled format (.bin), converted once to safetensors where the user allows it.

Unpickling can run code. `torch.load(weights_only=True)` refuses everything but tensors and plain containers, and this is the
only module that calls it; all others read safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quartet.config import ModelsConfig
from quartet.errors import CheckpointError, cause_of
from quartet.models.cache import cache_folder
from quartet.models.checkpoint_info import ADAPTER_CONFIG, CheckpointInfo, Kind, read_checkpoint

_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")
_WHOLE, _INDEX, _ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"


def open_checkpoint(models: ModelsConfig, kind: Kind, *, headers_only: bool = False) -> CheckpointInfo:
    """`read_checkpoint` of `models.sft` or `models.reward`; with `models.allow_pickle` pickled weights of local folders are
    converted first.

    Args:
        headers_only: as `read_checkpoint`.

    Raises:
        CheckpointError: as `read_checkpoint`; a pickle that holds anything but tensors; a cache that cannot be written.
    """
    given: str = getattr(models, kind)
    place = Path(given).expanduser()
    if not models.allow_pickle or not place.is_dir():
        return read_checkpoint(given, kind, trust_remote_code=models.trust_remote_code, headers_only=headers_only)
    key = f"models.{kind}"
    origin = _base_of(place)
    info = read_checkpoint(str(_without_pickles(place, key)), kind, trust_remote_code=models.trust_remote_code)
    return replace(info, name=given, origin=None if origin == info.base else origin)


def _base_of(folder: Path) -> str:
    """The full checkpoint that a folder holds or is an adapter on."""
    base = (
        _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") if (folder / ADAPTER_CONFIG).is_file() else None
    )
    return base if isinstance(base, str) else str(folder)


def _without_pickles(folder: Path, key: str) -> Path:
    """The folder itself, or a copy in the cache that holds safetensors where it holds pickles."""
    changes: dict[str, str] = {}
    base = Path(_base_of(folder))
    if base != folder and base.is_dir():
        changes["base_model_name_or_path"] = str(_without_pickles(base, key))
    files = _pickles(folder, key)
    if not files and changes.get("base_model_name_or_path", str(base)) == str(base):
        return folder
    target = cache_folder() / "unpickled" / _key(folder, changes)
    if not target.is_dir():
        _convert(folder, files, changes, target, key)
    return target


def _pickles(folder: Path, key: str) -> list[Path]:
    if (folder / ADAPTER_CONFIG).is_file():
        return [] if (folder / "adapter_model.safetensors").is_file() else _existing([folder / _ADAPTER])
    if (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file():
        return []
    if (folder / _WHOLE).is_file() or not (folder / _INDEX).is_file():
        return _existing([folder / _WHOLE])
    parts = _json(folder / _INDEX).get("weight_map")
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if not names or any(Path(name).name != name or not (folder / name).is_file() for name in names):
        raise CheckpointError(f"{key}: {folder / _INDEX} does not name the files beside it; fetch the checkpoint again")
    return [folder / name for name in names]


def _existing(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.is_file()]


def _convert(folder: Path, files: list[Path], changes: dict[str, str], target: Path, key: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
            copy = Path(temporary) / "checkpoint"
            copy.mkdir()
            for file in folder.iterdir():
                if file.is_file() and (file.suffix not in _WEIGHTS or file.name == "adapter_model.safetensors"):
                    shutil.copyfile(file, copy / file.name)
            _write_weights(files, copy, key)
            if changes:
                config = _json(copy / ADAPTER_CONFIG) | changes
                (copy / ADAPTER_CONFIG).write_text(json.dumps(config), "utf-8")
            if not target.exists():
                copy.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{key}={str(folder)!r} is to be converted to safetensors in {target} and cannot be written there "
            f"({cause_of(error)}); free some space or set QUARTET_CACHE to another folder"
        ) from error


def _write_weights(files: list[Path], folder: Path, key: str) -> None:
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        tensors = _tensors(file, key)
        single = "adapter_model.safetensors" if file.name == _ADAPTER else "model.safetensors"
        name = single if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _tensors(file: Path, key: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a protocol that may turn out unreadable, which is an error then
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{key}: {file} is damaged or holds more than tensors, which is not loaded even with models.allow_pickle "
            f"({type(error).__name__}); give a checkpoint in safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise CheckpointError(f"{key}: {file} holds no table of tensors; give a checkpoint in safetensors")
    # Weights that share memory (tied embeddings) become tensors of their own, which safetensors asks for.
    seen: set[int] = set()
    for name, tensor in found.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor.clone() if shared else tensor.contiguous()
    return found


def _key(folder: Path, changes: dict[str, str]) -> str:
    """Changes with the files: their names, sizes and times."""
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode())
    for file in sorted(folder.iterdir()):
        status = file.stat()
        digest.update(f"{os.path.realpath(file)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _json(path: Path) -> dict[str, object]:
    """Its content, empty where it is no JSON object: `read_checkpoint` says what is wrong with it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
