"""Files as the world hands them in (see data/cases): lengths that were decoded, damage named, nothing followed."""

import io
import pathlib
import re
import wave

import av
import clip_trees
import fuzz_media
import made_media
import numpy as np
import pytest
import soundfile

from av_mae import preprocess
from av_mae.errors import ClipFailure, UserError
from av_mae.media import decode as media

CASES = pathlib.Path(__file__).parents[1] / "data" / "cases"


def mkv(seconds: int, **options) -> bytes:
    frames = [made_media.numbered_frame(number) for number in range(5 * seconds)]
    sound = made_media.hum(np.arange(16000 * seconds) / 16000)
    return made_media.encoded(frames, sound, **({"format": "matroska"} | options))


@pytest.mark.parametrize(
    "name, seconds",
    [
        ("adts_loudfirst.aac", 29.12),
        ("adts_quietfirst.aac", 12.096),
        ("chained.ogg", 8.032),
        ("vbr_noxing.mp3", 29.088),
    ],
)
def test_a_guessed_length_is_replaced_by_what_was_decoded(name, seconds):
    """Samples counted by `ffmpeg -i X -f s16le -`; the excerpt lies in the middle of them."""
    clip = media.Media(CASES / name)
    waveform, rate, first = clip.waveform(0.0, 100.0)
    assert clip.duration == pytest.approx(seconds, abs=0.001) == len(waveform) / rate
    assert media.span(CASES / name) == pytest.approx((0.0, seconds), abs=0.001)
    late, _, began = clip.waveform(seconds - 1.5, 1.0)  # after a seek where that is possible
    begin = round((began - first) * rate)
    assert began == pytest.approx(seconds - 1.5, abs=0.1) and len(late) >= rate
    assert np.abs(waveform[begin : begin + rate] - late[:rate]).max() < 1e-3


def test_a_clip_of_a_guessed_length_loads():
    batch = preprocess.load(CASES / "adts_quietfirst.aac", missing="zeros")
    assert batch["start"][0] == pytest.approx((12.096 - 3) / 2, abs=0.001)


