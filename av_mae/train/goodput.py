"""Where a run's time goes: its goodput, the process that holds up the others, and the end of a run that hangs."""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from av_mae.checkpoint import TrainState
from av_mae.console import format_duration
from av_mae.errors import RESTART
from av_mae.storage import replace_file
from av_mae.train.loop import Hook, Moment, Prefetch
from av_mae.train.sharding import gather_values
from av_mae.train.step import Batch, Metrics

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
FILE = "run.json"
# productive: steps that counted. repeated: steps done again after a restart. down: from the last sign of life to the
# next start. start: imports, meeting the others, restoring. other: plots and what else is periodic.
KINDS = ("productive", "start", "compilation", "input", "checkpoint", "other", "repeated", "down")
WRITE_SECONDS = 10.0
SLOW_SHARE = 0.05  # of its time that a host waits for input beyond the median host, from which on it is named
# When this process began, nearly, or ended its last run.
_began, _began_wall = time.monotonic(), time.time()


def open_record(workdir: pathlib.Path) -> dict[str, Any]:
    """What earlier attempts left; a new record where there is none. All processes get that of the first."""
    record: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            record = json.loads((workdir / FILE).read_text())
        except (OSError, ValueError):
            record = {"id": secrets.token_hex(8), "attempts": 0, "seconds": dict.fromkeys(KINDS, 0.0)}
            write_record(workdir, record)
    first: dict[str, Any] = gather_values([record])[0]
    return first


