"""What a run folder's config.yaml may not do by itself when the run is resumed: have code run, or be sent a token.

A run folder is data, and may come from somebody else. `quartet train` takes the user's own configuration and needs no
such question.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import urlsplit

from quartet.config import Config
from quartet.errors import ConfigError, QuartetError
from quartet.run.stored_config import CONFIG_FILE, read_config


def resume_command(run: Path) -> str:
    """What continues the run of this folder, for its user."""
    try:
        named = _named(read_config(run))
    except QuartetError:
        named = []  # resuming will say what is wrong with it
    return f"quartet resume {shlex.quote(str(run))}{' --trust' if named else ''}"


def refuse_untrusted(config: Config, run: Path) -> None:
    """Check that resuming would import, call and send nothing that only the run folder names.

    Raises:
        ConfigError: it would; says what, and how to allow it.
    """
    named = _named(config)
    if named:
        raise ConfigError(
            f"{run / CONFIG_FILE} names {', '.join(named)}, which resuming would use; if you know them, add --trust "
            "(in Python: trust=True)"
        )


def _named(config: Config) -> list[str]:
    """What has to be trusted."""
    named = [f"the reward function {entry.function}" for entry in config.rewards if entry.function is not None]
    named += [f"the reward endpoint {_host(entry.url)}" for entry in config.rewards if entry.url is not None]
    if config.rollout.vllm.url is not None:
        named.append(f"the vLLM server {_host(config.rollout.vllm.url)}")
    if config.models.trust_remote_code:
        named.append("the code that its checkpoints bring along (models.trust_remote_code)")
    return named


def _host(url: str) -> str:
    """Without what may be a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "at an address that cannot be read"
    return f"{parts.scheme}://{parts.hostname}{parts.path}"
