"""Checkpoint folders, exported indexes and registries as somebody with bad intent would share them.

Each variant changes a whole one in place. Names of modules lead to `evil.py`, which writes a canary when it is
imported; pickles write it when they are loaded.
"""

import json
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable

import pyarrow as pa
from pyarrow import parquet

from av_mae.checkpoint_files import find_checkpoint, meta_hash
from av_mae.export import tables

Change = Callable[[pathlib.Path, pathlib.Path], None]  # of a folder, told where the canary is
DEEP = "[" * 200_000
TRAVERSAL = "../" * 20 + "etc/passwd"


class Bomb:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, canary: pathlib.Path):
        self.canary = canary

    def __reduce__(self):
        return pathlib.Path.write_text, (self.canary, "run")


def _meta(change: Callable[[dict], object]) -> Change:
    """Changes a checkpoint's meta and signs it again, as whoever shares it can."""

    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        path = find_checkpoint(str(folder)) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        changed = change(meta)
        meta = meta if changed is None else changed
        if isinstance(meta, dict):
            meta["sha256"] = meta_hash(meta)
        path.write_text(json.dumps(meta))

    return apply


def _file(name: str, content: str | bytes | Callable[[pathlib.Path], bytes]) -> Change:
    """Another content of a checkpoint's file; `name` may be a pattern."""

    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        known = content(canary) if callable(content) else content
        paths = sorted(find_checkpoint(str(folder)).glob(name)) or [find_checkpoint(str(folder)) / name]
        for path in paths:
            path.write_bytes(known.encode() if isinstance(known, str) else known)

    return apply


def _json(name: str, change: Callable[[dict], object]) -> Change:
    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        path = find_checkpoint(str(folder)) / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _link(name: str, target: str) -> Change:
    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        path = find_checkpoint(str(folder)) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return apply


