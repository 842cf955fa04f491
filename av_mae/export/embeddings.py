"""Embeddings of all clips of an input as Parquet: batches → the encoder → shards, each process its own."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx

from av_mae import models, preprocess, recipes
from av_mae.checkpoint import FREE_FIELDS
from av_mae.config import MeshConfig
from av_mae.console import Progress, note
from av_mae.data.pipeline import read_ahead
from av_mae.errors import UserError, check_numbers
from av_mae.evaluate.run import Rates
from av_mae.export import tables
from av_mae.export.inputs import Input, Shape, open_input
from av_mae.loading import LoadedModel, forward
from av_mae.models.kinds import flat_values
from av_mae.train.loop import Prefetch
from av_mae.train.sharding import batch_sharding, gather_values, make_mesh, replicated, row_shards
from av_mae.workdir import named

Batch = dict[str, np.ndarray]


class Groups(grain.MapDataset):
    """All windows of a few consecutive clips per element: `image` [n, …], `audio` [n, …] and `row` (Rows) [n].

    Shard s has the clips from s · shard_clips on; a group lies in one shard.
    """

    def __init__(self, clips: Input, shards: Sequence[int], shard_clips: int, size: int):
        super().__init__()
        self._clips = clips
        ends = {shard: min((shard + 1) * shard_clips, len(clips)) for shard in shards}
        self._groups = [
            (first, min(first + size, end))
            for shard, end in ends.items()
            for first in range(shard * shard_clips, end, size)
        ]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return stack([window for position in range(*self._groups[index]) for window in self._clips.windows(position)])


def stack(windows: list) -> Batch:
    """Windows as one batch; rows are objects."""
    rows = np.empty(len(windows), object)
    for number, window in enumerate(windows):
        rows[number] = window.row
    return {
        "image": np.stack([window.image for window in windows]),
        "audio": np.stack([window.audio for window in windows]),
        "row": rows,
    }


def batches(
    clips: Input, shards: Sequence[int], shard_clips: int, size: int, workers: int, prefetch: int = 4
) -> Iterator[Batch]:
    """Batches of `size` windows, shard after shard; the last one of a shard is padded with zeros and row None.

    workers: processes that read clips; 0: a thread of this one. prefetch: groups that each of them is ahead.
    """
    shape = clips.shape
    window_bytes = 3 * shape.image[0] * shape.image[1] + 4 * shape.audio[0] * shape.audio[1]
    # Small groups keep all workers busy where a clip takes long; a batch is joined from them.
    group = max(1, size // max(1, workers))
    groups = Groups(clips, shards, shard_clips, group)
    reading = read_ahead(groups, workers, prefetch * max(1, workers), group * window_bytes)
    try:
        for _, own in itertools.groupby(reading, key=lambda group: shard_of(group, shard_clips)):
            yield from _of_one_size(own, size)
    finally:
        reading.close()


def shard_of(batch: Batch, shard_clips: int) -> int:
    """The shard that a batch belongs to."""
    return batch["row"][0].position // shard_clips


def _of_one_size(groups: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The windows of the groups in batches of one size."""
    held: list[Batch] = []
    count = 0
    for group in groups:
        held.append(group)
        count += len(group["row"])
        if count < size:
            continue
        joined = {name: np.concatenate([part[name] for part in held]) for name in group}
        for first in range(0, count - size + 1, size):
            yield {name: x[first : first + size] for name, x in joined.items()}
        count %= size
        held = [{name: x[len(x) - count :] for name, x in joined.items()}] if count else []
    if count:
        joined = {name: np.concatenate([part[name] for part in held]) for name in held[0]}
        yield {name: _pad(x, size) for name, x in joined.items()}


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    padding = np.zeros((size - len(x), *x.shape[1:]), x.dtype)
    if x.dtype == object:
        padding[:] = None
    return np.concatenate([x, padding])


