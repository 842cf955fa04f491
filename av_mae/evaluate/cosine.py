"""Exact search by cosine, block by block: the matrix of similarities is never whole in memory.

`closest` finds the rows nearest to a few queries, on the host. `nearest` and `retrieval` compare all clips with all
others on the devices: beside the embeddings (an array, or a file mapped into memory) live two blocks of rows, their
similarities (64 MB per stream at the default block) and a few numbers per clip.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from av_mae.evaluate.bootstrap import Values, require_finite
from av_mae.train.sharding import batch_sharding, replicated

BLOCK = 4096
LEAST_LENGTH = 1e-12
ALL = "all"  # the sum of the streams' similarities
RECALLS = (1, 5, 10)
DIRECTIONS = ("audio_to_image", "image_to_audio")


class Hits(NamedTuple):
    """The closest rows of each query: similarity float32 and row int64, [queries, k] with the closest first.

    Of `nearest` [n] each, the nearest other clip of each clip; -1 where there is none.
    """

    similarity: np.ndarray
    row: np.ndarray


def nearest(streams: Mapping[str, np.ndarray], block: int = BLOCK, mesh: Mesh | None = None) -> dict[str, Hits]:
    """The nearest other clip of every clip by cosine, for each stream and for the sum of all similarities.

    Similarities are symmetric, so each pair of blocks is compared once and serves both. Of equal similarities the first
    clip wins.

    Args:
      streams: name → float [n, width], the widths may differ.
      block: rows compared at a time.
      mesh: the devices that share the rows of a block, which they must divide; None: the default device.

    Returns:
      Name → neighbours, and 'all' where there is more than one stream.

    Raises:
      UserError: embeddings that are not finite.
    """
    clips = len(next(iter(streams.values())))
    names = [*streams] + ([ALL] if len(streams) > 1 else [])
    found = {name: Hits(np.full(clips, -np.inf, np.float32), np.full(clips, -1)) for name in names}
    closest = _compiled(_closest, mesh)
    split, whole = _shardings(mesh)
    for left, left_rows in _blocks(streams, block, split):
        for right, right_rows in _blocks(streams, block, whole, left):
            for name, (across, down) in closest(left_rows, right_rows, left, right, clips).items():
                _improve(found[name], left, *across)
                if right > left:
                    _improve(found[name], right, *down)
    return found


def closest(queries: np.ndarray, blocks: Iterable[np.ndarray], top: int, skip: np.ndarray | None = None) -> Hits:
    """The rows whose inner product with each query is highest: the cosine, where rows have length 1.

    Args:
      queries: float32 [q, D].
      blocks: the rows in order, float32 [n, D] each.
      top: how many rows of each query.
      skip: int [q], a row that is no hit of this query; `None`: every row may be.

    Returns:
      At most `top` rows of each query, the closest first; of equally close ones the first.
    """
    similarity: np.ndarray = np.zeros((len(queries), 0), np.float32)
    row: np.ndarray = np.zeros((len(queries), 0), np.int64)
    first = 0
    for block in blocks:
        numbers = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
        found = queries @ block.T
        if skip is not None:
            found = np.where(numbers == skip[:, None], -np.inf, found)
        similarity, row = np.concatenate([similarity, found], axis=1), np.concatenate([row, numbers], axis=1)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
        similarity, row = np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)
        first += len(block)
    return Hits(similarity, row)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] divided by their length, float32; rows of zeros stay."""
    rows = np.asarray(rows, np.float32)
    require_finite(rows, "embeddings")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), LEAST_LENGTH)