def write_record(workdir: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Replaces the record; a disk that is full keeps the one of before (the hook that writes metrics tells of it)."""
    with contextlib.suppress(OSError):
        replace_file(workdir / FILE, json.dumps(record, indent=2) + "\n")


class Goodput(Hook):
    """Sums up where time goes; the first process writes it every WRITE_SECONDS and at the end.

    `first` is the step that this attempt goes on from.
    """

    def __init__(self, record: Mapping[str, Any], workdir: pathlib.Path, prefetch: Prefetch, first: int):
        self.workdir, self.prefetch = workdir, prefetch
        self._hooks: Sequence[Hook] = ()
        self._saver: Hook = self
        self.before = resumed(record, first)
        self.start_seconds = time.monotonic() - _began
        self.compile_seconds, self.save_seconds, self.ended = 0.0, 0.0, False
        self._step, self._first, self._written = first, first, 0.0
        self._record = record

    def count(self, hooks: Sequence[Hook], saver: Hook) -> None:
        """From now on counts the time of these hooks, one of which saves."""
        self._hooks, self._saver = hooks, saver

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What is inside waits for a checkpoint."""
        began = time.monotonic()
        yield
        self.save_seconds += time.monotonic() - began

    def compiling(self, step_function: StepFunction) -> StepFunction:
        """The step, its first call counted as compilation."""

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            if self.compile_seconds:
                return step_function(state, batch)
            began = time.monotonic()
            result = step_function(state, batch)
            self.compile_seconds = time.monotonic() - began
            return result

        return run

    def spent(self) -> dict[str, float]:
        """Seconds by kind, all attempts together."""
        periodic, saving = sum(hook.seconds for hook in self._hooks), self._saver.seconds
        ours = {
            "start": self.start_seconds,
            "compilation": self.compile_seconds,
            "input": self.prefetch.wait_seconds,
            "checkpoint": saving + self.save_seconds,
            "other": periodic - saving,
        }
        ours["productive"] = max(0.0, time.monotonic() - _began - sum(ours.values()))
        return {kind: self.before[kind] + ours.get(kind, 0.0) for kind in KINDS}

    def share(self) -> float:
        """Of the time since the run's first start that was productive."""
        seconds = self.spent()
        return seconds["productive"] / max(sum(seconds.values()), 1e-9)

    def report(self) -> str:
        """One line: the share, and seconds by kind."""
        seconds = self.spent()
        parts = ", ".join(f"{kind} {format_duration(x)}" for kind, x in seconds.items() if x >= 0.5)
        attempts = self._record["attempts"] + 1
        return f"goodput {100 * self.share():.0f} % over {attempts} attempt{'s' * (attempts > 1)}: {parts}"

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        self._step = step
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Writes the record of this moment."""
        self._written = time.monotonic()
        if jax.process_index() != 0:
            return
        done = max(1, self._step - self._first)
        seconds = self.spent()
        last = {
            "time": time.time(),
            "step": self._step,
            "ended": self.ended,
            "step_seconds": (seconds["productive"] - self.before["productive"]) / done,
        }
        record = {
            "id": self._record["id"],
            "attempts": self._record["attempts"] + 1,
            "goodput": self.share(),
            "seconds": seconds,
            "last": last,
        }
        write_record(self.workdir, record)

    def close(self) -> None:
        global _began, _began_wall
        self.write()
        _began, _began_wall = time.monotonic(), time.time()  # of the process' next run, where it has one


def resumed(record: Mapping[str, Any], first: int) -> dict[str, float]:
    """Seconds by kind of earlier attempts, seen from one that goes on after step `first`.

    Steps after it were in vain, and the time since the last sign of life is lost unless the run was ended on purpose.
    """
    seconds, last = dict(record["seconds"]), record.get("last")
    if last:
        again = min(max(0, last["step"] - first) * last["step_seconds"], seconds["productive"])
        seconds["productive"] -= again
        seconds["repeated"] += again
        if not last["ended"]:
            seconds["down"] += max(0.0, _began_wall - last["time"])
    return seconds


class Stragglers(Hook):
    """Every `every` steps compares how long the processes waited for their input, and names the one that holds up all.

    In a step all processes wait for the last one: where its input is late, the others' devices idle.
    """

    def __init__(self, every: int, prefetch: Prefetch, say: Callable[[str], None]):
        self.every, self.prefetch, self.say = every, prefetch, say
        self._last = time.monotonic(), prefetch.wait_seconds

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return jax.process_count() > 1 and step % self.every == 0

    def after_step(self, moment: Moment) -> None:
        now, (then, waited) = time.monotonic(), self._last
        self._last = now, self.prefetch.wait_seconds
        ours = [socket.gethostname(), self.prefetch.wait_seconds - waited, now - then]
        message = slowest(gather_values([ours]))
        if message:
            self.say(f"warning: step {moment.step}: {message}")


def slowest(hosts: Sequence[tuple[str, float, float]]) -> str:
    """What to say of the slowest process, from (host, seconds waited for input, seconds) of each; '' where alike."""
    number = max(range(len(hosts)), key=lambda i: hosts[i][1])
    name, waited, seconds = hosts[number]
    median = statistics.median(host[1] for host in hosts)
    if waited - median <= SLOW_SHARE * seconds:
        return ""
    return (
        f"process {number} ({name}) waited {waited:.1f} s of the last {seconds:.1f} s for its input, the median "
        f"process {median:.1f} s: it holds up all; see its cores, disk and data.workers"
    )


RECENT = 100  # steps whose median duration counts
LAST_WORDS = 10.0  # seconds until the end, which ends the others: theirs tell where they hang
FIRST = 6  # times as long may pass before the first step is done: it compiles


def end_hung(seconds: float) -> None:
    """Prints the stack of every thread and ends the process; nothing that hangs is waited for."""
    print(f"error: no step was done for {seconds:.0f} s; where each thread is:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    print(
        f"error: this run hangs and ends with status {RESTART}; the same command goes on from the last checkpoint "
        "(hang_seconds and hang_factor say when)",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(LAST_WORDS)
    os._exit(RESTART)


class Watchdog(Hook):
    """Calls `end(seconds)` where no step gets done within the timeout: `factor` × the median step, at least `floor`
    seconds (0: no timeout).

    A thread of its own watches; a step is done when its metrics are there.
    """

    def __init__(self, floor: float, factor: float, end: Callable[[float], None] = end_hung):
        self.floor, self.factor, self.end = floor, factor, end
        self.timeout = FIRST * floor
        self._durations: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._last, self._started = time.monotonic(), False
        self._closed = threading.Event()
        if floor > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        now = time.monotonic()
        if self._started:
            self._durations.append(now - self._last)
            self.timeout = max(self.floor, self.factor * statistics.median(self._durations))
        self._last, self._started = now, True

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.floor / 4)):
            silent = time.monotonic() - self._last
            if silent > self.timeout:
                self.end(silent)
                return
