"""Annotations in batches: masks and boxes cropped as the frame is, clean sounds, mixtures, swaps."""

import io

import fake_clips
import numpy as np
import pytest
import soundfile
from PIL import Image

from av_mae.data import loading, pipeline, plans
from av_mae.errors import batch_failures

SIZE = (32, 48)


def png_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def png(mask: np.ndarray) -> bytes:
    return png_of(mask.astype(np.uint8) * 255)


COLOURED = png_of(np.zeros((4, 4, 3), np.uint8))


class TrueSet(fake_clips.FakeSet):
    """Records with a bright square on black, its mask and box, a second box, and two clean sounds."""

    def __getitem__(self, index: int) -> dict:
        clip = super().__getitem__(index)
        generator = np.random.default_rng(index + 1000)
        top, left = generator.integers(0, 16, 2)
        mask = np.zeros(SIZE, bool)
        mask[top : top + 12, left : left + 20] = True
        frame = np.repeat(mask[..., None] * np.uint8(255), 3, -1)
        whole = soundfile.read(io.BytesIO(clip["sound"]), dtype="float32")[0]
        part = generator.standard_normal(len(whole)).astype(np.float32) * 0.05
        box = np.array([top / 32, left / 48, (top + 12) / 32, (left + 20) / 48], np.float32)
        return clip | {
            "labels": np.array([index, (index + 5) % 12]),
            "frames": [fake_clips.jpeg(frame)] * 3,
            "masks": [png(mask)],
            "mask_frames": np.array([1]),
            "boxes": np.stack([np.float32([0, 0, 1, 1]), box]),
            "object_labels": np.array([4, 7]),
            "sounding": np.array([0, 1]),
            "box_annotators": np.array([0, 2]),
            "annotators": np.int64(3),
            "sources": [fake_clips.flac(part, 4000), fake_clips.flac(whole - part, 4000)],
        }


def batches(count=8, training=False, swap="", broken=None, **changes):
    config = fake_clips.small_config(**changes)
    source = loading.ClipSource("a", TrueSet("a", 12, broken=broken))
    sizes = ((32, 32), (16, 16))
    if training:
        data = pipeline.TrainingData([source], config, *sizes, count, np.arange(count), seed=0)
        return next(data.batches(0))
    return next(iter(pipeline.EvaluationData([source], config, *sizes, count, np.arange(count), swap=swap)))


@pytest.mark.parametrize("training", [True, False])
def test_mask_and_box_are_cut_as_the_frame_is(training):
    batch = batches(training=training, annotations=("mask", "objects"), crop_scale=(0.3, 1.0))
    assert batch["valid"].all() and batch["mask"].dtype == np.uint8
    for image, mask, boxes in zip(batch["image"], batch["mask"], batch["boxes"]):
        assert np.mean((image.mean(-1) > 127) == mask) > 0.97
        if not mask.any():
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / 32
        np.testing.assert_allclose(boxes[1], found, atol=1.5 / 32)
        np.testing.assert_array_equal(boxes[2:], 0)
    for name, values in (("object_labels", [4, 7]), ("sounding", [0, 1]), ("box_annotators", [0, 2])):
        np.testing.assert_array_equal(batch[name][0], values + [-1] * (loading.OBJECTS - 2))
    assert (batch["annotators"] == 3).all()


def test_clean_sounds_add_up_to_the_mixture():
    batch = batches(training=True, annotations=("sources", "waveforms"))
    np.testing.assert_allclose(batch["sources"].sum(1), batch["mixture"], atol=3e-4)  # three 16-bit roundings, 6 dB up
    assert batch["source"].shape == batch["audio"].shape and not np.allclose(batch["source"], batch["audio"])
    np.testing.assert_array_equal(batch["sources"][:, 2:], 0)