def retrieval(audio: np.ndarray, image: np.ndarray, block: int = BLOCK, mesh: Mesh | None = None) -> dict[str, Values]:
    """Recall of each clip's own image among all images by cosine with its audio, and the other way round.

    Args:
      audio, image: float [n, width], row i of both belongs to clip i.
      block, mesh: as in `nearest`.

    Returns:
      `audio_to_image/recall1`, `…5`, `…10` and `image_to_audio/…`: per clip 1 where fewer than k others are closer
      than its own, else 0; where others are just as close, the share of their orders that puts it among the first k.
      Nothing but the reason where the streams have different widths.

    Raises:
      UserError: embeddings that are not finite.
    """
    clips, widths = len(audio), (audio.shape[1], image.shape[1])
    if widths[0] != widths[1]:
        reason = f"audio of width {widths[0]} and images of width {widths[1]} have no cosine"
        return {f"{name}/recall{k}": [reason] * clips for name in DIRECTIONS for k in RECALLS}
    own = np.zeros(-(-clips // block) * block, np.float32)
    own_similarity = _compiled(lambda audio, image: jnp.diagonal(_similarity(audio, image)), mesh)
    count_closer = _compiled(_count_closer, mesh)
    split, whole = _shardings(mesh)
    for start, blocks in _blocks({"audio": audio, "image": image}, block, split):
        own[start : start + block] = own_similarity(blocks["audio"], blocks["image"])
    counts = np.zeros((2, 2, len(own)), np.int64)  # of audio → image and image → audio: closer, just as close
    for left, audio_rows in _blocks({"audio": audio}, block, split):
        for right, image_rows in _blocks({"image": image}, block, whole):
            across, down = count_closer(
                audio_rows["audio"],
                image_rows["image"],
                own[left : left + block],
                own[right : right + block],
                left,
                right,
                clips,
            )
            counts[0, :, left : left + block] += across
            counts[1, :, right : right + block] += down
    return {
        f"{name}/recall{k}": recalls(counts[number, 0, :clips], counts[number, 1, :clips], k)
        for number, name in enumerate(DIRECTIONS)
        for k in RECALLS
    }


def recalls(closer: np.ndarray, equal: np.ndarray, k: int) -> Values:
    """Recall at k of each clip, from how many others are closer than its own and how many just as close: int [n]."""
    if len(closer) <= k:
        return [f"{k} of {len(closer)} clips always hold the own one"] * len(closer)
    return np.clip((k - closer) / (equal + 1), 0, 1)


def _blocks(
    streams: Mapping[str, np.ndarray], block: int, sharding: NamedSharding | None, first: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(start, rows start … start + block of each stream) from row `first` on, zeros after the last row."""
    for start in range(first, len(next(iter(streams.values()))), block):
        found: dict[str, Any] = {}
        for name, values in streams.items():
            part = np.asarray(values[start : start + block], np.float32)
            require_finite(part, f"{name} embeddings from clip {start} on")
            part = np.pad(part, ((0, block - len(part)), (0, 0)))
            split = part if sharding is None else jax.make_array_from_callback(part.shape, sharding, part.__getitem__)
            found[name] = split
        yield start, found


def _shardings(mesh: Mesh | None) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Rows split over the devices of a mesh, and whole on each; (None, None) for the default device."""
    return (None, None) if mesh is None else (batch_sharding(mesh), replicated(mesh))


def _compiled(function: Callable, mesh: Mesh | None) -> Callable:
    """The function compiled; what it returns is whole on every device of the mesh."""
    return jax.jit(function, out_shardings=_shardings(mesh)[1])


def _similarity(left: jax.Array, right: jax.Array) -> jax.Array:
    """Cosines [B, B] of rows [B, D]; 0 for rows of zeros."""
    left, right = (x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), LEAST_LENGTH) for x in (left, right))
    return jnp.einsum("ld,rd->lr", left, right, precision=jax.lax.Precision.HIGHEST)


def _others(left: jax.Array, right: jax.Array, block: int, clips: jax.Array) -> jax.Array:
    """bool [B, B]: pairs of two different clips, for blocks that start at `left` and `right`; padding is no clip."""
    left, right = left + jnp.arange(block), right + jnp.arange(block)
    return (left[:, None] != right) & (left < clips)[:, None] & (right < clips)


def _closest(
    left_rows: dict[str, jax.Array],
    right_rows: dict[str, jax.Array],
    left: jax.Array,
    right: jax.Array,
    clips: jax.Array,
) -> dict:
    """For each stream ((similarity, index) of each left row's closest right row, the same of each right row)."""
    similarities = {name: _similarity(left_rows[name], right_rows[name]) for name in left_rows}
    if len(similarities) > 1:
        first, *rest = similarities.values()
        similarities[ALL] = sum(rest, first)
    others = _others(left, right, len(next(iter(left_rows.values()))), clips)
    found = {}
    for name, similarity in similarities.items():
        similarity = jnp.where(others, similarity, -jnp.inf)
        found[name] = _first_maximum(similarity, 1, right), _first_maximum(similarity, 0, left)
    return found


def _first_maximum(similarity: jax.Array, axis: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima along an axis, and their first indices, counted from `start` on."""
    maxima = similarity.max(axis, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, axis)
    first = jnp.where(similarity == maxima, indices, similarity.shape[axis]).min(axis)  # argmax takes 3 times as long
    return maxima.squeeze(axis), start + first


def _improve(found: Hits, start: int, similarity: jax.Array, index: jax.Array) -> None:
    """Takes the closest rows of a block [B] where they are closer than those known for clips start, start + 1, …"""
    part = slice(start, min(start + len(similarity), len(found.row)))
    value, row = (np.asarray(values)[: part.stop - start] for values in (similarity, index))
    closer = value > found.similarity[part]
    found.row[part][closer], found.similarity[part][closer] = row[closer], value[closer]


def _count_closer(
    audio: jax.Array,
    image: jax.Array,
    audio_own: jax.Array,
    image_own: jax.Array,
    left: jax.Array,
    right: jax.Array,
    clips: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """For each row of audio how many other images are (closer, just as close) as its own; and vice versa.

    Returns int [2, B] each.
    """
    similarity, others = _similarity(audio, image), _others(left, right, len(audio), clips)

    def count(own: jax.Array, axis: int) -> jax.Array:
        return jnp.stack([(others & (similarity > own)).sum(axis), (others & (similarity == own)).sum(axis)])

    return count(audio_own[:, None], 1), count(image_own, 0)