class Embedder:
    """embedder(image, audio) → columns: float32 arrays [B, …] by name, B a multiple of `devices`.

    Columns are `image`, `audio` and `fusion` [B, D], means over the tokens after the final norms (no `fusion` where
    the model has no such tokens); for each of `layers` the means before those norms, `image_layer3` …; and with
    `tokens` all tokens after them, `image_tokens` [B, N, D] ….
    """

    def __init__(self, model: LoadedModel, tokens: bool = False, layers: tuple[int, ...] = ()):
        depth = len(model.encoder.fusion_blocks)
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong:
            raise UserError(f"--layers={','.join(map(str, layers))}: the encoder has layers 0 to {depth - 1}")
        self.config, self.sound = model.config, model.sound
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        self.rows, self.devices = batch_sharding(mesh), row_shards(mesh)
        self._graph, state = nnx.split(model.encoder)
        self._state = jax.device_put(state, replicated(mesh))
        self._tokens, self._layers = tokens, layers

    def __call__(self, image: jax.Array, audio: jax.Array) -> dict[str, jax.Array]:
        """Images uint8 [B, H, W, 3] and log-mels float32 [B, mels, frames], rows sharded as `rows`."""
        return _columns(self._state, image, audio, self._graph, self._tokens, self._layers)

    def columns(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each column."""
        size = self.config.image.size, self.config.audio.size
        found = jax.eval_shape(
            self.__call__,
            jax.ShapeDtypeStruct((1, *size[0], 3), np.uint8),
            jax.ShapeDtypeStruct((1, *size[1]), np.float32),
        )
        streams = [name for name in ("image", "audio", "fusion") if name in found]  # jax sorts names
        endings = ["", *(f"_layer{number}" for number in self._layers), *(["_tokens"] if self._tokens else [])]
        return {name + ending: found[name + ending].shape[1:] for ending in endings for name in streams}

    def shape(self, stride: float | None = None, missing: str = "error") -> Shape:
        """What clips are cut to for this encoder."""
        return Shape(self.config.image.size, self.config.audio.size, self.sound, stride, missing)


@functools.partial(jax.jit, static_argnames=("graph", "tokens", "layers"))
def _columns(
    state: nnx.State, image: jax.Array, audio: jax.Array, graph: nnx.GraphDef, tokens: bool, layers: tuple[int, ...]
) -> dict[str, jax.Array]:
    encoded, features = forward(nnx.merge(graph, state), image, audio, return_layers=bool(layers))
    columns = dict(features)
    for number in layers:
        columns |= {f"{stream}_layer{number}": x for stream, x in models.pool(encoded.layers[number]).items()}
    if tokens:
        columns |= {f"{stream}_tokens": getattr(encoded, stream) for stream in features}
    return columns


def model_identity(model: LoadedModel) -> str:
    """SHA-256 of an encoder's parameters with their names: the same for the same embeddings, whatever head it has."""
    digest = hashlib.sha256()
    for name, x in sorted(flat_values(model.encoder).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def configuration_hash(model: LoadedModel) -> str:
    """SHA-256 of the configuration on which embeddings depend: streams, fusion and sound."""
    config = recipes.to_dict(model.config)
    for field in FREE_FIELDS:
        part, _, name = field.partition(".")
        config[part].pop(name)
    text = json.dumps(
        [config["image"], config["audio"], config["fusion"], recipes.to_dict(model.sound)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


FORMAT = 1  # counts changes of what the files of an export hold


@dataclasses.dataclass(frozen=True)
class Options:
    """What is embedded, and how; `batch_size` and `workers` change nothing but the time.

    stride: seconds from window to window, `None` for one window in the middle of each clip. missing: 'error' or 'zeros'
    for what has no audio or no image. dtype, tokens, layers: what is stored, see Embedder. shard_clips: clips
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
        least = {"stride": 1e-3, "shard_clips": 1, "batch_size": 1, "workers": 0}
        check_numbers(self, least, {"batch_size": 2**20, "workers": 4096})


def export_embeddings(
    model: LoadedModel, checkpoint: str, data: str, output: pathlib.Path, options: Options = Options()
) -> dict[str, Any]:
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
    layout = tables.Layout(
        settings_of(model, clips, options), clips.label, options.missing == "zeros", embedder.columns(), options.dtype
    )
    tables.begin_output(output, layout.settings, {"checkpoint": checkpoint, "data": data})
    shards = -(-len(clips) // options.shard_clips)
    own = range(jax.process_index(), shards, jax.process_count())
    todo = [shard for shard in own if not tables.is_finished(tables.shard_path(output, shard, shards))]
    if len(todo) < len(own):
        note(f"{named(output)}: {len(own) - len(todo)} of {len(own)} shards are there already")
    rates = {}
    if todo:
        rates = write_shards(
            embedder, clips, todo, layout, lambda shard: tables.shard_path(output, shard, shards), options
        )
    return finish(output, [tables.shard_path(output, shard, shards) for shard in own], len(clips), rates)


def settings_of(model: LoadedModel, clips: Input, options: Options) -> dict[str, Any]:
    """All that the tables depend on, as JSON has it."""
    return {
        "format": FORMAT,
        "model": model_identity(model),
        "configuration": configuration_hash(model),
        "preprocessing": preprocess.VERSION,
        "data": clips.fingerprint(),
        "clips": len(clips),
        "classes": list(clips.classes),
        "stride": options.stride,
        "missing": options.missing,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "layers": list(options.layers),
        "shard_clips": options.shard_clips,
    }


def write_shards(
    embedder: Embedder,
    clips: Input,
    shards: list[int],
    layout: tables.Layout,
    path_of: Callable[[int], pathlib.Path],
    options: Options,
) -> dict[str, float]:
    """Computes shards one after the other; files are written beside the computation. Returns the rates."""
    size = -(-options.batch_size // embedder.devices) * embedder.devices
    total = sum(min(options.shard_clips, len(clips) - shard * options.shard_clips) for shard in shards)
    with contextlib.ExitStack() as stack:
        reading = batches(clips, shards, options.shard_clips, size, options.workers)
        prefetch = stack.enter_context(Prefetch(reading, embedder.rows))
        progress = stack.enter_context(Progress(len(clips), "exporting", initial=len(clips) - total))
        background = stack.enter_context(Background())
        rates, windows, began = Rates(prefetch), 0, 0.0
        for shard, own in itertools.groupby(prefetch, key=lambda item: shard_of(item[0], options.shard_clips)):
            writer = tables.ShardWriter(path_of(shard), layout)
            last = -1
            for host, batch in own:
                columns = jax.device_get(rates.timed(embedder, batch["image"], batch["audio"]))
                background.run(writer.add, host["row"], columns)
                positions = [row.position for row in host["row"] if row is not None]
                progress.update(len(set(positions) - {last}))
                windows, last = windows + len(positions) if began else 0, positions[-1]
                began = began or time.perf_counter()
            background.run(writer.close)
        background.wait()
        seconds = time.perf_counter() - began
        measured = rates.metrics(size, embedder, batch["image"], batch["audio"])
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
    parts = gather_values([[read, rates]])
    found = [shard for shards, _ in parts for shard in shards]
    failures = sorted(tables.Failed(*failure) for _, failed in found for failure in failed)
    result = {
        "clips": total - len(failures),
        "windows": sum(windows for windows, _ in found),
        "failed": len(failures),
        "causes": dict(collections.Counter(failure.error for failure in failures).most_common(5)),
        **{name: sum(part[name] for _, part in parts if part) for name in rates},
    }
    if jax.process_index() == 0:
        tables.write_failures(output, failures)
        record = tables.read_record(output) or {}
        tables.write_record(output, record | {"result": record.get("result", {}) | result})
    if not result["clips"]:
        raise UserError(
            f"none of the {total} clips can be read; the first error: {failures[0].path or failures[0].id}: "
            f"{failures[0].error}"
        )
    return result
