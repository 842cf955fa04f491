"""How long a media file says that it is, and what of that is known to be exact."""

import os
import struct
from typing import Any

import av

from av_mae.media.ends import UNKNOWN_COUNT

# Formats whose files say how long they are: one that ends sooner is cut off. Where others have a length, FFmpeg has
# guessed it from the bit rate.
PROMISING = {"mov", "matroska", "flv", "avi", "asf", "wav", "w64", "flac", "aiff", "caf", "au"}
EXACT = {"wav", "w64", "flac", "aiff", "caf", "au"}  # to the sample
FROM_ZERO = {"matroska", "flv", "asf"}  # whose lengths may be the time of the last packet
LATE = 0.5  # seconds; files whose first packet is later may count from 0
TIMED = {"mpegts", "mpeg"}  # the last time is the length, but for the rest of its packet: up to 0.5 s of sound
HEADER = 1 << 20  # bytes at a file's beginning that are searched for its length
COUNTED_LATE = 0.15  # seconds by which a count of frames may be too large: some count the header, at 8 kHz 0.07 s


def promised(
    container: av.container.InputContainer, format: str, source: str | os.PathLike[str] | bytes
) -> float | None:
    """How long a file says that it is, in seconds; `None` where it does not say so.

    Args:
        container: the file, open.
        format: the first of FFmpeg's names of the container's format.
        source: the file's path, or its content.
    """
    known = None if container.duration is None else container.duration / av.time_base
    if format == "avi" and known is not None and not container.streams.video:
        # FFmpeg counts ADPCM by a bit rate; the header has the number of blocks.
        audios = [own for own in container.streams.audio if own.frames < UNKNOWN_COUNT]
        known = max([known, *(float(own.frames * (own.time_base or 0)) for own in audios)])
    if format not in ("mp3", "wav"):
        return known if format in (*PROMISING, *TIMED) else None
    if isinstance(source, bytes):
        begin, size = source[:HEADER], len(source)
    else:
        with open(source, "rb") as file:
            begin, size = file.read(HEADER), os.fstat(file.fileno()).st_size
    if format == "mp3":  # a header that counts the frames; an ID3 tag's length is in four times seven bits
        tag = sum((value & 127) << shift for value, shift in zip(begin[6:10], (21, 14, 7, 0)))
        first = begin[10 + tag :][:2048] if begin.startswith(b"ID3") else begin[:2048]
        return known if any(mark in first for mark in (b"Xing", b"Info", b"VBRI")) else None
    position, rate = 12, 0
    while position + 8 <= len(begin):  # FFmpeg takes the file's size for the length where data is missing
        kind, length = struct.unpack_from("<4sI", begin, position)
        if kind == b"fmt " and position + 20 <= len(begin):
            (rate,) = struct.unpack_from("<I", begin, position + 16)  # bytes a second
        if kind == b"data":
            missing = length not in (0, 0xFFFFFFFF) and position + 8 + length > size
            return length / rate if missing and rate else known
        position += 8 + length + length % 2
    return known


def since_begin(length: float | None, format: str, origin: float, last: float) -> float | None:
    """A promised length counted from a file's first packet: some writers count it from 0, whenever that packet is.

    Args:
        length: what `promised` returned.
        format: as of `promised`.
        origin: seconds at which the first packet begins.
        last: seconds from there to the end of the last packet.
    """
    if length is None or format not in FROM_ZERO or origin < LATE or abs(length - origin - last) >= abs(length - last):
        return length
    return length - origin


def end_of_edits(stream: Any, end: float, origin: float) -> float:
    """When a stream ends that begins with an empty edit (mp4, mov), seconds from the file's first packet on.

    FFmpeg shortens a stream's duration to its edits, the empty one included; then its begin must not be added.

    Args:
        stream: of an open file.
        end: seconds of its begin and duration.
        origin: as of `since_begin`.
    """
    edited = float((stream.duration or 0) * stream.time_base) - origin
    shown = [float(entry.timestamp * stream.time_base) for entry in stream.index_entries if not entry.is_discard]
    if len(shown) < 2:
        return end
    # The index has the times of decoding, which begin and end earlier than those of showing.
    begin = end - float((stream.duration or 0) * stream.time_base)
    ended = begin + (shown[-1] - shown[0]) * len(shown) / (len(shown) - 1)
    return edited if abs(ended - edited) < min(LATE, abs(ended - end)) else end


def lacks(format: str, stream: Any, end: float, whole: float | None, short: float) -> str:
    """What a stream lacks of its promised length, '' where nothing is known to be missing.

    The times of an AVI file are counted from chunk to chunk, so that after a lost chunk all pictures are early; the
    header says how many there were.

    Args:
        format: as of `promised`.
        stream: of an open file.
        end: seconds at which its last packet ends.
        whole: what `promised` returned.
        short: seconds that may be missing of audio.
    """
    if format == "avi" and stream.type == "video" and 0 < stream.frames < UNKNOWN_COUNT:
        expected = float(stream.frames * stream.time_base)
        short = 0.5 * float(stream.time_base)
    elif (format in EXACT or format == "mp3") and whole is not None:
        expected, short = whole, COUNTED_LATE if format == "mp3" else short
    else:
        return ""
    return f"{end:.2f} of {expected:.2f} s are there" if end + short < expected else ""
