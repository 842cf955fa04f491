"""Validation in pretraining: the metrics of the evaluation, the best checkpoint, and runs that end early."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_tasks import MODEL, SOUND, prepared

import av_mae
from av_mae.checkpoint_files import read_meta
from av_mae.config import DataConfig, OptimizerConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import run as evaluation
from av_mae.evaluate import validation
from av_mae.models.kinds import flat_values
from av_mae.train import __main__ as train
from av_mae.train import run
from av_mae.train import sharding as mesh

CLIPS = 11
METRICS = [
    f"{prefix}{stream}_error"
    for prefix in ("", "over_baseline/", "swapped_over_right/")
    for stream in ("image", "audio")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    prepared(folder, "single", test_clips=CLIPS)
    return folder


@pytest.fixture
def on_devices(monkeypatch):
    """Runs see the first devices alone."""

    def use(devices: int) -> None:
        for module in (run, evaluation):
            monkeypatch.setattr(module, "make_mesh", lambda config: mesh.make_mesh(config, jax.devices()[:devices]))

    use(1)
    return use


def recipe(folder, **changes) -> TrainConfig:
    defaults = {
        "steps": 6,
        "batch_size": 8,
        "dtype": "float32",
        "model": MODEL,
        "data": DataConfig(path=str(folder / "single"), sound=SOUND),
        "checkpoint_every": 2,
        "log_every": 1,
        "images_every": 0,
        "optimizer": OptimizerConfig(base_lr=0.1, warmup=1.0),
        "validate_every": 2,
    }
    return TrainConfig(**defaults | changes)


def validations(workdir) -> dict[int, dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "validation/loss" in line}


def test_metrics_of_the_evaluation_on_any_mesh_and_after_a_stop(folder, on_devices, tmp_path, monkeypatch, capsys):
    steps, made = [], train.periodic
    monkeypatch.setattr(train, "periodic", lambda config, step, *rest: steps.append(step) or made(config, step, *rest))
    config = recipe(folder, keep_best="single/audio_error", images_every=3)
    train.run(config, tmp_path / "whole")
    found, said = validations(tmp_path / "whole"), capsys.readouterr().err
    assert list(found) == [2, 4, 6] and steps[0].step._cache_size() == 1
    assert "the lowest validation/single/audio_error was " in said and f"validation: {CLIPS} clips of single" in said
    evaluate.main(
        [
            "--config=configs/reconstruction.py",
            f"--workdir={tmp_path / 'evaluation'}",
            f"--config.init={tmp_path / 'whole' / 'checkpoints' / '4'}",
            f"--config.data.path={folder / 'single'}",
            "--config.bootstrap=100",
        ]
    )
    expected = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert found[4].keys() == {"step", "validation/loss", *(f"validation/single/{name}" for name in METRICS)}
    for name in METRICS:
        value = expected[f"single/{name}"]["value"]
        assert found[4][f"validation/single/{name}"] == pytest.approx(value, rel=1e-4), name
    best = min(found, key=lambda step: found[step]["validation/single/audio_error"])
    assert [path.name for path in (tmp_path / "whole" / "best").iterdir()] == [f"{best}"]
    kept = read_meta(tmp_path / "whole" / "best" / f"{best}")
    assert kept["validation/loss"] == found[best]["validation/loss"] and kept["position"] == 8 * best
    # A stop after step 4 that has kept a later best, and more devices.
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "6")
    train.run(config, tmp_path / "stopped")
    assert validations(tmp_path / "stopped") == found
    assert [path.name for path in (tmp_path / "stopped" / "best").iterdir()] == [f"{best}"]
    on_devices(8)
    train.run(config, tmp_path / "eight")
    for step, line in validations(tmp_path / "eight").items():
        for name, value in line.items():
            assert found[step][name] == pytest.approx(value, rel=1e-3), (step, name)


def test_a_run_that_gains_nothing_ends_and_keeps_its_best(folder, on_devices, tmp_path, monkeypatch, capsys):
    values = iter([3.0, 1.0, 2.0, 1.5, 1.2])
    loss = MODEL.image.loss_weight

    def scripted(self, state, name, batches):
        return {"image_error": np.array([next(values) / loss]), "audio_error": np.zeros(1)}

    monkeypatch.setattr(validation.ValidationHook, "_errors", scripted)
    config = recipe(folder, steps=40, keep_best="loss", stop_after=2, keep_last=10)
    train.run(config, tmp_path)
    said = capsys.readouterr().err
    assert {step: line["validation/loss"] for step, line in validations(tmp_path).items()} == {
        2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 9: 1.2,
    }  # fmt: skip
    assert "stop_after=2 validations without a lower loss: the run ends" in said and "asked to stop" not in said
    assert "the lowest validation/loss was 1 at step 4, kept in " in said
    assert (tmp_path / "card.json").is_file() and [path.name for path in (tmp_path / "best").iterdir()] == ["4"]
    kept, saved = (flat_values(av_mae.load(tmp_path / name).encoder) for name in ("best", "checkpoints/4"))
    assert kept.keys() == saved.keys() and all(np.array_equal(kept[name], saved[name]) for name in kept)
    train.run(config, tmp_path)
    assert "it has done 9 of 40 steps; stop_after=2 validations brought nothing" in capsys.readouterr().err


def test_plots_show_the_same_clips_and_masks_at_every_step(folder, on_devices, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("av_mae.plots.reconstructions", lambda image, audio, out, _: shown.append((image, audio, out)))
    monkeypatch.setattr("av_mae.plots.save_png", lambda *_: None)
    monkeypatch.setattr("av_mae.train.hooks.Events.image", lambda *_: None)
    train.run(recipe(folder, steps=4, images_every=2), tmp_path)
    for first, second in zip(*((*image_audio, out.image_mask, out.audio_mask) for *image_audio, out in shown)):
        np.testing.assert_array_equal(first, second)
    assert len(shown) == 2 and not np.array_equal(*(out.image_prediction for *_, out in shown))


def test_what_cannot_be_validated(folder, on_devices, tmp_path, capsys):
    with pytest.raises(UserError, match=r"validate_split='dev': .*single has test, train"):
        train.run(recipe(folder, validate_split="dev"), tmp_path / "dev")
    with pytest.raises(UserError, match="keep_best='acc' must be one of loss, single/image_error"):
        train.run(recipe(folder, keep_best="acc"), tmp_path / "acc")
    for changes in ({"validate_every": -1}, {"validate_clips": 0}, {"stop_after": -1}):
        with pytest.raises(UserError, match=next(iter(changes))):
            recipe(folder, **changes)
    with pytest.raises(UserError, match="need validate_every above 0"):
        recipe(folder, validate_every=0, stop_after=1)
    # trained on the only split that could be measured
    train.run(recipe(folder, steps=1, data=DataConfig(str(folder / "single"), split="test", sound=SOUND)), tmp_path)
    assert not validations(tmp_path)
