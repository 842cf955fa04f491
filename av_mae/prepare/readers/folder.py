"""Sets whose clips are all media files of a tree.

`folder`: any tree. Labels are the folders that hold the files, or columns of a csv or Parquet table.

`grid`, spoken sentences of six words, which the names of the files spell: videos of any ending in folders s1 … s34 (at
any depth) or in none. A name such as brbk7n is 'bin red by k seven now'.
"""

import collections
import dataclasses
import hashlib
import io
import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from av_mae.errors import UserError, one_line
from av_mae.media import MEDIA, SOUNDS, MediaFiles, ending, stem
from av_mae.prepare.readers import catalogue as tables
from av_mae.prepare.readers.catalogue import SPLITS, Catalogue, SourceClip, check_id, split_name
from av_mae.storage import Folder

DESCRIPTION = "A folder of media files."
LICENCE = "That of the media files, which av_mae does not know."
GRID = "GRID (Cooke et al., JASA 2006): 34 speakers read sentences of six words to a camera."
GRID_LICENCE = "CC BY 4.0"
OTHER_ENDINGS = frozenset(
    """txt csv tsv json jsonl xml html htm md pdf parquet npy npz pkl pt pth h5 hdf5 yaml yml log srt vtt ass lab align
    ini jpg jpeg png bmp gif webp tif tiff db zip tar gz tgz bz2 xz rar 7z py sh nfo sha256 md5 textgrid""".split()
)
COLUMNS = ("path", "id", "label", "split", "start", "end")
SPLIT_LIKE = re.compile(rf"({'|'.join(sorted(SPLITS, reverse=True))})(?:[\W_\d]|$)")  # train_videos, test1, dev-clean
SEPARATORS = ";|"  # between several labels of a clip
WORDS = (
    ("command", {"b": "bin", "l": "lay", "p": "place", "s": "set"}),
    ("colour", {"b": "blue", "g": "green", "r": "red", "w": "white"}),
    ("preposition", {"a": "at", "b": "by", "i": "in", "w": "with"}),
    ("letter", {letter: letter for letter in "abcdefghijklmnopqrstuvxyz"}),
    ("digit", dict(zip("z123456789", "zero one two three four five six seven eight nine".split()))),
    ("adverb", {"a": "again", "n": "now", "p": "please", "s": "soon"}),
)
CLASSES = tuple(f"{kind} {word}" for kind, words in WORDS for word in words.values())
HELD_OUT = ("s1", "s2", "s20", "s22")  # speakers for testing, as in LipNet (Assael et al., 2016)


def read(folder: Folder, table: str | None = None) -> Catalogue:
    """Every media file of a tree, or the rows of a table.

    Folders `train`, `validation`, `test` at the tree's top are splits, the folder that holds a file is its label.

    Args:
        folder: the tree.
        table: a csv or Parquet file, beside the tree or in it, whose rows are the clips: `path` (relative), and where
            known `id`, `label` (several: a;b), `split`, `start` and `end` (s).

    Raises:
        UserError: where no media file is there, or folders that look like splits lie below others.
    """
    if table is not None:
        return _from_table(folder, table)
    catalogue, files = Catalogue(), folder.files()
    names = [name for name in files if ending(name) in MEDIA]
    if not names:
        raise UserError(f"{folder} holds no media file (known endings: {', '.join(sorted(MEDIA))})")
    _note_others(catalogue, files)
    splits, inner = _splits(folder, names)
    for name in names:
        if name not in splits:
            known = ", ".join(sorted(set(splits.values())))
            catalogue.note("no_split", name, "files", f"{name} lies in none of the folders of the splits {known}")
    names = list(splits)
    labels = {name: inner[name].rpartition("/")[0] for name in names}
    numbers, ids = catalogue.set_classes(set(labels.values()) - {""}), _ids(names)
    catalogue.clips = [
        SourceClip(
            ids[name], splits[name], name, source=ids[name], labels=(numbers[labels[name]],) if labels[name] else ()
        )
        for name in names
    ]
    return catalogue


def _note_others(catalogue: Catalogue, files: Sequence[str]) -> None:
    """A finding for each ending that is of no media file, unless it is known to be of something else."""
    others: dict[str, list[str]] = collections.defaultdict(list)
    for name in files:
        if ending(name) not in MEDIA | OTHER_ENDINGS:
            others[f".{ending(name)}" if ending(name) else "without ending"].append(name)
    for kind, names in sorted(others.items()):
        message = f"{len(names)} files are left out, e.g. {names[0]}: rename them to a known ending if they are media"
        catalogue.note("not_media", kind, "files", message)


