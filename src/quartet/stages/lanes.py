"""Passes over different models, one after the other or at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import torch

from quartet.kernels import more_threads

Result = TypeVar("Result")


class Stopped(Exception):
    """A job was left because another failed."""


class Lanes:
    """Runs jobs one after the other, or each in a thread with its share of the processor's threads.

    Small operations leave most of a processor idle when all its threads share each of them: two models on half of the
    threads each take less time than one after the other on all. When a job ends, kernels of those that are left take its
    threads too; torch's operations, whose sums may depend on how many there are, do not.
    """

    def __init__(self, count: int) -> None:
        """
        Args:
            count: jobs at the same time; no more than torch has threads. 1 keeps all in the thread that calls.
        """
        assert 1 <= count <= torch.get_num_threads(), f"{count} lanes, {torch.get_num_threads()} threads"
        self.count = count
        self._others: ThreadPoolExecutor | None = None
        self._failed = Event()
        self._running = 0
        self._idle: list[int] = []
        """Threads of the jobs that have ended."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the threads of the other lanes for as long as this lasts."""
        if self.count == 1:
            yield
            return
        with ThreadPoolExecutor(self.count - 1, thread_name_prefix="lane") as self._others:
            try:
                yield
            finally:
                self._others = None

    def run(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """What the jobs return. The first runs in this thread; all have ended when this returns or raises.

        Raises:
            BaseException: what a job raised.
        """
        if self._others is None:
            return [job() for job in jobs]
        assert len(jobs) <= self.count, f"{len(jobs)} jobs, {self.count} lanes"
        self._failed.clear()
        self._running = len(jobs)
        self._idle.clear()
        whole = torch.get_num_threads()
        share = whole // len(jobs)
        others = [self._others.submit(self._job, share, job) for job in jobs[1:]]
        try:
            results = [self._job(whole - share * len(others), jobs[0])]
        except Stopped:
            results = []  # what the other raised comes below
        finally:
            wait(others)
            torch.set_num_threads(whole)
        # An error refers to all that its lane had in memory: nothing here may refer to the error once it is raised.
        while others:
            results.append(others.pop(0).result())
        return results

    def go_on(self) -> None:
        """For jobs to ask now and then.

        Raises:
            Stopped: another job failed.
        """
        if self._failed.is_set():
            raise Stopped

    def _job(self, threads: int, job: Callable[[], Result]) -> Result:
        torch.get_num_threads()  # a thread takes the number of the thread that set it last on its first question, not later
        torch.set_num_threads(threads)
        try:
            with more_threads(self._spare):
                result = job()
        except BaseException:
            self._failed.set()
            raise
        self._idle.append(threads)
        return result

    def _spare(self) -> int:
        """Threads that a job may take beside its own."""
        return sum(self._idle) // (self._running - len(self._idle))
