"""Runs a function on many items in processes, one of which may die without the others."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

__all__ = [
    "run_each",
]

Result = TypeVar("Result")


def run_each(
    work: Callable[[str], Result], items: Sequence[str], jobs: int, lost: Callable[[str, int | None], Result]
) -> Iterator[Result]:
    """The results in the order in which they are there.

    Args:
        work: what is done with an item; for several jobs it is pickled. It raises nothing.
        items: to be worked on.
        jobs: how many processes; 1 is this one.
        lost: the result for an item whose process has ended, given its exit code. The other items get a new process.
    """
    if jobs == 1:
        yield from map(work, items)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, busy = deque(items), [_Worker(work, threads) for _ in range(jobs)]
    for worker in busy:
        worker.take(waiting.popleft())
    try:
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [each for each in busy if each.pipe in ready]:
                try:
                    result: Result = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    busy.remove(worker)
                    result = lost(worker.item, worker.end())
                    if waiting:
                        busy.append(_Worker(work, threads))
                        busy[-1].take(waiting.popleft())
                else:
                    if waiting:
                        worker.take(waiting.popleft())
                    else:
                        busy.remove(worker)
                        worker.end()
                yield result
    finally:
        for worker in busy:
            worker.end()


class _Worker:
    """A process that works on one item after the other.

    Attributes:
        pipe: the results come from it.
        item: what it works on.
    """

    def __init__(self, work: Callable[[str], Any], threads: int) -> None:
        context = get_context("spawn")  # a fork of a process with threads can hang
        self.pipe, theirs = context.Pipe()
        self.item = ""
        self._process = context.Process(target=_serve, args=(theirs, work, threads), daemon=True)
        self._process.start()
        theirs.close()

    def take(self, item: str) -> None:
        self.item = item
        with suppress(BrokenPipeError):  # it has died, which its pipe tells
            self.pipe.send(item)

    def end(self) -> int | None:
        """End the process, if it has not ended; its exit code."""
        self.pipe.close()
        self._process.join(timeout=1)
        self._process.terminate()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()
        return self._process.exitcode


def _serve(pipe: Connection, work: Callable[[str], Any], threads: int) -> None:
    """In the process: work on what comes, until the pipe is closed.

    Ctrl-C reaches all processes of a terminal: the first one ends this one, in a way that lets it tidy up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            pipe.send(work(pipe.recv()))
