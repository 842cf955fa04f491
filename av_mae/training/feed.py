"""Host batches → global sharded arrays on the devices, prepared in the background."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

_END = object()


def to_global(batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """The arrays of a host batch as global arrays [B, …] of `sharding`.

    The rows of all hosts together are the global batch; a host passes its own rows in ascending order. Objects (`id`
    and `error`) stay on the host.
    """
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(x))
            for name, x in batch.items() if x.dtype != object}


def host_fields(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of a host batch stays on the host."""
    return {name: x for name, x in batch.items() if x.dtype == object}


class Feed:
    """Iterates over (host fields, device batch), `prefetch` batches ahead of the caller.

    The host fields are the batch's objects, e.g. `id` and `error`, str [b]. `wait_seconds` sums up how long next() had
    to wait: what the step loses to the input. What goes wrong in the background is raised by next(). close() also
    closes `batches`.
    """

    def __init__(self, batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, prefetch: int = 2):
        self.wait_seconds = 0.0
        self._batches = batches
        self._sharding = sharding
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, prefetch))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
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

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_) -> None:
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
                self._ready.put((host_fields(batch), to_global(batch, self._sharding)))
                if self._stopped.is_set():
                    return
            self._ready.put(_END)
        except BaseException as error:  # handed to the caller of next()
            self._ready.put(error)
