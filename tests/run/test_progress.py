"""What a run looks like in a log and on a terminal."""

import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from quartet.cli import main
from quartet.run.progress import Progress

RECORD = {
    "iteration": 7,
    "reward/score": 1.23456,
    "kl/reference": 0.5,
    "response/length": 53.25,
    "policy/loss": -0.00125,
    "value/loss": 1234567.0,
    "value/explained_variance": -0.3,
    "time/rollout": 4.0,
    "time/update": 10.5,
    "memory/peak_bytes": 3 * 2**30,
}
HEADING = "  iter    score      KL  length pol.loss val.loss expl.var  seconds peak GiB"
ROW = "     7    1.235   0.500    53.2  -0.0013  1.2e+06    -0.30     14.5     3.00"


def shown(*, terminal: bool, width: int = 80) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    kind = None if terminal else False
    console = Console(file=file, force_terminal=terminal or kind, width=width, height=24, color_system=None)
    return Progress(console), file


def without_control_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_log_has_a_heading_and_one_aligned_line_an_iteration() -> None:
    progress, file = shown(terminal=False)
    with progress:
        progress.start(10, "title")
        progress.stage("rollout")
        progress.iteration(RECORD)
        progress.iteration({**RECORD, "iteration": 8})
    assert file.getvalue() == "\n".join(["title", HEADING, ROW, ROW.replace(" 7 ", " 8 ", 1), ""])


def test_numbers_that_are_missing_or_not_finite() -> None:
    progress, file = shown(terminal=False)
    progress.iteration({"iteration": 123456, "reward/score": math.nan, "kl/reference": math.inf})
    assert file.getvalue().split() == ["123456", "-", "inf", "-", "-", "-", "-", "0.0", "-"]


def test_text_is_printed_as_it_is_in_one_line() -> None:
    progress, file = shown(terminal=False, width=20)
    text = "saved [bold]run[/bold] :smile: " + "x" * 100
    progress.say(text)
    assert file.getvalue() == text + "\n"


def test_terminal_shows_the_stage_and_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, *[103.0] * 100])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress, file = shown(terminal=True)
    progress.start(10, "title")
    progress.stage("rollout")
    progress.iteration(RECORD)
    progress.say("a note")
    progress.stop()
    progress.stop()
    text = without_control_codes(file.getvalue())
    for line in (HEADING, ROW, "a note"):
        assert line in text.splitlines()
    assert "7/10" in text
    assert "rollout 3 s" in text
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_cursor_comes_back_after_an_error() -> None:
    progress, file = shown(terminal=True)
    progress.start(1, "title")
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert "\x1b[?25h" in file.getvalue()


@contextmanager
def unwritable(kind: str) -> Iterator[None]:
    """Standard output is a pipe that nobody reads any more, or a file on a full disk. Leaving flushes it, as Python does."""
    if kind == "closed":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    with pytest.MonkeyPatch.context() as patch, os.fdopen(writer, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_a_display_that_nobody_can_see_goes_quiet(kind: str) -> None:
    with unwritable(kind):
        with Progress() as progress:
            progress.start(10, "title")
            progress.stage("rollout")
            progress.iteration(RECORD)
            progress.show("table")
            progress.say("a note")
        print("policy: run/policy", flush=True)


@pytest.mark.parametrize("kind", ["closed", "full"])
@pytest.mark.parametrize("length", [10, 100_000])
def test_a_command_whose_output_nobody_reads_says_nothing(
    length: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`quartet eval RUN | head`; a long text fails while it is written, a short one when it is flushed."""
    monkeypatch.setattr("quartet.cli._report", lambda _: print("x" * length))
    with unwritable(kind):
        code = main(["report", "run"])
    full = "quartet: standard output cannot be written (No space left on device); free some space\n"
    assert (code, capsys.readouterr().err) == ((0, "") if kind == "closed" else (2, full))
