"""The files of a checkpoint: how they are found, written, read back, and told from damaged or swapped ones."""

import functools
import hashlib
import json
import logging
import pathlib
import sys
import urllib.parse
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from av_mae.errors import UserError
from av_mae.storage import as_path, is_url, reached

Arrays = dict[str, Any]
# Arrays, or their shapes, dtypes and shardings alone, by dotted name.
Abstract = Mapping[str, jax.Array | jax.ShapeDtypeStruct]
COMMITTED = "commit_success.txt"  # Orbax's, in a checkpoint on a store and in each of its items: they are whole


def find_checkpoint(path: str) -> pathlib.Path:
    """The folder of the checkpoint that `path` names: a checkpoint, or the newest of a workdir or its `checkpoints`.

    Raises:
      UserError: there is none.
    """
    folder = as_path(path)
    with reached(folder):
        if (folder / "model").is_dir():
            return folder
        for candidate in (folder / "checkpoints", folder):
            if candidate.is_dir():
                children = [child for child in candidate.iterdir() if child.name.isdecimal()]
                steps = [int(child.name) for child in children if is_whole(child)]
                if steps:
                    return candidate / str(max(steps))
                if children:
                    raise UserError(
                        f"the checkpoints in {candidate} are not finished, or were copied without their "
                        "commit_success.txt: name another folder, or copy them again"
                    )
    raise UserError(f"there is no checkpoint in {path!r}: name a work directory, its checkpoints/ or one of them")


def unfinished(folder: pathlib.Path, step: str = "*") -> list[pathlib.Path]:
    """Checkpoints of a step that were begun and not finished. On stores they have their last name from the start."""
    if is_url(folder):
        found = folder.iterdir() if folder.is_dir() else ()
        return [path for path in found if path.name.isdecimal() and step in ("*", path.name) and not is_whole(path)]
    return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def is_whole(checkpoint: pathlib.Path) -> bool:
    """Whether Orbax has finished a checkpoint, or a part of one, that has its last name."""
    return not is_url(checkpoint) or (checkpoint / COMMITTED).exists()


