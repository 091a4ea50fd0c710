"""The run folder: created once, never written over."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from quartet import __version__
from quartet.config import Config
from quartet.distributed import ProcessEngine
from quartet.errors import CheckpointError, ConfigError, cause_of
from quartet.kernels.library import are_there
from quartet.run.checkpoint_folder import list_checkpoints
from quartet.run.stored_config import CONFIG_FILE
from quartet.run.trust import resume_command

CONFIGURATION = "configuration"
"""Entry of inputs.json: the configuration that the run was started with."""


class RunFolder:
    """Paths of one run and the small files in it, absolute: a reward function may change the working directory."""

    def __init__(self, path: str | Path) -> None:
        given = os.path.expanduser(path)
        self.path = Path(os.path.abspath(given))
        self._given = str(Path(given))
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples.jsonl"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.plan = self.path / "plan.json"
        self.policy = self.path / "policy"
        self.value = self.path / "value"

    def refuse_used(self) -> None:
        """Check that a new run may be written here.

        Raises:
            ConfigError: the folder holds a run or other files, or is not a folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir={self._given!r} is a file; name a folder")
        if (self.path / CONFIG_FILE).exists():
            raise ConfigError(
                f"run.dir={self._given!r} already holds a run; name another folder, "
                f"or continue it with: {resume_command(self.path)}"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"run.dir={self._given!r} is not empty; name a new or empty folder")

    def create(self, config: Config, plan: dict[str, Any], inputs: dict[str, str]) -> None:
        """Make the folder with config.yaml, plan.json and inputs.json (what the run is started with: fingerprints, and the
        configuration).

        Raises:
            ConfigError: the folder cannot be written; it is then as it was.
        """
        self.refuse_used()
        new = not self.path.exists()
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise self._not_written(error) from error
        try:
            self.write_plan(plan)
            resolved = _resolved(config)
            write_atomically(self.inputs, json.dumps(inputs | {CONFIGURATION: resolved}, indent=2) + "\n")
            write_atomically(self.path / CONFIG_FILE, _header() + yaml.safe_dump(resolved, sort_keys=False))
        except OSError as error:
            with suppress(OSError):  # a part of a run would block the next try
                for path in (self.path / CONFIG_FILE, self.inputs, self.plan):
                    path.unlink(missing_ok=True)
                self.checkpoints.rmdir()
                if new:
                    self.path.rmdir()
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"run.dir={self._given!r} cannot be written ({cause_of(error)}); free some space or name another folder"
        )

    @contextmanager
    def locked(self, engine: ProcessEngine) -> Iterator[None]:
        """Keep others from writing this run while open; the system takes the lock from a process that ends in any way.

        Raises:
            CheckpointError: another process writes it.
        """
        held = engine.agree(lambda: None if engine.rank else self._lock())
        try:
            yield
        finally:
            if held is not None:
                held.close()

    def _lock(self) -> IO[bytes] | None:
        try:
            stream = self.inputs.open("r+b")  # it stays the same file for the run's whole life
        except OSError:
            return None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise CheckpointError(
                f"{self.path} is being written by another process, which trains there; wait until it has ended, or stop it "
                "first"
            ) from None
        except OSError:  # a file system without locks
            pass
        return stream

    def stopped_early(self, *configs: Config) -> bool:
        """Whether the run was stopped before its first checkpoint was due: nothing is lost by beginning again.

        Args:
            configs: those it may have run with.
        """
        if list_checkpoints(self.checkpoints):
            return False
        lines = self.metrics.read_bytes().count(b"\n") if self.metrics.is_file() else 0
        return lines <= max(config.run.save_every or config.ppo.iterations for config in configs)

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write or replace plan.json."""
        write_atomically(self.plan, json.dumps(plan, indent=2) + "\n")

    def read_plan(self) -> dict[str, Any]:
        """What plan.json holds; nothing where it is gone or damaged, since a run can go on without."""
        try:
            content = json.loads(self.plan.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a file of a run folder.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({cause_of(error)}); free some space and go on from the newest checkpoint "
            f"with: {resume_command(path.parent)}"
        ) from error


def put_on_disk(stream: IO[Any]) -> None:
    """Flush a file and wait until the disk has it."""
    stream.flush()
    os.fsync(stream.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            put_on_disk(stream)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _header() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    kernels = "compiled kernels" if are_there() else "no compiled kernels"
    return f"# quartet {__version__}{_commit()}; {', '.join(versions)}; {kernels}\n"


def _commit() -> str:
    """The commit of the source tree that runs, where it is one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return f" (commit {done.stdout.strip()})" if done.returncode == 0 else ""


def _resolved(config: Config) -> dict[str, Any]:
    """Plain values, with local paths made absolute so that the run can be resumed from anywhere."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for section, key in (("models", "sft"), ("models", "reward"), ("data", "prompts"), ("data", "eval_prompts")):
        given = values[section][key]
        if given is not None and Path(given).expanduser().exists():
            values[section][key] = str(Path(given).expanduser().resolve())
    return values
