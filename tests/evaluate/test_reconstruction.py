"""The reconstruction evaluation against plain loops, and what must not change its metrics."""

import functools
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_tasks import prepared, pretrained

from av_mae import models
from av_mae.checkpoint import Checkpoint
from av_mae.config import DataConfig, SoundConfig, TrainConfig
from av_mae.data import plans, records
from av_mae.errors import UserError
from av_mae.evaluate import __main__ as evaluate
from av_mae.evaluate import reconstruction, run
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Report
from av_mae.evaluate.reconstruction import Noise, ReconstructionConfig, interpolate_image
from av_mae.evaluate.task import set_names
from av_mae.train.sharding import make_mesh

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SOUND = SoundConfig(rate=8000, n_fft=400, hop=125, mels=8, log_floor=1e-3, mean=-1.0, std=0.5)


def _config(normalize: bool) -> models.AVMAEConfig:
    sizes = {"patch": 4, "width": 16, "depth": 1, "heads": 2, "normalize_targets": normalize}
    return models.AVMAEConfig(
        image=models.StreamConfig(size=(12, 8), mask_ratio=0.5, **sizes),
        audio=models.StreamConfig(size=(8, 20), channels=1, mask_ratio=0.8, **sizes),
        fusion=models.FusionConfig(tokens=(3, 2, 1), heads=2, attention_ratio=1.0),
        decoder=models.DecoderConfig(width=16, depth=2, heads=2),
    )


class Clips(NamedTuple):
    image: np.ndarray
    audio: np.ndarray
    index: np.ndarray


def _clips(count: int) -> Clips:
    generator = np.random.default_rng(3)
    image = generator.integers(0, 256, (count, 12, 8, 3), np.uint8)
    return Clips(image, generator.normal(size=(count, 8, 20)).astype(np.float32), np.arange(count) * 2)


@functools.lru_cache
def _models(normalize: bool) -> tuple[models.AVMAE, models.AVMAE]:
    return tuple(models.AVMAE(_config(normalize), rngs=nnx.Rngs(seed)) for seed in (5, 6))


def _task(config: models.AVMAEConfig, seed: int) -> reconstruction.Reconstruction:
    recipe = TrainConfig(steps=1, model=config, data=DataConfig(sound=SOUND))
    checkpoint = Checkpoint(pathlib.Path("none"), recipe, "pretraining", None)
    return reconstruction.Reconstruction(ReconstructionConfig(init="none", seed=seed), checkpoint)


