"""What batches carry of the truth about a clip: masks and boxes cut as the frame is, clean sounds, mixtures, swaps."""

import io

import fake_clips
import numpy as np
import pytest
import soundfile
from PIL import Image

from av_mae.data import loading, pipeline, truth

SIZE = (32, 48)


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return file.getvalue()


def coloured_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


COLOURED = coloured_png()


class TrueSet(fake_clips.FakeSet):
    """Records with a bright square on black, its mask and box, a second box, and two clean sounds."""

    def __getitem__(self, index: int) -> dict:
        clip = super().__getitem__(index)
        generator = np.random.default_rng(index + 1000)
        top, left = generator.integers(0, 16, 2)
        mask = np.zeros(SIZE, bool)
        mask[top:top + 12, left:left + 20] = True
        frame = np.repeat(mask[..., None] * np.uint8(255), 3, -1)
        whole = soundfile.read(io.BytesIO(clip["sound"]), dtype="float32")[0]
        part = generator.standard_normal(len(whole)).astype(np.float32) * 0.05
        box = np.array([top / 32, left / 48, (top + 12) / 32, (left + 20) / 48], np.float32)
        return clip | {"frames": [fake_clips.jpeg(frame)] * 3, "masks": [png(mask)], "mask_frames": np.array([1]),
                       "boxes": np.stack([np.float32([0, 0, 1, 1]), box]), "object_labels": np.array([4, 7]),
                       "sounding": np.array([0, 1]), "box_annotators": np.array([0, 2]), "annotators": np.int64(3),
                       "sources": [fake_clips.flac(part, 4000), fake_clips.flac(whole - part, 4000)]}


def batches(count=8, training=False, swap="", broken=None, **changes):
    config = fake_clips.small_config(**changes)
    source = loading.ClipSource("a", TrueSet("a", 12, broken=broken))
    sizes = ((32, 32), (16, 16))
    if training:
        data = pipeline.TrainingData([source], config, *sizes, 0, count, np.arange(count))
        return next(data.batches(0))
    return next(iter(pipeline.EvaluationData([source], config, *sizes, count, np.arange(count), swap)))


@pytest.mark.parametrize("training", [True, False])
def test_mask_and_box_are_cut_as_the_frame_is(training):
    batch = batches(training=training, truth=("mask", "objects"), crop_scale=(0.3, 1.0))
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
        np.testing.assert_array_equal(batch[name][0], values + [-1] * (truth.OBJECTS - 2))
    assert (batch["annotators"] == 3).all()


def test_clean_sounds_add_up_to_the_mixture():
    batch = batches(training=True, truth=("sources", "waveforms"))
    np.testing.assert_allclose(batch["sources"].sum(1), batch["mixture"], atol=3e-4)  # three 16-bit roundings, 6 dB up
    assert batch["source"].shape == batch["audio"].shape and not np.allclose(batch["source"], batch["audio"])
    np.testing.assert_array_equal(batch["sources"][:, 2:], 0)


@pytest.mark.parametrize("training", [True, False])
def test_sounds_of_several_clips_are_added(training):
    options = {"truth": ("waveforms", "sources"), "volume_db": 0.0}
    alone = {one: wave for one, wave in _waves(batches(count=12, training=training, **options))}
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
    options = {"count": 12, "truth": ("mask",)}
    own, image, audio = (batches(swap=swap, **options) for swap in ("", "image", "audio"))
    for swapped, changed, kept in ((image, "image", "audio"), (audio, "audio", "image")):
        np.testing.assert_array_equal(swapped["id"], own["id"])
        np.testing.assert_array_equal(swapped[kept], own[kept])
        np.testing.assert_array_equal(swapped["mask"], own["mask"])
        partner = pipeline.partners(12, 0)
        np.testing.assert_array_equal(swapped[changed], own[changed][partner])


def test_noise_has_its_level():
    quiet = batches(count=12, truth=("waveforms",))["mixture"]
    noisy = batches(count=12, truth=("waveforms",), sound_snr=-10.0)["mixture"]
    ratio = np.mean(np.square(quiet), 1) / np.mean(np.square(noisy - quiet), 1)
    np.testing.assert_allclose(10 * np.log10(ratio), -10, atol=0.6)


def test_a_partner_that_fails_costs_the_clip():
    batch = batches(count=12, mix=2, broken={3: "read"})
    partner = pipeline.partners(12, 0)
    assert set(np.flatnonzero(~batch["valid"])) == {3, int(np.flatnonzero(partner == 3)[0])}
    assert all("read: the shard breaks off" in error for error in batch["error"] if error)


@pytest.mark.parametrize("name, field, message", [
    ("mask", {"masks": []}, "truth: the clip has no mask"),
    ("mask", {"masks": [COLOURED]}, "truth: a mask must be an 8-bit greyscale picture, got mode RGB"), ("sources", {"sources": []}, "sound: the clip has no clean"),
    ("waveforms", {"sources": [b""] * 5}, "sound: the clip has 5 clean sounds, at most 4"),
    ("objects", {"boxes": np.zeros((9, 4))}, "truth: the clip has 9 boxes, at most 8")])
def test_what_is_missing_is_named(name, field, message, monkeypatch):
    read = TrueSet.__getitem__
    monkeypatch.setattr(TrueSet, "__getitem__", lambda self, index: read(self, index) | (field if index == 2 else {}))
    batch = batches(truth=(name,))
    assert batch["error"][2].startswith(f"clip a-2: {message}") and not batch["valid"][2]
    assert batch["valid"].sum() == 7
