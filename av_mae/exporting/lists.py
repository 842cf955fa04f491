"""Lists of media files: what a folder holds, and what csv, tsv and Parquet lists say."""

import collections
import math
import os
import pathlib
from typing import Any, NamedTuple

from av_mae.datasets.media_files import MEDIA, ending
from av_mae.errors import UserError

COLUMNS = ("path", "start", "end", "label", "id")


class Entry(NamedTuple):
    """A file, or the part of it from `start` to `end` seconds (None: its beginning, its end)."""

    path: str
    id: str
    start: float | None = None
    end: float | None = None
    label: int | str | None = None


def list_folder(folder: str) -> list[Entry]:
    """All media files in a folder and below it, in the order of their names; the id is the path below it.

    Raises UserError where there are none.
    """
    found = [os.path.relpath(os.path.join(place, name), folder)
             for place, _, names in os.walk(folder, followlinks=True) for name in names
             if not name.startswith(".") and ending(name) in MEDIA]
    if not found:
        raise UserError(f"--data={folder} holds no media: no file below it ends in {', '.join(sorted(MEDIA))}; a "
                        "list of files (csv or parquet) takes any name")
    return [Entry(os.path.join(folder, name), name) for name in sorted(found)]


def read_list(path: str) -> tuple[list[Entry], str | None]:
    """The entries of a list, and the type of their labels: 'int64', 'string', or None where there are none.

    Columns: `path` (from the list's folder, where it is not absolute), and if wanted `start` and `end` (seconds),
    `label` (whole numbers or text) and `id` (else the path as it stands there, with #start where a file occurs more
    than once). Empty cells are unknown.

    Raises UserError, with the row, for what cannot be read.
    """
    columns = _read_columns(path)
    count = len(columns["path"])
    if not count:
        raise UserError(f"--data={path} lists no files")
    cells = {name: [_known(value) for value in columns.get(name, [None] * count)] for name in COLUMNS}
    label, labels = _labels(cells["label"])
    folder, times = os.path.dirname(path), collections.Counter(cells["path"])
    entries = []
    for row, name in enumerate(cells["path"]):
        if name is None:
            raise UserError(f"--data={path}: row {row + 1} has no path")
        start, end = (_seconds(path, row, column, cells[column][row]) for column in ("start", "end"))
        start = 0.0 if start is None and end is not None else start
        if end is not None and end <= start:
            raise UserError(f"--data={path}: row {row + 1} ends at {end:g} s, but must end after its start, "
                            f"{start:g} s")
        unique = f"{name}#{start:g}" if times[name] > 1 and start is not None else str(name)
        known = cells["id"][row]
        entries.append(Entry(os.path.join(folder, str(name)), unique if known is None else str(known), start, end,
                             labels[row]))
    return entries, label


def _read_columns(path: str) -> dict[str, list[Any]]:
    suffix = pathlib.Path(path).suffix.lower()
    import pyarrow

    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            table = parquet.read_table(path)
        elif suffix in (".csv", ".tsv"):
            from pyarrow import csv

            table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ","),
                                 convert_options=csv.ConvertOptions(column_types={
                                     "path": pyarrow.string(), "id": pyarrow.string(), "label": pyarrow.string()}))
        else:
            raise UserError(f"--data={path} must be a folder, or a list that ends in .csv, .tsv or .parquet")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--data={path} cannot be read as a list of files: {str(error).splitlines()[0]}") from error
    if "path" not in table.column_names:
        raise UserError(f"--data={path} needs a column 'path'; it has {', '.join(table.column_names)}")
    return {name: table[name].to_pylist() for name in COLUMNS if name in table.column_names}


def _known(value: Any) -> Any:
    unknown = value is None or value == "" or isinstance(value, float) and math.isnan(value)
    return None if unknown else value


def _labels(values: list[Any]) -> tuple[str | None, list[int | str | None]]:
    """The labels' type, and the labels in it: whole numbers where all are."""
    if all(value is None for value in values):
        return None, values
    # A column of whole numbers with gaps comes as floats.
    texts = [None if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)
             for value in values]
    try:
        return "int64", [None if text is None else int(text) for text in texts]
    except ValueError:
        return "string", texts


def _seconds(path: str, row: int, column: str, value: Any) -> float | None:
    try:
        seconds = None if value is None else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if seconds is not None and not 0 <= seconds < math.inf:
        raise UserError(f"--data={path}: row {row + 1} has {column}={value!r}, which must be 0 or more seconds")
    return seconds
