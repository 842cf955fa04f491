"""Embeddings of all clips of an input as Parquet: batches → the encoder → shards, each process its own."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from av_mae import preprocess
from av_mae.errors import UserError
from av_mae.evaluation.rates import Rates
from av_mae.exporting import tables
from av_mae.exporting.batches import batches, shard_of
from av_mae.exporting.embedder import Embedder, configuration_hash, model_identity
from av_mae.exporting.inputs import Input, open_input
from av_mae.progress import Progress
from av_mae.training.checkpoint import note
from av_mae.training.feed import Feed
from av_mae.training.mesh import gather_texts

FORMAT = 1  # counts changes of what the files of an export hold


@dataclasses.dataclass(frozen=True)
class Options:
    """What is embedded, and how; `batch_size` and `workers` change nothing but the time.

    stride: seconds from window to window (None: one window in the middle of each clip). missing: 'error' or 'zeros'
    for what has no sound or no picture. dtype, tokens, layers: what is stored (exporting.embedder). shard_clips: clips
    in a file, which is what a stopped export repeats at most.
    """

    stride: float | None = None
    missing: str = "error"
    dtype: str = "float32"
    tokens: bool = False
    layers: tuple[int, ...] = ()
    shard_clips: int = 4096
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self):
        if self.stride is not None and not 0 < self.stride < math.inf:
            raise UserError(f"--stride={self.stride} must be a number of seconds above 0")
        for name in ("shard_clips", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.workers < 0:
            raise UserError(f"--workers={self.workers} must be 0 (in this process) or more")


def export_embeddings(model: nnx.Module, checkpoint: str, data: str, output: pathlib.Path,
                      options: Options = Options()) -> dict[str, Any]:
    """Writes the embeddings of all clips of `data`; the same call goes on where it was stopped.

    Every process of a run calls it with the same arguments, and writes its share of the shards into `output`.

    Returns `clips` and `windows` that were embedded, `failed` (clips), and of what this call has computed
    `clips_per_second` (windows, from input to file) and `encoder_clips_per_second` (the encoder alone).

    Raises:
      UserError: there are no clips, none can be read, or `output` holds another export or other files.
      OSError: the file system refuses; finished shards stay.
    """
    embedder = Embedder(model, options.tokens, options.layers)
    clips = open_input(data, embedder.shape(options.stride, options.missing))
    layout = tables.Layout(settings_of(model, clips, options), clips.label, options.missing == "zeros",
                           embedder.columns(), options.dtype)
    tables.begin_output(output, layout.settings, {"checkpoint": checkpoint, "data": data})
    shards = -(-len(clips) // options.shard_clips)
    own = range(jax.process_index(), shards, jax.process_count())
    todo = [shard for shard in own if not tables.is_finished(tables.shard_path(output, shard, shards))]
    if len(todo) < len(own):
        note(f"{output}: {len(own) - len(todo)} of {len(own)} shards are there already")
    rates = {}
    if todo:
        rates = write_shards(embedder, clips, todo, layout, lambda shard: tables.shard_path(output, shard, shards),
                             options)
    return finish(output, [tables.shard_path(output, shard, shards) for shard in own], len(clips), rates)


def settings_of(model: nnx.Module, clips: Input, options: Options) -> dict[str, Any]:
    """All that the tables depend on, as JSON has it."""
    return {"format": FORMAT, "model": model_identity(model), "configuration": configuration_hash(model),
            "preprocessing": preprocess.VERSION, "data": clips.fingerprint(), "clips": len(clips),
            "classes": list(clips.classes), "stride": options.stride, "missing": options.missing,
            "dtype": options.dtype, "tokens": options.tokens, "layers": list(options.layers),
            "shard_clips": options.shard_clips}


def write_shards(embedder: Embedder, clips: Input, shards: list[int], layout: tables.Layout,
                 path_of: Callable[[int], pathlib.Path], options: Options) -> dict[str, float]:
    """Computes shards one after the other; files are written beside the computation. Returns the rates."""
    size = -(-options.batch_size // embedder.devices) * embedder.devices
    total = sum(min(options.shard_clips, len(clips) - shard * options.shard_clips) for shard in shards)
    with contextlib.ExitStack() as stack:
        reading = batches(clips, shards, options.shard_clips, size, options.workers)
        feed = stack.enter_context(Feed(reading, embedder.rows))
        progress = stack.enter_context(Progress(len(clips), "exporting", initial=len(clips) - total))
        background = stack.enter_context(Background())
        rates, windows, began = Rates(feed), 0, 0.0
        for shard, own in itertools.groupby(feed, key=lambda item: shard_of(item[0], options.shard_clips)):
            writer = tables.ShardWriter(path_of(shard), layout)
            last = -1
            for host, batch in own:
                columns = jax.device_get(rates.timed(embedder, batch["image"], batch["audio"]))
                background.run(writer.add, host["row"], columns)
                places = [row.place for row in host["row"] if row is not None]
                progress.update(len(set(places) - {last}))
                windows, last = windows + len(places) if began else 0, places[-1]
                began = began or time.perf_counter()
            background.run(writer.close)
        background.wait()
        seconds = time.perf_counter() - began
        measured = rates.figures(size, embedder, batch["image"], batch["audio"])
    return measured | {"clips_per_second": windows / seconds} if measured else {}


class Background:
    """Runs calls one after the other in a thread, one behind the caller at most; errors come with the next."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "tables")
        self._pending: concurrent.futures.Future | None = None

    def run(self, function: Callable, *arguments: Any) -> None:
        """Waits for the call before, and starts this one."""
        self.wait()
        self._pending = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Waits for the last call."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()


def finish(output: pathlib.Path, own: list[pathlib.Path], total: int, rates: dict[str, float]) -> dict[str, Any]:
    """Puts the processes' failures together, writes their table and the result; see export_embeddings."""
    read = [tables.read_failures(path) for path in own]
    parts = [json.loads(text) for text in gather_texts([json.dumps([read, rates])])]
    found = [shard for shards, _ in parts for shard in shards]
    failures = sorted(failure for _, failed in found for failure in failed)
    result = {"clips": total - len(failures), "windows": sum(windows for windows, _ in found),
              "failed": len(failures),
              "causes": dict(collections.Counter(cause for *_, cause in failures).most_common(5)),
              **{name: sum(part[name] for _, part in parts if part) for name in rates}}
    if jax.process_index() == 0:
        tables.write_failures(output, failures)
        record = tables.read_record(output)
        tables.write_record(output, record | {"result": record.get("result", {}) | result})
    if not result["clips"]:
        raise UserError(f"none of the {total} clips can be read; the first error: {failures[0][2] or failures[0][1]}: "
                        f"{failures[0][3]}")
    return result
