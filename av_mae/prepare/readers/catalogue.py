"""What readers of data sets give (classes, clips, findings), and annotation tables as users have them: with or without
header, quoted or not, with bad rows among good ones."""

import contextlib
import csv
import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from av_mae.errors import UserError
from av_mae.storage import Folder

# Why a clip is not in the prepared set, or what is odd about it. The order is that of the report.
CAUSES = {
    "bad_row": "a row of an annotation file breaks a rule",
    "bad_id": "an id that cannot name a clip",
    "duplicate_id": "the id of a clip that came before",
    "missing": "annotated, but there is no such file",
    "no_split": "outside of the folders that are splits",
    "not_media": "files whose ending is that of no media file",
    "undecodable": "the file cannot be decoded",
    "no_sound": "the file has no audio",
    "no_picture": "the file has no frames",
    "too_short": "shorter than --shortest",
    "too_long": "the file is longer than the part that is annotated, which alone is taken",
    "ends_early": "the file lacks the end of the annotated part, or its picture or sound is far shorter than it",
    "damaged": "its end or something in it is lost or marked as damaged, or its times jump; what there is is taken",
    "clipped": "the audio is far beyond full scale, and is cut off there",
    "silence": "the audio never rises above -60 dB of full scale",
    "black": "every frame is black",
    "still": "the frame never changes",
    "no_label": "the set has classes, the clip has none",
    "duplicate_content": "the same frames and audio as a clip that came before",
}
# With these, no record is stored whatever the options say.
NEVER_STORED = ("bad_row", "bad_id", "duplicate_id", "missing", "no_split", "not_media", "undecodable")
# What is seen when a clip is decoded, and may leave it out (--skip).
SKIPPABLE = ("no_sound", "no_picture", "too_short", "ends_early", "damaged", "clipped", "silence", "black", "still")

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
LONGEST_ID = 200
_FIELD = re.compile(r'(?:^|,)( *"(?:[^"]|"")*"|[^,]*)')  # of a line of a csv file, with its quotes and spaces
_WIDE_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_Kind = TypeVar("_Kind")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the report tells about a clip (or a row of annotations).

    Args:
        cause: one of CAUSES.
        clip: the clip's id; the file and number of a row that gives no clip.
        stage: where it was found: annotations, files, open, frame, sound, mask, decode, content.
        message: what exactly is wrong or odd.
        split: the clip's split, '' where it is unknown.
    """

    cause: str
    clip: str
    stage: str
    message: str
    split: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class SourceClip:
    """One clip as the data set describes it; files are named relative to the source folder.

    Args:
        id: the clip's name, once in a set.
        split: train, validation, test or another.
        media: a file with frames and audio; with `images`, the audio of those.
        images: image files that are the clip's frames, in place of those of `media`.
        image_times: seconds at which the images are shown; empty: all of them in the middle of the audio.
        start: seconds in `media` at which the clip begins.
        end: seconds in `media` at which the clip ends; `None` at the end of the file.
        labels: numbers of classes.
        source: the recording that the clip was cut from.
        source_start: seconds in the recording at which the clip begins.
        part: seconds of begin and length that the annotations give the clip in `media`, if `media` is longer than that.
        boxes: (ymin, xmin, ymax, xmax) in 0…1 in the clip's middle frame.
        box_annotators: the number of each box's annotator.
        annotators: how many people looked at the clip.
        masks: image files with the mask of each of `mask_frames`.
        mask_frames: positions in the frames.
        mask_reader: how the masks are written (see masks.read_mask).
        mask_classes: how many classes the masks tell apart, where they do.
        mixed_with: the clip whose audio is added to this one's (a test pair of separation).
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
    part: tuple[float, float] | None = dataclasses.field(default=None, repr=False)
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    box_annotators: tuple[int, ...] = ()
    annotators: int = 0
    masks: tuple[str, ...] = ()
    mask_frames: tuple[int, ...] = ()
    mask_reader: str = ""
    mask_classes: int = dataclasses.field(default=0, repr=False)
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

    def set_classes(self, names: Iterable[str]) -> dict[str, int]:
        """Makes the sorted different `names` the classes, however their accents are encoded; the number of each."""
        spelled = {name: unicodedata.normalize("NFC", name) for name in names}
        self.classes = tuple(sorted(set(spelled.values())))
        numbers = {name: number for number, name in enumerate(self.classes)}
        return {name: numbers[one] for name, one in spelled.items()}

    @contextlib.contextmanager
    def row(self, name: str, number: int) -> Iterator[None]:
        """What is wrong with row `number` of the file `name` becomes a finding, and the row is left out."""
        try:
            yield
        except (ValueError, TypeError, AttributeError) as error:  # JSON may hold any type in any place
            self.note("bad_row", f"{name}:{number}", "annotations", f"{name}, row {number}: {error}")


