"""Everything Quartet raises on purpose.

QuartetError
├── ConfigError       the configuration: unknown key, value out of range, options that exclude each other
├── CheckpointError   a model or run checkpoint: missing, unreadable, of the wrong kind, of another tokenizer
├── DataError         prompts: missing file, absent column, nothing usable
├── RewardError       a reward source: raised, timed out, returned the wrong count or something not finite
├── RolloutError      a generation engine outside this program: not installed, not reachable, of another model
├── TrainingError     the run itself: a loss, score or gradient that is not finite
└── Interrupted       the user stopped the run (Ctrl-C, SIGTERM)

The message is one sentence for the user: what was given, what is wrong, what to do. The command line prints it
without a traceback and exits with `exit_code`. Text that comes from elsewhere goes into it through `brief` or `shown`.
"""

from __future__ import annotations

_MOST = 200


def brief(text: object, most: int = _MOST) -> str:
    """Text from elsewhere, such as another library's error, as part of a sentence: on one line, and cut after `most`."""
    return _cut(" ".join(str(text).split()).rstrip(".;"), most)


def shown(value: object, most: int = _MOST) -> str:
    """A value as somebody gave it, as a literal cut after `most` characters."""
    return _cut(repr(value), most)


def cause_of(error: Exception) -> str:
    """Why the system refused, without the file's name where it can be had without."""
    return brief(getattr(error, "strerror", None) or error)


def printable(text: str) -> str:
    """Without what moves a terminal's cursor or colours it; a file's name may hold such things."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


class QuartetError(Exception):
    """Base of all errors that Quartet raises on purpose; `exit_code` is what the command line exits with."""

    exit_code = 2


class ConfigError(QuartetError):
    """The configuration cannot be used as given."""


class CheckpointError(QuartetError):
    """A checkpoint is missing, unreadable, or not what its place in the configuration needs."""


class DataError(QuartetError):
    """The prompts cannot be read or none of them can be used."""


class RewardError(QuartetError):
    """A reward source failed or returned something that is not one finite number per episode."""


class RolloutError(QuartetError):
    """vLLM is not installed, cannot be reached or started, serves another model, or answered something else."""


class TrainingError(QuartetError):
    """Training would continue on numbers that are not finite; the last good weights are on disk."""


class Interrupted(QuartetError):
    """The user stopped the run; the state is on disk and the message holds the resume command."""

    exit_code = 130
