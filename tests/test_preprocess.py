"""Media files and arrays → batches of one clip: the same numbers as evaluation, and a message for what cannot be."""

import concurrent.futures
import os
import subprocess
import sys
import time

import hanging_decoder
import made_media
import numpy as np
import pytest
import soundfile
from PIL import Image
from real_media import BLACK, ROBUST, frame_as_stored, probed

from av_mae import preprocess
from av_mae.config import DataConfig, SoundConfig
from av_mae.data import audio as sound
from av_mae.data import frames, loading
from av_mae.errors import UserError
from av_mae.media import encode as clip_writer
from av_mae.prepare.demo import clips as demo_clips
from av_mae.prepare.demo import toy_band
from av_mae.prepare.shards import complete

FIELDS = {"image", "audio", "id", "start", "has_image", "has_audio"}
BROKEN = {
    "corrupted.mp4": "sound: there is none",
    "sample_ac3_aac.mp4": "frame: there is none",
    "sample_audio_only.mp4": "frame: there is none",
    "sample_malformed_free_box.mp4": "open: Invalid data found when processing input",
    "sample_video_only.mp4": "sound: there is none",
    "sample_with_invalid_nalu.mp4": "sound: there is none",
    "sample_with_sdt.ts": "frame: no frame can be decoded",
    "zero_length.webm": "open: Invalid data found when processing input",
}


def check(batch: dict, image_size=(224, 224), audio_size=(128, 192)) -> None:
    assert set(batch) == FIELDS
    assert batch["image"].shape == (1, *image_size, 3) and batch["image"].dtype == np.uint8
    assert batch["audio"].shape == (1, *audio_size) and batch["audio"].dtype == np.float32
    assert batch["start"].shape == (1,) and batch["start"].dtype == np.float32 and batch["id"].shape == (1,)
    for name in ("has_image", "has_audio"):
        assert batch[name].shape == (1,) and batch[name].dtype == bool
    assert np.isfinite(batch["audio"]).all()


@pytest.mark.parametrize("name", ROBUST)
def test_robust_clips_come_through(shared, name):
    path, row = shared / "media" / "robust" / name, probed(shared, name)
    silent = row["n_a"] == "0"
    if silent:
        with pytest.raises(UserError, match=f"{name}: sound: there is none; missing='zeros'"):
            preprocess.load(path)
    batch = preprocess.load(path, missing="zeros" if silent else "error")
    check(batch)
    assert batch["id"][0] == str(path)
    assert batch["has_image"][0] and batch["has_audio"][0] != silent
    assert batch["image"].std() > 2 or name in BLACK
    assert batch["audio"].any() != silent
    spare = max(0.0, float(row["duration"] or row["asec"]) - 3) / 2 if silent else max(0.0, float(row["asec"]) - 3) / 2
    assert batch["start"][0] == pytest.approx(spare, abs=0.07)  # some sounds begin that much later than the file


@pytest.mark.parametrize(
    "name, start, number, turn",
    [
        ("video_90.mov", 0.0, 0, lambda stored: np.rot90(stored, -1)),
        ("sample_rotate_and_reflect.mp4", 0.06, 2, lambda stored: np.swapaxes(stored, 0, 1)),
        ("sample_portrait.mp4", 0.05, 2, lambda stored: stored),
    ],
)
def test_images_are_the_upright_frames_cropped_as_in_evaluation(shared, name, start, number, turn):
    path = shared / "media" / "robust" / name
    upright = turn(frame_as_stored(path, number))
    box = frames.centre_box(*upright.shape[:2], (160, 128))
    expected = Image.fromarray(upright).resize((128, 160), Image.Resampling.BILINEAR, box=box)
    batch = preprocess.load(path, start, 0.016, missing="zeros", image_size=(160, 128))
    np.testing.assert_array_equal(batch["image"][0], np.asarray(expected))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_clips_are_refused_in_one_line(shared, name, capfd):
    path, began = shared / "media" / "broken" / name, time.monotonic()
    with pytest.raises(UserError) as error:
        preprocess.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {BROKEN[name]}") and "\n" not in message
    assert time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")  # FFmpeg's own remarks stay away