# Control characters, what ends a line, and bytes of a file name that are not UTF-8. Spaces of any script, joiners of
# letters and of emoji and characters newer than Python's tables are none of these, though not `str.isprintable`.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_id(name: str) -> None:
    """Raises ValueError where a name cannot be a clip's id."""
    if not name.strip():
        raise ValueError(f"id {name!r} is empty")
    if re.search(r"[/\\\x00-\x1f]", name) or name in (".", ".."):
        raise ValueError(f"id {name!r} holds a path separator or a control character")
    if _UNPRINTABLE.search(name):
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
        same = unicodedata.normalize("NFC", clip.id)  # ids that look the same are
        if same in kept:
            message = f"{clip.media} ({clip.split}); {kept[same].media} ({kept[same].split}) is kept"
            findings.append(Finding("duplicate_id", clip.id, "annotations", message, clip.split))
        else:
            kept[same] = clip
    clips = [clip for clip in kept.values() if not splits or clip.split in splits]
    if not clips:
        first = f": {findings[0].message}" if findings else ""
        raise UserError(f"no clip was found in --source{first} ({len(findings)} findings)")
    findings.sort(key=lambda finding: (list(CAUSES).index(finding.cause), finding.clip, finding.message))
    return Catalogue(catalogue.classes, clips, findings)


def find(folder: Folder, *names: str) -> str | None:
    """The first of the files `names` that is there, in the folder or its `annotations`, `anno` or `metadata`; `None`
    where none is."""
    paths = (below + name for name in names for below in ("annotations/", "", "anno/", "metadata/"))
    return next((path for path in paths if folder.exists(path)), None)


def find_needed(folder: Folder, *names: str) -> str:
    """As `find`, but raises UserError where none of the files is there."""
    found = find(folder, *names)
    if found is None:
        raise UserError(f"{folder} holds none of {', '.join(names)} (nor do its folders annotations, anno, metadata)")
    return found


def rows(
    folder: Folder,
    name: str,
    width: int | range,
    catalogue: Catalogue,
    header: Sequence[str] = (),
    files: frozenset[str] = frozenset(),
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv file; `#` lines, empty lines and the header are left out.

    Args:
        folder: holds the file.
        name: of the file.
        width: how many fields a row may have.
        catalogue: takes a finding for each row that cannot be read.
        header: what the first field of a header may be called.
        files: names of files; a `#` line that has one of them among its fields is a row, and fields that are names of
            them or in quotes are as they are written.

    Yields:
        The number of a row in the file, from 1 on, and its fields, stripped (but see `files`).

    Raises:
        UserError: where the file cannot be read, or none of its rows.
    """
    widths = range(width, width + 1) if isinstance(width, int) else width
    content = read(folder, name)
    if content[:2] in _WIDE_ENCODINGS:
        raise UserError(f"{folder.path(name)} is encoded as {_WIDE_ENCODINGS[content[:2]]}; save it as UTF-8")
    good, found = 0, len(catalogue.findings)
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#") and not _names_one(line, files):
            continue
        with catalogue.row(name, number):
            fields = _fields(line, files)
            if number == 1 and fields[0].lower() in header:
                continue
            if len(fields) not in widths:
                raise ValueError(f"{len(fields)} fields, expected {_range(widths)}")
            good += 1
            yield number, fields
    bad = len(catalogue.findings) - found
    if bad and not good:
        raise UserError(f"{folder.path(name)}: {catalogue.findings[-1].message}; none of its {bad} rows can be read")


def _names_one(line: bytes, files: frozenset[str]) -> bool:
    with contextlib.suppress(ValueError):
        return bool(files) and not files.isdisjoint(_fields(line, files))
    return False


def read(folder: Folder, name: str) -> bytes:
    """The content of a file. Raises UserError where it cannot be read."""
    try:
        return folder.read(name)
    except FileNotFoundError as error:
        raise UserError(f"there is no {folder.path(name)}") from error
    except OSError as error:
        raise UserError(f"{folder.path(name)} cannot be read: {error.strerror or error}") from error


def read_json(folder: Folder, name: str, kind: type[_Kind]) -> _Kind:
    """A JSON file whose top is of type `kind`. Raises UserError."""
    content = read(folder, name)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{folder.path(name)} is no UTF-8 JSON file: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{folder.path(name)} holds a {type(value).__name__} at its top; this is not the file expected")
    return value


def number(text: str, name: str) -> float:
    """Raises ValueError for what is not a finite number of at least 0."""
    try:
        value = float(text.replace("_", "x"))  # Python takes 1_0 for 10
    except ValueError:
        raise ValueError(f"{name} {text!r} is no number") from None
    if not 0 <= value < 1e9:
        raise ValueError(f"{name} {text!r} must be 0 or more")
    return value


def _fields(line: bytes, files: frozenset[str]) -> list[str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8") from None
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True))
    except (csv.Error, StopIteration) as error:
        raise ValueError(f"cannot be split at commas: {error}") from None
    if not files:
        return [field.strip() for field in fields]
    written = [found[1] for found in _FIELD.finditer(text)]
    if len(written) != len(fields):  # quotes within a field
        written = fields
    return [
        field if own.lstrip(" ").startswith('"') else own if own in files else field.strip()
        for field, own in zip(fields, written)
    ]


def _range(widths: range) -> str:
    return str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
