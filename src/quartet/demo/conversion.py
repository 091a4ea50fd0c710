"""From a GGUF file to a Hugging Face checkpoint folder, and a sum over a folder's weights."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from quartet.errors import CheckpointError, brief

WEIGHTS_FILE = "model.safetensors"


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model, tokenizer and chat template of a GGUF file as a folder that `from_pretrained` reads, in float32.

    The weights are what the quantized file stands for; nothing is rounded further.

    Raises:
        CheckpointError: the packages that read GGUF files are not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"converting {gguf.name} needs the package {error.name}, which is not installed; "
            "run `pip install quartet-rlhf[demo]`"
        ) from error
    # The GGUF reader draws its progress bar without asking the settings that `quiet_transformers` changes.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The tensors are plain float32 by now, but the model still says that it is quantized and refuses to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def weights_digest(folder: Path) -> str:
    """SHA-256, hexadecimal, over name, type, shape and bytes of every tensor in `model.safetensors`, in order of name.

    Metadata in the file's header do not count, since they change with the library that wrote it.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS_FILE
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({brief(error)}); delete the folder {folder} and run again"
        ) from error
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, log lines or deprecation notices of transformers inside; all is put back on the way out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT reads names that transformers is about to drop; nothing a user could act on.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
