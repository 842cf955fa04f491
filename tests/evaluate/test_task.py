"""Downstream tasks from a pretrained checkpoint to results.json: every task, on any mesh, stopped, misused."""

import functools
import io
import json
import pathlib

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny_tasks import VARIANTS, arguments, prepared, pretrained

from av_mae import recipes
from av_mae.data import records
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import run as evaluation
from av_mae.evaluate import separation
from av_mae.media import encode as clip_writer
from av_mae.prepare.shards import write_set
from av_mae.train import run
from av_mae.train import sharding as mesh
from av_mae.workdir import read_skipped

PLOTS = {
    "classification": "confusion",
    "localization": "localization",
    "segmentation": "segmentation",
    "separation": "separation",
}
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
        for module in (run, evaluation):
            monkeypatch.setattr(module, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:devices]))

    use(1)
    return use


def measured(folder, task: str, workdir, *overrides: str) -> dict:
    evaluate.main(arguments(task, workdir, folder / "pretrained", folder / VARIANTS[task], *overrides))
    return json.loads((workdir / "results.json").read_text())


def metrics(results: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in results.items() if isinstance(metric, dict) and "value" in metric}


def assert_same(ours: dict, expected: dict) -> None:
    ours, expected = metrics(ours), metrics(expected)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None, name
        else:
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.slow] if task == "separation" else []) for task in VARIANTS]
)
def test_a_task_leaves_metrics_pictures_and_a_checkpoint(folder, one_device, task, tmp_path):
    results = measured(folder, task, tmp_path)
    assert results["clips"] == 21 and results["skipped"] == 0 and results["skipped_clips"] == []
    assert results["checkpoint"]["step"] == 0 and results["config"]["steps"] == 3
    assert results["clips_per_second"] > 0 and results["encoder_clips_per_second"] > 0
    found = metrics(results)
    names = {
        "classification": "accuracy/joint",
        "localization": "ciou",
        "segmentation": "iou",
        "separation": "sdr_improvement",
    }
    for prefix in ("", "swapped/", "blank/"):
        assert np.isfinite(found[prefix + names[task]])
    plot = np.asarray(Image.open(tmp_path / "images" / f"{PLOTS[task]}.png"))
    assert plot.ndim == 3 and plot.std() > 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "3"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    if task == "separation":
        sounds = sorted((tmp_path / "images" / "separation").glob("*.wav"))
        assert len(sounds) == 6 and soundfile.info(sounds[0]).samplerate == 8000


@pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_metrics_do_not_depend_on_mesh_and_batch_size(folder, one_device, task, tmp_path):
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
    assert metrics(restarted) == metrics(whole)


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
    (failure,) = read_skipped(tmp_path)
    assert (failure.clip, failure.stage) == ("toy_band_single_test_000005", "sound")
    assert results["skipped_clips"] == [str(failure)]


def test_ids_move_no_cursor(folder, one_device, tmp_path, monkeypatch, capsys):
    """What a prepared set holds is printed with its control characters as escapes."""
    read, hostile = records.RecordSource.__getitem__, "clip\x1b[2K\raccuracy 1.000\n\x9b1A"

    def damaged(self, index):
        broken = self.split == "test" and index == 5
        return read(self, index) | ({"id": hostile, "sound": b"none"} if broken else {})

    monkeypatch.setattr(records.RecordSource, "__getitem__", damaged)
    assert measured(folder, "classification", tmp_path)["skipped"] == 1
    printed = capsys.readouterr()
    assert "left out: clip clip\\x1b[2K\\raccuracy 1.000\\n\\x9b1A: sound: " in printed.out
    assert not {"\x1b", "\r", "\x9b"} & set(printed.out + printed.err)


def changed(path: pathlib.Path, source: pathlib.Path, change) -> pathlib.Path:
    """A copy of a prepared set; `change(split, number, record)` gives the fields that are others."""

    def contents(split):
        source_set = records.open_source(source, split)
        for number in range(len(source_set)):
            record = source_set[number]
            del record["label"]
            yield record | change(split, number, record)

    path.mkdir()
    splits = {split: functools.partial(contents, split) for split in ("train", "test")}
    write_set(path, "changed", "changed", records.class_names(source), splits, 24)
    return path


def test_clips_of_several_classes_and_one_of_none(folder, one_device, tmp_path):
    """Two windows a clip; the clip without a class is left out of the metrics, and its cause is there."""

    def second_class(split, number, record):
        return {"labels": [] if (split, number) == ("test", 4) else [record["labels"][0], number % 8]}

    data = changed(tmp_path / "set", folder / "single", second_class)
    results = measured(
        folder,
        "classification",
        tmp_path / "run",
        f"data.path={data}",
        "settings.multi_label=True",
        "settings.mixup=0.5",
        "settings.log_odds=True",
        "windows=2",
    )
    assert (results["clips"], results["skipped"], results["items"], results["missing"]) == (20, 1, 40, 0)
    assert results["skipped_clips"] == ["clip toy_band_single_test_000004: label: the class is unknown"]
    for name in ("mean_ap", "auc"):
        assert 0 < results[f"{name}/joint"]["value"] < 1


