"""Nearest neighbours and retrieval of a checkpoint's features: the task, and the hook of pretraining."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from tiny_tasks import MODEL, SOUND, prepared, pretrained

import av_mae
from av_mae import models
from av_mae.config import DataConfig, OptimizerConfig, TrainConfig
from av_mae.data import records
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import neighbours
from av_mae.evaluate import run as evaluation
from av_mae.train import __main__ as train
from av_mae.train import run
from av_mae.train import sharding as mesh

STREAMS = ("image", "audio", "fusion")
CLIPS = 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbours")
    pretrained(folder / "pretrained")
    prepared(folder, "single", test_clips=CLIPS)
    return folder


@pytest.fixture
def on_devices(monkeypatch):
    """Runs see the first devices alone."""

    def use(devices: int) -> None:
        for module in (run, evaluation, neighbours):
            monkeypatch.setattr(module, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:devices]))

    use(1)
    return use


def measured(folder, workdir, *overrides: str, init=None) -> dict:
    values = [
        f"init={init or folder / 'pretrained'}",
        f"data.path={folder / 'single'}",
        "test_batch_size=8",
        "bootstrap=100",
        "pictures=3",
        *overrides,
    ]
    evaluate.main(
        ["--config=configs/neighbours.py:demo", f"--workdir={workdir}", *(f"--config.{value}" for value in values)]
    )
    return json.loads((workdir / "results.json").read_text())


def values(results: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in results.items() if isinstance(metric, dict) and "value" in metric}


def plain_features(folder) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pooled features of the held-out clips by the model's own call, 'alone/…' of streams without fusion tokens."""
    model = av_mae.load(folder / "pretrained")
    data = DataConfig(path=str(folder / "single"), split="test", sound=SOUND)
    with open_evaluation_data(data, MODEL.image.size, MODEL.audio.size, CLIPS, np.arange(CLIPS)) as source:
        batch = next(iter(source))
    image = models.normalize_image(batch["image"])
    tokens, alone = (model.encoder(image, batch["audio"], fused=fused) for fused in (True, False))
    features = {name: np.asarray(getattr(tokens, name)).mean(1) for name in STREAMS}
    features |= {f"alone/{name}": np.asarray(getattr(alone, name)).mean(1) for name in STREAMS[:2]}
    return features, batch["label"]


def cosines(left, right):
    left, right = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (left, right)
    )
    return left @ right.T


def recall(similarity: np.ndarray, k: int) -> float:
    return float(np.mean([(row > row[number]).sum() < k for number, row in enumerate(similarity)]))


def test_metrics_against_scikit_learn_and_loops_on_any_mesh(folder, on_devices, tmp_path):
    results = measured(folder, tmp_path / "one", "test_batch_size=7")
    found, (features, labels) = values(results), plain_features(folder)
    for name in STREAMS:
        index = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(features[name]).kneighbors()[1]
        assert found[f"nearest/{name}"] == pytest.approx(100 * np.mean(labels[index[:, 0]] == labels), abs=1e-4)
    total = sum(cosines(features[name], features[name]) for name in STREAMS) - 9 * np.eye(CLIPS)
    assert found["nearest/all"] == pytest.approx(100 * np.mean(labels[total.argmax(1)] == labels), abs=1e-4)
    for prefix, streams in (("", "alone/"), ("fused/", "")):
        similarity = cosines(features[f"{streams}audio"], features[f"{streams}image"])
        for k in (1, 5, 10):
            assert found[f"{prefix}audio_to_image/recall{k}"] == pytest.approx(recall(similarity, k), abs=1e-6)
            assert found[f"{prefix}image_to_audio/recall{k}"] == pytest.approx(recall(similarity.T, k), abs=1e-6)
    assert len(found) == 4 + 12 and results["clips"] == CLIPS and results["checkpoint"]["step"] == 0
    assert results["nearest/all"]["low"] <= found["nearest/all"] <= results["nearest/all"]["high"]
    plot = np.asarray(Image.open(tmp_path / "one" / "images" / "neighbours.png"))
    assert plot.ndim == 3 and plot.std() > 5
    assert not (tmp_path / "one" / "checkpoints").exists()
    on_devices(8)
    again = values(measured(folder, tmp_path / "eight", "test_batch_size=32"))
    assert again.keys() == found.keys()
    np.testing.assert_allclose([*again.values()], [*found.values()], rtol=1e-5, atol=1e-5)