def _splits(folder: Folder, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The split of each file, and its path within the split. A file that is in no split where others are has none.

    A top folder `train` that holds files alone, beside others, is a class (there are sounds of trains).
    """
    below = os.path.commonpath([name.rpartition("/")[0] for name in names])
    for root in dict.fromkeys(("", f"{below}/" if below else "")):
        parts = {name: name.removeprefix(root).split("/") for name in names}
        tops = {own[0].lower() for own in parts.values() if len(own) > 1}
        nested = any(own[0].lower() in SPLITS for own in parts.values() if len(own) > 2)
        named = {SPLITS[top] for top in tops & SPLITS.keys()}
        if named and (tops <= SPLITS.keys() or nested or named != {"train"}):
            inside = {name: own for name, own in parts.items() if len(own) > 1 and own[0].lower() in SPLITS}
            return (
                {name: SPLITS[own[0].lower()] for name, own in inside.items()},
                {name: "/".join(own[1:]) for name, own in inside.items()},
            )
    alike = {part: found[1] for part in tops if (found := re.match(SPLIT_LIKE, part))}
    if len({SPLITS[split] for split in alike.values()}) > 1:
        raise UserError(
            f"{folder} has folders called {', '.join(sorted(alike))}: call them train, validation and test if they are "
            "splits, or give the splits in a --table"
        )
    deeper = {part.lower() for name in names for part in name.split("/")[:-1]} & SPLITS.keys()
    if len({SPLITS[part] for part in deeper}) > 1:
        raise UserError(
            f"{folder} has folders called {', '.join(sorted(deeper))} below others: name the folder that holds them as "
            "--source, or give the splits in a --table"
        )
    return dict.fromkeys(names, "train"), {name: name for name in names}


def _ids(names: Sequence[str]) -> dict[str, str]:
    """'a/b.mp4' → 'a-b'; files that share all but the ending keep it, those that still share it get a digest."""
    ids = {name: "-".join([*name.split("/")[:-1], stem(name)]) for name in names}
    ids |= {name: name.replace("/", "-") for name in _shared(ids)}
    digests = {name: hashlib.sha256(os.fsencode(name)).hexdigest()[:8] for name in _shared(ids)}
    return ids | {name: f"{ids[name]}-{digest}" for name, digest in digests.items()}


def _shared(ids: Mapping[str, str]) -> list[str]:
    """The names whose ids others have, too, or ids that look the same."""
    looks = {name: unicodedata.normalize("NFC", id) for name, id in ids.items()}
    count = collections.Counter(looks.values())
    return [name for name, look in looks.items() if count[look] > 1]


def _from_table(folder: Folder, table: str) -> Catalogue:
    catalogue, there = Catalogue(), frozenset(folder.files())
    files = MediaFiles(there)
    read_rows = list(_parquet_rows(table) if table.endswith(".parquet") else _csv_rows(table, catalogue, there))
    numbers = catalogue.set_classes(label for _, row in read_rows for label in _labels(row))
    unnamed = set()
    for number, row in read_rows:
        with catalogue.row(table, number):
            clip = _clip(row, numbers, there)
            media = clip.media if clip.media in there else files.at(clip.media)
            if media is None:
                catalogue.note("missing", clip.id, "files", f"{table}, row {number}: no file {clip.media}", clip.split)
                continue
            catalogue.clips.append(dataclasses.replace(clip, media=media))
            if not row.get("id"):
                unnamed.add(len(catalogue.clips) - 1)
    _separate(catalogue.clips, unnamed)
    return catalogue


def _separate(clips: list[SourceClip], unnamed: set[int]) -> None:
    """Gives the `unnamed` clips ids of their own.

    Parts that begin together get their end, files that share an id another (see `_ids`), what is left a number. Equal
    rows stay equal.
    """
    ids = _ids(sorted({clips[index].source for index in unnamed}))
    shared = collections.Counter(unicodedata.normalize("NFC", clip.id) for clip in clips)
    taken: dict[str, list[SourceClip]] = collections.defaultdict(list)
    for index in sorted(unnamed):
        clip = clips[index]
        if shared[unicodedata.normalize("NFC", clip.id)] == 1:
            continue
        begin = f"_{clip.start:.10g}" if clip.start or clip.end is not None else ""
        name = ids[clip.source] + begin + ("" if clip.end is None else f"_{clip.end:.10g}")
        if clip not in taken[name]:
            taken[name].append(clip)
        number = taken[name].index(clip)
        clips[index] = dataclasses.replace(clip, id=f"{name}_{number + 1}" if number else name)


def _labels(row: Mapping[str, Any]) -> list[str]:
    labels = row.get("label", "")
    names = re.split(f"[{SEPARATORS}]", labels) if isinstance(labels, str) else labels
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def _clip(row: Mapping[str, Any], numbers: Mapping[str, int], there: Collection[str]) -> SourceClip:
    path = row["path"] if row["path"] in there else row["path"].replace("\\", "/").removeprefix("./")
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"path {row['path']!r} must be a file below the source folder")
    start = tables.number(row["start"], "start") if row.get("start") else 0.0
    end = tables.number(row["end"], "end") if row.get("end") else None
    if end is not None and end <= start:
        raise ValueError(f"end {end:g} must be after start {start:g}")
    name = row.get("id") or _ids([path])[path] + (f"_{start:.10g}" if start or end is not None else "")
    check_id(name)
    return SourceClip(
        name,
        split_name(row["split"]) if row.get("split") else "train",
        path,
        start=start,
        end=end,
        labels=tuple(dict.fromkeys(numbers[label] for label in _labels(row))),
        source=path,
        source_start=start,
    )


def _csv_rows(table: str, catalogue: Catalogue, there: frozenset[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    below, _, name = table.rpartition("/")
    columns: list[str] = []
    for number, fields in tables.rows(Folder(below or "."), name, range(1, 100), catalogue, files=there):
        if not columns:
            columns = _columns(fields, table)
        else:
            with catalogue.row(table, number):
                if len(fields) != len(columns):
                    raise ValueError(f"{len(fields)} fields, the header has {len(columns)}")
                row = zip(columns, fields)
                yield number, {name: value if name == "path" else value.strip() for name, value in row}


def _parquet_rows(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    below, _, name = table.rpartition("/")
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(tables.read(Folder(below or "."), name)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{table} is no Parquet file: {error}") from error
    columns = _columns(rows.column_names, table)
    for number, row in enumerate(rows.to_pylist(), 1):
        yield number, dict(zip(columns, map(_text, row.values())))


def _text(value: Any) -> Any:
    """A value of a Parquet file as a csv file has it; a list stays one, since its items may hold SEPARATORS."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, bytes):
        return os.fsdecode(value)
    return "" if value is None or value != value else str(value)  # nan is what pandas writes for nothing


def _columns(names: list[str], table: str) -> list[str]:
    """What each column is; those that no clip needs keep their names, and are named once."""
    plain = [name.strip().lower() for name in names]
    renamed = [
        "path" if name in ("file", "filename") else "label" if name in ("labels", "class") else name for name in plain
    ]
    if "path" not in renamed:
        raise UserError(
            f"{table} has the columns {', '.join(names)}; it needs `path`, and may have {', '.join(COLUMNS[1:])}"
        )
    for column in COLUMNS:
        alike = [name for name, kind in zip(names, renamed) if kind == column]
        if len(alike) > 1:
            raise UserError(f"{table} has several columns for `{column}` ({', '.join(alike)}): leave one")
    unused = [name for name, kind in zip(names, renamed) if kind not in COLUMNS]
    if unused:
        print(one_line(f"{table}: not used are the columns {', '.join(unused)}"), file=sys.stderr)
    return renamed


def read_grid(folder: Folder) -> Catalogue:
    """One label per word, in the order of the sentence. Split `test` holds the speakers HELD_OUT, `train` all else."""
    catalogue, numbers = Catalogue(CLASSES), {name: number for number, name in enumerate(CLASSES)}
    names = [name for name in folder.files() if ending(name) in MEDIA - SOUNDS]
    if not names:
        raise UserError(f"{folder} holds no video")
    for name in names:
        speaker = next((part for part in name.lower().split("/")[:-1] if re.fullmatch(r"s\d+", part)), "")
        sentence = stem(name).lower()
        words = [words.get(letter) for (_, words), letter in zip(WORDS, sentence)]
        clip = f"{speaker}_{sentence}" if speaker else sentence
        if len(sentence) != len(WORDS) or None in words:
            catalogue.note("bad_row", clip, "annotations", f"{name}: {sentence!r} spells no sentence of GRID")
            continue
        labels = tuple(numbers[f"{kind} {word}"] for (kind, _), word in zip(WORDS, words))
        catalogue.clips.append(
            SourceClip(clip, "test" if speaker in HELD_OUT else "train", name, labels=labels, source=clip)
        )
    return catalogue
