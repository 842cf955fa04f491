"""The demo shrunk: both sets prepared, its recipe trained for a few steps, evaluated, everything left in its place."""

import json

import numpy as np
import pytest
from PIL import Image

from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate.reconstruction import ROWS, STREAMS
from av_mae.prepare import __main__ as prepare
from av_mae.train import __main__ as train
from av_mae.workdir import read_skipped

SMALL = [
    "batch_size=8",
    "steps=3",
    "checkpoint_every=2",
    "images_every=2",
    "log_every=1",
    "optimizer.warmup=1",
    "model.image.depth=1",
    "model.audio.depth=1",
    "model.decoder.depth=1",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    sets = [folder / "data" / name for name in ("toy_band", "spoken_digits")]
    sets[0].parent.mkdir()
    for path in sets:
        prepare.main([f"--dataset={path.name}", f"--output={path}", "--clips=10", "--test_clips=5", "--workers=1"])
    paths = f"--config.data.path={sets[0]},{sets[1]}"
    train.main(["--config=configs/demo.py", f"--workdir={folder}", paths, *(f"--config.{value}" for value in SMALL)])
    evaluate.main(
        [
            "--config=configs/reconstruction.py:demo",
            f"--workdir={folder / 'evaluation'}",
            paths,
            f"--config.init={folder}",
            "--config.batch_size=4",
            "--config.pictures=2",
        ]
    )
    return folder


def test_results(demo):
    results = json.loads((demo / "evaluation" / "results.json").read_text())
    assert results.pop("clips") == 10 and results.pop("skipped") == 0
    metrics = {name: x for name, x in results.items() if isinstance(x, dict) and "value" in x}
    assert set(metrics) == {
        f"{name}/{prefix}{stream}"
        for name in ("toy_band", "spoken_digits")
        for prefix in ROWS.values()
        for stream in STREAMS
    }
    for name, metric in metrics.items():
        assert metric["low"] <= metric["value"] <= metric["high"], name
        assert "minus" in name or metric["value"] > 0


def test_pictures(demo):
    for name in ("reconstruction_toy_band", "reconstruction_spoken_digits", "curves"):
        plot = np.asarray(Image.open(demo / "evaluation" / "images" / f"{name}.png"))
        assert plot.ndim == 3 and plot.std() > 10
    assert (demo / "images" / "step_00000002.png").is_file()


def test_work_directory(demo):
    assert json.loads((demo / "config.json").read_text())["batch_size"] == 8
    assert json.loads((demo / "evaluation" / "config.json").read_text())["init"] == str(demo)
    assert (demo / "checkpoints" / "3").is_dir()
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "validation/loss" in line] == [3]
    assert "loss" in json.loads((demo / "card.json").read_text())["training"]
    assert any(path.name.startswith("events") for path in demo.rglob("*"))


def test_a_damaged_clip_is_skipped_and_counted(demo, monkeypatch, capsys, tmp_path):
    from av_mae.data import records

    def damage(path, split, fields=None):
        source = open_source(path, split, fields)
        read = source.__class__.__getitem__
        monkeypatch.setattr(
            source.__class__,
            "__getitem__",
            lambda self, index: read(self, index) | ({"sound": b"none"} if index == 1 else {}),
        )
        return source

    open_source = records.open_source
    monkeypatch.setattr(records, "open_source", damage)
    evaluate.main(
        [
            "--config=configs/reconstruction.py",
            f"--workdir={tmp_path}",
            f"--config.init={demo}",
            f"--config.data.path={demo / 'data' / 'toy_band'}",
            "--config.batch_size=4",
            "--config.pictures=0",
        ]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    # The damaged clip, and the one that it would lend its audio to under `swapped/`.
    assert (results["clips"], results["skipped"]) == (3, 2)
    table = capsys.readouterr().out
    failures = read_skipped(tmp_path)
    assert "toy_band: 3 held-out clips, 2 skipped" in table and len({failure.clip for failure in failures}) == 2
    for failure in failures:
        assert failure.clip and failure.stage == "sound" and f"left out: clip {failure.clip}: sound: " in table
        assert failure.cause and failure.clip not in failure.cause
