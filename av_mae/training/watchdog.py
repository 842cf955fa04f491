"""Ends a run that hangs, with the stack of every thread on stderr, so that a launcher can start it again."""

import collections
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from av_mae.training.hosts import RESTART
from av_mae.training.loop import Hook

RECENT = 100  # steps whose median duration counts
LAST_WORDS = 10.0  # seconds until the end, which ends the others: theirs tell where they hang
FIRST = 6  # times as long may pass before the first step is done: it compiles


def end_hung(seconds: float) -> None:
    """Prints the stack of every thread and ends the process; nothing that hangs is waited for."""
    print(f"error: no step was done for {seconds:.0f} s; where each thread is:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    print(f"error: this run hangs and ends with status {RESTART}; the same command goes on from the last checkpoint "
          "(hang_seconds and hang_factor say when)", file=sys.stderr, flush=True)
    time.sleep(LAST_WORDS)
    os._exit(RESTART)


class Watchdog(Hook):
    """Calls `end(seconds)` where no step gets done for `factor` × the median step, at least `floor` seconds (0: never).

    A thread of its own watches; a step is done when its metrics are there.
    """

    def __init__(self, floor: float, factor: float, end: Callable[[float], None] = end_hung):
        self.floor, self.factor, self.end = floor, factor, end
        self.limit = FIRST * floor
        self._durations: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._last, self._started = time.monotonic(), False
        self._closed = threading.Event()
        if floor > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        now = time.monotonic()
        if self._started:
            self._durations.append(now - self._last)
            self.limit = max(self.floor, self.factor * statistics.median(self._durations))
        self._last, self._started = now, True

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.floor / 4)):
            silent = time.monotonic() - self._last
            if silent > self.limit:
                self.end(silent)
                return
