"""How fast features are extracted, with the input in the loop and without it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from av_mae.training.feed import Feed

REPEATS = 3


class Rates:
    """Times a forward pass in a loop over the batches of a feed; the first batch, which compiles, does not count."""

    def __init__(self, feed: Feed):
        self._feed, self._seconds, self._waited = feed, [], 0.0

    def timed(self, forward: Callable, *args) -> Any:
        """forward(*args), waited for."""
        start = time.perf_counter()
        result = jax.block_until_ready(forward(*args))
        self._seconds.append(time.perf_counter() - start)
        if len(self._seconds) == 1:
            self._waited = self._feed.wait_seconds
        return result

    def figures(self, batch_size: int, forward: Callable, *args) -> dict[str, float]:
        """`clips_per_second` of the loop (forward passes and waiting for input) and `encoder_clips_per_second` of the
        same pass again and again on one batch. Nothing where the loop had one batch only."""
        batches = len(self._seconds) - 1
        if batches < 1:
            return {}
        seconds = sum(self._seconds[1:]) + self._feed.wait_seconds - self._waited
        alone = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(forward(*args))
            alone.append(time.perf_counter() - start)
        return {"clips_per_second": batches * batch_size / seconds,
                "encoder_clips_per_second": batch_size / float(np.median(alone))}
