"""Shows a run: one row of numbers an iteration, and on a terminal also the stage at work with its elapsed seconds."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from quartet.distributed import ProcessEngine

Record = Mapping[str, float | int]

_GIB = 1024.0**3


def _field(name: str) -> Callable[[Record], float]:
    return lambda record: record.get(name, math.nan)


def _seconds(record: Record) -> float:
    return sum(value for name, value in record.items() if name.startswith("time/"))


def _peak_gib(record: Record) -> float:
    return record.get("memory/peak_bytes", math.nan) / _GIB


_COLUMNS: tuple[tuple[str, int, int, Callable[[Record], float]], ...] = (
    ("score", 9, 3, _field("reward/score")),
    ("KL", 8, 3, _field("kl/reference")),
    ("length", 8, 1, _field("response/length")),
    ("pol.loss", 9, 4, _field("policy/loss")),
    ("val.loss", 9, 4, _field("value/loss")),
    ("expl.var", 9, 2, _field("value/explained_variance")),
    ("seconds", 9, 1, _seconds),
    ("peak GiB", 9, 2, _peak_gib),
)
"""Heading, width, decimals and source of each column after the iteration."""


def drop_output() -> None:
    """Send what is still to come on standard output nowhere: nobody reads it any more, or its disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # no file of the system's, as in tests
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class _Output:
    """Standard output, which goes quiet where it cannot be written any more: a run is not its display."""

    def __init__(self) -> None:
        self._stream, self._gone = sys.stdout, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            act()
        except OSError:
            self._gone = True
            drop_output()


class Progress:
    """The display of one run. Rows stay in the scroll-back; only the stage line below them is redrawn.

    Where standard output is no terminal (a log of CI, a file), it prints a heading and one plain line an iteration. Where it
    is closed or full, the run goes on without a display.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(file=cast("IO[str]", _Output())) if console is None else console
        self._live_wanted = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._status = _Status(ascii_only=self._console.options.ascii_only)

    def start(self, total: int, title: str) -> None:
        """Begin a run of `total` iterations; prints the title and the heading."""
        self._status.total = total
        self._line(title, style="bold")
        self._line(_row("iter", [(heading, width) for heading, width, _, _ in _COLUMNS]), style="dim")
        if self._live_wanted:
            self._live = Live(self._status, console=self._console, refresh_per_second=5, transient=True)
            self._live.start()

    def stage(self, name: str) -> None:
        """Show that stage `name` begins now."""
        self._status.begin(name)

    def iteration(self, record: Record) -> None:
        """Add the row of one iteration; `record` is what goes into metrics.jsonl."""
        done = int(record["iteration"])
        self._status.done = done
        cells = [(_number(source(record), width, digits), width) for _, width, digits, source in _COLUMNS]
        self._line(_row(str(done), cells))

    def say(self, text: str) -> None:
        """Print a line of its own, such as a warning or where something was saved."""
        self._line(text)

    def show(self, table: RenderableType) -> None:
        """Print something that rich lays out."""
        self._console.print(table, crop=False)

    def stop(self) -> None:
        """Take the stage line away; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, text: str, style: str = "") -> None:
        # No markup: a text may hold brackets. No wrapping: a log keeps one line a record, and a terminal wraps itself.
        self._console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def display_of(engine: ProcessEngine) -> Progress:
    """The display of the main process; the others show nothing."""
    return Progress() if engine.rank == 0 else Progress(Console(quiet=True))


class _Status:
    """The line below the rows: bar, iterations done, spinner, stage, seconds of the stage."""

    def __init__(self, *, ascii_only: bool) -> None:
        self.total = 0
        self.done = 0
        self._stage = ""
        self._since = 0.0
        self._spinner = Spinner("line" if ascii_only else "dots")

    def begin(self, stage: str) -> None:
        self._stage, self._since = stage, time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Table.grid(padding=(0, 1))
        stage = Text(f"{self._stage} {time.monotonic() - self._since:.0f} s" if self._stage else "")
        bar = ProgressBar(total=max(self.total, 1), completed=self.done, width=20, complete_style="cyan")
        grid.add_row(bar, Text(f"{self.done}/{self.total}"), self._spinner, stage)
        yield grid


def _row(first: str, cells: list[tuple[str, int]]) -> str:
    return first.rjust(6) + "".join(text.rjust(width) for text, width in cells)


def _number(value: float, width: int, digits: int) -> str:
    """`value` with `digits` decimals, in fewer figures where that is too wide, `-` where there is none."""
    if math.isnan(value):
        return "-"
    text = f"{value:.{digits}f}"
    return text if len(text) < width else f"{value:.1e}"
