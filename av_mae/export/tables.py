"""Embeddings as Parquet: one file per shard, written under another name and renamed when whole.

`embeddings/00000-of-00008.parquet` … hold the windows in input order; `failures.parquet` and `skipped.jsonl` the clips
that could not be read; `export.json` what the export is. A shard's footer holds its failures too, as JSON, until all
shards are there.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from av_mae.checkpoint import first_difference
from av_mae.errors import ClipFailure, StoreError, UserError
from av_mae.export.inputs import Row
from av_mae.storage import is_url, reached, replace_file
from av_mae.workdir import named, write_skipped

FOLDER, FAILURES, RECORD = "embeddings", "failures.parquet", "export.json"
GROUP_BYTES = 2**26  # of embeddings in a row group
KEY = b"av_mae"  # of the settings in a file's metadata
FAILED_KEY = b"av_mae.failures"
FAILURE_SCHEMA = pa.schema([("place", pa.int64()), ("id", pa.string()), ("path", pa.string()), ("error", pa.string())])
# A column with few different values is stored once; embeddings have none that repeat.
TEXTS = ("path", "label")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the tables hold: `settings` of the export, a type of labels, whether clips may lack a stream, and the shape
    of one row of each column of embeddings, stored as `dtype` ('float16', 'float32')."""

    settings: Mapping[str, Any]
    label: str | None
    partial: bool
    columns: Mapping[str, tuple[int, ...]]
    dtype: str

    @property
    def schema(self) -> pa.Schema:
        fields = [("id", pa.string()), ("path", pa.string()), ("place", pa.int64()), ("start", pa.float64())]
        if self.label:
            fields.append(("label", pa.type_for_alias(self.label)))
        if self.partial:
            fields += [("has_image", pa.bool_()), ("has_audio", pa.bool_())]
        for name, shape in self.columns.items():
            kind = pa.from_numpy_dtype(np.dtype(self.dtype))
            for size in reversed(shape):
                kind = pa.list_(kind, size)
            fields.append((name, kind))
        return pa.schema(fields, {KEY: json.dumps(self.settings)})

    @property
    def group_rows(self) -> int:
        """Rows of a row group."""
        row = sum(int(np.prod(shape)) for shape in self.columns.values()) * np.dtype(self.dtype).itemsize
        return max(1, GROUP_BYTES // row)


class ShardWriter:
    """One shard: rows and embeddings are added batch by batch, `close` gives the file its name.

    Raises OSError where the file system refuses; what is unfinished then stays under its other name.
    """

    def __init__(self, path: pathlib.Path, layout: Layout):
        self._path, self._layout = path, layout
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._file = open(self._unfinished, "wb")
        texts = [name for name in TEXTS if name in layout.schema.names]
        self._writer = parquet.ParquetWriter(self._file, layout.schema, use_dictionary=texts)
        self._tables: list[pa.Table] = []
        self.failures: list[Row] = []

    def add(self, rows: np.ndarray, embeddings: Mapping[str, np.ndarray]) -> None:
        """Adds windows: Rows [n] and arrays [n, …]; those that failed are kept apart, None is padding."""
        fine = np.array([row is not None and row.failure is None for row in rows])
        self.failures += [row for row in rows if row is not None and row.failure]
        self._tables.append(make_table(self._layout, rows[fine], {name: x[fine] for name, x in embeddings.items()}))
        size = self._layout.group_rows
        if sum(map(len, self._tables)) >= size:
            whole = pa.concat_tables(self._tables)
            rest = len(whole) % size
            self._writer.write_table(whole[: len(whole) - rest], row_group_size=size)
            self._tables = [whole[len(whole) - rest :]]

    def close(self) -> None:
        """Writes what is left and renames the file."""
        if any(map(len, self._tables)):
            self._writer.write_table(pa.concat_tables(self._tables))
        failed = [(x.position, x.id, x.path, x.failure.stage, x.failure.cause) for x in self.failures if x.failure]
        self._writer.add_key_value_metadata({FAILED_KEY: json.dumps(failed)})
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())  # a name that outlives a crash without its contents would count as done
        self._file.close()
        os.replace(self._unfinished, self._path)


