"""Annotation tables as users have them: with or without header, quoted or not, with bad rows among good ones."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from av_mae.datasets.catalogue import Catalogue
from av_mae.errors import UserError
from av_mae.storage import Folder

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


def rows(folder: Folder, name: str, width: int | range, catalogue: Catalogue, header: Sequence[str] = (),
         skip: int = 0) -> Iterator[tuple[int, list[str]]]:
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