def _zarr(folder: pathlib.Path, canary: pathlib.Path) -> None:
    """Arrays in zarr's own layout, with a codec that numcodecs would unpickle."""
    model = find_checkpoint(str(folder)) / "model"
    for path in model.iterdir():
        if path.name.startswith(("ocdbt", "manifest", "d")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in json.loads((model / "_METADATA").read_text())["tree_metadata"]:
        array = model / ".".join(
            json.loads(name.replace("'", '"').replace("(", "[").replace(",)", "]").replace(")", "]"))
        )
        array.mkdir()
        described = {
            "zarr_format": 2,
            "shape": [1],
            "chunks": [1],
            "dtype": "|O",
            "compressor": None,
            "fill_value": None,
        }
        (array / ".zarray").write_text(json.dumps(described | {"order": "C", "filters": [{"id": "pickle"}]}))
        (array / "0").write_bytes(pickle.dumps(Bomb(canary)))


def _every_value(name: str) -> Change:
    def change(content: dict) -> None:
        for value in content["tree_metadata"].values():
            value["value_metadata"]["value_type"] = name

    return _json("model/_METADATA", change)


def _config(**values) -> Change:
    return _meta(lambda meta: meta["config"].update(values))


def _stream(**values) -> Change:
    return _meta(lambda meta: meta["config"]["model"]["image"].update(values))


CHECKPOINTS: dict[str, Change] = {
    "an unknown field that names a class": _config(pythonClassName="evil.Tensor"),
    "a kind that names a class": _meta(lambda meta: meta.update(kind="evil.Tensor")),
    "a kind that is a list": _meta(lambda meta: meta.update(kind=["evil"])),
    "a head that is a list": _meta(lambda meta: meta.update(kind="classifier", head=["evil.Tensor"])),
    "a head of unknown fields": _meta(lambda meta: meta.update(kind="classifier", head={"__class__": "evil.Tensor"})),
    "a configuration that is a text": _meta(lambda meta: meta.update(config="evil.Tensor")),
    "a model that is a list": _config(model=["evil"]),
    "a fusion that names a class": _meta(lambda meta: meta["config"]["model"]["fusion"].update(kind="evil.Tensor")),
    "an image of a billion": _stream(size=[10**9, 10**9]),
    "a depth of a million": _stream(depth=10**6),
    "a width that is a text": _stream(width="__import__('evil')"),
    "a meta of lists in lists": _file("meta/metadata", DEEP),
    "a meta that is a list": _meta(lambda meta: [meta]),
    "a meta that is a pickle": _file("meta/metadata", lambda canary: pickle.dumps(Bomb(canary))),
    "no checksums": _meta(lambda meta: meta.pop("checksums")),
    "arrays that are of a class": _every_value("evil.Tensor"),
    "arrays that are no arrays": _every_value("scalar"),
    "a tree that is a list": _json("model/_METADATA", lambda content: content.update(tree_metadata=[])),
    "a tree of lists in lists": _file("model/_METADATA", DEEP),
    "handlers that name a class": _file(
        "model/_METADATA", json.dumps({"tree_metadata": {}, "custom_metadata": {"handler": "evil.Handler"}})
    ),
    "a manifest that is a pickle": _file("model/manifest.ocdbt", lambda canary: pickle.dumps(Bomb(canary))),
    "manifests that are pickles": _file("model/**/manifest.ocdbt", lambda canary: pickle.dumps(Bomb(canary))),
    "arrays elsewhere": _link("model/manifest.ocdbt", "/etc/hostname"),
    "values by pickle": _zarr,
}


def _record(change: Callable[[dict], object]) -> Change:
    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        path = folder / tables.RECORD
        record = json.loads(path.read_text())
        changed = change(record)
        path.write_text(json.dumps(record if changed is None else changed))

    return apply


def _settings(**values) -> Change:
    return _record(lambda record: record["settings"].update(values))


def _shard(change: Callable[[pa.Table, pathlib.Path], pa.Table]) -> Change:
    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        (path,) = sorted((folder / tables.FOLDER).glob("*.parquet"))
        table = change(parquet.read_table(path), canary)
        finished = {tables.FAILED_KEY: b"[]"}
        parquet.write_table(table.replace_schema_metadata((table.schema.metadata or {}) | finished), path)

    return apply


def _bytes(content: bytes) -> Change:
    def apply(folder: pathlib.Path, canary: pathlib.Path) -> None:
        for path in (folder / tables.FOLDER).glob("*.parquet"):
            path.write_bytes(content)

    return apply


def _extension(table: pa.Table, canary: pathlib.Path) -> pa.Table:
    """A column whose type is a pickle, which older versions of Arrow loaded."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(canary)),
    }
    field = table.schema.field("audio").with_metadata(metadata)
    position = table.schema.get_field_index("audio")
    return table.cast(table.schema.set(position, field))


def _column(name: str, values: Callable[[int], pa.Array]) -> Change:
    def change(table: pa.Table, canary: pathlib.Path) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, values(len(table)))

    return _shard(change)


INDEXES: dict[str, Change] = {
    "a count that is no number": _settings(clips="evil"),
    "a count below nothing": _settings(clips=-7),
    "a count of a trillion": _settings(clips=10**12),
    "shards of no clips": _settings(shard_clips=0),
    "no settings": _record(lambda record: record.pop("settings")),
    "settings that are a list": _record(lambda record: record.update(settings=["evil"])),
    "no source": _record(lambda record: record.pop("source")),
    "a record that is a list": _record(lambda record: [record]),
    "a record of lists in lists": lambda folder, canary: (folder / tables.RECORD).write_text(DEEP) and None,
    "a record that is a pickle": lambda folder, canary: (
        (folder / tables.RECORD).write_bytes(pickle.dumps(Bomb(canary))) and None
    ),
    "a table that is no Parquet": _bytes(b"PAR1" + b"evil" * 9 + b"PAR1"),
    "an empty table": _bytes(b""),
    "vectors that are texts": _column("audio", lambda rows: pa.array(["evil"] * rows)),
    "vectors of other lengths": _column("audio", lambda rows: pa.array([[1.0]] * rows, pa.list_(pa.float32(), 1))),
    "vectors with holes": _column("audio", lambda rows: pa.array([None] * rows, pa.list_(pa.float32(), 5))),
    "no ids": _shard(lambda table, canary: table.drop_columns(["id"])),
    "ids that are numbers": _column("id", lambda rows: pa.array(range(rows))),
    "ids that write to the terminal": _column("id", lambda rows: pa.array(["\x1b[2J\rfake: done"] * rows)),
}

# Types that a reader would have to unpickle are read as what they hold.
HARMLESS_INDEXES: dict[str, Change] = {"a column whose type is a pickle": _shard(_extension)}

REGISTRIES = {
    "no TOML": "\0evil",
    "lists in lists": "a = " + "[" * 5000,
    "a path that is a table": '[x]\npath = {"__class__" = "evil.Tensor"}\nsha256 = "0"\nlicence = ""\n',
    "an address": '[x]\npath = "http://127.0.0.1:9/evil"\nsha256 = "0"\nlicence = ""\n',
    "a path outside": f'[x]\npath = "{TRAVERSAL}"\nsha256 = "0"\nlicence = ""\n',
    "a device": '[x]\npath = "/dev/null/evil"\nsha256 = "0"\nlicence = ""\n',
    "a further field": '[x]\npath = "."\nsha256 = "0"\nlicence = ""\nloader = "evil.Tensor"\n',
    "an entry that is a text": 'x = "evil.Tensor"\n',
    "a licence that writes to the terminal": '[x]\npath = "."\nsha256 = "0"\nlicence = ""\n"\\u001b[2J\\nfake" = 1\n',
}


def write_evil(folder: pathlib.Path, canary: pathlib.Path) -> None:
    """`evil.py` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"import pathlib\npathlib.Path({os.fspath(canary)!r}).write_text('run')\n"
    text += "class Tensor:\n    pass\nHandler = Tensor\n"
    (folder / "evil.py").write_text(text)