def test_a_clip_that_only_other_readers_find_broken_comes_through(shared):
    """Its probe read 280 frames and 11.23 s of sound from it without an error."""
    batch = preprocess.load(shared / "media" / "broken" / "video_with_failing_audio.mp4")
    check(batch)
    assert batch["start"][0] == pytest.approx((11.23 - 3) / 2, abs=0.02)


def test_a_decoder_that_hangs_is_stopped(shared, monkeypatch):
    path, began = shared / "media" / "robust" / "sample.mp4", time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(preprocess.media, "read_excerpt", hanging_decoder.read_excerpt)
        with pytest.raises(UserError, match="sample.mp4: decode: stopped after time_limit=0.7 s"):
            preprocess.load(path, time_limit=0.7)
    assert time.monotonic() - began < 5
    check(preprocess.load(path))


@pytest.mark.parametrize(
    "name",
    [
        "sample.mp4",
        "sample.flv",
        "flipping_a_pancake.mkv",
        "no_duration.webm",
        "sample_h262_mpeg_audio.ts",
        "sample-with-large-length.avi",
    ],
)
def test_random_damage_costs_a_message_at_most(shared, tmp_path, name, capfd):
    """Truncated, flipped bytes anywhere, flipped bytes near both ends, a stretch of noise."""
    whole, generator = (shared / "media" / "robust" / name).read_bytes(), np.random.default_rng(len(name))
    path, near = tmp_path / name, min(3000, len(whole) // 2)
    for kind in range(12):
        damaged = bytearray(whole[: generator.integers(len(whole))] if kind % 4 == 0 else whole)
        indices = {1: generator.integers(len(whole), size=20), 2: generator.integers(-near, near, 30)}.get(kind % 4, [])
        for index in indices:
            damaged[index] = generator.integers(256)
        if kind % 4 == 3:
            start = generator.integers(len(whole))
            damaged[start : start + 3000] = generator.bytes(len(damaged[start : start + 3000]))
        path.write_bytes(damaged)
        try:
            check(preprocess.load(path, missing="zeros", time_limit=10))
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert "crashed" not in str(error) and "stopped" not in str(error)
    assert capfd.readouterr() == ("", "")


def test_a_relative_name_is_found_after_a_change_of_folder(shared, monkeypatch):
    """The decoding process keeps the working folder in which it began."""
    clips = sorted((shared / "media" / "grid_samples").iterdir())
    for folder in (clips[0].parent, clips[0].parents[1]):
        monkeypatch.chdir(folder)
        assert preprocess.load(os.path.relpath(clips[0], folder))["has_image"].all()


def test_threads_have_decoders_of_their_own(shared):
    paths = [shared / "media" / "robust" / name for name in ("chaplin.mp4", "sample.mkv", "sample_portrait.mp4")] * 2
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        together = list(threads.map(preprocess.load, paths))
    for path, batch in zip(paths, together):
        alone = preprocess.load(path)
        assert batch["id"][0] == str(path)
        np.testing.assert_array_equal(batch["image"], alone["image"])
        np.testing.assert_array_equal(batch["audio"], alone["audio"])


SCRIPT = """
import os, sys
from av_mae import preprocess

def mean():
    return preprocess.load(sys.argv[1])["image"].mean()

first = mean()  # a script without a main guard
if os.fork() == 0:
    print(mean() == first, flush=True)
    os._exit(0)
os.wait()
print(mean() == first)
"""


def test_a_script_and_its_fork_have_decoders_of_their_own(root, shared, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(root)!r})\n" + SCRIPT)
    # Python 3.12 warns of every fork of a process with threads
    clip = shared / "media" / "robust" / "chaplin.mp4"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script, clip],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (ended.stdout.split(), ended.stderr) == (["True", "True"], "")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> str:
    """Twenty seconds at five frames a second, with lossless sound at 44.1 kHz."""
    path = str(tmp_path_factory.mktemp("media") / "numbered.mov")
    made_media.write(
        path,
        [made_media.numbered_frame(number) for number in range(100)],
        made_media.hum(np.arange(20 * 44100) / 44100),
        rate=44100,
        format="mov",
        audio="pcm_s16le",
    )
    return path


