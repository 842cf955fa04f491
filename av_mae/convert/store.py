"""Weights written as a checkpoint or as safetensors, and the weights from which a stream of a run starts.

A stream starts from a unimodal encoder: a MAE of images, or an AudioMAE. Its class token, positions and decoder are
left out; the run keeps the sin-cos positions of its own grid. Patches are taken as they are: AudioMAE counts time in
rows, and DeepAVFusion does not turn them either.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from av_mae import recipes
from av_mae.checkpoint import Checkpoint, open_checkpoint
from av_mae.checkpoint_files import COMMITTED
from av_mae.config import DataConfig, SoundConfig, TrainConfig
from av_mae.console import note
from av_mae.convert.deepavfusion import DeepAVFusionFile, Survey, complaints, summarize
from av_mae.convert.infer import AS_TOLD, Found, Options, identify, infer
from av_mae.convert.names import names_of
from av_mae.convert.tensors import SAFETENSORS_TYPES, StoredTensor
from av_mae.convert.weight_file import open_weights
from av_mae.errors import UserError, one_line
from av_mae.models import AVMAEConfig, kinds
from av_mae.models.config import require
from av_mae.storage import Folder, fetched, is_url, put_tree

METADATA = "__metadata__"  # of a safetensors file
# What a converted checkpoint keeps of its file, so that the file comes back bit for bit.
KEPT_FOLDER, RECORD, KEPT = "published", "names.json", "tensors.safetensors"
TYPES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
BATCH = 2**25  # bytes that are written at once: single arrays cost a commit each
ALIGNMENT = 8  # bytes: where the data of a safetensors file begin
# Parameters are float32 in both systems; batches are counted in int32 here and int64 there.
DEEPAVFUSION_DTYPES: dict[np.dtype, np.dtype] = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(np.int32): np.dtype(np.int64),
}


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is made when it is written, and then forgotten."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


NamedTensors = Sequence[tuple[str, Lazy | StoredTensor]]


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write Lazy arrays in groups of BATCH bytes, one after the other: else it holds them all, twice.

    `between` is called before each group, when nothing is being written.
    """

    def __init__(self, between: Callable[[], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._between = between

    async def serialize(self, values, infos, args=None):
        begin, size = 0, 0
        for end, value in enumerate(values, 1):
            size += math.prod(value.shape) * value.dtype.itemsize
            if size >= BATCH or end == len(values):
                self._between()
                group = slice(begin, end)
                arrays = [lazy.read() for lazy in values[group]]
                for written in await super().serialize(arrays, infos[group], args[group]):
                    await asyncio.to_thread(written.result)
                begin, size = end, 0
        return []


def write_arrays(folder: pathlib.Path, arrays: dict[str, Lazy], between: Callable[[], None]) -> None:
    """One item of a checkpoint, as av_mae.checkpoint reads it; `between` as in LazyHandler."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, LazyHandler(between)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
        writer.save(folder.absolute(), arrays)


def write_safetensors(path: pathlib.Path, tensors: NamedTensors, between: Callable[[], None] = lambda: None) -> None:
    """A safetensors file of named tensors in their order, one in memory at a time; `between` is called before each.

    Source: the format's description in the safetensors repository.

    Raises:
      UserError: a tensor has the one name that the format keeps for itself.
    """
    header: dict[str, dict] = {METADATA: {"format": "pt"}}
    position = 0
    for name, tensor in tensors:
        require(name != METADATA, f"safetensors cannot hold a tensor named {METADATA}")
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in tensors:
            between()
            file.write(np.asarray(tensor.read(), order="C").reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def whole_or_nothing(output: str | os.PathLike[str]) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """A path to write to, which becomes `output` at the end, at once; after an error nothing is left of it.

    What is for a store is written to it at the end, file by file.

    With the path comes a function, which the writer calls now and then, whenever nothing is half written. The function
    raises KeyboardInterrupt or SystemExit if the process was told to end. (Orbax writes in threads: after an exception
    in the midst of a write these would go on beside the removal.)

    Raises:
      UserError: `output` is there already, or cannot be written.
    """
    there = Folder(output).exists("") if is_url(output) else os.path.exists(output)
    if there:
        raise UserError(f"--output={output} is there already: name another one, or move it away")
    if is_url(output):
        with tempfile.TemporaryDirectory(prefix="av_mae-") as folder:
            with signals_kept() as end_if_told:
                yield pathlib.Path(folder, "output"), end_if_told
            put_tree(pathlib.Path(folder, "output"), os.fspath(output))
        return
    output = pathlib.Path(output)
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        remove(unfinished)
        output.parent.mkdir(parents=True, exist_ok=True)
        with signals_kept() as end_if_told:
            yield unfinished, end_if_told
        os.rename(unfinished, output)
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror or error}") from error
    finally:
        remove(unfinished)


@contextlib.contextmanager
def signals_kept() -> Iterator[Callable[[], None]]:
    """Keeps SIGINT and SIGTERM until the function is called; a second one acts at once. In the main thread only."""
    told: list[int] = []

    def end_if_told() -> None:
        if told:
            raise KeyboardInterrupt if told[0] == signal.SIGINT else SystemExit(128 + told[0])

    def keep(number: int, _) -> None:
        told.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield end_if_told
        return
    before: dict[int, Any] = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield end_if_told
        end_if_told()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_checkpoint(
    folder: pathlib.Path, weights: DeepAVFusionFile, survey: Survey, between: Callable[[], None]
) -> None:
    """A work directory with one checkpoint of a weight file's model, and what the model does not hold."""
    found, checkpoint = weights.found, folder / "checkpoints" / "0"
    (checkpoint / "meta").mkdir(parents=True)
    values = {path: Lazy(x.shape, x.dtype, functools.partial(weights.read, path)) for path, x in weights.shapes.items()}
    write_arrays(checkpoint / "model", values, between)
    config = recipe_of(found.config)
    meta = {
        "step": 0,
        "seed": config.seed,
        "config": recipes.to_dict(config),
        "kind": found.kind,
        "head": recipes.to_dict(found.head),
        "checksums": {"model": survey.checksum},
    }
    (checkpoint / "meta" / "metadata").write_text(json.dumps(meta))
    record = checkpoint / KEPT_FOLDER
    record.mkdir()
    tensors = weights.file.tensors
    names = [(name, str(tensor.dtype)) for name, tensor in tensors.items()]
    (record / RECORD).write_text(json.dumps({"prefix": found.prefix, "tensors": names}))
    write_safetensors(record / KEPT, [(name, tensors[name]) for name in survey.kept], between)
    recipes.save(config, folder / "config.json")
    for item in (checkpoint / "model", checkpoint / "meta", checkpoint):
        (item / COMMITTED).touch()  # on a store Orbax looks for it


def recipe_of(model: AVMAEConfig) -> TrainConfig:
    """DeepAVFusion's recipe around a model: what a checkpoint's configuration is besides."""
    return TrainConfig(epochs=200.0, data=DataConfig(sound=SoundConfig(mels=model.audio.size[0])), model=model)


def deepavfusion_tensors(checkpoint: Checkpoint, record: pathlib.Path) -> NamedTensors:
    """What a checkpoint is in DeepAVFusion, by DeepAVFusion's names: of a converted file just what that held.

    record: a folder of this machine with what the checkpoint's KEPT_FOLDER holds, where there is one.

    Raises:
      UserError: DeepAVFusion has no such model, or the checkpoint cannot be read.
    """
    definition, values = checkpoint.load()
    model = definition.merge(values)
    known = json.loads((record / RECORD).read_text()) if record.is_dir() else {}
    names = names_of(model, known.get("prefix", "encoder."))
    kept = open_weights(record / KEPT).tensors if record.is_dir() else {}
    shapes = {path: x.shape for path, x in values.items()}

    def tensor(name: str, said: str | None) -> Lazy | StoredTensor:
        if name in kept:
            return kept[name]
        if name in names.buffers:
            value = names.buffers[name].make()
            return Lazy(value.shape, np.dtype(said or str(value.dtype)), lambda: value.astype(said or value.dtype))
        rule = names.rules[name]
        dtype: np.dtype = np.dtype(said) if said else DEEPAVFUSION_DTYPES[np.dtype(values[rule.here[0]].dtype)]
        return Lazy(rule.shape(shapes), dtype, lambda: rule.join(values).astype(dtype))

    tensors = known.get("tensors") or [(name, None) for name in (*names.rules, *names.buffers)]
    return [(name, tensor(name, dtype)) for name, dtype in tensors]


def stream_arrays(path: str, stream: str, config: AVMAEConfig) -> dict[str, np.ndarray]:
    """What a stream of a model starts with, by dotted path in the model ('encoder.image.…').

    Args:
      path: a weight file of a unimodal encoder, or what av_mae.convert made of one.
      stream: 'image' or 'audio'.
      config: of the model.

    Returns:
      The stream's parameters, float32.

    Raises:
      UserError: the file cannot be read, is no unimodal encoder of this stream, or does not fit the configuration.
    """
    wanted = next(kind for kind, name in kinds.STREAMS.items() if name == stream)
    if pathlib.Path(path).is_file():
        file = open_weights(path)
        found = identify(file.tensors, path)[0]
    else:
        checkpoint = open_checkpoint(path)
        found = checkpoint.kind
    if found != wanted:
        raise UserError(
            f"init_{stream}={path} must be a unimodal {stream} encoder, but it holds: {found}"
            + ("; use init for a checkpoint of both streams" if found == kinds.PRETRAINING else "")
        )
    if pathlib.Path(path).is_file():
        weights = DeepAVFusionFile(file, Found(wanted, config, prefix=""))
        for complaint in complaints(weights, weights.survey()):
            note(f"warning: {complaint}")
        arrays = {name: weights.read(name) for name in weights.shapes}
    else:
        arrays = {name: np.asarray(x) for name, x in checkpoint.load(config)[1].items()}
    return {f"encoder.{stream}.{name}": x for name, x in arrays.items()}


def convert(source: str | os.PathLike, output: str | os.PathLike, options: Options = AS_TOLD) -> str:
    """Writes the model of a weight file as a work directory with one checkpoint.

    In memory are a few times the largest tensor, never the whole model.

    Args:
      source: a .pth, .pt, .safetensors or .index.json file of DeepAVFusion or of a unimodal MAE.
      output: the new work directory.
      options: what the file does not tell of its model.

    Returns:
      What the file is, in lines.

    Raises:
      UserError: the file cannot be read or is no such model, or `output` is there already.
    """
    file = open_weights(source)
    weights = DeepAVFusionFile(file, infer(file.tensors, str(source), options))
    survey = weights.survey()
    for complaint in complaints(weights, survey):
        print(f"warning: {one_line(complaint)}", file=sys.stderr)
    with whole_or_nothing(output) as (unfinished, between):
        write_checkpoint(unfinished, weights, survey, between)
    return summarize(weights, options)


def export(source: str | os.PathLike, output: str | os.PathLike) -> str:
    """Writes a checkpoint, or a weight file, as safetensors with DeepAVFusion's names; says in a line what was written.

    What a checkpoint was converted from comes back bit for bit.

    Raises:
      UserError: the source cannot be read, DeepAVFusion has no such model, or `output` is there already.
    """
    with contextlib.ExitStack() as stack:
        if not is_url(source) and os.path.isfile(source):
            tensors: NamedTensors = list(open_weights(source).tensors.items())
        else:
            checkpoint = open_checkpoint(os.fspath(source))
            record = stack.enter_context(fetched(checkpoint.folder / KEPT_FOLDER))
            tensors = deepavfusion_tensors(checkpoint, record)
        unfinished, between = stack.enter_context(whole_or_nothing(output))
        write_safetensors(unfinished, tensors, between)
        size = unfinished.stat().st_size
    return f"{len(tensors)} tensors, {size / 1e6:.1f} MB"
