"""Decoding of media files, in this process: sizes, times, orientation, and that only what is near is read."""

import io
import os
from fractions import Fraction

import av
import made_media
import numpy as np
import pytest
import simplejpeg
import soundfile
from real_media import ROBUST, frame_as_stored, probed

from av_mae.errors import ClipFailure
from av_mae.media import decode as media


@pytest.mark.parametrize("name", ROBUST)
def test_robust_clips_have_the_size_and_length_that_a_probe_read(shared, name):
    row, clip = probed(shared, name), media.Media(shared / "media" / "robust" / name)
    if row["duration"]:
        assert clip.duration == pytest.approx(float(row["duration"]), abs=0.006)
    else:
        assert clip.duration == pytest.approx(int(row["vframes"]) / float(row["fps"]), abs=0.1)
    width, height = map(int, row["res"].split("x"))
    ((_, frame),) = clip.frames([clip.duration / 2])
    assert frame.shape == ((width, height, 3) if row["rot"] else (height, width, 3)) and frame.dtype == np.uint8
    assert (clip.audio is None) == (row["n_a"] == "0")
    if clip.audio:
        waveform, rate, _ = clip.waveform(0.0, clip.duration + 1)
        assert rate == int(row["arate"]) and waveform.dtype == np.float32 and np.abs(waveform).max() < 1.5
        assert len(waveform) / rate == pytest.approx(float(row["asec"]), abs=0.006)


def test_a_turned_clip_is_turned(shared):
    path = shared / "media" / "robust" / "video_90.mov"
    ((_, frame),) = media.Media(path).frames([0.0])
    np.testing.assert_array_equal(frame, np.rot90(frame_as_stored(path), -1))  # clockwise


def test_a_turned_and_mirrored_clip_is_both(shared):
    folder = shared / "media" / "robust"
    ((_, frame),) = media.Media(folder / "sample_rotate_and_reflect.mp4").frames([0.0])
    plain = frame_as_stored(folder / "sample.mp4")  # the same clip without a matrix
    np.testing.assert_array_equal(frame, np.fliplr(np.rot90(plain, -1)))


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_every_quarter_of_the_picture_is_where_the_matrix_puts_it(matrix):
    mp4 = made_media.encoded([made_media.quadrants()] * 3)
    ((_, frame),) = media.Media(made_media.with_matrix(mp4, *matrix)).frames([0.2])
    a, b, c, d = matrix
    assert frame.shape == ((96, 64, 3) if b else (64, 96, 3))
    shown = made_media.colours(frame)
    for y in (0, 1):
        for x in (0, 1):
            column, row = a * (2 * x - 1) + c * (2 * y - 1), b * (2 * x - 1) + d * (2 * y - 1)
            assert shown[int(row > 0), int(column > 0)] == 2 * y + x


@pytest.mark.parametrize("aspect, width", [(Fraction(4, 3), 128), (Fraction(8, 9), 85)])
def test_samples_become_square(aspect, width):
    mp4 = made_media.encoded([made_media.quadrants()] * 3, aspect=aspect)
    ((_, frame),) = media.Media(mp4).frames([0.0])
    assert frame.shape == (64, width, 3)
    np.testing.assert_array_equal(made_media.colours(frame), [[0, 1], [2, 3]])
    ((_, turned),) = media.Media(made_media.with_matrix(mp4, 0, 1, -1, 0)).frames([0.0])
    np.testing.assert_array_equal(turned, np.rot90(frame, -1))


def test_an_absurd_sample_aspect_ratio_is_refused():
    with pytest.raises(ClipFailure, match="open: the sample aspect ratio 20 is beyond 8 to 1"):
        media.Media(made_media.encoded([made_media.quadrants()] * 3, aspect=Fraction(20)))


