"""The training loop: it takes batches, calls the step and its hooks in order, and knows when to stop."""

import collections
import contextlib
import dataclasses
import itertools
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from av_mae.checkpoint import TrainState
from av_mae.errors import UserError, WorkerKilled
from av_mae.train.step import Batch, Metrics

_END = object()
_ASKED = itertools.count(1)  # how often this process has asked whether to stop; the same in all


def to_global(batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The arrays of a host batch as global arrays [B, …] of `sharding`.

    The rows of all hosts together are the global batch; a host passes its own rows in ascending order. Objects (`id`,
    `stage` and `cause`) stay on the host.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(x))
        for name, x in batch.items()
        if x.dtype != object
    }


class Prefetch:
    """Iterates over (host fields, device batch), `prefetch` batches ahead of the caller.

    The host fields are the batch's objects, e.g. `id`, `stage` and `cause`, str [b]. `wait_seconds` sums up how long
    next() had to wait: what the step loses to the input. What goes wrong in the background is raised by next().
    close() also closes `batches`.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, prefetch: int = 2):
        self.wait_seconds = 0.0
        self._batches = batches
        self._sharding = sharding
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, prefetch))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]:
        return self

    def __next__(self) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
        if self._stopped.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, tuple):
            return item
        self._stopped.set()
        raise StopIteration if item is _END else item

    def close(self) -> None:
        """Stops the background thread and closes the batches; a second call does nothing."""
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)
        self._drain()
        if hasattr(self._batches, "close"):
            self._batches.close()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drain(self) -> None:
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            pass

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if self._stopped.is_set():
                    return
                host = {name: x for name, x in batch.items() if x.dtype == object}
                self._ready.put((host, to_global(batch, self._sharding)))
                if self._stopped.is_set():
                    return
            self._ready.put(_END)
        except BaseException as error:  # handed to the caller of next()
            self._ready.put(error)


# Steps that the devices may be behind the host: metrics are looked at this many steps late, so that reading them
# never leaves the devices idle.
LAG = 2


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step that has just been done, with its batch: `finished` after the last one, `stopped` when asked to stop."""

    step: int
    state: TrainState
    batch: Batch
    finished: bool
    stopped: bool


class Hook:
    """Something periodic. All processes of a run have the same hooks and call them at the same steps.

    `seconds` sums up how long the loop spent in `after_step`. `enough`: the next step is to be the last one.
    """

    seconds: float = 0.0
    enough: bool = False

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        """Whether `after_step` wants to be called after this step."""
        return False

    def after_step(self, moment: Moment) -> None:
        """Called right after a step that is due; all metrics up to it have been given out and were finite."""

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        """Called once for every step in order, some steps late. `host` has `id`, `stage` and `cause` of this
        host's rows."""

    def close(self) -> None:
        """Called at the end, also after an error."""


class NonFinite(UserError):
    """A loss or gradient that is not a finite number."""


def check_finite(step: int, metrics: Mapping[str, float], ids: Iterable[str]) -> None:
    """Raises NonFinite, naming the step and the clips, unless losses, gradient norm and all else are finite."""
    wrong = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise NonFinite(
            f"step {step}: {', '.join(wrong)} must be finite; the run stops and keeps its last "
            "checkpoint. Try a lower optimizer.base_lr, optimizer.clip_norm or dtype=float32. "
            f"Clips of the batch: {', '.join(map(str, ids))}"
        )


class Pending:
    """Steps whose metrics have not been looked at yet."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = hooks
        self._steps: collections.deque[tuple[int, Metrics, Mapping[str, np.ndarray]]] = collections.deque()

    def add(self, step: int, metrics: Metrics, host: Mapping[str, np.ndarray]) -> None:
        """Takes a step's metrics, and gives out those of LAG steps before."""
        self._steps.append((step, metrics, host))
        self.give_out(LAG)

    def give_out(self, keep: int = 0) -> None:
        """Checks the oldest steps' metrics and shows them to the hooks, all but the newest `keep`."""
        while len(self._steps) > keep:
            step, metrics, host = self._steps.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            values = {"loss": values["loss"]} | values
            if not values.get("skipped_update"):
                check_finite(step, values, host["id"])
            for hook in self._hooks:
                hook.after_metrics(step, values, host)


def train(
    step_function: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    prefetch: Prefetch,
    first: int,
    last: int,
    hooks: Sequence[Hook],
    should_stop: Callable[[int], bool],
) -> TrainState:
    """Runs steps first + 1 … last and returns the state after them, or after the step at which to stop.

    Raises:
      NonFinite: a loss was not finite; nothing from that step on has been saved.
      WorkerKilled: a process that reads clips is gone; the last state has been saved.
    """
    pending = Pending(hooks)
    for step in range(first + 1, last + 1):
        try:
            host, batch = next(prefetch)
        except WorkerKilled:
            if step > first + 1 and jax.process_count() == 1:  # saving needs all processes, and the others go on
                pending.give_out()
                for hook in (hook for hook in hooks if hook.due(step - 1, False, True)):
                    hook.after_step(Moment(step - 1, state, batch, False, True))
            raise
        state, metrics = step_function(state, batch)
        pending.add(step, metrics, host)
        stopped = should_stop(step)
        finished = step == last or any(hook.enough for hook in hooks)
        due = [hook for hook in hooks if hook.due(step, finished, stopped)]
        if due:
            pending.give_out()
        for hook in due:
            began = time.monotonic()
            hook.after_step(Moment(step, state, batch, finished, stopped))
            hook.seconds += time.monotonic() - began
        if stopped or finished:
            break
    pending.give_out()
    return state


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[int], bool]]:
    """Gives `should_stop(step)`: True once this process, or any other of the run, was told to end.

    With several processes JAX's coordinator makes all of them stop after the same step.
    """
    if jax.process_count() > 1:
        # The place to stop at is one more than the highest number that any process has asked with, none yet being 0:
        # with the steps of a resumed run, whoever was told before its first one would never get there.
        yield lambda _: multihost_utils.reached_preemption_sync_point(next(_ASKED))
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda _: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
