"""Annotation tables as users have them: with or without header, quoted or not, with bad rows among good ones."""

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from av_mae.errors import UserError
from av_mae.storage import Folder

# Why a clip is not in the prepared set, or what is odd about it. The order is that of the report.
CAUSES = {
    "bad_row": "a row of an annotation file breaks a rule",
    "bad_id": "an id that cannot name a clip",
    "duplicate_id": "the id of a clip that came before",
    "missing": "annotated, but there is no such file",
    "undecodable": "the file cannot be decoded",
    "no_sound": "the file has no sound",
    "no_picture": "the file has no picture",
    "too_short": "shorter than --shortest",
    "silence": "the sound never rises above -60 dB of full scale",
    "black": "every frame is black",
    "still": "the picture never changes",
    "no_label": "the set has classes, the clip has none",
    "duplicate_content": "the same frames and sound as a clip that came before",
}
# With these, no record is stored whatever the options say.
NEVER_STORED = ("bad_row", "bad_id", "duplicate_id", "missing", "undecodable")
# What is seen when a clip is decoded, and may leave it out (--skip).
SKIPPABLE = ("no_sound", "no_picture", "too_short", "silence", "black", "still")

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
}
LONGEST_ID = 200


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the report tells about a clip (or a row). `stage`: annotations, files, open, frame, sound, …"""

    cause: str
    clip: str
    stage: str
    message: str
    split: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class SourceClip:
    """One clip as the data set describes it; files are named relative to the source folder.

    media: a file with picture and sound, or, with `images`, the sound of those pictures, which are shown at
    `image_times` (s; empty: all of them in the middle of the sound). start, end: the part of `media` (s). source and
    source_start: the recording the clip was cut from, and where. boxes: (ymin, xmin, ymax, xmax) in 0…1 in the clip's
    middle frame, with the annotator of each; annotators: how many there were. masks: picture files, for the frames
    `mask_frames`. mixed_with: the clip whose sound is added to this one's (a test pair of separation).
    """

    id: str
    split: str
    media: str
    images: tuple[str, ...] = ()
    image_times: tuple[float, ...] = ()
    start: float = 0.0
    end: float | None = None
    labels: tuple[int, ...] = ()
    source: str = ""
    source_start: float = 0.0
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    box_annotators: tuple[int, ...] = ()
    annotators: int = 0
    masks: tuple[str, ...] = ()
    mask_frames: tuple[int, ...] = ()
    mask_reader: str = ""
    mixed_with: "SourceClip | None" = None

    def files(self) -> tuple[str, ...]:
        """Every file that the clip is made of."""
        others = self.mixed_with.files() if self.mixed_with else ()
        return (self.media, *self.images, *self.masks, *others)


@dataclasses.dataclass
class Catalogue:
    """A data set as its annotations and files describe it. `classes` by number; `findings` in no order."""

    classes: tuple[str, ...] = ()
    clips: list[SourceClip] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def note(self, cause: str, clip: str, stage: str, message: str, split: str = "") -> None:
        self.findings.append(Finding(cause, clip, stage, message, split))


def check_id(name: str) -> None:
    """Raises ValueError where a name cannot be a clip's id."""
    if not name or name != name.strip():
        raise ValueError(f"id {name!r} is empty or begins or ends with a space")
    if re.search(r"[/\\\x00-\x1f]", name) or name in (".", ".."):
        raise ValueError(f"id {name!r} holds a path separator or a control character")
    if not name.isprintable():  # so are bytes of a file name that are not UTF-8
        raise ValueError(f"id {name!r} holds what cannot be printed")
    if len(name) > LONGEST_ID:
        raise ValueError(f"id {name[:20]!r}… has {len(name)} characters, at most {LONGEST_ID} are allowed")


def split_name(name: str) -> str:
    """'val' → 'validation' and so on. Raises ValueError for a name that is no split."""
    known = SPLITS.get(name.strip().lower())
    if known is None:
        raise ValueError(f"split {name!r} must be one of {', '.join(SPLITS)}")
    return known


