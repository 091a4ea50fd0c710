"""What a run was started with, as hashes of the content: resuming on other weights or prompts would be another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quartet.errors import CheckpointError, ConfigError
from quartet.models.base_comparison import digest_of
from quartet.models.checkpoint_info import CheckpointInfo, TensorInfo
from quartet.records import Prompts
from quartet.run.folder import CONFIGURATION
from quartet.run.setup import Inputs


def fingerprints(inputs: Inputs) -> dict[str, str]:
    """A hash for each input, by configuration key.

    Checkpoints: their configuration, the name, type and shape of every tensor, the bytes of small tensors and of blocks of
    large ones. Prompts: text and tokens in order, so that the tokenizer and its chat template count too. Where the files
    lie does not matter.
    """
    found = model_fingerprints(inputs)
    found["data.prompts"] = inputs.prompts.digest()
    if inputs.evaluation is not None:
        found["data.eval_prompts"] = _prompts(inputs.evaluation)
    return found


def model_fingerprints(inputs: Inputs) -> dict[str, str]:
    """Those of the two checkpoints alone."""
    return {info.key: _checkpoint(info) for info in (inputs.sft, inputs.reward)}


def refuse_changed(file: Path, now: Mapping[str, str], *, whole: bool = True) -> None:
    """Compare with what the run wrote when it started.

    Args:
        whole: whether `now` has to hold all that the run wrote.

    Raises:
        CheckpointError: names the first input that differs.
    """
    before = read_inputs_file(file)
    before.pop(CONFIGURATION, None)  # compared key by key (`edited.py`)
    # In the order in which they were taken: prompts that are held out follow from all prompts.
    for key in (*now, *(before.keys() - now.keys() if whole else ())):
        if before.get(key) != now.get(key):
            raise CheckpointError(
                f"{key} is not what this run was started with (its content differs from {file}); restore it, or start a new run"
            )


def refuse_different(everyone: Sequence[Mapping[str, str]]) -> None:
    """Compare what processes of several machines read.

    Args:
        everyone: the fingerprints that each process took, by rank, or nothing; those of process 0 are among them.

    Raises:
        ConfigError: names the first input that differs.
    """
    for rank, own in enumerate(everyone):
        for key in sorted(everyone[0].keys() | own.keys()) if own else ():
            if own.get(key) != everyone[0].get(key):
                raise ConfigError(
                    f"{key} has other content on the machine of process {rank} than on that of process 0; give all machines "
                    "the same files"
                )


def read_inputs_file(file: Path) -> dict[str, Any]:
    """What a run wrote when it started.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        assert isinstance(content, dict)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; restore it from a copy") from None
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable as JSON; restore it from a copy") from error
    return content


def _checkpoint(info: CheckpointInfo) -> str:
    tensors = {**info.tensors, **{f"adapter {name}": tensor for name, tensor in info.adapter_tensors.items()}}
    beside = next(iter(info.tensors.values())).file.with_name("config.json")
    parts = [beside.read_text("utf-8") if beside.is_file() else "", json.dumps(info.adapter_config, sort_keys=True)]
    return _hash([*parts, *(f"{name} {_tensor(tensor)}" for name, tensor in sorted(tensors.items()))])


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {tensor.shape} {digest_of(tensor, None).hex()}"


def _prompts(prompts: Prompts) -> str:
    return _hash(f"{text} {tokens.tolist()}" for text, tokens in zip(prompts.texts, prompts.tokens, strict=True))


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # A length before each part, so that no two lists of parts run together alike.
        content = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()
