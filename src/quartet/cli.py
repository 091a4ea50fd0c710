"""The command line: `quartet train | plan | resume | eval | report | export | demo`.

Mistakes end in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from quartet import __version__
from quartet.errors import QuartetError, cause_of, printable, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 the user's mistake, 130 interrupted)."""
    _make_streams_usable()
    options = _parsed(arguments)
    try:
        result: int = options.command(options)
        sys.stdout.flush()
    except QuartetError as error:
        print(f"quartet{_rank()}: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"quartet{_rank()}: no permission to use {shown(error.filename)}; check whose it is", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"quartet{_rank()}: {shown(error.filename)} is too long for a path; give another", file=sys.stderr)
            return 2
        if not _output_failed():
            raise
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has what it wanted, such as `head`
        print(
            f"quartet{_rank()}: standard output cannot be written ({cause_of(error)}); free some space", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"quartet{_rank()}: interrupted", file=sys.stderr)
        return 130
    return result


def command() -> int:
    """`main`, after which the process ends: what is still there is not looked over for garbage once more."""
    code = main()
    gc.freeze()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End one of several processes without taking the interpreter down: threads of gloo outlive their group, and one that asks
    for the interpreter at that moment ends the process with SIGABRT (pytorch/pytorch#179291), after all was done."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _make_streams_usable() -> None:
    """Streams that the shell closed lead nowhere, and those whose encoding lacks a character get its number in its place."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand after options, where argparse takes no more of them."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    later = [item for item in left if "=" in item and not item.startswith("-")]
    if left != later or (left and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if later:
        options.overrides = [*options.overrides, *later]
    return options


def _output_failed() -> bool:
    """Whether standard output cannot be written any more; it then leads nowhere, so that nothing more is said of it."""
    try:
        print(flush=True)  # something to fail with: what was not written before is dropped
    except OSError:
        from quartet.run.progress import drop_output

        drop_output()
        return True
    return False


def _rank() -> str:
    """Which process speaks, where a launcher started several."""
    return (
        f" (process {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quartet", description="PPO-based RLHF for language models.")
    parser.add_argument("--version", action="version", version=f"quartet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run PPO from a YAML file")
    train.add_argument("config", help="the YAML file")
    train.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value", help="override single keys")
    train.add_argument("--force", action="store_true", help="run even if it is predicted not to fit into memory")
    train.set_defaults(command=_train)
    plan = commands.add_parser("plan", help="predict the memory of a configuration before anything is loaded")
    plan.add_argument("config", help="the YAML file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="dotted.key=value", help="override single keys")
    plan.add_argument("--memory", metavar="SIZE", help="find the cheapest change that fits, such as 24GiB or 80g")
    plan.add_argument("--processes", type=_positive, default=1, metavar="N", help="processes that share the work")
    plan.add_argument("--engine", choices=("ddp", "zero2", "zero3", "fsdp2"), help="how they share it")
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    plan.set_defaults(command=_plan)
    resume = commands.add_parser("resume", help="continue a run from its newest checkpoint")
    resume.add_argument("run", type=_path, help="the run folder")
    resume.add_argument("--from", dest="start", metavar="CHECKPOINT", help="go back to this one, such as step-000020")
    resume.add_argument(
        "--trust", action="store_true", help="use the reward sources and remote code that the run's config.yaml names"
    )
    resume.set_defaults(command=_resume)
    evaluation = commands.add_parser("eval", help="let a run's policy answer prompts, and score the answers")
    evaluation.add_argument(
        "--prompts", metavar="FILE", help="file or data set (default: the run's evaluation prompts)"
    )
    evaluation.add_argument("--count", type=_positive, metavar="N", help="only the first N prompts")
    evaluation.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    evaluation.set_defaults(command=_eval)
    export = commands.add_parser("export", help="write policy/ and value/ of a run's checkpoint to another folder")
    export.add_argument("--out", type=_path, required=True, metavar="FOLDER", help="a new or empty folder")
    export.set_defaults(command=_export)
    for command in (evaluation, export):
        command.add_argument("run", type=_path, help="the run folder")
        command.add_argument(
            "--from", dest="start", metavar="CHECKPOINT", help="not the newest, but for example step-000020"
        )
        command.add_argument("--trust", action="store_true", help="use what the run's config.yaml names, as for resume")
    report = commands.add_parser("report", help="write report.html of a run: charts, and samples side by side")
    report.add_argument("run", type=_path, help="the run folder")
    report.set_defaults(command=_report)
    demo = commands.add_parser("demo", help="fetch a small model and human ratings, and watch PPO learn from them")
    demo.add_argument("--iterations", type=_positive, help="iterations of PPO")
    demo.add_argument("--seed", type=int, default=0, help="seed of reward model and PPO")
    demo.add_argument("--out", type=_path, help="run folder (default: the first free runs/demo, runs/demo-2, ...)")
    demo.set_defaults(command=_demo)
    return parser


def _path(text: str) -> Path:
    """A shell leaves `~` alone behind a `=`."""
    return Path(os.path.expanduser(text))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _demo(options: argparse.Namespace) -> int:
    with _uncollected():
        _quiet_libraries()
        from quartet.demo.run import run_demo

    run_demo(iterations=options.iterations, seed=options.seed, out=options.out)
    return 0


def _quiet_libraries() -> None:
    """Only errors of the libraries below: what users must know, Quartet says in its own words."""
    import logging

    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers imports DeepSpeed where it is installed; its logger writes to standard output, and sets its own level.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _is_error(record: Any) -> bool:
    return bool(record.levelname in ("ERROR", "CRITICAL"))


def _train(options: argparse.Namespace) -> int:
    from quartet.config import load_config

    config = load_config(options.config, options.overrides)
    with _uncollected():
        _quiet_libraries()
        from quartet.trainer import train

    folder = train(config, force=options.force)
    print(f"policy: {folder / 'policy'}\nvalue: {folder / 'value'}\nmetrics: {folder / 'metrics.jsonl'}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    with _uncollected(), _uncompiled():
        _quiet_libraries()
        from quartet.memory.command import run_plan

        return run_plan(options)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage among the many objects that the imports in the block make, which stay.

    In the block that takes seconds, and later on a part of one each time that all objects are looked over.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Leave torch's compiler out of the imports in the block: bitsandbytes would fetch it for kernels of its own."""
    import torch

    compiler: Any = torch.compiler
    if not hasattr(compiler, "set_default_backend"):  # older than torch 2.12
        yield
        return
    before = compiler.get_default_backend()
    compiler.set_default_backend("eager")
    try:
        yield
    finally:
        compiler.set_default_backend(before)


def _eval(options: argparse.Namespace) -> int:
    with _uncollected():
        _quiet_libraries()
        from quartet.run.reopen_command import run_eval

    return run_eval(options)


def _export(options: argparse.Namespace) -> int:
    with _uncollected():
        _quiet_libraries()
        from quartet.run.reopen_command import run_export

    return run_export(options)


def _report(options: argparse.Namespace) -> int:
    from quartet.run.report import write_report

    print(write_report(options.run))
    return 0


def _resume(options: argparse.Namespace) -> int:
    with _uncollected():
        _quiet_libraries()
        from quartet.trainer import resume

    folder = resume(options.run, start=options.start, trust=options.trust)
    print(f"policy: {folder / 'policy'}\nvalue: {folder / 'value'}\nmetrics: {folder / 'metrics.jsonl'}")
    return 0