@pytest.mark.parametrize("training", [True, False])
def test_sounds_of_several_clips_are_added(training):
    options = {"annotations": ("waveforms", "sources"), "volume_db": 0.0}
    alone = dict(_waves(batches(count=12, training=training, **options)))
    batch = batches(count=12, training=training, mix=3, **options)
    for own, mixture, sources in zip(batch["id"], batch["mixture"], batch["sources"]):
        np.testing.assert_allclose(sources[:3].sum(0), mixture, atol=1e-6)
        if not training:
            others = [one for wave in sources[1:3] for one, known in alone.items() if np.array_equal(known, wave)]
            np.testing.assert_array_equal(sources[0], alone[own])
            assert len(others) == 2 and own not in others and len(set(others)) == 2


def _waves(batch):
    return zip(batch["id"], batch["mixture"])


def test_swapped_streams_are_another_clips():
    options = {"count": 12, "annotations": ("mask",)}
    own, image, audio = (batches(swap=swap, **options) for swap in ("", "image", "audio"))
    for swapped, changed, kept in ((image, "image", "audio"), (audio, "audio", "image")):
        np.testing.assert_array_equal(swapped["id"], own["id"])
        np.testing.assert_array_equal(swapped[kept], own[kept])
        np.testing.assert_array_equal(swapped["mask"], own["mask"])
        partner = plans.partners(12, 0)
        np.testing.assert_array_equal(swapped[changed], own[changed][partner])


def test_noise_has_its_level():
    quiet = batches(count=12, annotations=("waveforms",))["mixture"]
    noisy = batches(count=12, annotations=("waveforms",), sound_snr=-10.0)["mixture"]
    ratio = np.mean(np.square(quiet), 1) / np.mean(np.square(noisy - quiet), 1)
    np.testing.assert_allclose(10 * np.log10(ratio), -10, atol=0.6)


def test_a_partner_that_fails_costs_the_clip():
    batch = batches(count=12, mix=2, broken={3: "read"})
    plan = plans.random_mixtures(plans.Clips(12, 0, None), 2)
    with_it = plan.group == plan.group[plan.clip == 3]
    np.testing.assert_array_equal(batch["valid"], ~with_it)
    assert with_it.sum() == 2 and all(batch["stage"][with_it] == "read")
    assert all(batch["cause"][with_it] == "the shard breaks off")


@pytest.mark.parametrize(
    "name, field, message",
    [
        ("mask", {"masks": []}, "annotations: the clip has no mask"),
        ("mask", {"masks": [COLOURED]}, "annotations: a mask must be an 8-bit greyscale picture, got mode RGB"),
        ("sources", {"sources": []}, "sound: the clip has no clean"),
        ("waveforms", {"sources": [b""] * 5}, "sound: the clip has 5 clean sounds, at most 4"),
        ("mask", {"masks": [b"no picture"]}, "annotations: cannot identify image file"),
        ("labels", {"label": np.int64(-1)}, "label: the class is unknown"),
        ("label", {"label": np.int64(-1)}, "label: the class is unknown"),
        ("labels", {"labels": np.array([1, 12])}, "label: class 12 is none of 12"),
        ("objects", {"boxes": np.zeros((33, 4))}, "annotations: the clip has 33 boxes, at most 32"),
    ],
)
def test_what_is_missing_is_named(name, field, message, monkeypatch):
    read = TrueSet.__getitem__
    monkeypatch.setattr(TrueSet, "__getitem__", lambda self, index: read(self, index) | (field if index == 2 else {}))
    batch = batches(annotations=(name,), classes=12 if name == "labels" else 0)
    (failure,) = batch_failures(batch)
    assert str(failure).startswith(f"clip a-2: {message}") and not batch["valid"][2]
    assert batch["valid"].sum() == 7


def test_all_labels_of_a_clip_are_marked():
    batch = batches(annotations=("labels",), classes=12)
    expected = np.zeros((8, 12), np.int32)
    for index in range(8):
        expected[index, [index, (index + 5) % 12]] = 1
    np.testing.assert_array_equal(batch["label"], expected)
    assert batch["label"].dtype == np.int32


