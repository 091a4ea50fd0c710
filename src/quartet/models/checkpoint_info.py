"""What a model checkpoint is, learned from its small files only: configuration, adapter configuration, safetensors headers."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from quartet.errors import CheckpointError

Kind = Literal["sft", "reward"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a safetensors header."""

    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.offsets[1] - self.offsets[0]

    offsets: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class CheckpointInfo:
    """A full checkpoint, or a LoRA adapter with the full checkpoint below it."""

    kind: Kind
    """Which of the two inputs this is: `models.sft` or `models.reward`."""
    name: str
    """As the configuration gives it."""
    base: str
    """Folder or Hub id of the full checkpoint: `name` itself, or what the adapter was trained on."""
    adapter: str | None
    """Folder or Hub id of the adapter; None for a full checkpoint."""
    config: PretrainedConfig
    """Of the full checkpoint."""
    trust_remote_code: bool = False

    @property
    def key(self) -> str:
        """The configuration key, for messages."""
        return f"models.{self.kind}"

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the full checkpoint by name, from the headers.

        Raises:
            CheckpointError: no safetensors file, or a damaged one.
        """
        return read_headers(weight_files(self.base, self.key))

    @cached_property
    def adapter_tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the adapter by name; empty for a full checkpoint."""
        if self.adapter is None:
            return {}
        return read_headers([_file(self.adapter, ADAPTER_WEIGHTS, self.key)])

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """Content of adapter_config.json; empty for a full checkpoint."""
        return {} if self.adapter is None else _json(_file(self.adapter, ADAPTER_CONFIG, self.key), self.key)


def read_checkpoint(name: str, kind: Kind, *, trust_remote_code: bool = False) -> CheckpointInfo:
    """Describe a local folder or Hub id.

    Raises:
        CheckpointError: nothing there, no configuration, an adapter whose base is missing, or pickled weights only.
    """
    key = f"models.{kind}"
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(name).is_file():
        raise CheckpointError(f"{key}={name!r} is a file; give the checkpoint's folder or a Hub id")
    adapter_file = _optional_file(name, ADAPTER_CONFIG)
    base, adapter = name, None
    if adapter_file is not None:
        content = _json(adapter_file, key)
        base = content.get("base_model_name_or_path") or ""
        adapter = name
        if content.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{key}={name!r} is a PEFT adapter of type {content.get('peft_type')}; give a LoRA adapter or merge it"
            )
        if not base:
            raise CheckpointError(
                f"{key}={name!r} is an adapter that does not name its base model; "
                f"set base_model_name_or_path in its {ADAPTER_CONFIG}"
            )
    config = _model_config(base, key, trust_remote_code, adapter)
    info = CheckpointInfo(kind, name, base, adapter, config, trust_remote_code)
    assert isinstance(info.tensors, dict)  # reads the headers, so that damaged or pickled weights end here
    assert isinstance(info.adapter_tensors, dict)
    return info