def meta_hash(meta: Mapping[str, Any]) -> str:
    """SHA-256 of all of a checkpoint's meta but the hash itself."""
    text = json.dumps({name: value for name, value in meta.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The meta of the checkpoint in `folder`.

    Raises:
      ValueError: the meta is not the one that was saved, or of another step than the folder's name. Checkpoints of
        earlier versions have no hash to compare with.
    """
    meta: dict[str, Any] = json.loads((folder / "meta" / "metadata").read_text())
    if folder.name.isdecimal() and meta["step"] != int(folder.name):
        raise ValueError(f"its meta is of step {meta['step']}")
    if ("digests" in meta or "sha256" in meta) and meta.get("sha256") != meta_hash(meta):
        raise ValueError("its meta has changed since it was saved")
    return meta


@jax.jit
def checksum(arrays: Arrays) -> jax.Array:
    """The sum of all 32-bit words of the arrays, uint32, which is the same on every mesh."""
    words = [jax.lax.bitcast_convert_type(x, jnp.uint32) for x in arrays.values()]
    return sum((x.sum(dtype=jnp.uint32) for x in words), jnp.uint32(0))


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of a word changes about half the bits of the result."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


@jax.jit
def _digest_words(x: jax.Array, salts: jax.Array) -> jax.Array:
    """A sum for each salt over all 32-bit words of one array, each word mixed with its index and the salt: uint32 [n].

    Compiled once for each shape and sharding, not for each name: a model has hundreds of arrays of few shapes.
    """
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):  # row-major, and without an array of another sharding
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    word = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.vmap(lambda salt: _mix(_mix(index ^ salt) + word).sum(dtype=jnp.uint32))(salts)


def digest(arrays: Arrays) -> str:
    """64 bits in hexadecimal that tell arrays of 32-bit values: names, values and the order of the values.

    The digest is a sum over the values, so that it is the same on every mesh and each device reads only its own shards.
    A hash of the bytes, as SHA-256, would need every array whole on one host.
    """
    seeds = (0x9E3779B9, 0x7F4A7C15)
    salts = {name: np.array([zlib.crc32(name.encode(), seed) for seed in seeds], np.uint32) for name in arrays}
    # One after the other: hundreds of small programs under way at once can starve the devices of a CPU of threads.
    sums = [jax.device_get(_digest_words(x, salts[name])) for name, x in arrays.items()]
    return "".join(f"{word:08x}" for word in np.reshape(sums, (-1, 2)).sum(0, dtype=np.uint32))


def arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays without compression, and nothing about them but shape and dtype."""
    # Of Orbax's defaults, zstd makes float32 weights 8 % smaller and takes as long as writing them. Notes on the
    # sharding of each of a thousand arrays take a third of a small checkpoint's time, and nothing reads them: restoring
    # needs the shardings that the arrays get, not those they had.
    handler = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False, array_metadata_store=None)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, handler), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def read_layout(folder: pathlib.Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays in an item ('model' or 'optimizer') of a checkpoint."""
    _silence_late_reads()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))  # Orbax warns that an item is no whole checkpoint
    try:
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(folder / item).item_metadata.tree
    finally:
        logger.setLevel(level)
    return {name: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for name, x in tree.items()}


def read_arrays(folder: pathlib.Path, item: str, abstract: Abstract, meta: Mapping) -> Arrays:
    """The arrays of an item of a checkpoint.

    Args:
      folder: of the checkpoint.
      item: 'model' or 'optimizer'.
      abstract: shapes, dtypes and shardings of the arrays to read, which may be a part of the item.
      meta: of the checkpoint.

    Raises:
      ValueError: the arrays are not those that were saved.
    """
    # all arrays are read, since the checksum is that of the whole item
    anywhere = next(iter(abstract.values())).sharding
    whole = (
        jax.sharding.NamedSharding(anywhere.mesh, jax.sharding.PartitionSpec())
        if isinstance(anywhere, jax.sharding.NamedSharding)
        else anywhere
    )
    others = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
        for name, x in read_layout(folder, item).items()
        if name not in abstract
    }
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore(folder / item, {**abstract, **others})
    found, saved = int(jax.device_get(checksum(arrays))), meta["checksums"][item]
    if found != saved:
        raise ValueError(f"checksum of {item} is {found}, it was {saved} when saved")
    if "digests" in meta and digest(arrays) != meta["digests"][item]:  # earlier versions have none
        raise ValueError(f"checksum of {item} fits, but not the order of its values: they were swapped after saving")
    return {name: arrays[name] for name in abstract}


def read_back(folder: pathlib.Path, name: str, expected: jax.Array) -> None:
    """Reads a checkpoint's meta, and of one array of its model the shards of this process.

    Args:
      folder: of the checkpoint.
      name: of the array.
      expected: the array as it was saved.

    Raises:
      ValueError: the shards are others. What Orbax, the file system or the store raise, where they are not there.
    """
    import tensorstore

    read_meta(folder)
    # Not by Orbax, whose restoring is a meeting of all processes: one that has just been killed is no unreadable file.
    base = f"{folder}/model/" if is_url(folder) else f"file://{urllib.parse.quote(str(folder))}/model/"
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    found = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
    for shard in expected.addressable_shards:
        if not np.array_equal(shard.data, found[shard.index].read().result(), equal_nan=True):
            raise ValueError(f"{name} has other values than were saved")


@functools.cache
def _silence_late_reads() -> None:
    """Where one array cannot be read, TensorStore reports the others' ends to an event loop that Orbax has closed.

    Python would print eight lines for each of them, after the one that names the damage.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def check_shapes(folder: pathlib.Path, wanted: Abstract, partly: bool = False) -> None:
    """Compares the model in a checkpoint with the one that is wanted.

    Args:
      folder: of the checkpoint.
      wanted: shapes of the wanted model by dotted name.
      partly: whether the checkpoint may hold other parameters besides.

    Raises:
      UserError: names the first parameter that is missing, superfluous or of another shape.
    """
    found = read_layout(folder, "model")
    for name in [*wanted, *(name for name in found if name not in wanted and not partly)]:
        here, there = (tuple(x[name].shape) if name in x else "none" for x in (wanted, found))
        if here != there:
            raise UserError(
                f"{folder} is a checkpoint of another model: parameter {name} is {there} in it and "
                f"{here} in the recipe's model"
            )
