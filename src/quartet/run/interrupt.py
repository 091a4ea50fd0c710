"""Ctrl-C and SIGTERM: the first asks to stop after the iteration at work, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user has asked to stop."""

    asked = False


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while open; outside the main thread, where Python allows no handlers, catch nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        say(f"{signal.Signals(number).name}: stopping after this iteration with a checkpoint; once more stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
