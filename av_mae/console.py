"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere. Both go to stderr."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

LINE_SECONDS = 10.0


def format_duration(seconds: float) -> str:
    """Seconds as 1:23 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Metrics by name as `loss=0.123 rate=12.3`; numbers get four digits."""
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, (int, float)) else f"{name}={value}"
        for name, value in metrics.items()
    )


class Progress:
    """Shows how far work of `total` units is, its rate and the time left.

    `initial` units were done before (a resumed run) and count for the share done, not for the rate. Nor does what came
    before the end of the first update: a first step compiles.
    """

    def __init__(
        self, total: int, description: str, unit: str = "clips", initial: int = 0, stream: TextIO | None = None
    ):
        self.total, self.description, self.unit = total, description, unit
        self.done = self.initial = initial
        self._stream = stream if stream is not None else sys.stderr
        self._bar = None
        self._metrics: dict[str, Any] = {}
        self._started = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first update came, and what was done then
        self._printed = -1

    def __enter__(self) -> "Progress":
        self._started = self._last_line = time.monotonic()
        if self._stream.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.description,
                unit=f" {self.unit}",
                file=self._stream,
                dynamic_ncols=True,
                smoothing=0.1,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done != self._printed:
            self._print_line()

    def update(self, n: int = 1, **metrics: float | str) -> None:
        """Counts `n` more units; `metrics` (name=number or text) are shown behind."""
        self.done += n
        self._first = self._first or (time.monotonic(), self.done)
        self._metrics.update(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(format_metrics(self._metrics), refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def write(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def line(self) -> str:
        """What a plain line says now."""
        now = time.monotonic()
        seconds = now - self._started
        first = self._first or (now, self.done)
        later = self.done > first[1]
        began, before = first if later else (self._started, self.initial)
        rate = (self.done - before) / (now - began) if now > began else 0.0
        known = later and rate > 0 and self.done < self.total
        left = f", {format_duration((self.total - self.done) / rate)} left" if known else ""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total > 0 else ""
        metrics = f" {format_metrics(self._metrics)}" if self._metrics else ""
        return (
            f"{self.description}: {self.done}/{self.total} {self.unit}{share}, {rate:.4g} {self.unit}/s, "
            f"{format_duration(seconds)} elapsed{left}{metrics}"
        )

    def _print_line(self) -> None:
        print(self.line(), file=self._stream, flush=True)
        self._last_line, self._printed = time.monotonic(), self.done


def note(message: str) -> None:
    """Tells the user something on stderr; only the first process speaks."""
    jax = sys.modules.get("jax")  # prepare does without it: the import takes seconds, in each decoding process too
    if jax is None or jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Failures in the background are told in one line by whoever waits for them; the libraries' traces are noise."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def first_line(error: BaseException) -> str:
    """An error in at most one line of 300 characters; a full disk in plain words."""
    if "No space left on device" in str(error):
        return "no space left on device"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