@pytest.mark.parametrize(
    "format, video, audio, late",
    [
        ("mp4", "libx264", "aac", 0.0),
        ("mov", "mjpeg", "pcm_s16le", 0.0),
        ("matroska", "libx264", "pcm_s16le", 0.0),
        ("mpegts", "mpeg2video", "aac", 0.064),
    ],
)  # a block of AAC, which this container cannot undo
def test_frames_and_sound_after_a_seek_are_those_of_their_time(format, video, audio, late):
    fps, rate = 25 if video == "mpeg2video" else 5, 16000
    frames = [made_media.numbered_frame(number) for number in range(30 * fps)]
    sound = made_media.hum(np.arange(30 * rate) / rate)
    clip = media.Media(made_media.encoded(frames, sound, format=format, video=video, audio=audio, fps=fps, rate=rate))
    times = [0.3, 9.93, 17.1, 28.4]
    for time, (own, frame) in zip(times, clip.frames(times)):
        ((alone, same),) = clip.frames([time])
        assert alone == own and np.array_equal(frame, same) and abs(own - time) <= 0.51 / fps
        assert own - made_media.number_of(frame) / fps == pytest.approx(late, abs=1e-4)
        waveform, own_rate, first = clip.waveform(time, 0.5)
        assert own_rate == rate and first <= time and len(waveform) >= 0.5 * rate
        expected = made_media.hum(first - late + np.arange(len(waveform)) / rate)
        assert np.abs(waveform - expected).mean() < 2e-3  # its own mean is 0.055


class CountingFile(io.BytesIO):
    total = 0

    def read(self, size=-1):
        data = super().read(size)
        CountingFile.total += len(data)
        return data


def test_only_what_is_near_is_read(monkeypatch):
    """Ten minutes whose data is overwritten with zeros but for half a minute in the middle."""
    frames = [made_media.numbered_frame(number) for number in range(1200)]
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 600 * 8000)
    whole = made_media.encoded(frames, sound, format="mov", video="mpeg4", audio="pcm_s16le", fps=2, rate=8000)
    with monkeypatch.context() as patch:
        patch.setattr(media.io, "BytesIO", CountingFile)
        expected = media.read_excerpt(whole, None, 3.0)
    assert 0 < CountingFile.total < len(whole) / 5
    begin, length = whole.index(b"mdat") + 4, len(whole) - whole.index(b"mdat")
    damaged = bytearray(whole)
    for low, high in ((0, 0.47), (0.52, 0.9)):  # the index is behind the data
        part = slice(begin + int(low * length), begin + int(high * length))
        damaged[part] = bytes(part.stop - part.start)
    excerpt = media.read_excerpt(bytes(damaged), None, 3.0)
    assert made_media.number_of(excerpt.frame) == 600 and excerpt.start == pytest.approx(298.5)
    np.testing.assert_array_equal(excerpt.frame, expected.frame)
    np.testing.assert_array_equal(excerpt.waveform, expected.waveform)
    with pytest.raises(ClipFailure, match="frame: cannot be decoded"):
        media.read_excerpt(bytes(damaged), 100.0, 3.0)


@pytest.mark.parametrize(
    "subtype, channels, error",
    [
        ("PCM_U8", 1, 8e-3),
        ("PCM_16", 2, 4e-5),
        ("PCM_24", 6, 4e-7),
        ("PCM_32", 3, 3e-7),
        ("FLOAT", 2, 3e-7),
        ("DOUBLE", 1, 3e-7),
    ],
)
def test_channels_of_any_sample_format_are_averaged(subtype, channels, error):
    samples = np.random.default_rng(channels).uniform(-0.9, 0.9, (4000, channels))
    file = io.BytesIO()
    soundfile.write(file, samples, 11025, format="WAV", subtype=subtype)
    waveform, rate, first = media.Media(file.getvalue()).waveform(0.0, 1.0)
    assert (rate, first, waveform.dtype) == (11025, 0.0, np.float32)
    np.testing.assert_allclose(waveform, samples.mean(axis=1), atol=error, rtol=0)


