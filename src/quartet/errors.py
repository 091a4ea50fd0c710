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
without a traceback and exits with `exit_code`.
"""


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