def checked(catalogue: Catalogue, splits: Iterable[str] = ()) -> Catalogue:
    """The catalogue with each id once, in the order of ids, and only of the `splits` named (none: all).

    Raises UserError where a split is not there, or no clip is left.
    """
    known = sorted({clip.split for clip in catalogue.clips})
    unknown = sorted(set(splits) - set(known))
    if unknown:
        raise UserError(f"--splits={','.join(splits)}: the data set has no {unknown[0]!r}; it has {', '.join(known)}")
    kept: dict[str, SourceClip] = {}
    findings = list(catalogue.findings)
    for clip in sorted(catalogue.clips, key=lambda clip: clip.id):  # stable: of the same id, the first stays
        try:
            check_id(clip.id)
        except ValueError as error:
            findings.append(Finding("bad_id", repr(clip.id)[1:-1], "annotations", str(error), clip.split))
            continue
        if clip.id in kept:
            message = f"{clip.media} ({clip.split}); {kept[clip.id].media} ({kept[clip.id].split}) is kept"
            findings.append(Finding("duplicate_id", clip.id, "annotations", message, clip.split))
        else:
            kept[clip.id] = clip
    clips = [clip for clip in kept.values() if not splits or clip.split in splits]
    if not clips:
        first = f": {findings[0].message}" if findings else ""
        raise UserError(f"no clip was found in --source{first} ({len(findings)} findings)")
    findings.sort(key=lambda finding: (list(CAUSES).index(finding.cause), finding.clip, finding.message))
    return Catalogue(catalogue.classes, clips, findings)


_WIDE_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def find(folder: Folder, *names: str, needed: bool = True) -> str | None:
    """The first of the files `names` that is there, in the folder or its `annotations`, `anno` or `metadata`.

    Raises UserError where none is there and one is `needed`.
    """
    for name in names:
        for place in ("annotations/", "", "anno/", "metadata/"):
            if folder.exists(place + name):
                return place + name
    if needed:
        raise UserError(f"{folder} holds none of {', '.join(names)} (nor do its folders annotations, anno, metadata)")
    return None


def rows(
    folder: Folder, name: str, width: int | range, catalogue: Catalogue, header: Sequence[str] = (), skip: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file with their numbers, fields stripped; `#` lines, empty lines and the header left out.

    width: how many fields a row may have. header: what the first field of a header may be called. skip: lines to leave
    out at the top. A row that cannot be read is noted in the catalogue. Raises UserError where no row can be read.
    """
    widths = range(width, width + 1) if isinstance(width, int) else width
    content = read(folder, name)
    if content[:2] in _WIDE_ENCODINGS:
        raise UserError(f"{folder.path(name)} is encoded as {_WIDE_ENCODINGS[content[:2]]}; save it as UTF-8")
    good = bad = 0
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if number <= skip or not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            fields = _fields(line)
            if number == 1 + skip and fields[0].lower() in header:
                continue
            if len(fields) not in widths:
                raise ValueError(f"{len(fields)} fields, expected {_range(widths)}")
        except ValueError as error:
            bad += 1
            catalogue.note("bad_row", f"{name}:{number}", "annotations", f"{name}, row {number}: {error}")
            continue
        good += 1
        yield number, fields
    if not good and bad:
        raise UserError(f"{folder.path(name)}: {catalogue.findings[-1].message}; none of its {bad} rows can be read")


def guarded(catalogue: Catalogue, name: str, number: int, make: Callable[[], None]) -> None:
    """Runs `make` for a row; a ValueError becomes a bad row of the catalogue."""
    try:
        make()
    except ValueError as error:
        catalogue.note("bad_row", f"{name}:{number}", "annotations", f"{name}, row {number}: {error}")


def read(folder: Folder, name: str) -> bytes:
    try:
        return folder.read(name)
    except OSError as error:
        raise UserError(f"{folder.path(name)} cannot be read: {error.strerror or error}") from error


def read_json(folder: Folder, name: str, kind: type | tuple[type, ...]) -> Any:
    """A JSON file whose top is of a type. Raises UserError."""
    try:
        value = json.loads(read(folder, name).decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{folder.path(name)} is no UTF-8 JSON file: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{folder.path(name)} holds a {type(value).__name__} at its top; this is not the file expected")
    return value


def number(text: str, name: str) -> float:
    """Raises ValueError for what is not a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is no number") from None
    if not 0 <= value < 1e9:
        raise ValueError(f"{name} {text!r} must be 0 or more")
    return value


def _fields(line: bytes) -> list[str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8") from None
    try:
        return [field.strip() for field in next(csv.reader([text], skipinitialspace=True, strict=True))]
    except (csv.Error, StopIteration) as error:
        raise ValueError(f"cannot be split at commas: {error}") from None


def _range(widths: range) -> str:
    return str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
