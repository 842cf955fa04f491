"""What tests/data/saved holds, read through the code that is here now."""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
from pyarrow import parquet

import av_mae
from av_mae.data.records import open_source
from av_mae.search import Index

FOLDER = pathlib.Path(__file__).parent / "data" / "saved"
ROOT = pathlib.Path(__file__).parent.parent
MODELS = ("pretraining", "classification")
SPLITS = (("toy_band", "train"), ("toy_band", "test"), ("scene", "train"), ("folder", "train"))
MADE_IN = "/tmp/saved"
STREAMS = ("image", "audio", "fusion")


@functools.cache
def expected() -> tuple[dict[str, np.ndarray], dict]:
    """Arrays by name, and the rest as JSON has it."""
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays), json.loads((FOLDER / "expected.json").read_text())


def unpack(folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(FOLDER / "saved.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def move(folder: pathlib.Path) -> None:
    """The task's checkpoint says where the pretrained one was; this makes it say where that is now."""
    for path in (folder / "classification" / "checkpoints").glob("*/meta/metadata"):
        assert MADE_IN in path.read_text()
        path.write_text(path.read_text().replace(MADE_IN, str(folder)))


def inputs() -> dict[str, np.ndarray]:
    """Two clips of the saved models' sizes, and the noise that masks them."""
    random = np.random.default_rng(0)
    return {
        "image": random.standard_normal((2, 16, 16, 3), np.float32),
        "audio": random.standard_normal((2, 16, 32), np.float32),
        "image_noise": random.random((2, 4), np.float32),
        "audio_noise": random.random((2, 8), np.float32),
    }


def outputs(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """Pooled features of a saved model, and its losses or the logits of its head."""
    clips, model = inputs(), av_mae.load(folder / name)
    found = {f"features/{stream}": x for stream, x in av_mae.encode(model, clips).features.items()}
    if name == "pretraining":
        losses = model.losses(*clips.values())
        found |= {f"loss/{stream}": x for stream, x in zip(STREAMS[:2], losses, strict=True)}
    else:
        found |= {f"logits/{stream}": x for stream, x in model(clips["image"], clips["audio"]).items()}
    return {key: np.asarray(x) for key, x in found.items()}


def sound_settings(folder: pathlib.Path, name: str) -> dict:
    """Of the log-mel features that a model was trained on."""
    return {
        key: getattr(av_mae.load(folder / name).sound, key)
        for key in ("rate", "n_fft", "hop", "mels", "log_floor", "mean", "std")
    }


def plain(value):
    """A field of a record for JSON: bytes become their length and digest."""
    if isinstance(value, bytes):
        return [len(value), hashlib.sha256(value).hexdigest()]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [plain(x) for x in value]
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def records(folder: pathlib.Path, name: str, split: str) -> dict:
    """How many records a split has, their ids and labels, and all fields of the first."""
    source = open_source(folder / name, split)
    every = [source[number] for number in range(len(source))]
    return {
        "ids": [plain(record["id"]) for record in every],
        "labels": [plain(record["labels"]) for record in every],
        "first": {key: plain(value) for key, value in every[0].items()},
    }


def table(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The columns of the saved export, by pyarrow."""
    files = [parquet.read_table(path) for path in sorted((folder / "embeddings" / "embeddings").glob("*.parquet"))]
    return {name: np.array([x for file in files for x in file[name].to_pylist()]) for name in files[0].column_names}


def search(folder: pathlib.Path, stream: str) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The two rows closest to each row of the saved export, and how the rows are described."""
    index = Index(folder / "embeddings")
    hits = index.search(table(folder)[stream], stream, 2)
    return hits._asdict(), [index.describe(row) for row in range(len(index))]


def run(folder: pathlib.Path, module: str, *options: str) -> str:
    """A command in a process of its own, in a folder with the saved files; returns what it says. One device."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", f"av_mae.{module}", *options],
        cwd=folder,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def read_metrics(folder: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl that are of a step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def resume(folder: pathlib.Path) -> tuple[str, dict]:
    """The pretraining goes on for a step more: what it says, and that step's figures."""
    recipe = folder / "resumed.py"
    recipe.write_text(RECIPE.format(path=str(folder / "pretraining" / "config.json")))
    said = run(
        folder,
        "train",
        f"--config={recipe}",
        "--workdir=pretraining",
        "--config.steps=5",
        "--config.checkpoint_every=5",
    )
    line = read_metrics(folder / "pretraining")[-1]
    return said, {key: line[key] for key in ("step", "loss", "image_loss", "audio_loss", "grad_norm")}


RECIPE = '''"""The recipe of a config.json."""
import json

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads(open({path!r}).read()))
'''


def read_all(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Everything that tests compare."""
    arrays = {f"{name}/{key}": x for name in MODELS for key, x in outputs(folder, name).items()}
    arrays |= {f"table/{key}": x for key, x in table(folder).items()}
    told = {
        "sound": sound_settings(folder, "pretraining"),
        "records": {f"{name}:{split}": records(folder, name, split) for name, split in SPLITS},
    }
    for stream in STREAMS:
        hits, told["rows"] = search(folder, stream)
        arrays |= {f"search/{stream}/{key}": x for key, x in hits.items()}
    return arrays, told | {"resumed": resume(folder)[1]}  # last: it goes on in the folder