@pytest.mark.slow
def test_every_annotated_frame_is_segmented(folder, one_device, tmp_path):
    """Clip n has masks of n % 3 + 1 frames; one clip's are empty: counted beside every metric."""

    def more_masks(split, number, record):
        blank = np.asarray(Image.open(io.BytesIO(record["masks"][0]))) * 0
        mask = clip_writer.png(blank.astype(bool)) if (split, number) == ("test", 2) else record["masks"][0]
        return {"masks": [mask] * (number % 3 + 1), "mask_frames": np.arange(number % 3 + 1) * 2}

    data = changed(tmp_path / "set", folder / "scene", more_masks)
    results = measured(folder, "segmentation", tmp_path / "run", f"data.path={data}")
    assert (results["clips"], results["items"]) == (21, 7 * (1 + 2 + 3))
    assert results["iou"]["left_out"] == {"the target is all background": 3}
    assert results["region_sizes"].startswith("iou/small: what sounds takes less than 0.05 of the image")


@pytest.mark.slow
def test_listed_mixtures_are_separated_source_by_source(folder, one_device, tmp_path):
    name = "toy_band_single_test_00000"
    (tmp_path / "pairs.csv").write_text(f"{name}1,{name}3\n{name}4,nobody\n{name}5,{name}2\n")
    results = measured(
        folder,
        "separation",
        tmp_path / "run",
        f"data.path={folder / 'single'}",
        "data.mix=2",
        f"pairs={tmp_path / 'pairs.csv'}",
        "pictures=1",
    )
    assert (results["clips"], results["items"], results["missing"]) == (2, 4, 1)
    assert (tmp_path / "run" / "missing.txt").read_text() == "mixture 2: nobody\n"
    both = [results[f"source{number}/sdr"]["value"] for number in (1, 2)]
    assert results["sdr"]["value"] == pytest.approx(np.mean(both))


@pytest.mark.parametrize(
    "name, values",
    [
        (
            "classification:vggsound_probe",
            {
                "epochs": 60,
                "optimizer.warmup": 10,
                "optimizer.kind": "lars",
                "optimizer.base_lr": 0.3,
                "head.classes": 309,
                "settings.multi_label": False,
            },
        ),
        (
            "classification:audioset_probe",
            {
                "epochs": 300,
                "optimizer.warmup": 20,
                "head.classes": 527,
                "head.input_norm": True,
                "encoder_rate": 0,
                "settings.multi_label": True,
            },
        ),
        (
            "classification:vggsound_finetune",
            {
                "epochs": 100,
                "optimizer.warmup": 20,
                "windows": 10,
                "layer_decay": 0.75,
                "settings.drop_path": 0.2,
                "settings.mixup": 1,
                "settings.balanced": True,
            },
        ),
        (
            "classification:audioset_finetune",
            {
                "optimizer.base_lr": 3e-4,
                "data.split": "balanced",
                "windows": 10,
                "settings.label_smoothing": 0.1,
                "settings.log_odds": True,
            },
        ),
        (
            "separation:vggsound_music",
            {
                "epochs": 300,
                "optimizer.warmup": 40,
                "optimizer.base_lr": 3e-4,
                "data.mix": 2,
                "head.mask": "ratio",
                "head.weighted": True,
                "layer_decay": 0.75,
            },
        ),
        ("separation:music", {"epochs": 300, "optimizer.weight_decay": 0.05, "data.mix": 2}),
        ("segmentation:s4", {"epochs": 100, "optimizer.warmup": 20, "optimizer.base_lr": 2e-4, "head.classes": 1}),
        ("segmentation:ms3", {"head.classes": 1, "layer_decay": 0.75}),
        ("segmentation:avss", {"head.classes": 71}),
        ("localization:vggss", {"against": "box", "top": 0.5, "agreeing": 1}),
        ("localization:flickr", {"agreeing": 2}),
    ],
)
def test_published_protocols(name, values):
    """As ../shared/TASKS.md has them."""
    task, variant = name.split(":")
    config = recipes.load_recipe(f"configs/{task}.py:{variant}", [], evaluate.kind_of)
    for key, value in values.items():
        assert functools.reduce(getattr, key.split("."), config) == value, key


@pytest.mark.parametrize(
    "task, overrides, message",
    [
        ("classification", ["head.classes=9"], "head.classes=9 does not match the labels: .* has 8 classes"),
        ("segmentation", ["head.classes=3"], "head.classes=3 does not match the labels: .* has 8 classes"),
        ("classification", ["data.path="], "no data: set --config.data.path=DIR"),
        ("separation", ["pairs=list.csv"], "pairs=list.csv lists clips to be mixed: set data.mix"),
        ("separation", ["pairs=nowhere.csv", "data.mix=2"], "cannot read pairs=nowhere.csv: No such file"),
        ("segmentation", ["init="], "no checkpoint: set --config.init=DIR"),
        ("segmentation", ["test_split=valid"], "has no split 'valid'"),
        ("localization", ["method=magic"], "method='magic' must be one of contrastive, attention, occlusion"),
        ("segmentation", ["layer_decay=0"], "layer_decay=0.0 must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(folder, one_device, task, overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        measured(folder, task, tmp_path, *overrides)


@pytest.mark.parametrize("levels, kept", [((1, 1, 0, 0), 2), ((0, 1, 0, 0), 2), ((1, 0, 1, 0), 3), ((1, 0, 0, 0), 2)])
def test_a_silent_source_keeps_its_place(levels, kept):
    sources = np.outer(levels, np.ones(5))
    np.testing.assert_array_equal(separation.without_padding(sources), sources[:kept])