def test_a_gap_in_the_timestamps_is_silence():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start in (0, 800, 5600):
            frame = av.AudioFrame.from_ndarray(np.full((1, 800), 8192, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
            container.mux(stream.encode(frame))
    waveform, _, _ = media.Media(file.getvalue()).waveform(0.0, 1.0)
    np.testing.assert_array_equal(waveform, np.repeat([0.25, 0.0, 0.25], [1600, 4000, 800]))


def adts(rate: int) -> bytes:
    return made_media.encoded(None, made_media.hum(np.arange(2 * rate) / rate), format="adts", rate=rate)


def test_a_change_of_rate_is_refused():
    with pytest.raises(ClipFailure, match="sound: the rate changes from 16000 to 8000 Hz"):
        media.Media(adts(16000) + adts(8000)).waveform(0.0, 9.0)


def test_a_cover_picture_is_no_frame():
    mp3 = made_media.encoded(None, made_media.hum(np.arange(16000) / 16000), format="mp3", audio="libmp3lame")
    jpeg = simplejpeg.encode_jpeg(made_media.quadrants())
    body = b"\0image/jpeg\0\x03\0" + jpeg
    tag = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    length = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    clip = media.Media(b"ID3\x03\0\0" + length + tag + mp3[mp3.index(b"\xff") :])
    assert clip.video is None and clip.audio.end == pytest.approx(1.0, abs=0.1)


def test_a_file_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_media.write("plain.mp4", [made_media.quadrants()] * 3)
    os.rename("plain.mp4", "concat:a|b.mp4")
    assert media.Media("concat:a|b.mp4").video.end == pytest.approx(0.6)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    frames = [made_media.numbered_frame(number) for number in range(50)]
    sound = made_media.hum(np.arange(160000) / 16000)
    path, index_first = tmp_path / "clip.mov", {"movflags": "faststart"}
    made_media.write(str(path), frames, sound, audio="pcm_s16le", format="mov", options=index_first)
    file = path.read_bytes()
    assert file.index(b"moov") < file.index(b"mdat")  # else it could not be opened
    cut = file[: len(file) * 6 // 10]
    assert made_media.number_of(media.read_excerpt(cut, 1.0, 2.0).frame) == 10
    with pytest.raises(ClipFailure, match=r"sound: the file is cut off: 5\.\d+ of 10\.00 s are there"):
        media.read_excerpt(cut, 4.5, 3.0)
    made_media.write(str(path), frames, options=index_first)
    silent = path.read_bytes()
    with pytest.raises(ClipFailure, match=r"frame: (the file is cut off|cannot be decoded at 4)"):
        media.read_excerpt(silent[: len(silent) * 6 // 10], 7.0, 2.0)


def test_damage_is_named_with_its_time(shared):
    path = shared / "media" / "broken" / "corrupted.mp4"  # 28 of 50 frames at 10 a second
    assert media.read_excerpt(path, 1.0, 2.0).frame.shape == (720, 1280, 3)
    with pytest.raises(ClipFailure, match=r"frame: cannot be decoded at 3.00 s: Invalid data found"):
        media.read_excerpt(path, 2.5, 2.0)


@pytest.mark.parametrize(
    "start, message",
    [
        (2.5, "sound: none from 2.50 to 3.50 s, it lasts from 0.00 to 2.00 s"),
        (1e12, "sound: none from"),
    ],
)
def test_nothing_is_found_beyond_the_end(start, message):
    clip = made_media.encoded(None, np.zeros(32000), format="wav", audio="pcm_s16le")
    with pytest.raises(ClipFailure, match=message):
        media.read_excerpt(clip, start, 1.0)


def test_nothing_is_shown_beyond_the_end():
    clip = made_media.encoded([made_media.quadrants()] * 5)
    with pytest.raises(ClipFailure, match="frame: none at 1.20 s, the picture lasts from 0.00 to 1.00 s"):
        media.read_excerpt(clip, 1.2, 1.0)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "open: Invalid data found when processing input"),
        (b"1\n00:00:00,000 --> 00:00:01,000\nHello\n\n", "open: the file holds neither a picture nor a sound"),
    ],
)
def test_what_is_no_clip_is_refused(content, message):
    with pytest.raises(ClipFailure, match=message):
        media.Media(content)