@pytest.mark.parametrize("start, duration", [(None, 3.0), (0.0, 3.0), (1.2345, 1.5), (14.4, 0.75), (17.0, 3.0)])
def test_start_and_duration_are_exact(numbered, start, duration):
    batch = preprocess.load(numbered, start, duration, image_size=made_media.SIZE)
    columns = round(duration * 16000) // 250
    check(batch, made_media.SIZE, (128, columns))
    begin = 8.5 if start is None else start
    assert batch["start"][0] == pytest.approx(begin, abs=1 / 44100)
    assert made_media.number_of(batch["image"][0]) == pytest.approx(5 * (begin + duration / 2), abs=0.51)
    waveform = made_media.hum(round(begin * 44100) / 44100 + np.arange(columns * 250) / 16000)
    expected = sound.log_mel(waveform.astype(np.float32), SoundConfig(log_floor=1e-2))
    got = preprocess.load(numbered, start, duration, sound=SoundConfig(log_floor=1e-2))["audio"][0]
    edge = 2 if start in (0.0, 17.0) else 0  # where the file's sound begins or ends, the resampling filter rings
    inner = slice(edge, columns - edge)
    np.testing.assert_allclose(got[:, inner], expected[:, inner], rtol=0, atol=0.01)


def test_a_sound_that_ends_is_mirrored_and_the_frame_is_its_middle(numbered):
    batch = preprocess.load(numbered, 18.0, 3.0, image_size=made_media.SIZE)
    assert batch["start"][0] == 18.0 and made_media.number_of(batch["image"][0]) == 95  # of 18 … 20 s
    waveform = made_media.hum(18 + np.arange(32000) / 16000).astype(np.float32)
    mirrored = np.concatenate([waveform, waveform[::-1][:16000]])
    config = SoundConfig(log_floor=1e-2)
    got = preprocess.load(numbered, 18.0, 3.0, sound=config)["audio"][0]
    inner = np.r_[2:120, 136:190]  # where the sound ends, the resampling filter rings
    np.testing.assert_allclose(got[:, inner], sound.log_mel(mirrored, config)[:, inner], rtol=0, atol=0.01)


def test_a_file_gives_what_evaluation_gives_for_its_record(tmp_path):
    """A demo clip as mp4, and as the record that was prepared from it (JPEG and 16-bit FLAC in between)."""
    clip = toy_band.compose(0, "test", 3, "single")
    mp4, record = demo_clips.encode_clip(clip)
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)
    config = SoundConfig(rate=8000, n_fft=400, hop=125, mels=64, log_floor=1e-3)
    loader = loading.ClipLoader(DataConfig(sound=config), (96, 96), (64, 96), augment=False)
    expected = loader.random_map(complete(record, len(toy_band.CLASSES)), np.random.default_rng(0))
    batch = preprocess.load(path, float(expected["start"]), 1.5, sound=config, image_size=(96, 96))
    assert batch["start"][0] == pytest.approx(expected["start"], abs=1e-4)
    np.testing.assert_allclose(batch["audio"][0], expected["audio"], rtol=0, atol=0.01)
    assert np.abs(batch["image"][0].astype(int) - expected["image"]).mean() < 3
    stored, times, _, _ = clip_writer.decode_mp4(mp4)  # before JPEG
    nearest = np.argmin(np.abs(times - (expected["start"] + 0.75)))
    np.testing.assert_array_equal(batch["image"][0], stored[nearest])
    centred = preprocess.load(path, None, 1.5, sound=config, image_size=(96, 96))
    assert centred["start"][0] == pytest.approx(expected["start"], abs=0.1)  # the last block of AAC is padding


