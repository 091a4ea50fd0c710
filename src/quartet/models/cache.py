"""Quartet's cache folder, and in it frozen checkpoints in the computation's dtype so that a CPU can map them.

transformers maps safetensors weights from the file (clean pages, shared between processes and given back under pressure)
when they are asked for in the file's own dtype; any other dtype is an anonymous copy. So a frozen checkpoint is converted
once, tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from quartet.errors import CheckpointError, cause_of
from quartet.models.checkpoint_info import CheckpointInfo, TensorInfo

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SMALL_FILES = ("config.json", "generation_config.json")


def cache_folder() -> Path:
    """`$QUARTET_CACHE`, else `quartet` in the platform's cache folder. The folder need not exist."""
    chosen = os.environ.get("QUARTET_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quartet"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quartet"


def mappable(info: CheckpointInfo, dtype: torch.dtype) -> str:
    """A folder with the checkpoint's full weights in `dtype`: the checkpoint itself, or a converted copy in the cache.

    Raises:
        CheckpointError: the copy cannot be written.
    """
    if _is_in(info, dtype):
        return info.base
    target = _copy(info, dtype)
    if not (target / "config.json").is_file():
        _convert(info, NAMES[dtype], target)
    return str(target)


def largest_to_convert(info: CheckpointInfo, dtype: torch.dtype) -> int:
    """Bytes of the largest tensor that `mappable` would convert now; 0 where it would convert none."""
    if _is_in(info, dtype):
        return 0
    try:
        if (_copy(info, dtype) / "config.json").is_file():
            return 0
    except OSError:  # the files are still to come from the Hub
        pass
    return max(math.prod(t.shape) for t in info.tensors.values()) * dtype.itemsize


def _is_in(info: CheckpointInfo, dtype: torch.dtype) -> bool:
    wanted = NAMES[dtype]
    return info.trust_remote_code or all(t.dtype == wanted or t.dtype not in FLOATS for t in info.tensors.values())


def _copy(info: CheckpointInfo, dtype: torch.dtype) -> Path:
    return cache_folder() / "converted" / f"{_key(info)}-{NAMES[dtype].lower()}"


def _key(info: CheckpointInfo) -> str:
    """Changes with the files: their names, sizes and times, and every header."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in info.tensors.values()}):
        status = file.resolve().stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    for name, tensor in sorted(info.tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
    return digest.hexdigest()[:16]


def _convert(info: CheckpointInfo, wanted: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
            folder = Path(temporary) / "checkpoint"
            folder.mkdir()
            _write(info.tensors, wanted, folder / "model.safetensors")
            origin = next(iter(info.tensors.values())).file.parent
            for name in SMALL_FILES:
                if (origin / name).is_file():
                    shutil.copyfile(origin / name, folder / name)
            if not (folder / "config.json").is_file():
                info.config.save_pretrained(folder)
            if not target.exists():
                folder.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{info.key}={info.base!r} is to be converted to {wanted} in {target} and cannot be written there "
            f"({cause_of(error)}); free some space or set QUARTET_CACHE to another folder"
        ) from error


def _write(tensors: dict[str, TensorInfo], wanted: str, path: Path) -> None:
    """One safetensors file, a tensor at a time: header length, header, then the bytes in the header's order."""
    names = sorted(tensors, key=lambda name: (str(tensors[name].file), tensors[name].offsets))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        info = tensors[name]
        dtype = wanted if info.dtype in FLOATS else info.dtype
        size = info.nbytes // FLOATS[info.dtype] * FLOATS[wanted] if info.dtype in FLOATS else info.nbytes
        header[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target = {v: k for k, v in NAMES.items()}[wanted]
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            with safe_open(tensors[name].file, framework="pt") as stored:
                tensor = stored.get_tensor(name)
            if tensor.is_floating_point():
                tensor = tensor.to(target)
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
