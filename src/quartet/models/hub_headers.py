"""Safetensors headers of a model on the Hub, by HTTP range requests: kilobytes, where the weights would be gigabytes."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

from quartet.errors import CheckpointError, brief

_FAILURES: tuple[type[Exception], ...] = (NotASafetensorsRepoError, SafetensorsParsingError, OSError)
_FAILURES += tuple(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))
"""The bases of the Hub's own error are those of the HTTP library's, whichever it is."""
Entry = tuple[str, dict[str, Any]]
"""File in the repository, and the tensor's entry as a safetensors header writes it."""


def hub_headers(name: str, key: str, *, file: str | None = None) -> dict[str, Entry]:
    """Entries of all tensors of a repository, or of one file of it.

    Args:
        key: the configuration key, for messages.

    Raises:
        CheckpointError: not reachable, no safetensors file, or a damaged one.
    """
    api = HfApi()
    try:
        if file is not None:
            files = {file: api.parse_safetensors_file_metadata(name, file)}
        else:
            files = api.get_safetensors_metadata(name).files_metadata
    except _FAILURES as error:
        raise CheckpointError(
            f"{key}={name!r}: the headers of its weights cannot be read from the Hub ({brief(error)}); check the id and the "
            "network, or give a local folder"
        ) from error
    return {
        tensor: (place, {"dtype": found.dtype, "shape": found.shape, "data_offsets": found.data_offsets})
        for place, content in files.items()
        for tensor, found in content.tensors.items()
    }
