"""Files that were cut off, where the file itself tells: none of these cuts may be silent, no whole file named."""

import io
import struct

import av
import made_media
import numpy as np
import pytest

from av_mae.errors import ClipFailure
from av_mae.media import decode as media
from av_mae.media import ends

FRAMES = [made_media.numbered_frame(number) for number in range(40)]
SOUND = made_media.hum(np.arange(48000 * 4) / 48000)
KINDS = {
    "mp2": {"audio": "mp2", "rate": 48000},
    "mp3": {"audio": "libmp3lame", "rate": 48000, "options": {"write_xing": "0"}},
    "yuv4mpegpipe": {"video": "wrapped_avframe"},
    "ivf": {"video": "libvpx"},
    "apng": {"video": "apng"},
    "gif": {"video": "gif"},
    "mpegts": {"video": "mpeg2video", "fps": 25},
    "asf": {"video": "mpeg4"},
}


def made(format: str) -> bytes:
    options = {"fps": 10} | KINDS[format]
    if format in ("apng", "gif", "yuv4mpegpipe"):
        return pictures(format)
    frames, sound = (None, SOUND) if "audio" in options else (FRAMES, None)
    return made_media.encoded(frames, sound, format=format, **options)


def pictures(format: str) -> bytes:
    file, codec = io.BytesIO(), KINDS[format]["video"]
    if format == "yuv4mpegpipe":  # as the format is defined; FFmpeg's frames are no packets
        file.write(b"YUV4MPEG2 W64 H48 F10:1 Ip A1:1 C420jpeg\n")
        for frame in FRAMES:
            planes = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p").to_ndarray()
            file.write(b"FRAME\n" + planes.tobytes())
        return file.getvalue()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = made_media.SIZE
        stream.pix_fmt = "rgb24" if format == "apng" else "rgb8"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def named(content: bytes) -> str:
    """What is said of a file when all of it is read; '' where nothing is."""
    try:
        clip = media.Media(content)
        if clip.audio:
            clip.waveform(0.0, 100.0)
        if clip.video:
            list(clip.frames([0.0, clip.duration], every=True))
    except ClipFailure as failure:
        return str(failure)
    return "; ".join(clip.damages.values())


@pytest.mark.parametrize("format", KINDS)
def test_cut_files_are_named_and_whole_ones_are_not(format):
    whole = made(format)
    assert not named(whole)
    generator = np.random.default_rng(3)
    for part in generator.uniform(0.3, 0.99, 5):
        size = int(part * len(whole))
        if format == "mpegts" and size % 188 == 0:
            continue
        assert named(whole[:size]), size


def test_frames_that_an_ivf_file_counts_are_missed():
    whole = made("ivf")
    position = 32
    for _ in range(25):
        position += 12 + struct.unpack_from("<I", whole, position)[0]
    assert named(whole[:position]) == "25 of 40 frames are there"
    for unknown in (0, 2**32 - 1):  # as written to a pipe
        assert not named(whole[:24] + struct.pack("<I", unknown) + whole[28:position])


def test_a_last_frame_of_mpeg_audio_is_as_long_as_its_header_says():
    """Lengths counted by FFmpeg's parser in files of every layer that can be made here."""
    for codec, rate, bit_rate in [("mp2", 48000, 192000), ("mp2", 22050, 64000), ("libmp3lame", 16000, 24000)]:
        with av.open(io.BytesIO(), "w", format="mp3" if codec == "libmp3lame" else "mp2") as container:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            stream.bit_rate = bit_rate
            frame = av.AudioFrame(stream.codec_context.format.name, "mono", 1152)
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            frame.sample_rate = rate
            packets = [*stream.encode(frame), *stream.encode(None)]
        assert packets and all(ends._frame_length(bytes(packet)) == packet.size for packet in packets)
    assert ends._frame_length(b"TAG\0") == 0 == ends._frame_length(b"")


def test_an_mp3_whose_header_counts_more_frames_is_named():
    whole = made_media.encoded(None, SOUND, format="mp3", audio="libmp3lame", rate=48000)
    last = whole.rindex(b"\xff\xfb") if whole.rfind(b"\xff\xfb") > 0 else 0
    assert not named(whole) and last
    assert "s are there" in named(whole[: len(whole) * 95 // 100])
