"""Any tree of media files. Labels are the folders that hold the files, or columns of a csv or Parquet table."""

import collections
import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

from av_mae.errors import UserError
from av_mae.media.files import MEDIA, MediaFiles, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import SPLITS, Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

DESCRIPTION = "A folder of media files."
LICENCE = "That of the media files, which av_mae does not know."
COLUMNS = ("path", "id", "label", "split", "start", "end")
SEPARATORS = ";|"  # between several labels of a clip


def read(folder: Folder, table: str | None = None) -> Catalogue:
    """Every media file of a tree: folders `train`, `validation`, `test` at its top are splits, the folder that holds a
    file is its label. With a `table` (beside the tree or in it) its rows are the clips: `path` (relative), and where
    known `id`, `label` (several: a;b), `split`, `start` and `end` (s)."""
    if table is not None:
        return _from_table(folder, table)
    names = [name for name in folder.files() if ending(name) in MEDIA]
    if not names:
        raise UserError(f"{folder} holds no media file (known endings: {', '.join(sorted(MEDIA))})")
    tops = {name.split("/")[0].lower() for name in names}
    split_folders = all("/" in name for name in names) and tops <= SPLITS.keys()
    inner = {name: name.split("/", 1)[1] if split_folders else name for name in names}
    labels = {name: inner[name].rpartition("/")[0] for name in names}
    classes = tuple(sorted(set(labels.values()) - {""}))
    numbers = {label: number for number, label in enumerate(classes)}
    ids = _ids(names)
    return Catalogue(
        classes,
        [
            SourceClip(
                ids[name],
                split_name(name.split("/")[0]) if split_folders else "train",
                name,
                source=ids[name],
                labels=(numbers[labels[name]],) if labels[name] else (),
            )
            for name in names
        ],
    )


def _ids(names: list[str]) -> dict[str, str]:
    """'a/b.mp4' → 'a-b'; files that share all but the ending keep it."""
    short = {name: "-".join([*name.split("/")[:-1], stem(name)]) for name in names}
    shared = collections.Counter(short.values())
    return {name: short[name] if shared[short[name]] == 1 else name.replace("/", "-") for name in names}


def _from_table(folder: Folder, table: str) -> Catalogue:
    catalogue, files = Catalogue(), MediaFiles(folder.files())
    present = set(files.names)
    read_rows = list(_parquet_rows(table) if table.endswith(".parquet") else _csv_rows(table, catalogue))
    names = sorted({label for _, row in read_rows for label in _labels(row)})
    catalogue.classes, numbers = tuple(names), {label: number for number, label in enumerate(names)}
    for number, row in read_rows:

        def add():
            clip = _clip(row, numbers)
            media = clip.media if clip.media in present else files.find(stem(clip.media))
            if media is None:
                catalogue.note("missing", clip.id, "files", f"{table}, row {number}: no file {clip.media}", clip.split)
            else:
                catalogue.clips.append(dataclasses.replace(clip, media=media))

        tables.guarded(catalogue, table, number, add)
    return catalogue


def _labels(row: Mapping[str, str]) -> list[str]:
    text = row.get("label", "")
    for separator in SEPARATORS[1:]:
        text = text.replace(separator, SEPARATORS[0])
    return [label.strip() for label in text.split(SEPARATORS[0]) if label.strip()]


def _clip(row: Mapping[str, str], numbers: Mapping[str, int]) -> SourceClip:
    path = row["path"].replace("\\", "/").removeprefix("./")
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"path {row['path']!r} must be a file below the source folder")
    start = tables.number(row["start"], "start") if row.get("start") else 0.0
    end = tables.number(row["end"], "end") if row.get("end") else None
    if end is not None and end <= start:
        raise ValueError(f"end {end:g} must be after start {start:g}")
    name = row.get("id") or _ids([path])[path] + (f"_{start:g}" if start or end is not None else "")
    check_id(name)
    return SourceClip(
        name,
        split_name(row["split"]) if row.get("split") else "train",
        path,
        start=start,
        end=end,
        labels=tuple(numbers[label] for label in _labels(row)),
        source=path,
        source_start=start,
    )


def _csv_rows(table: str, catalogue: Catalogue) -> Iterator[tuple[int, dict[str, str]]]:
    place, _, name = table.rpartition("/")
    columns: list[str] = []
    for number, fields in tables.rows(Folder(place or "."), name, range(1, 100), catalogue):
        if not columns:
            columns = _columns([field.lower() for field in fields], table)
        elif len(fields) != len(columns):
            catalogue.note(
                "bad_row",
                f"{table}:{number}",
                "annotations",
                f"{table}, row {number}: {len(fields)} fields, the header has {len(columns)}",
            )
        else:
            yield number, dict(zip(columns, fields))


def _parquet_rows(table: str) -> Iterator[tuple[int, dict[str, str]]]:
    import pyarrow.parquet

    place, _, name = table.rpartition("/")
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(tables.read(Folder(place or "."), name)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{table} is no Parquet file: {error}") from error
    columns = _columns(rows.column_names, table)
    for number, row in enumerate(rows.to_pylist(), 1):
        yield number, dict(zip(columns, map(_text, row.values())))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return SEPARATORS[0].join(map(str, value))
    return "" if value is None else str(value)


def _columns(names: list[str], table: str) -> list[str]:
    renamed = [
        "path" if name in ("file", "filename") else "label" if name in ("labels", "class") else name for name in names
    ]
    if "path" not in renamed:
        raise UserError(
            f"{table} has the columns {', '.join(names)}; it needs `path`, and may have {', '.join(COLUMNS[1:])}"
        )
    return renamed
