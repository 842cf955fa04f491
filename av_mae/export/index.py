"""Exact search by cosine over exported embeddings, file by file: no more than a block of rows is in memory."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import require_finite
from av_mae.export import tables

BLOCK = 16384  # rows
LEAST_SPREAD = 1e-4  # of the largest: what spreads less is noise
ROW_COLUMNS = ("id", "path", "place", "start", "label")
SUFFIXES = (".npy", ".fvecs")


class Hits(NamedTuple):
    """The closest rows of each query, closest first: similarity float32 [queries, k] and row int64 [queries, k]."""

    similarity: np.ndarray
    row: np.ndarray


class Index:
    """The embeddings of one export. Rows are counted through its files in the order of their names.

    Raises:
      UserError: the folder holds no export, or an unfinished one.
    """

    def __init__(self, folder: pathlib.Path):
        record = tables.read_record(folder)
        if record is None:
            raise UserError(f"--index={folder} holds no embeddings: make them with python -m av_mae.export")
        self.folder, self.settings, self.source = folder, record["settings"], record["source"]
        shards = -(-self.settings["clips"] // self.settings["shard_clips"])
        paths = [tables.shard_path(folder, shard, shards) for shard in range(shards)]
        unfinished = [path.name for path in paths if not tables.is_finished(path)]
        if unfinished:
            raise UserError(
                f"--index={folder} is not finished: {len(unfinished)} of {shards} files are not there, the "
                f"first is {unfinished[0]}; run its export again"
            )
        self._files = [parquet.ParquetFile(path) for path in paths]
        self._first = np.cumsum([0] + [file.metadata.num_rows for file in self._files])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def columns(self) -> list[str]:
        """The columns of embeddings that can be searched."""
        return [
            field.name
            for field in self._files[0].schema_arrow
            if pa.types.is_fixed_size_list(field.type) and not pa.types.is_nested(field.type.value_type)
        ]

    def blocks(self, column: str) -> Iterator[np.ndarray]:
        """The rows of a column in order, of length 1: float32 [n, D].

        Raises:
          UserError: there is no such column, or a value is not finite.
        """
        if column not in self.columns:
            raise UserError(f"--modality={column}: {self.folder} has {', '.join(self.columns)}")
        for file in self._files:
            for batch in file.iter_batches(BLOCK, columns=[column]):
                values = batch.column(0)
                yield unit(values.flatten().to_numpy().reshape(len(values), values.type.list_size))

    def search(self, queries: np.ndarray, column: str, top: int, whiten: bool = False) -> Hits:
        """The `top` rows closest to each query [queries, D]; of equally close ones the first.

        whiten: cosines are taken in units of the index's own spread, see `whitening`.
        """
        change = self.whitening(column) if whiten else unit
        queries = change(queries)
        best = Hits(np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64))
        first = 0
        for block in self.blocks(column):
            block = change(block) if whiten else block
            rows = np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))
            best = closest(
                Hits(
                    np.concatenate([best.similarity, queries @ block.T], axis=1),
                    np.concatenate([best.row, rows], axis=1),
                ),
                top,
            )
            first += len(block)
        return best

    def whitening(self, column: str) -> Callable[[np.ndarray], np.ndarray]:
        """A function of rows [n, D] after which the index's rows have mean 0 and about the same spread in all
        directions, and length 1: what all clips share no longer outweighs how they differ."""
        total, products = 0.0, 0.0
        for block in self.blocks(column):
            block = block.astype(np.float64)
            total, products = total + block.sum(0), products + block.T @ block
        mean = total / len(self)
        spread, directions = np.linalg.eigh(products / len(self) - np.outer(mean, mean))
        matrix = directions / np.sqrt(np.maximum(spread, LEAST_SPREAD * spread.max()))
        return lambda rows: unit((unit(rows) - mean) @ matrix)

    def describe(self, row: int) -> dict[str, Any]:
        """id, path, place, start and label (its name where that is known) of a row."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        file = self._files[number]
        columns = [name for name in ROW_COLUMNS if name in file.schema_arrow.names]
        found = {
            name: values[0]
            for name, values in file.read(columns).slice(row - int(self._first[number]), 1).to_pydict().items()
        }
        classes = self.settings["classes"]
        if classes and found.get("label") is not None:
            found["label"] = classes[found["label"]]
        return found

    def write_vectors(self, path: pathlib.Path, column: str) -> None:
        """All rows of a column, of length 1, as FAISS and others read them: float32 `.npy` [n, D], or `.fvecs` (before
        each row its length as int32). Inner products are cosines. Their ids, a line each, go to `PATH.ids.txt`.

        Raises:
          UserError: another suffix, or no such column.
          OSError: the file system refuses.
        """
        if path.suffix not in SUFFIXES:
            raise UserError(f"--faiss={path} must end in {' or '.join(SUFFIXES)}")
        blocks = self.blocks(column)
        block = next(blocks, np.zeros((0, 0), np.float32))
        unfinished = path.with_name(f".{path.name}.unfinished")
        with open(unfinished, "wb") as file:
            if path.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(self), block.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            while block is not None:
                length = np.full((len(block), 1), block.shape[1], "<i4").view("<f4")
                file.write(block.tobytes() if path.suffix == ".npy" else np.hstack([length, block]).tobytes())
                block = next(blocks, None)
        unfinished.replace(path)
        with open(f"{path}.ids.txt", "w") as file:
            for table in self._files:
                file.writelines(f"{name}\n" for name in table.read(["id"])["id"].to_pylist())


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] divided by their length, float32; rows of zeros stay."""
    rows = np.asarray(rows, np.float32)
    require_finite(rows, "embeddings")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def closest(hits: Hits, top: int) -> Hits:
    """The `top` closest of hits [queries, n] in order; of equally close ones the one that stands first."""
    order = np.argsort(-hits.similarity, axis=1, kind="stable")[:, :top]
    return Hits(*(np.take_along_axis(values, order, 1) for values in hits))