def test_the_nearest_of_a_few_clips():
    features = {name: np.random.default_rng(number).normal(size=(9, 4)) for number, name in enumerate(STREAMS)}
    features["alone/image"] = features["image"][::-1]
    found = neighbours.nearest_of(features, np.array([2, 8]), 20)
    total = sum(cosines(features[name], features[name]) for name in STREAMS)
    for query, others in zip((2, 8), found, strict=True):
        assert others.tolist() == [clip for clip in np.argsort(-total[query]) if clip != query]
    assert neighbours.nearest_of(features, np.array([2]), 3).tolist() == [found[0][:3].tolist()]


def test_random_weights_are_others_and_what_cannot_work_is_refused(folder, on_devices, tmp_path):
    assert values(measured(folder, tmp_path, "random_weights=True", "seed=7")) != values(measured(folder, tmp_path))
    with pytest.raises(UserError, match="no data: set"):
        measured(folder, tmp_path, "data.path=")
    with pytest.raises(UserError, match="has no split 'valid'"):
        measured(folder, tmp_path, "test_split=valid")


def pretraining(folder, **changes) -> TrainConfig:
    data = DataConfig(path=str(folder / "single"), sound=SOUND)
    return TrainConfig(
        **{
            "steps": 4,
            "batch_size": 8,
            "dtype": "float32",
            "model": MODEL,
            "data": data,
            "checkpoint_every": 2,
            "log_every": 1,
            "images_every": 0,
            "optimizer": OptimizerConfig(base_lr=0.1, warmup=1.0),
            "neighbours_every": 2,
            "neighbours_clips": CLIPS,
            "validate_every": 0,
        }
        | changes
    )


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_hook_gives_the_metrics_of_the_task(folder, on_devices, tmp_path, monkeypatch):
    """At every step those of the checkpoint of the step; the same after a stop; the step is compiled once."""
    steps, made = [], train.periodic
    monkeypatch.setattr(train, "periodic", lambda config, step, *rest: steps.append(step) or made(config, step, *rest))
    config = pretraining(folder)
    train.run(config, tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 2, 3, 4, 4]
    found = {line["step"]: line for line in lines(tmp_path / "whole") if "single/nearest/all" in line}
    assert list(found) == [2, 4] and found[2] != found[4] | {"step": 2}
    assert steps[0].step._cache_size() == 1
    for step, line in found.items():
        checkpoint = tmp_path / "whole" / "checkpoints" / str(step)
        expected = values(measured(folder, tmp_path / str(step), init=checkpoint))
        assert line.keys() == {"step", *(f"single/{name}" for name in expected)}
        for name, value in expected.items():
            assert line[f"single/{name}"] == pytest.approx(value, abs=1e-5), name
    assert np.asarray(Image.open(tmp_path / "whole" / "images" / "neighbours.png")).std() > 5
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    train.run(config, tmp_path / "stopped")
    assert {line["step"]: line for line in lines(tmp_path / "stopped") if "single/nearest/all" in line} == found


def test_the_hook_leaves_out_clips_that_fail_and_metrics_without_labels(folder, on_devices, tmp_path, monkeypatch):
    read = records.RecordSource.__getitem__

    def damaged(self, index):
        changes = {"sound": b"none"} if self.split == "test" and index == 5 else {}
        return read(self, index) | changes | {"label": -1}

    monkeypatch.setattr(records.RecordSource, "__getitem__", damaged)
    (tmp_path / "metrics.jsonl").write_text("")
    line = made_hook(pretraining(folder, neighbours_clips=12), tmp_path)
    names = ["audio_to_image", "image_to_audio", "fused/audio_to_image", "fused/image_to_audio"]
    assert [f"single/{name}/recall{k}" for name in names for k in (1, 5, 10)] == [*line][1:]
    monkeypatch.setattr(records.RecordSource, "__getitem__", read)
    with pytest.raises(UserError, match="has no split 'valid'"):
        made_hook(pretraining(folder, neighbours_split="valid"), tmp_path)
    for changes in ({"neighbours_every": -1}, {"neighbours_clips": 1}, {"neighbours_split": ""}):
        with pytest.raises(UserError, match=next(iter(changes))):
            pretraining(folder, **changes)


def made_hook(config: TrainConfig, workdir) -> dict[str, float]:
    """The line that the hook writes for random weights."""
    written = []
    metrics = type("Metrics", (), {"write": staticmethod(written.append)})
    with run.open_run(config) as (step, _, _):
        hook = neighbours.NeighboursHook(config, step, workdir, metrics, print)
        hook.after_step(run.hooks.Moment(2, step.init(), {}, False, False))
    return written[0]
