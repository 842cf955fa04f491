"""Downstream tasks from a pretrained checkpoint to results.json: every task, any mesh and batch size, stopped, misused."""

import json

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny_tasks import VARIANTS, arguments, prepared, pretrained

from av_mae import evaluate
from av_mae.data import records
from av_mae.errors import UserError
from av_mae.evaluation import separation
from av_mae.training import mesh, run

PICTURES = {"classification": "confusion", "localization": "localization", "segmentation": "segmentation",
            "separation": "separation"}
RATES = ("clips_per_second", "encoder_clips_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained checkpoint and one set of each variant."""
    folder = tmp_path_factory.mktemp("tasks")
    pretrained(folder / "pretrained")
    for variant in ("single", "scene", "mixture"):
        prepared(folder, variant)
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Runs see the first device alone."""
    def use(devices: int) -> None:
        monkeypatch.setattr(run, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:devices]))

    use(1)
    return use


def measured(folder, task: str, workdir, *overrides: str) -> dict:
    evaluate.main(arguments(task, workdir, folder / "pretrained", folder / VARIANTS[task], *overrides))
    return json.loads((workdir / "results.json").read_text())


def figures(results: dict) -> dict[str, float]:
    return {name: figure["value"] for name, figure in results.items() if isinstance(figure, dict) and "value" in figure}


def assert_same(ours: dict, expected: dict) -> None:
    ours, expected = figures(ours), figures(expected)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None, name
        else:
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("task", [pytest.param(task, marks=[pytest.mark.slow] if task == "separation" else [])
                                  for task in VARIANTS])
def test_a_task_leaves_figures_pictures_and_a_checkpoint(folder, one_device, task, tmp_path):
    results = measured(folder, task, tmp_path)
    assert results["clips"] == 21 and results["skipped"] == 0 and results["skipped_clips"] == []
    assert results["checkpoint"]["step"] == 0 and results["config"]["steps"] == 3
    assert results["clips_per_second"] > 0 and results["encoder_clips_per_second"] > 0
    found = figures(results)
    names = {"classification": "accuracy/joint", "localization": "ciou", "segmentation": "iou",
             "separation": "sdr_improvement"}
    for prefix in ("", "swapped/", "blank/"):
        assert np.isfinite(found[prefix + names[task]])
    picture = np.asarray(Image.open(tmp_path / "images" / f"{PICTURES[task]}.png"))
    assert picture.ndim == 3 and picture.std() > 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "3"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    if task == "separation":
        sounds = sorted((tmp_path / "images" / "separation").glob("*.wav"))
        assert len(sounds) == 6 and soundfile.info(sounds[0]).samplerate == 8000


@pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_mesh_and_batch_size(folder, one_device, task, tmp_path):
    """The head is trained once; it is measured on one device in batches of 7 and 32, then on eight."""
    expected = measured(folder, task, tmp_path, "test_batch_size=7")
    assert_same(measured(folder, task, tmp_path, "test_batch_size=32"), expected)
    one_device(8)
    assert_same(measured(folder, task, tmp_path, "test_batch_size=7"), expected)


@pytest.mark.slow
def test_a_stopped_task_goes_on_and_ends_alike(folder, one_device, tmp_path):
    whole = measured(folder, "segmentation", tmp_path / "whole")
    measured(folder, "segmentation", tmp_path / "stopped", "steps=2")  # as a run that was killed after its checkpoint
    (tmp_path / "stopped" / "results.json").unlink()
    restarted = measured(folder, "segmentation", tmp_path / "restarted")
    assert figures(restarted) == figures(whole)


def test_untrained_maps_need_no_training(folder, one_device, tmp_path):
    for method in ("attention", "occlusion"):
        results = measured(folder, "localization", tmp_path / method, f"method={method}", "masks=2")
        assert 0 <= results["pointing"]["value"] <= 1
        assert not any((tmp_path / method / "checkpoints").glob("[0-9]*"))


def test_random_weights_and_a_frozen_encoder(folder, one_device, tmp_path):
    random = measured(folder, "classification", tmp_path / "random", "random_weights=True")
    assert random["config"]["random_weights"] is True
    with pytest.raises(UserError, match="random_weights is True in it and False now"):
        measured(folder, "classification", tmp_path / "random", "random_weights=False")


@pytest.mark.slow
def test_windows_are_averaged(folder, one_device, tmp_path):
    one = measured(folder, "classification", tmp_path, "windows=1")
    three = measured(folder, "classification", tmp_path, "windows=3")
    assert three["clips"] == one["clips"] == 21


def test_a_broken_clip_is_named_and_left_out(folder, one_device, tmp_path, monkeypatch):
    read = records.RecordSource.__getitem__

    def damaged(self, index):
        return read(self, index) | ({"sound": b"none"} if self.split == "test" and index == 5 else {})

    monkeypatch.setattr(records.RecordSource, "__getitem__", damaged)
    results = measured(folder, "classification", tmp_path)
    assert results["clips"] == 20 and results["skipped"] == 1
    assert "toy_band_single_test_000005: sound" in results["skipped_clips"][0]


@pytest.mark.parametrize("task, overrides, message", [
    ("classification", ["head.classes=9"], "head.classes=9 does not match the labels: .* has 8 classes"),
    ("segmentation", ["init="], "no checkpoint: set --config.init=DIR"),
    ("segmentation", ["test_split=valid"], "has no split 'valid'"),
    ("localization", ["method=magic"], "method='magic' must be one of contrastive, attention, occlusion"),
    ("segmentation", ["layer_decay=0"], "layer_decay=0.0 must be above 0")])
def test_what_cannot_work_is_refused(folder, one_device, task, overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        measured(folder, task, tmp_path, *overrides)


@pytest.mark.parametrize("levels, kept", [((1, 1, 0, 0), 2), ((0, 1, 0, 0), 2), ((1, 0, 1, 0), 3), ((1, 0, 0, 0), 2)])
def test_a_silent_source_keeps_its_place(levels, kept):
    sources = np.outer(levels, np.ones(5))
    np.testing.assert_array_equal(separation.heard(sources), sources[:kept])
