"""Names for models: small TOML files that a user or a lab extends, each entry with its path, checksum and licence.

    [demo]
    path = "runs/demo"          # a work directory, checkpoint or file of DeepAVFusion; relative to the TOML file
    sha256 = "…"                # `sha256` of the model's card.json
    licence = "Apache-2.0"
    figures = {"accuracy/joint" = 0.85}

The files are those of the environment variable AV_MAE_REGISTRY (separated as PATH is), then `av_mae/registry.toml` in
the user's configuration folder; the first that has a name wins.
"""

import dataclasses
import hashlib
import os
import pathlib
import tomllib
from collections.abc import Mapping

from av_mae.checkpoint import find_checkpoint
from av_mae.errors import UserError

VARIABLE = "AV_MAE_REGISTRY"
PARTS = ("model", "meta")  # items of a checkpoint that its model depends on
FIELDS = {"path": str, "sha256": str, "licence": str, "figures": dict}
CHUNK = 2**24  # bytes


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model: its path, its checksum, its licence, and what it scored, by the metric's name."""

    path: str
    sha256: str
    licence: str
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


def registry_files() -> list[pathlib.Path]:
    """The registry files that exist.

    Raises:
      UserError: AV_MAE_REGISTRY names a file that does not exist.
    """
    named = [pathlib.Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    missing = [path for path in named if not path.is_file()]
    if missing:
        raise UserError(f"{VARIABLE} names {missing[0]}, which is not there")
    home = pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config")
    return named + [path for path in [home / "av_mae" / "registry.toml"] if path.is_file()]


def entries() -> dict[str, Entry]:
    """All registered models by name.

    Raises:
      UserError: a file is not TOML, or an entry lacks a field.
    """
    known: dict[str, Entry] = {}
    for file in registry_files():
        try:
            values = tomllib.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"registry {file} cannot be read: {error}") from error
        for name, value in values.items():
            known.setdefault(name, _entry(file, name, value))
    return known


def _entry(file: pathlib.Path, name: str, value: object) -> Entry:
    fields = value if isinstance(value, dict) else {}
    wrong = [
        field
        for field, kind in FIELDS.items()
        if not isinstance(fields.get(field, {} if field == "figures" else None), kind)
    ]
    if wrong or set(fields) - set(FIELDS):
        raise UserError(
            f"registry {file}: [{name}] needs path, sha256 and licence (text), and may have figures "
            f"(a table); wrong: {', '.join([*wrong, *sorted(set(fields) - set(FIELDS))])}"
        )
    return Entry(**{**fields, "path": str(file.parent / fields["path"])})


def resolve(path: str | os.PathLike) -> str:
    """`path` itself if it exists, else the path of the registered model of this name.

    Raises:
      UserError: neither exists, or the model's checksum is not the registered one.
    """
    if os.path.exists(path):
        return os.fspath(path)
    known = entries()
    if str(path) not in known:
        names = f"; registered names are {', '.join(known)}" if known else ""
        raise UserError(
            f"there is no checkpoint in {str(path)!r}: name a work directory, its checkpoints/ or one of them{names}"
        )
    entry = known[str(path)]
    found = checksum(entry.path)
    if found != entry.sha256:
        raise UserError(
            f"{path}: {entry.path} is not the model that was registered: its sha256 is {found}, the "
            f"registry says {entry.sha256}; restore the model, or correct the entry"
        )
    return entry.path


def checksum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or of the model in a checkpoint: its files, by name and contents.

    Raises:
      UserError: `path` is neither a file nor holds a checkpoint.
    """
    digest = hashlib.sha256()
    if os.path.isfile(path):
        _add(digest, pathlib.Path(path))
        return digest.hexdigest()
    folder = find_checkpoint(os.fspath(path))
    for part in PARTS:
        for file in sorted(file for file in (folder / part).rglob("*") if file.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            _add(digest, file)
    return digest.hexdigest()


def _add(digest, path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
