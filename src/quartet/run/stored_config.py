"""The configuration that lies in a run folder."""

from __future__ import annotations

from pathlib import Path

from quartet.config import Config, parse_config, read_plain
from quartet.errors import CheckpointError

CONFIG_FILE = "config.yaml"


def read_config(run: Path) -> Config:
    """The configuration of the run in this folder.

    Raises:
        CheckpointError: no run here.
        ConfigError: its config.yaml is not readable or not valid.
    """
    file = run / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{str(run)!r} holds no run (no {CONFIG_FILE}); give the folder of a run")
    values = read_plain(file)
    return parse_config(values if isinstance(values, dict) else {}, origin=str(file))