@pytest.mark.parametrize("name", ["cut_mkv.mkv", "cut_webm.webm", "cut_mp3.mp3", "flv", "aiff", "wav", "asf"])
def test_a_download_that_stopped_is_named(name):
    content = (CASES / name).read_bytes() if "." in name else b""
    if name in ("flv", "asf"):
        whole = mkv(
            6, **({"format": "flv"} if name == "flv" else {"format": "asf", "video": "mpeg4", "audio": "libmp3lame"})
        )
        content = whole[: int(0.55 * len(whole))]
    elif not content:
        file = io.BytesIO()
        soundfile.write(file, made_media.hum(np.arange(96000) / 16000), 16000, format=name.upper())
        content = file.getvalue()[: 96000 * 2 * 55 // 100]
    clip = media.Media(content)
    with pytest.raises(
        ClipFailure, match=r"sound: (the file is cut off: \d\.\d+ of \d\.\d+ s are there|damaged at|cannot be decoded)"
    ):
        clip.waveform(0.0, 10.0)
    early, rate, _ = clip.waveform(0.0, 0.5)  # what is there can be used
    assert len(early) >= 0.5 * rate


def test_damage_in_the_middle_is_named():
    with pytest.raises(ClipFailure, match=r"sound: damaged at \d\.\d\d s: CRC mismatch!"):
        media.Media(CASES / "dam.ogg").waveform(0.0, 10.0)
    with pytest.raises(ClipFailure, match=r"sound: (damaged at|\d.* s are lost at|cannot be decoded at)"):
        media.Media(CASES / "dam.flac").waveform(0.0, 100.0)
    file, noise = io.BytesIO(), np.random.default_rng(0).uniform(-0.5, 0.5, 64000)
    soundfile.write(file, noise, 16000, format="FLAC")
    damaged = bytearray(file.getvalue())
    damaged[50_000:51_500] = np.random.default_rng(1).bytes(1500)
    with pytest.raises(ClipFailure, match=r"sound: (damaged at|\d.* s are lost at)"):
        media.Media(bytes(damaged)).waveform(0.0, 10.0)


def test_frames_with_an_exif_block_are_decoded():
    clip = media.Media(CASES / "camera.avi")
    assert [frame.shape for _, frame in clip.frames([0.0, 0.5, 0.9])] == [next(clip.frames([0.0]))[1].shape] * 3


def test_sound_of_an_edit_list_within_a_block_begins_in_time():
    """As by decoding from the first packet on, which says how many samples of its block the edit cuts off."""
    with av.open(str(CASES / "midgop_edit.mp4")) as container:
        blocks = [frame.to_ndarray().mean(axis=0) for frame in container.decode(audio=0)]
    waveform, rate, first = media.Media(CASES / "midgop_edit.mp4").waveform(-0.25, 4.0)
    assert first == 0.0 and len(blocks[0]) < 1024
    np.testing.assert_array_equal(waveform, np.concatenate(blocks))


def test_the_default_track_is_taken():
    clip = media.Media(CASES / "first_silent.mp4")
    assert clip.audio.number == 2 and np.abs(clip.waveform(0.0, 2.0)[0]).max() > 0.01


@pytest.mark.parametrize(
    "format, codec",
    [("h264", "libx264"), ("hevc", "libx265"), ("m4v", "mpeg4"), ("ivf", "libvpx-vp9")],
)
def test_raw_video_is_read_from_its_beginning(format, codec):
    """Files without an index, and the first three without times."""
    frames = [made_media.numbered_frame(number) for number in range(25 * 13)]
    clip = media.Media(made_media.encoded(frames, fps=25, format=format, video=codec))
    assert clip.audio is None and clip.duration == pytest.approx(13.0, abs=0.001)
    for times in ([0.3, 1.1, 12.3], [12.3]):
        shown = [(time, made_media.number_of(frame)) for time, frame in clip.frames(times)]
        assert [number / 25 for _, number in shown] == pytest.approx([time for time, _ in shown], abs=1e-3)
        assert [time for time, _ in shown] == pytest.approx(times, abs=0.021)


def later(content: bytes, format: str, seconds: float, scale: float = 1.0) -> bytes:
    """A file as another container whose times begin at `seconds`, those of the sound multiplied by `scale`."""
    file = io.BytesIO()
    with av.open(io.BytesIO(content)) as given, av.open(file, "w", format=format) as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is None or packet.pts is None:
                continue
            factor = scale if packet.stream.type == "audio" else 1.0
            begin = round(seconds / packet.time_base)
            packet.pts, packet.dts = (begin + round(time * factor) for time in (packet.pts, packet.dts))
            packet.stream = streams[packet.stream_index]
            made.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("format", ["matroska", "flv", "asf", "mpegts"])
def test_a_file_whose_times_begin_late_is_whole(format):
    """As a part of a broadcast that was copied with its times: some writers count its length from 0."""
    clip = media.Media(later(clip_trees.clip(0, 4.0), format, 30.0))
    waveform, rate, began = clip.waveform(0, 10)
    assert clip.duration == pytest.approx(4, abs=0.5) and not clip.damages
    assert len(waveform) / rate == pytest.approx(4, abs=0.2) and began == pytest.approx(0, abs=0.1)
    assert [made_media.number_of(frame) for _, frame in clip.frames([0.45, 2.05])] == [2, 10]


def test_sound_longer_than_its_times_is_named():
    clip = media.Media(later(clip_trees.clip(0, 4.0), "matroska", 0.0, scale=0.9))
    clip.waveform(0, 10)
    assert re.fullmatch(r"0\.1\d s more than its times say, at 0\.\d\d s", clip.damages["sound"])


@pytest.mark.parametrize("scale", [1.02, 1.1])
def test_silence_put_where_times_run_fast_is_named(scale):
    """Steps of a tenth of a second each, where the clock of the times was not that of the samples."""
    clip = media.Media(later(clip_trees.clip(0, 12.0), "matroska", 0.0, scale=scale))
    waveform, rate, _ = clip.waveform(0, 20)
    found = re.fullmatch(
        r"its times jump ahead (\d+) times?, (\d\.\d\d) s of silence, first at .* s", clip.damages["sound"]
    )
    assert found and float(found[2]) == pytest.approx(12 * (scale - 1), abs=0.15)
    assert int(found[1]) == pytest.approx(float(found[2]) / 0.1, rel=0.7)
    short = media.Media(later(clip_trees.clip(0, 4.0), "matroska", 0.0, scale=1.0005))  # as clocks of recorders differ
    short.waveform(0, 20)
    assert not short.damages


def test_codes_of_motion_jpeg_that_no_table_has_are_named():
    """FFmpeg 8 says nothing of them, 5.1 prints "error count" (damage 1864 of seed 8 of fuzz_media.py)."""
    whole = fuzz_media.whole_file("avi", 1)
    damaged = whole[:10531] + bytes(335) + whole[10531 + 335 :]
    assert len(list(media.Media(whole).frames([0.0, 1.0]))) == 2
    with pytest.raises(ClipFailure, match="frame: damaged at 0.00 s: Corrupt JPEG data"):
        list(media.Media(damaged).frames([0.0, 1.0]))


def test_a_time_that_falls_once_is_no_second_file():
    """FLV holds a time for every block: one with a flipped bit is not the first of another recording."""
    whole = bytearray(fuzz_media.whole_file("flv", 1))
    sounds, position = [], 13
    while position + 11 < len(whole):  # tags: kind, 3 bytes of size, 3 of time, …; 4 bytes of size again
        if whole[position] == 8:
            sounds.append(position)
        position += 11 + int.from_bytes(whole[position + 1 : position + 4], "big") + 4
    media.Media(bytes(whole)).waveform(0.0, 4.0)
    late = sounds[len(sounds) // 2]
    whole[late + 4 : late + 7] = (100).to_bytes(3, "big")
    with pytest.raises(ClipFailure, match="the times fall from 1.99 to"):
        media.Media(bytes(whole)).waveform(0.0, 4.0)


def test_whole_numbers_as_floats_are_refused(tmp_path):
    with pytest.raises(ClipFailure, match=r"sound: samples reach 1\d{4}"):
        media.Media(CASES / "int16_as_float.wav").waveform(0.0, 1.0)
    loud = (14000 * np.sin(np.arange(32000) / 9)).astype(np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    with pytest.raises(ClipFailure, match=r"sound: samples reach 1\d{4}.*divide 16-bit ones by 32768"):
        media.Media(tmp_path / "loud.wav").waveform(0.0, 1.0)
    with pytest.raises(UserError, match="samples reach"):
        preprocess.load(tmp_path / "loud.wav", missing="zeros")


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{secret}'\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 50000 RTP/AVP 0\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>{secret}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "srt": "1\n00:00:00,000 --> 00:00:01,000\nHello\n\n",
}


@pytest.mark.parametrize("name", ["x.mp4", "x.ffconcat", "x.m3u8"])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_that_name_other_files_are_refused(tmp_path, kind, name):
    secret = tmp_path / "secret.mp4"
    made_media.write(str(secret), [made_media.quadrants()] * 5, made_media.hum(np.arange(16000) / 16000))
    path = tmp_path / name
    path.write_text(LISTS[kind].format(secret=secret))
    for source in (path, path.read_bytes()):
        with pytest.raises(
            ClipFailure, match="open: (the file holds neither a picture nor a sound|Invalid data)"
        ) as error:
            media.Media(source)
        assert "\n" not in str(error.value)


def test_a_pattern_of_names_is_a_name(tmp_path):
    """FFmpeg would read a%d.png as a series of pictures."""
    with wave.open(str(tmp_path / "a%d.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    assert media.Media(tmp_path / "a%d.wav").duration == pytest.approx(1.0)
