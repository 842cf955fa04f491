"""What is embedded: the clips of a prepared set, of a folder of media, or of a list of files, by their index.

An input is pickled and read in worker processes. It knows nothing of the model but the sizes in `Shape`.
"""

import abc
import collections
import dataclasses
import hashlib
import io
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import soundfile

from av_mae import preprocess
from av_mae.config import DataConfig, SoundConfig
from av_mae.console import note
from av_mae.data.copies import folder_of
from av_mae.data.loading import FIELDS, ClipLoader
from av_mae.data.plans import MIDDLE
from av_mae.errors import ClipFailure, UserError, one_line, stage
from av_mae.media import MEDIA, ending
from av_mae.storage import Folder, is_url

COLUMNS = ("path", "start", "end", "label", "id")


class Entry(NamedTuple):
    """A file, or the part of it from `start` to `end` seconds ; `None` means its beginning, its end."""

    path: str
    id: str
    start: float | None = None
    end: float | None = None
    label: int | str | None = None


def list_folder(folder: str) -> list[Entry]:
    """All media files in a folder and below it, in the order of their names; the id is the path below it.

    Links are followed, but no folder is entered twice; hidden files and folders are left out. Raises UserError where
    there are no media.
    """
    found = [name for name in Folder(os.path.abspath(folder)).files() if ending(name) in MEDIA]
    if not found:
        raise UserError(
            f"--data={folder} holds no media: no file below it ends in {', '.join(sorted(MEDIA))}; a "
            "list of files (csv or parquet) takes any name"
        )
    return [Entry(os.path.join(folder, name), readable(name)) for name in found]


def readable(name: str) -> str:
    """A file's name as UTF-8 whatever the locale; bytes that are no UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
        if start is not None and end is not None and end <= start:
            raise UserError(
                f"--data={path}: row {row + 1} ends at {end:g} s, but must end after its start, {start:g} s"
            )
        unique = f"{name}#{start:g}" if times[name] > 1 and start is not None else str(name)
        known = cells["id"][row]
        entries.append(
            Entry(os.path.join(folder, str(name)), unique if known is None else str(known), start, end, labels[row])
        )
    twice = [name for name, number in collections.Counter(entry.id for entry in entries).items() if number > 1]
    if twice:
        note(f"warning: --data={path} has {len(twice)} ids more than once: {one_line(', '.join(map(repr, twice[:5])))}")
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

            table = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ","),
                convert_options=csv.ConvertOptions(
                    column_types={"path": pyarrow.string(), "id": pyarrow.string(), "label": pyarrow.string()}
                ),
            )
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
    texts = [
        None if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)
        for value in values
    ]
    try:
        return "int64", [None if text is None else int(text) for text in texts]
    except ValueError:
        return "string", [*texts]


def _seconds(path: str, row: int, column: str, value: Any) -> float | None:
    try:
        seconds = None if value is None else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if seconds is not None and not 0 <= seconds < math.inf:
        raise UserError(f"--data={path}: row {row + 1} has {column}={value!r}, which must be 0 or more seconds")
    return seconds


MISSING_FILE = "there is no such file"


class Row(NamedTuple):
    """What a table says of a window beside its embeddings.

    position: the clip's number in the input. start: of the window, in seconds. failure: why the clip cannot be read.
    """

    position: int
    id: str
    path: str
    start: float
    label: int | str | None
    has_image: bool = True
    has_audio: bool = True
    failure: ClipFailure | None = None


class Window(NamedTuple):
    """One window of a clip: image uint8 [H, W, 3] and audio float32 [mels, frames], zeros where the clip failed."""

    row: Row
    image: np.ndarray
    audio: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shape:
    """What windows are cut to, and which: one in the middle of a clip, or (`stride`) one every so many seconds.

    missing: 'error', or 'zeros' for what has no audio or no image.
    """

    image: tuple[int, int]
    audio: tuple[int, int]
    sound: SoundConfig
    stride: float | None = None
    missing: str = "error"

    @property
    def seconds(self) -> float:
        """The length of a window."""
        return self.audio[1] * self.sound.hop / self.sound.rate

    def starts(self, begin: float, end: float) -> list[float]:
        """Starts of the windows of a clip from `begin` to `end`: at least one, the others wholly inside."""
        stride = self.stride or math.inf
        count = 1 + max(0, int((end - begin - self.seconds + 1e-6) // stride))
        return [begin + (number and number * stride) for number in range(count)]


class Input(abc.ABC):
    """Clips by position. label: the type of labels ('int64', 'string') or None; classes: their names, if known."""

    label: str | None = None
    classes: tuple[str, ...] = ()

    def __init__(self, shape: Shape):
        self.shape = shape

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many clips there are."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A checksum of which clips there are, in which order."""

    @abc.abstractmethod
    def find(self, position: int) -> tuple[Row, Any]:
        """What is known of a clip before its media are decoded, and what `read` takes. Raises ClipFailure."""

    @abc.abstractmethod
    def read(self, row: Row, clip: Any) -> list[Window]:
        """The windows of a clip. Raises ClipFailure."""

    def window(self, position: int, start: float) -> Window:
        """The window of a clip that begins at `start` seconds, or nearest to it. Raises ClipFailure."""
        return min(self.read(*self.find(position)), key=lambda window: abs(window.row.start - start))

    def windows(self, position: int) -> list[Window]:
        """The windows of a clip; of one that cannot be read a single one with the reason."""
        row = Row(position, f"[{position}]", "", 0.0, None)
        try:
            row, clip = self.find(position)
            return self.read(row, clip)
        except ClipFailure as failure:
            image, audio = np.zeros((*self.shape.image, 3), np.uint8), np.zeros(self.shape.audio, np.float32)
            return [Window(row._replace(failure=failure.named(row.id), has_image=False, has_audio=False), image, audio)]