def same_base(one: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Whether two checkpoints rest on the same full weights, judged by headers and bytes, not by path.

    Heads may differ (a language model's file may hold `lm_head`, a classifier's `score`): tensors that only one file holds
    must be one (an outermost layer with a row for each token, or with few rows). All shared tensors must agree in dtype and
    shape, and in their bytes: small ones and whatever has a row for each token are compared whole, large ones at `_BLOCKS`
    places.
    """
    mine, theirs = one.tensors, other.tensors
    shared = sorted(mine.keys() & theirs.keys())
    if not shared or any((mine[k].dtype, mine[k].shape) != (theirs[k].dtype, theirs[k].shape) for k in shared):
        return False
    vocabulary = getattr(one.config.get_text_config(), "vocab_size", None)
    for name in mine.keys() ^ theirs.keys():
        rows = (mine.get(name) or theirs[name]).shape[:1]
        head = name.count(".") == 1 and bool(rows) and (rows[0] == vocabulary or rows[0] <= _LABELS)
        if not head:
            return False
    return all(
        (mine[k].file.samefile(theirs[k].file) and mine[k].offsets == theirs[k].offsets)
        or _digest(mine[k], vocabulary) == _digest(theirs[k], vocabulary)
        for k in shared
    )


def weight_files(name: str, key: str) -> list[Path]:
    """The safetensors files of a full checkpoint.

    Raises:
        CheckpointError: none there; pickled weights are named as such.
    """
    single = _optional_file(name, "model.safetensors")
    if single is not None:
        return [single]
    index = _optional_file(name, "model.safetensors.index.json")
    if index is None:
        if _optional_file(name, "pytorch_model.bin") or _optional_file(name, "pytorch_model.bin.index.json"):
            raise CheckpointError(
                f"{key}={name!r} holds pickled weights (.bin) only, and unpickling can run code; "
                "convert it with save_pretrained(safe_serialization=True)"
            )
        raise CheckpointError(f"{key}={name!r} holds no model.safetensors; give a folder written by save_pretrained")
    parts = sorted(set(_json(index, key).get("weight_map", {}).values()))
    return [_file(name, part, key) for part in parts]


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of all tensors in safetensors files, without reading a weight.

    Raises:
        CheckpointError: a file is truncated or no safetensors file.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            try:
                header = json.loads(stream.read(length)) if length <= size - 8 else None
            except ValueError:
                header = None
        if not isinstance(header, dict):
            raise CheckpointError(f"{file} is not a safetensors file (its header is damaged); fetch or save it again")
        try:
            entries = {name: _entry(entry, file) for name, entry in header.items() if name != "__metadata__"}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} is not a safetensors file (its header lacks {error}); fetch or save it again"
            ) from error
        end = max((entry.offsets[1] for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise CheckpointError(
                f"{file} is {size} bytes where its header says {8 + length + end}; it is truncated, fetch or save it again"
            )
        found |= entries
    return found


def _entry(entry: dict[str, Any], file: Path) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(str(entry["dtype"]), tuple(map(int, entry["shape"])), file, (int(begin), int(end)))


def read_tensor(info: TensorInfo, name: str) -> Tensor:
    """One tensor from its file, in the file's dtype."""
    with safe_open(info.file, framework="pt") as stored:
        tensor: Tensor = stored.get_tensor(name)
        return tensor


_BLOCKS, _BLOCK = 64, 16_384
"""Places and bytes at which a large tensor is looked at; one below `_WHOLE` bytes is read whole."""
_WHOLE = 4 << 20
_LABELS = 64
"""Most rows of a classifier's head."""


def _digest(info: TensorInfo, vocabulary: int | None) -> bytes:
    """Hash of a tensor's bytes, or of evenly spaced blocks of them."""
    whole = info.nbytes <= _WHOLE or (vocabulary is not None and info.shape[:1] == (vocabulary,))
    digest = hashlib.sha256()
    with info.file.open("rb") as stream:
        begin = 8 + struct.unpack("<Q", stream.read(8))[0] + info.offsets[0]
        stream.seek(begin)
        if whole:
            digest.update(stream.read(info.nbytes))
            return digest.digest()
        for place in range(_BLOCKS):
            stream.seek(begin + (info.nbytes - _BLOCK) * place // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.digest()


def _model_config(base: str, key: str, trust_remote_code: bool, adapter: str | None) -> PretrainedConfig:
    where = f"{key}={base!r}" if adapter is None else f"the base {base!r} of the adapter {key}={adapter!r}"
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise CheckpointError(f"{where} holds no config.json; give a folder written by save_pretrained")
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise CheckpointError(f"{where} does not exist; give a checkpoint's folder or a Hub id")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        kind_of = "" if Path(base).is_dir() else "no such folder, and as a Hub id: "
        raise CheckpointError(
            f"{where} cannot be read: {kind_of}{reason}; give a folder written by save_pretrained"
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _optional_file(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    try:
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _file(name: str, file: str, key: str) -> Path:
    found = _optional_file(name, file)
    if found is None:
        raise CheckpointError(f"{key}={name!r} lacks {file}; give a complete checkpoint")
    return found


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{key}: {path} is not readable as JSON; fetch or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{key}: {path} holds no JSON object; fetch or save the checkpoint again")
    return content