def _errors(batch_size: int, normalize: bool = False, count: int = 5, seed: int = 2):
    """Errors [count] by name under all conditions, in batches padded with zeros."""
    model, untrained = _models(normalize)
    clips, task, partner = _clips(count), _task(model.config, seed), plans.partners(count, 2)
    noise = reconstruction.mask_noise(clips.index, model.config, seed)
    errors = {}
    for condition in task.conditions:
        arrays = clips._asdict()
        if condition.swap:
            arrays[condition.swap] = arrays[condition.swap][partner]
        forward = nnx.jit(functools.partial(task.forward_under, condition))
        found = []
        for start in range(0, count, batch_size):
            rows = {name: x[start : start + batch_size] for name, x in arrays.items()}
            own = len(rows["index"])
            padded = {
                name: np.concatenate([x, np.zeros((batch_size - own, *x.shape[1:]), x.dtype)])
                for name, x in rows.items()
            }
            out = forward(untrained if condition.untrained else model, padded)
            found.append({name: np.asarray(x)[:own] for name, x in out.items() if name.endswith("_error")})
        errors |= {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return errors, model, untrained, clips, Noise(*map(np.asarray, noise))


def _baselines(clips: Clips, config: models.AVMAEConfig, seed: int) -> dict[str, np.ndarray]:
    noise = reconstruction.mask_noise(clips.index, config, seed)
    streams = (config.image, config.audio)
    masks = [np.asarray(models.random_mask(x, s.keep).mask) for x, s in zip(noise, streams, strict=True)]
    task, nothing = _task(config, seed), np.zeros(())
    scores = [
        task.score({"image": image, "audio": audio, "image_mask": image_mask, "audio_mask": audio_mask, "id": nothing})
        for image, audio, image_mask, audio_mask in zip(clips.image, clips.audio, *masks, strict=True)
    ]
    return {
        "baseline/image_error": np.array([clip.errors["baseline/image_error"] for clip in scores]),
        "baseline/audio_error": reconstruction.row_mean_errors([clip.audio for clip in scores]),
    }


def _patch(array: np.ndarray, number: int, columns: int) -> np.ndarray:
    row, column = divmod(number, columns)
    return array[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)


def _plain_error(original: np.ndarray, prediction: np.ndarray, noise: np.ndarray, keep: int, normalize: bool) -> float:
    """Loop over the patches of one clip whose noise is not among the `keep` least."""
    total, columns = [], original.shape[1] // 4
    for number in np.argsort(noise)[keep:]:
        values = _patch(original, number, columns).astype(np.float64)
        if normalize:
            values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
        total.append(np.mean((prediction[number] - values) ** 2))
    return float(np.mean(total))


@nnx.jit
def _predict(model, image, audio, image_keep, audio_keep):
    """Predictions at all patches from the visible ones (None: all), by the model's parts."""
    tokens = model.encoder(image, audio, image_keep, audio_keep)
    return (
        model.image_decoder(tokens.image, tokens.fusion, image_keep),
        model.audio_decoder(tokens.audio, tokens.fusion, audio_keep),
    )


def _check(errors: np.ndarray, original: np.ndarray, prediction, noise: np.ndarray, keep: int, normalize=False):
    expected = [
        _plain_error(*clip, keep, normalize) for clip in zip(original, np.asarray(prediction), noise, strict=True)
    ]
    np.testing.assert_allclose(errors, expected, rtol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_errors_with_both_streams_masked(normalize):
    errors, model, untrained, clips, noise = _errors(2, normalize)
    image = ((clips.image / 255 - MEAN) / DEVIATION).astype(np.float32)
    keeps = np.argsort(noise.image)[:, :3].astype(np.int32), np.argsort(noise.audio)[:, :1].astype(np.int32)
    for prefix, network in (("", model), ("untrained/", untrained)):
        image_prediction, audio_prediction = _predict(network, image, clips.audio, *keeps)
        _check(errors[f"{prefix}image_error"], image, image_prediction, noise.image, 3, normalize)
        _check(errors[f"{prefix}audio_error"], clips.audio, audio_prediction, noise.audio, 1, normalize)


def test_other_stream_right_swapped_and_blank():
    """The masked stream's error, clip by clip, with the other stream whole: its own, its partner's, or nothing."""
    errors, model, _, clips, noise = _errors(2)
    partner = plans.partners(5, 2)
    image = ((clips.image / 255 - MEAN) / DEVIATION).astype(np.float32)
    grey = np.round(MEAN * 255) / 255
    blank = np.broadcast_to(((grey - MEAN) / DEVIATION).astype(np.float32), image.shape)
    silence = np.full_like(clips.audio, (-3 + 1) / 0.5)
    image_keep, audio_keep = np.argsort(noise.image)[:, :3], np.argsort(noise.audio)[:, :1]
    others = {
        "right": (image, clips.audio),
        "swapped": (image[partner], clips.audio[partner]),
        "blank": (blank, silence),
    }
    for prefix, (other_image, other_audio) in others.items():
        prediction = _predict(model, other_image, clips.audio, None, audio_keep.astype(np.int32))[1]
        _check(errors[f"{prefix}/audio_error"], clips.audio, prediction, noise.audio, 1)
        prediction = _predict(model, image, other_audio, image_keep.astype(np.int32), None)[0]
        _check(errors[f"{prefix}/image_error"], image, prediction, noise.image, 3)


def test_batch_size_changes_nothing():
    """Padding of the last batch (5 clips in batches of 2 and 4) counts nowhere."""
    small, large = _errors(2)[0], _errors(4)[0]
    assert set(small) == set(large) and len(small) == 10
    for name in small:
        assert small[name].shape == (5,)
        np.testing.assert_allclose(small[name], large[name], rtol=1e-5)


def test_masks_depend_on_seed_and_place_alone():
    config = _config(False)
    whole = reconstruction.mask_noise(np.arange(6), config, 7)
    part = reconstruction.mask_noise(np.array([4, 1]), config, 7)
    np.testing.assert_array_equal(part.image, np.asarray(whole.image)[[4, 1]])
    np.testing.assert_array_equal(part.audio, np.asarray(whole.audio)[[4, 1]])
    assert not np.array_equal(whole.image, reconstruction.mask_noise(np.arange(6), config, 8).image)
    assert len(np.unique(whole.audio)) == whole.audio.size
    image, audio = (
        np.asarray(models.random_mask(x, stream.keep).mask)
        for x, stream in zip(whole, (config.image, config.audio), strict=True)
    )
    assert (image.sum(1) == 3).all() and (audio.sum(1) == 9).all()


def test_partners():
    partner = plans.partners(7, 0)
    assert sorted(partner) == list(range(7)) and (partner != np.arange(7)).all()
    np.testing.assert_array_equal(partner, plans.partners(7, 0))
    with pytest.raises(UserError, match="at least 2 readable clips in a set, got 1"):
        plans.partners(1, 0)


def test_interpolation_of_images():
    image = np.zeros((3, 4, 2))
    image[0, 0], image[2, 3] = (1, 10), (4, 40)
    hidden = np.ones((3, 4), bool)
    hidden[0, 0] = hidden[2, 3] = False
    filled = interpolate_image(image, hidden)
    near, far = 2.0**-3, 5**-1.5
    at = (near * 1 + far * 4) / (near + far)
    np.testing.assert_allclose(filled[0, 2], [at, 10 * at])
    np.testing.assert_array_equal(filled[0, 0], [1, 10])


def test_interpolation_agrees_with_a_loop():
    generator = np.random.default_rng(0)
    image, hidden = generator.normal(size=(9, 7, 3)), generator.random((9, 7)) < 0.7
    filled = interpolate_image(image, hidden)
    seen = np.argwhere(~hidden)
    for row, column in np.argwhere(hidden):
        weights = np.hypot(*(seen - [row, column]).T) ** -3.0
        expected = (weights[:, None] * image[~hidden]).sum(0) / weights.sum()
        np.testing.assert_allclose(filled[row, column], expected, rtol=1e-9)


def test_a_flat_image_is_interpolated_without_error():
    hidden = np.zeros((8, 8), bool)
    hidden[2:7, 1:6] = True
    np.testing.assert_allclose(interpolate_image(np.full((8, 8, 3), 0.7), hidden), 0.7, rtol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_baseline_errors(normalize):
    clips, config = _clips(4), _config(normalize)
    noise = Noise(*map(np.asarray, reconstruction.mask_noise(clips.index, config, 0)))
    errors = _baselines(clips, config, 0)
    rows = np.array([clips.audio[:, row].mean() for row in range(8)])
    for clip in range(4):
        total = []
        for number in np.argsort(noise.audio[clip])[1:]:
            original = _patch(clips.audio[clip], number, 5).astype(np.float64)
            guess = _patch(np.tile(rows[:, None], (1, 20)), number, 5)
            scale = original.var(ddof=1) + 1e-6 if normalize else 1.0
            total.append(np.mean((guess - original) ** 2) / scale)
        np.testing.assert_allclose(errors["baseline/audio_error"][clip], np.mean(total), rtol=1e-5)
        image, hidden = (clips.image[clip] / 255 - MEAN) / DEVIATION, np.zeros((12, 8), bool)
        for number in np.argsort(noise.image[clip])[3:]:
            row, column = divmod(number, 2)
            hidden[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
        expected = _plain_error(
            image,
            np.stack([_scaled(interpolate_image(image, hidden), image, number, normalize) for number in range(6)]),
            noise.image[clip],
            3,
            normalize,
        )
        np.testing.assert_allclose(errors["baseline/image_error"][clip], expected, rtol=1e-4)


def _scaled(guess: np.ndarray, original: np.ndarray, number: int, normalize: bool) -> np.ndarray:
    """Patch `number` of the guess on the scale of the true patch."""
    guess, original = _patch(guess, number, 2), _patch(original, number, 2)
    return (guess - original.mean()) / np.sqrt(original.var(ddof=1) + 1e-6) if normalize else guess


def test_bootstrap_is_paired():
    generator = np.random.default_rng(1)
    values = generator.exponential(size=400)
    bootstrap = Bootstrap(400, seed=0, draws=2000)
    mean = bootstrap.mean(values)
    half = 1.96 * values.std() / 20
    assert mean.value == values.mean() and mean.low < mean.value < mean.high
    np.testing.assert_allclose([mean.low, mean.high], [mean.value - half, mean.value + half], atol=0.2 * half)
    gap = bootstrap.difference(values + 0.01, values)
    np.testing.assert_allclose([gap.low, gap.value, gap.high], 0.01, rtol=1e-9)
    ratio = bootstrap.ratio(1.5 * values, values)
    np.testing.assert_allclose([ratio.low, ratio.value, ratio.high], 1.5, rtol=1e-9)
    assert bootstrap.mean(values) == Bootstrap(400, 0, 2000).mean(values) != Bootstrap(400, 1, 2000).mean(values)


def test_summary_and_table():
    errors = _errors(2)[0]
    clips, config = _clips(5), _config(False)
    errors |= _baselines(clips, config, 2)
    metrics = reconstruction.summarize(errors, Bootstrap(5, 0, 200))
    for stream in ("image_error", "audio_error"):
        right, swapped = (metrics[f"{name}/{stream}"].value for name in ("right", "swapped"))
        np.testing.assert_allclose(metrics[f"swapped_over_right/{stream}"].value, swapped / right)
        np.testing.assert_allclose(metrics[f"swapped_minus_right/{stream}"].value, swapped - right, atol=1e-7)
        np.testing.assert_allclose(
            metrics[f"over_baseline/{stream}"].value, metrics[stream].value / metrics[f"baseline/{stream}"].value
        )
    table = reconstruction.format_table("toy_band", metrics, 5, 1)
    assert table.startswith("toy_band: 5 held-out clips, 1 skipped")
    for row in ("baseline", "untrained model", "swapped / right", "blank"):
        assert row in table
    assert str(metrics["audio_error"]) in table and max(map(len, table.splitlines())) <= 100


@pytest.mark.slow
def test_any_mesh_and_batch_size_give_the_same_results(tmp_path, monkeypatch):
    """One clip of two sets is broken; ids, errors and plots of the others are there."""
    pretrained(tmp_path / "run")
    sets = ",".join(str(prepared(tmp_path, variant, test_clips=9)) for variant in ("single", "mixture"))
    read = records.RecordSource.__getitem__

    def damaged(self, index):
        broken = "single" in str(self.path) and self.split == "test" and index == 5
        return read(self, index) | ({"sound": b"none"} if broken else {})

    results = []
    monkeypatch.setattr(records.RecordSource, "__getitem__", damaged)
    for devices, size in ((1, 4), (8, 16)):
        monkeypatch.setattr(run, "make_mesh", lambda config, n=devices: make_mesh(config, jax.devices()[:n]))
        workdir = tmp_path / str(devices)
        values = [f"init={tmp_path / 'run'}", f"data.path={sets}", f"batch_size={size}", "bootstrap=100", "pictures=2"]
        evaluate.main(
            ["--config=configs/reconstruction.py", f"--workdir={workdir}", *(f"--config.{value}" for value in values)]
        )
        results.append(json.loads((workdir / "results.json").read_text()))
        ids = (workdir / "ids.json").read_bytes()
        assert results[-1]["ids_sha256"] == hashlib.sha256(ids).hexdigest()
        assert {name: len(each) for name, each in json.loads(ids).items()} == {"single": 7, "mixture": 9}
        names = {path.name for path in (workdir / "images").iterdir()}
        assert names == {"reconstruction_single.png", "reconstruction_mixture.png"}
    first, second = ({name: x["value"] for name, x in found.items() if name.endswith("_error")} for found in results)
    assert len(first) == 2 * 2 * len(reconstruction.ROWS) and first.keys() == second.keys()
    np.testing.assert_allclose([*first.values()], [*second.values()], rtol=1e-4, atol=1e-6)
    assert results[0]["clips"] == 16 and results[0]["skipped"] == 2  # the broken clip, and the one it is swapped into


def test_report(tmp_path):
    report = Report({"toy_band/audio_error": Metric(0.5, 0.4, 0.6)}, clips=7, skipped=1, table="")
    report.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "toy_band/audio_error": {"value": 0.5, "low": 0.4, "high": 0.6},
        "clips": 7,
        "skipped": 1,
    }


def test_set_names():
    assert set_names(DataConfig(path="a/toy, b/digits").paths) == {"toy": "a/toy", "digits": "b/digits"}
    assert set_names(DataConfig(path="a/toy,b/toy").paths) == {"a/toy": "a/toy", "b/toy": "b/toy"}
    with pytest.raises(UserError, match="set --config.data.path"):
        set_names(())


@pytest.mark.parametrize(
    "override,message",
    [
        ("task=classify", "task='classify' must be one of reconstruction"),
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("bootstrap=5", "bootstrap=5 must be at least 100"),
        ("data.pth=x", "did you mean 'data.path'?"),
        ("data.clips=-1", "data.clips=-1"),
        ("data.path=", "set --config.data.path"),
        ("init=", "set --config.init=DIR"),
        ("init=missing", "there is no checkpoint in 'missing'"),
    ],
)
def test_bad_input(override, message, tmp_path):
    with pytest.raises(UserError) as error:
        evaluate.main(["--config=configs/reconstruction.py:demo", f"--workdir={tmp_path}", f"--config.{override}"])
    assert message in str(error.value)


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir="):
        evaluate.main(["--config=configs/reconstruction.py:demo", f"--workdir={tmp_path / 'file' / 'inside'}"])