class PreparedInput(Input):
    """The clips of one split of a prepared set, in stored order, read as evaluation reads them."""

    label = "int64"

    def __init__(self, path: str, split: str, shape: Shape):
        super().__init__(shape)
        from av_mae.data import records  # brings in TFDS

        self.path, self.classes = path, tuple(records.class_names(path))
        self._records = records.open_source(path, split, FIELDS)
        self._split, self._length = split, len(self._records)
        data = DataConfig(path=path, split=split, sound=shape.sound)
        self._loader = ClipLoader(data, shape.image, shape.audio, augment=False)

    def __len__(self) -> int:
        return self._length

    def fingerprint(self) -> str:
        described = (folder_of(self.path) / "dataset_info.json").read_bytes()
        return hashlib.sha256(described + self._split.encode()).hexdigest()

    def find(self, position: int) -> tuple[Row, dict[str, Any]]:
        with stage("read"):
            record = self._records[position]
        label = int(record["label"])
        return Row(position, record["id"], self.path, 0.0, label if label >= 0 else None), record

    def read(self, row: Row, clip: dict[str, Any]) -> list[Window]:
        return [self._window(row, clip, where) for where in self._window_positions(clip["sound"])]

    def _window_positions(self, audio: bytes) -> list[float]:
        """Where the windows lie among all that the audio holds: 0 is the first, 1 the last."""
        if self.shape.stride is None:
            return [0.5]
        with stage("sound"):
            try:
                spare = soundfile.info(io.BytesIO(audio)).duration - self.shape.seconds
            except soundfile.LibsndfileError as error:  # its own text holds an address
                raise ValueError(error.error_string) from error
        starts = self.shape.starts(0.0, spare + self.shape.seconds)
        return [start / spare if spare > 0 else 0.0 for start in starts]

    def _window(self, row: Row, record: dict[str, Any], where: float) -> Window:
        view = MIDDLE | {"window": where}
        clip = self._loader.random_map(record | {"view": view}, np.random.default_rng(0))
        if clip["stage"]:
            raise ClipFailure("", clip["stage"], clip["cause"])
        return Window(row._replace(start=float(clip["start"])), clip["image"], clip["audio"])


class MediaInput(Input):
    """Media files, or parts of them, read as `preprocess.load` reads them."""

    def __init__(self, entries: list[Entry], label: str | None, shape: Shape):
        super().__init__(shape)
        self._entries, self.label = entries, label

    def __len__(self) -> int:
        return len(self._entries)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(repr(tuple(entry)).encode())
        return digest.hexdigest()

    def find(self, position: int) -> tuple[Row, Entry]:
        entry = self._entries[position]
        return Row(position, entry.id, readable(entry.path), entry.start or 0.0, entry.label), entry

    def read(self, row: Row, clip: Entry) -> list[Window]:
        if not os.path.isfile(clip.path):
            raise ClipFailure("", "open", MISSING_FILE)
        try:
            return [self._window(row, clip, start) for start in self._starts(clip)]
        except UserError as error:
            if isinstance(error.__cause__, ClipFailure):
                raise error.__cause__ from None
            raise

    def _starts(self, entry: Entry) -> list[float | None]:
        """Where the windows of an entry begin (`None`: in its middle, which reading finds)."""
        begin, end, shape = entry.start, entry.end, self.shape
        if shape.stride is None:
            return [begin if begin is None or end is None else begin + max(0.0, (end - begin - shape.seconds) / 2)]
        if end is None:
            first, end = preprocess.span(entry.path)
            begin = first if begin is None else begin
        return [*shape.starts(begin or 0.0, end)]

    def _window(self, row: Row, entry: Entry, start: float | None) -> Window:
        shape = self.shape
        clip = preprocess.load(
            entry.path,
            start,
            shape.seconds,
            sound=shape.sound,
            image_size=shape.image,
            missing=shape.missing,
            end=entry.end,
        )
        row = row._replace(
            start=float(clip["start"][0]), has_image=bool(clip["has_image"][0]), has_audio=bool(clip["has_audio"][0])
        )
        return Window(row, clip["image"][0], clip["audio"][0])


def split_of(data: str) -> tuple[str, str]:
    """The path of `DIR:split` and the split, '' where there is none."""
    path, _, split = data.rpartition(":")
    return (data, "") if not path or split.startswith("//") or os.path.exists(data) else (path, split)


def open_input(data: str, shape: Shape) -> Input:
    """The clips that `data` names.

    That is a prepared set (DIR[:split], split train if none is given; one on a store must have been copied, see
    `copy_set`), a folder of media, or a csv, tsv or parquet list of files.

    Raises:
      UserError: there is nothing of that name, no media in the folder, or the list cannot be read.
    """
    path, split = split_of(data)
    if is_url(path):
        return PreparedInput(path, split or "train", shape)
    if os.path.isfile(path):
        return MediaInput(*read_list(path), shape)
    if not os.path.isdir(path):
        raise UserError(
            f"--data={data}: there is no such folder or file; name a prepared set (DIR[:split]), a folder "
            "of media, or a csv or parquet list of files"
        )
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        return PreparedInput(path, split or "train", shape)
    if split:
        raise UserError(f"--data={data}: {path} is no prepared set, so it has no split {split!r}")
    return MediaInput(list_folder(path), None, shape)
