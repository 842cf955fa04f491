"""Programs of a transport stream, edit lists of mp4 and colours: what is shown, and when."""

import io
import struct
from fractions import Fraction

import av
import made_media
import numpy as np
import pytest

from av_mae.media import decode as media
from av_mae.media.choice import programs

PACKET = 188


def program(number: int, first: int, rate: float | None) -> bytes:
    """A transport stream of one program with frames `first` … and a sine of `rate` Hz (`None`: no sound)."""
    frames = [made_media.numbered_frame(first + index) for index in range(50)]
    sound = None if rate is None else 0.3 * np.sin(2 * np.pi * rate * np.arange(32000) / 16000)
    options = {"mpegts_service_id": str(number), "mpegts_start_pid": str(0x100 * number)}
    options["mpegts_pmt_start_pid"] = str(0x1000 + number)
    arguments = {"format": "mpegts", "video": "mpeg2video", "audio": "mp2", "fps": 25, "options": options}
    return made_media.encoded(frames, sound, **arguments)


def checksum(section: bytes) -> bytes:
    value = 0xFFFFFFFF
    for byte in section:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return struct.pack(">I", value)


def together(*streams: bytes) -> bytes:
    """One transport stream of several, with a table that names the programs of all."""
    entries = b"".join(struct.pack(">HH", number, 0xE000 | 0x1000 + number) for number in range(1, len(streams) + 1))
    section = b"\0" + struct.pack(">HHBBB", 0xB000 | len(entries) + 9, 1, 0xC1, 0, 0) + entries
    table = (b"G\x40\0\x10\0" + section + checksum(section)).ljust(PACKET, b"\xff")
    packets = [[stream[at : at + PACKET] for at in range(0, len(stream), PACKET)] for stream in streams]
    mixed = [own[index] for index in range(max(map(len, packets))) for own in packets if index < len(own)]
    return b"".join(table if packet[1:3] in (b"\x40\0", b"\0\0") else packet for packet in mixed)


def test_picture_and_sound_are_of_one_program():
    """The first program has no sound: its picture must not come with the sound of the second one."""
    content = together(program(1, 100, None), program(2, 200, 440.0), program(3, 300, 880.0))
    assert programs(content) == [{0x100}, {0x200, 0x201}, {0x300, 0x301}]
    clip = media.Media(content)
    ((_, frame),) = clip.frames([1.0])
    waveform, rate, _ = clip.waveform(0.0, 2.0)
    loudest = np.argmax(np.abs(np.fft.rfft(waveform))) * rate / len(waveform)
    assert made_media.number_of(frame) // 100 == 2 and loudest == pytest.approx(440, abs=2)


def boxes(content: bytes):
    while content:
        size = struct.unpack_from(">I", content)[0]
        yield content[4:8], content[8:size]
        content = content[size:]


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_edits(mp4: bytes, edits: dict[int, list[tuple[float, float]]]) -> bytes:
    """The file, whose index is at its end, with edit lists: track → (seconds, their begin in the media or -1)."""
    made, number = b"", -1
    for kind, content in boxes(mp4):
        if kind == b"moov":
            parts = b""
            for inner, own in boxes(content):
                if inner == b"mvhd":
                    scale = struct.unpack_from(">I", own, 12)[0]
                if inner == b"trak":
                    number += 1
                    kept = {name: part for name, part in boxes(own) if name != b"edts"}
                    (media_scale,) = struct.unpack_from(">I", dict(boxes(kept[b"mdia"]))[b"mdhd"], 12)
                    entries = [
                        struct.pack(">IiI", round(seconds * scale), -1 if at < 0 else round(at * media_scale), 1 << 16)
                        for seconds, at in edits[number]
                    ]
                    listed = box(b"elst", struct.pack(">II", 0, len(entries)) + b"".join(entries))
                    own = b"".join(box(*part) for part in kept.items()) + box(b"edts", listed)
                parts += box(inner, own)
            content = parts
        made += box(kind, content)
    return made