@pytest.mark.parametrize("name, tolerance", [("demo1", 3e-4), ("demo2", 3e-4), ("chirp2s", 2e-2)])
def test_arrays_give_the_published_log_mel(shared, name, tolerance):
    golden = np.load(shared / "golden" / "audio.npz")
    batch = preprocess.load(waveform=golden[f"{name}/waveform"], rate=16000, missing="zeros")
    check(batch)
    np.testing.assert_allclose(batch["audio"][0], golden[f"{name}/log_mel"][0], rtol=0, atol=tolerance)
    assert not batch["has_image"][0] and not batch["image"].any() and batch["has_audio"][0]


def test_arrays_are_cut_averaged_and_cropped():
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 255, (301, 407, 3), np.uint8)
    waveform = generator.uniform(-0.5, 0.5, (2, 16000 * 5))
    batch = preprocess.load(frame=frame, waveform=waveform, rate=16000, image_size=(96, 64))
    check(batch, (96, 64))
    assert batch["start"][0] == 1.0 and batch["id"][0] == ""
    mono = waveform.mean(axis=0).astype(np.float32)
    expected = sound.log_mel(mono[16000:64000], SoundConfig())
    np.testing.assert_allclose(batch["audio"][0], expected, rtol=0, atol=1e-4)
    box = frames.centre_box(301, 407, (96, 64))
    image = Image.fromarray(frame).resize((64, 96), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(batch["image"][0], np.asarray(image))
    whole = np.round(waveform * 32767).astype(np.int16)
    later = preprocess.load(frame=frame, waveform=whole, rate=16000, start=1.0, image_size=(301, 407))
    np.testing.assert_allclose(later["audio"][0], expected, rtol=0, atol=0.02)
    np.testing.assert_array_equal(later["image"][0], frame)  # of that size already


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_arrays_are_resampled(rate):
    batch = preprocess.load(
        waveform=made_media.hum(np.arange(6 * rate) / rate),
        rate=rate,
        start=2.0,
        sound=SoundConfig(log_floor=1e-2),
        missing="zeros",
    )
    waveform = made_media.hum(2 + np.arange(48000) / 16000).astype(np.float32)
    np.testing.assert_allclose(
        batch["audio"][0][:, 2:-2], sound.log_mel(waveform, SoundConfig(log_floor=1e-2))[:, 2:-2], rtol=0, atol=5e-3
    )


def test_sound_alone_and_picture_alone(shared, tmp_path):
    spoken = preprocess.load(shared / "media" / "fsdd" / "7_theo_3.wav", missing="zeros")
    check(spoken)
    assert spoken["has_audio"][0] and not spoken["has_image"][0] and not spoken["image"].any()
    path = tmp_path / "picture.png"
    Image.fromarray(made_media.quadrants(33 * 2, 81 * 2)).save(path)
    shown = preprocess.load(path, missing="zeros")
    check(shown)
    assert shown["has_image"][0] and not shown["has_audio"][0] and not shown["audio"].any()
    np.testing.assert_array_equal(made_media.colours(shown["image"][0]), [[0, 1], [2, 3]])


FRAME, WAVE = np.zeros((8, 8, 3), np.uint8), np.zeros(16000, np.float32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give either a path, or frame and waveform with its rate; got none of them"),
        ({"path": "a.mp4", "frame": FRAME}, "got path and frame"),
        ({"path": "no/such.mp4"}, "no/such.mp4: open: there is no such file"),
        ({"path": "tests"}, "tests: open: is a folder, not a media file"),
        ({"path": ""}, "'': open: there is no such file"),
        ({"path": 7}, "path=7 must be the path of a file"),
        ({"frame": FRAME}, "sound: there is none; missing='zeros' takes zeros instead"),
        ({"waveform": WAVE, "rate": 16000}, "frame: there is none; missing='zeros' takes zeros instead"),
        ({"frame": FRAME, "waveform": WAVE}, "rate=None must be the waveform's samples per second"),
        ({"frame": FRAME, "rate": 16000}, "rate=16000 comes without a waveform"),
        ({"frame": FRAME, "waveform": WAVE, "rate": 44.1}, "rate=44.1 must be"),
        ({"frame": FRAME, "waveform": WAVE, "rate": -16000}, "rate=-16000 must be"),
        ({"frame": FRAME / 255}, r"frame must be uint8 \[H, W, 3\], got float64 \[8, 8, 3\]"),
        ({"frame": FRAME[..., 0]}, r"frame must be uint8 \[H, W, 3\], got uint8 \[8, 8\]"),
        ({"frame": FRAME[:0]}, r"got uint8 \[0, 8, 3\]"),
        ({"waveform": WAVE[None, None], "rate": 16000}, r"\[channels, samples\], got float32 \[1, 1, 16000\]"),
        ({"waveform": WAVE.astype(complex), "rate": 16000}, "floats or int16, .* got complex128"),
        ({"waveform": WAVE[:0], "rate": 16000}, r"waveform holds no samples: \[0\]"),
        ({"waveform": np.zeros((48000, 2)), "rate": 16000}, r"has 48000 channels.*transpose \[samples, channels\]"),
        ({"waveform": np.array([0, np.nan, np.inf]), "rate": 16000}, "2 of the waveform's 3 samples are not finite"),
        ({"waveform": WAVE + 32767, "rate": 16000}, "reaches 32767, but floats must lie in -1…1"),
        ({"waveform": WAVE, "rate": 16000, "start": 1.0}, "start=1.0 is beyond the end of the waveform, 1.00 s"),
        ({"waveform": WAVE[:1], "rate": 44100, "missing": "zeros"}, "features: the sound is too short"),
        ({"path": "a.mp4", "start": -1}, "start=-1 must be 0 or more seconds"),
        ({"path": "a.mp4", "start": "1"}, "start='1' must be 0 or more seconds"),
        ({"path": "a.mp4", "duration": 0}, "duration=0 must be a number of seconds above 0"),
        ({"path": "a.mp4", "duration": float("nan")}, "duration=nan must be"),
        ({"path": "a.mp4", "duration": 0.01}, "duration=0.01 is shorter than one frame of sound, 0.015625 s"),
        ({"path": "a.mp4", "time_limit": 0}, "time_limit=0 must be"),
        ({"path": "a.mp4", "time_limit": 1e300}, r"time_limit=1e\+300 must be .* at most 1000000"),
        ({"path": "a.mp4", "duration": 1e9}, "duration=1000000000.0 must be .* at most 3600"),
        ({"path": "a.mp4", "start": 1e300}, r"start=1e\+300 must be"),
        ({"path": "a.mp4", "start": 1, "end": 1e300}, r"end=1e\+300 must be"),
        ({"path": "a.mp4", "image_size": (10**9, 10**9)}, r"image_size=\(1000000000, 1000000000\) must be"),
        ({"waveform": WAVE, "rate": 10**12}, "rate=1000000000000 must be .* at most 768000"),
        ({"path": "a.mp4", "image_size": 224}, r"image_size=224 must be \(height, width\)"),
        ({"path": "a.mp4", "image_size": (0, 224)}, r"image_size=\(0, 224\) must be"),
        ({"path": "a.mp4", "image_size": (22.4, 224)}, r"image_size=\(22.4, 224\) must be"),
        ({"path": "a.mp4", "missing": "skip"}, "missing='skip' must be 'error' or 'zeros'"),
        ({"path": "a.mp4", "sound": SoundConfig(n_fft=256)}, "lower mels or raise n_fft"),
    ],
)
def test_bad_input_is_refused_by_rule_and_value(options, message):
    with pytest.raises(UserError, match=message) as error:
        preprocess.load(**options)
    assert "\n" not in str(error.value)


def test_a_file_is_named_with_stage_and_cause(numbered, tmp_path):
    with pytest.raises(UserError, match="numbered.mov: sound: none from 30.00 to 33.00 s, it lasts from 0.00 to 20.00"):
        preprocess.load(numbered, 30.0)
    path = tmp_path / "loud.wav"
    soundfile.write(path, np.array([0, np.nan, 0, 0] * 4000), 16000, subtype="DOUBLE")
    with pytest.raises(UserError, match="loud.wav: features: the log-mel spectrogram is not finite"):
        preprocess.load(path, missing="zeros")