class FilmSet(fake_clips.FakeSet):
    """Clips of 4 s with 5 frames, of which `annotated` have masks of classes: frame f is grey f, its mask is 1 + f in
    the right half. Clip i has masks for the first i % 3 + 1 of them."""

    annotated = (0, 2, 3)

    def __getitem__(self, index: int) -> dict:
        frames = [fake_clips.jpeg(np.full((*SIZE, 3), 20 + 40 * frame, np.uint8)) for frame in range(5)]
        masks = []
        for frame in self.annotated[: index % 3 + 1]:
            mask = np.zeros(SIZE, np.uint8)
            mask[:, 24:] = 1 + frame
            masks.append(png_of(mask))
        sound = np.random.default_rng(index).standard_normal(16000).astype(np.float32) * 0.1
        return {
            "id": f"{self.name}-{index}",
            "label": np.int64(0),
            "duration": np.float32(4),
            "frames": frames,
            "frame_times": np.float32([0.5, 1.2, 2.0, 2.9, 3.9]),
            "sound": fake_clips.flac(sound, 4000),
            "masks": masks,
            "mask_frames": np.array(self.annotated[: len(masks)]),
        }


def films(training: bool, swap: str = "", **changes) -> list[dict]:
    """The rows that are valid of the first batches (all, in evaluation) of 4 clips."""
    config = fake_clips.small_config(annotations=("mask",), crop_scale=(1.0, 1.0), flip=False, **changes)
    source, sizes = loading.ClipSource("f", FilmSet("f", 4)), ((32, 48), (16, 16))
    if training:
        with pipeline.TrainingData([source], config, *sizes, 16, np.arange(16), seed=0) as data:
            found = [next(data.batches(0))]
    else:
        with pipeline.EvaluationData([source], config, *sizes, 5, np.arange(5), swap=swap) as data:
            found = list(data)
    return [{name: x[row] for name, x in batch.items()} for batch in found for row in np.flatnonzero(batch["valid"])]


SECONDS = 16 * 64 / 4000  # of the sound that a model sees


def test_every_annotated_frame_is_seen_with_the_sound_around_it():
    rows = films(training=False, classes=5)
    assert [row["id"] for row in rows] == ["f-0"] + ["f-1"] * 2 + ["f-2"] * 3 + ["f-3"]
    times = {0: 0.5, 2: 2.0, 3: 2.9}
    for row, frame in zip(rows, [0, 0, 2, 0, 2, 3, 0], strict=True):
        assert abs(int(row["image"].mean()) - (20 + 40 * frame)) <= 2
        np.testing.assert_array_equal(row["mask"], np.repeat([[0] * 24 + [1 + frame] * 24], 32, axis=0))
        assert row["start"] == pytest.approx(times[frame] - SECONDS / 2, abs=1e-3)
    swapped = films(training=False, swap="audio", classes=5)
    assert all(np.array_equal(one["image"], other["image"]) for one, other in zip(rows, swapped, strict=True))


def test_training_takes_any_annotated_frame_and_a_window_that_holds_it():
    seen = set()
    for row in films(training=True):
        frame = int(round((row["image"].mean() - 20) / 40))
        time = {0: 0.5, 2: 2.0, 3: 2.9}[frame]
        assert time - SECONDS - 1e-3 <= row["start"] <= time + 1e-3
        assert set(np.unique(row["mask"])) == {0, 1} and abs(row["mask"].mean() - 0.5) < 0.05  # binary: any class
        seen.add((row["id"], frame))
    assert {frame for _, frame in seen} == {0, 2, 3} and len({row["start"] for row in films(training=True)}) > 12
    still = films(training=True, jitter=False)
    centred = {round(time - SECONDS / 2, 3) for time in (0.5, 2.0, 2.9)}
    assert {round(float(row["start"]), 3) for row in still} <= centred


def test_a_mask_of_more_classes_than_there_are_is_named():
    config = fake_clips.small_config(annotations=("mask",), classes=3)
    with pipeline.EvaluationData(
        [loading.ClipSource("f", FilmSet("f", 4))], config, (32, 48), (16, 16), 7, np.arange(7)
    ) as data:
        (batch,) = data
    assert list(batch["valid"]) == [True, True, False, True, False, False, True]
    assert batch["stage"][2] == "annotations"
    assert batch["cause"][2] == "the mask holds class 3, there are 3 (0 to 2); binary masks have no classes"