@pytest.mark.parametrize("gop", [5, 20])
def test_an_empty_edit_at_the_beginning_is_no_missing_end(gop):
    """Of 8 s, 3 s from 2 s on are shown, later than the file begins by 1 s (the picture alone, or all of it)."""
    frames = [made_media.numbered_frame(number) for number in range(40)]
    sound = made_media.hum(np.arange(128000) / 16000)
    mov = made_media.encoded(frames, sound, format="mov", video="mpeg4", audio="pcm_s16le", gop=gop)
    clip = media.Media(with_edits(mov, {0: [(1, -1), (3, 2)], 1: [(4, 2)]}))
    assert (clip.duration, clip.video.begin, clip.video.end) == pytest.approx((4.0, 1.0, 4.0), abs=0.03)
    assert [made_media.number_of(frame) for _, frame in clip.frames([1.0, 2.4, 3.8, 4.0], every=True)] == [
        10,
        17,
        24,
        24,
    ]
    clip = media.Media(with_edits(mov, {0: [(1, -1), (3, 2)], 1: [(1, -1), (3, 2)]}))
    waveform, rate, first = clip.waveform(0.0, 9.0)
    assert (clip.duration, len(waveform) / rate, first) == pytest.approx((3.0, 3.0, 0.0), abs=0.03)
    assert [made_media.number_of(frame) for _, frame in clip.frames([0.0, 1.4, 3.0], every=True)] == [10, 17, 24]
    np.testing.assert_allclose(waveform[:40000], made_media.hum(2 + np.arange(40000) / 16000), atol=1e-3)


def test_several_edits_follow_each_other():
    frames = [made_media.numbered_frame(number) for number in range(40)]
    sound = made_media.hum(np.arange(128000) / 16000)
    mov = made_media.encoded(frames, sound, format="mov", video="mpeg4", audio="pcm_s16le", gop=5)
    clip = media.Media(with_edits(mov, {0: [(2, 5), (2, 1)], 1: [(2, 5), (2, 1)]}))
    waveform, _, first = clip.waveform(0.0, 9.0)
    assert (clip.duration, first) == pytest.approx((4.0, 0.0), abs=0.03)
    assert [made_media.number_of(frame) for _, frame in clip.frames([0.2, 1.6, 2.2, 3.4], every=True)] == [
        26,
        33,
        6,
        12,
    ]
    np.testing.assert_allclose(waveform[:30000], made_media.hum(5 + np.arange(30000) / 16000), atol=1e-3)