def make_table(layout: Layout, rows: Sequence[Row], embeddings: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows and their embeddings [n, …] as a table."""
    schema, columns = layout.schema, []
    for field in schema:
        if field.name not in layout.columns:
            name = "position" if field.name == "place" else field.name
            columns.append(pa.array([getattr(row, name) for row in rows], field.type))
            continue
        x = embeddings[field.name]
        column = pa.array(np.asarray(x, layout.dtype).reshape(-1))
        for size in reversed(x.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def shard_path(output: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    """Where a shard's file is."""
    return output / FOLDER / f"{shard:05d}-of-{shards:05d}.parquet"


def opened(path: pathlib.Path) -> parquet.ParquetFile:
    """A table, here or on a store, of which what is read is fetched. Raises OSError or pa.ArrowException."""
    return parquet.ParquetFile(path.open("rb") if is_url(path) else path)


def is_finished(path: pathlib.Path) -> bool:
    """Whether a shard is there and whole. Raises StoreError where its store does not answer."""
    try:
        with reached(path):
            return FAILED_KEY in (opened(path).metadata.metadata or {})
    except StoreError:
        raise
    except (OSError, pa.ArrowException):
        return False


class Failed(NamedTuple):
    """A clip that could not be read."""

    position: int
    id: str
    path: str
    stage: str
    cause: str

    @property
    def error(self) -> str:
        """The failure without the clip."""
        return str(ClipFailure("", self.stage, self.cause))


def read_failures(path: pathlib.Path) -> tuple[int, list[Failed]]:
    """How many windows a shard holds, and its failures."""
    footer = parquet.read_metadata(path)
    rows = json.loads(footer.metadata[FAILED_KEY])
    # Shards of earlier versions have stage and cause in one text.
    return footer.num_rows, [
        Failed(*row) if len(row) == 5 else Failed(*row[:3], *row[3].split(": ", 1)) for row in rows
    ]


def write_failures(output: pathlib.Path, failures: Sequence[Failed]) -> None:
    """The table of clips that could not be read, which may be empty, and `skipped.jsonl`."""
    write_skipped(output, [ClipFailure(row.id, row.stage, row.cause) for row in failures])
    rows = [(row.position, row.id, row.path, row.error) for row in failures]
    columns: list = list(zip(*rows, strict=True)) or [()] * len(FAILURE_SCHEMA)
    table = pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, FAILURE_SCHEMA, strict=True)],
        schema=FAILURE_SCHEMA,
    )
    unfinished = output / f".{FAILURES}.unfinished"
    parquet.write_table(table, unfinished)
    os.replace(unfinished, output / FAILURES)


def begin_output(output: pathlib.Path, settings: Mapping[str, Any], source: Mapping[str, str]) -> None:
    """Makes the folder and says in it what the export is, or checks that it is this one.

    settings: all that the tables depend on. source: where checkpoint and data are, which may change.

    Raises:
      UserError: the folder holds another export, or other files.
    """
    shown = named(output)
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    record = read_record(output)
    if record is None:
        others = [child.name for child in output.iterdir() if not child.name.startswith(".") and child.name != FOLDER]
        if others or any((output / FOLDER).glob("*.parquet")):
            raise UserError(
                f"--output={shown} holds other files ({', '.join(others[:3]) or FOLDER}): name a folder "
                "that is new or empty"
            )
        if jax.process_index() == 0:  # on stores another's would come after the first one's result
            write_record(output, {"settings": settings, "source": source})
        return
    difference = first_difference(settings, record["settings"])
    if difference is not None:
        name, ours, theirs = difference
        raise UserError(
            f"--output={shown} holds another export, and is not mixed with this one: {name} is {theirs} "
            f"there and {ours} here; name another folder"
        )


def read_record(output: pathlib.Path) -> dict[str, Any] | None:
    """What the export in a folder is: its `settings`, and its `result` once it is finished. `None` without one."""
    try:
        record = json.loads((output / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("settings", "source"))
    return record if known else None


def write_record(output: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes what the export is, at once."""
    replace_file(output / RECORD, json.dumps(record, indent=2) + "\n")
