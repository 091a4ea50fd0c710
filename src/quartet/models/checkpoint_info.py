"""What a model checkpoint is, learned from its small files only: configuration, adapter configuration, safetensors headers."""

from __future__ import annotations

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

from quartet.errors import CheckpointError, brief
from quartet.models.hub_headers import Entry, hub_headers

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
    headers_only: bool = False
    """Whether weights on the Hub that are not in the local cache are left there, and only their headers are fetched."""
    origin: str | None = None
    """Folder that `base` is a converted copy of, where it is one."""

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
        if self.headers_only and not _at_hand(self.base):
            return _on_hub(self.base, hub_headers(self.base, self.key))
        return read_headers(weight_files(self.base, self.key))

    @cached_property
    def adapter_tensors(self) -> dict[str, TensorInfo]:
        """Tensors of the adapter by name; empty for a full checkpoint."""
        if self.adapter is None:
            return {}
        if self.headers_only and not _at_hand(self.adapter, ADAPTER_WEIGHTS):
            return _on_hub(self.adapter, hub_headers(self.adapter, self.key, file=ADAPTER_WEIGHTS))
        return read_headers([_file(self.adapter, ADAPTER_WEIGHTS, self.key)])

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """Content of adapter_config.json; empty for a full checkpoint."""
        return {} if self.adapter is None else _json(_file(self.adapter, ADAPTER_CONFIG, self.key), self.key)


def read_checkpoint(
    name: str, kind: Kind, *, trust_remote_code: bool = False, headers_only: bool = False
) -> CheckpointInfo:
    """Describe a local folder or Hub id.

    Args:
        headers_only: fetch no weights from the Hub (see `CheckpointInfo.headers_only`); for planning.

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
        base = str(content.get("base_model_name_or_path") or "")
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
        revision = content.get("revision")
        if revision not in (None, "", "main") and not Path(base).is_dir():
            raise CheckpointError(
                f"{key}={name!r} was trained on revision {revision!r} of {base!r}, and only a repository's main revision is "
                f"loaded; download that revision and name its folder as base_model_name_or_path in {ADAPTER_CONFIG}"
            )
    config = _model_config(base, key, trust_remote_code, adapter)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise CheckpointError(
            f"{key}={name!r} is already quantized ({method}), and gradients through stored formats are not vouched for; "
            "give the full-precision checkpoint and set models.quantization"
        )
    info = CheckpointInfo(kind, name, base, adapter, config, trust_remote_code, headers_only)
    assert isinstance(info.tensors, dict)  # reads the headers, so that damaged or pickled weights end here
    assert isinstance(info.adapter_tensors, dict)
    return info


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
                "convert it with save_pretrained(), or set models.allow_pickle=true for a local folder that you trust"
            )
        raise CheckpointError(f"{key}={name!r} holds no model.safetensors; give a folder written by save_pretrained")
    return [_file(name, part, key) for part in _parts(index, key)]


def _parts(index: Path, key: str) -> list[str]:
    """The files that an index names; they lie beside it."""
    places = _json(index, key).get("weight_map")
    parts = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not parts or any(Path(part).name != part for part in parts):
        raise CheckpointError(f"{key}: {index} does not name the files beside it; fetch or save the checkpoint again")
    return sorted(parts)


def _at_hand(name: str, file: str | None = None) -> bool:
    """Whether weights are in a local folder or in the Hub's cache, so that reading them fetches nothing."""
    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True

    def cached(part: str) -> Path | None:
        found = cached_file(
            name,
            part,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    if file is not None or cached("model.safetensors"):
        return cached(file or "model.safetensors") is not None
    index = cached("model.safetensors.index.json")
    return index is not None and all(cached(part) for part in _parts(index, name))


def _on_hub(name: str, entries: dict[str, Entry]) -> dict[str, TensorInfo]:
    return {tensor: _entry(entry, Path(name) / file) for tensor, (file, entry) in entries.items()}


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
            except (ValueError, RecursionError):
                header = None
        if not isinstance(header, dict):
            raise CheckpointError(f"{file} is not a safetensors file (its header is damaged); fetch or save it again")
        try:
            entries = {name: _entry(entry, file) for name, entry in header.items() if name != "__metadata__"}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{file} is not a safetensors file (its header lacks {brief(error)}); fetch or save it again"
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


def _model_config(base: str, key: str, trust_remote_code: bool, adapter: str | None) -> PretrainedConfig:
    where = f"{key}={base!r}" if adapter is None else f"the base {base!r} of the adapter {key}={adapter!r}"
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise CheckpointError(f"{where} holds no config.json; give a folder written by save_pretrained")
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise CheckpointError(f"{where} does not exist; give a checkpoint's folder or a Hub id")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers documents no base of what it raises for a damaged file
        kind_of = "" if Path(base).is_dir() else "no such folder, and as a Hub id: "
        raise CheckpointError(
            f"{where} cannot be read: {kind_of}{brief(error)}; give a folder written by save_pretrained"
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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{key}: {path} is not readable as JSON; fetch or save the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{key}: {path} holds no JSON object; fetch or save the checkpoint again")
    return content