@pytest.mark.parametrize("colour", [(255, 0, 0), (32, 192, 64), (250, 250, 250)])
@pytest.mark.parametrize(
    "number, red, blue, bits, transfer",
    [
        (1, 0.2126, 0.0722, 8, 1),
        (6, 0.299, 0.114, 8, 6),
        (9, 0.2627, 0.0593, 10, 16),  # HDR10: BT.2020, PQ
        (9, 0.2627, 0.0593, 10, 18),  # HLG
    ],
)
def test_colours_are_those_of_the_matrix_that_the_file_names(number, red, blue, bits, transfer, colour):
    """The code values of R', G' and B', by the formulas of BT.709, BT.601 and BT.2020; no tone is mapped."""
    r, g, b = np.array(colour) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    values = (16 + 219 * luma, 128 + 112 * (b - luma) / (1 - blue), 128 + 112 * (r - luma) / (1 - red))
    dtype = np.uint8 if bits == 8 else np.uint16
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p" if bits == 8 else "yuv420p10le"
        stream.codec_context.colorspace, stream.codec_context.color_trc = number, transfer
        stream.codec_context.color_range = 1
        planes = [
            np.full(96 * 64 // (1 if place == 0 else 4), round(value * 2 ** (bits - 8)), dtype)
            for place, value in enumerate(values)
        ]
        for index in range(5):
            frame = av.VideoFrame(96, 64, stream.pix_fmt)
            for plane, content in zip(frame.planes, planes, strict=True):
                rows = content.reshape(plane.height, plane.width)
                padded = np.zeros((plane.height, plane.line_size // rows.itemsize), dtype)
                padded[:, : plane.width] = rows
                plane.update(padded.tobytes())
            frame.pts, frame.time_base, frame.colorspace, frame.color_range = index, Fraction(1, 5), number, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    ((_, shown),) = media.Media(file.getvalue()).frames([0.4])
    np.testing.assert_allclose(shown, np.broadcast_to(colour, shown.shape), atol=3)


def test_pictures_that_begin_late_without_an_edit_list_end_late():
    """B frames of a file in fragments: its index has the times of decoding, two frames earlier."""
    frames, sound = [made_media.numbered_frame(number) for number in range(6)], made_media.hum(np.arange(9600) / 16000)
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "use_editlist": "0"}
    clip = media.Media(made_media.encoded(frames, sound, fps=10, options=options))
    assert (clip.video.begin, clip.video.end) == pytest.approx((0.2, 0.8), abs=0.03)
    clip = media.Media(made_media.encoded(frames, sound, fps=10, options={"use_editlist": "0"}))
    assert (clip.video.begin, clip.video.end) == pytest.approx((0.2, 0.8), abs=0.03)


@pytest.mark.parametrize(
    "format, codec, rate", [("mpegts", "mp2", 16000), ("mpeg", "mp2", 16000), ("vob", "ac3", 48000)]
)
def test_sound_ends_with_the_last_frame_of_its_last_packet(format, codec, rate):
    """Only the first frame of a packet of these formats has a time."""
    sound = made_media.hum(np.arange(2 * rate) / rate)
    content = made_media.encoded(None, sound, format=format, audio=codec, rate=rate)
    clip = media.Media(content)
    waveform, own_rate, _ = clip.waveform(0.0, 9.0)
    assert len(waveform) / own_rate >= 2.0
    assert clip.audio.end == clip.duration == pytest.approx(len(waveform) / own_rate, abs=0.02) and not clip.damages


def test_an_avi_file_of_adpcm_is_as_long_as_its_header_counts():
    file, rate, block = io.BytesIO(), 8000, 2036
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("adpcm_ms", rate=rate, layout="mono")
        for start in range(0, 4 * block, block):
            sound = made_media.hum(np.arange(start, start + block) / rate)
            container.mux(stream.encode(made_media._block(stream, sound, start)))
        container.mux(stream.encode(None))
    content = bytearray(file.getvalue())
    struct.pack_into("<I", content, content.index(b"strf") + 16, 2 * rate)  # bytes a second: as of PCM, by FFmpeg 5
    clip = media.Media(bytes(content))
    assert not clip.damages and clip.duration == pytest.approx(4 * block / rate, abs=0.01)


def test_h264_in_avi_is_no_longer_than_its_header_says():
    """FFmpeg gives its frames times that are some frames late."""
    frames = [made_media.numbered_frame(number) for number in range(12)]
    for video in ("libx264", "mpeg4"):
        clip = media.Media(made_media.encoded(frames, None, fps=2, format="avi", video=video))
        assert not clip.damages


def test_adpcm_is_found_where_a_wrong_byte_rate_leads_beyond_it():
    """As FFmpeg 5 writes them: the header's bytes a second are a third too few."""
    file, rate, block = io.BytesIO(), 8000, 2036
    time = np.arange(60 * block) / rate
    sound = 0.5 * np.sin(2 * np.pi * (200 + 20 * time) * time)
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("adpcm_ms", rate=rate, layout="mono")
        for start in range(0, len(sound), block):
            container.mux(stream.encode(made_media._block(stream, sound[start : start + block], start)))
        container.mux(stream.encode(None))
    content = bytearray(file.getvalue())
    struct.pack_into("<I", content, content.index(b"fmt ") + 16, 2682)  # of 4023
    clip = media.Media(bytes(content))
    waveform, _, first = clip.waveform(12.0, 1.0)
    begin = round(first * rate)
    assert not clip.damages and clip.duration == pytest.approx(len(sound) / rate, abs=0.01)
    assert first <= 12.0 and np.corrcoef(waveform, sound[begin : begin + len(waveform)])[0, 1] > 0.9
