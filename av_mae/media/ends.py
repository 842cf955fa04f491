"""What is missing at the end of a media file, where its header, its last bytes or its last packet tell."""

import os
import struct
from typing import NamedTuple

LARGEST_PAGE = 27 + 255 + 255 * 255  # bytes of an Ogg page
LAST_BYTES = {"apng": b"IEND\xaeB`\x82", "gif": b";"}
FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of an ASF file
LENGTHS = (188, 192, 204)  # of the packets of a transport stream: plain, with a time before, with a checksum behind
UNKNOWN_COUNT = 2**31 - 1  # and above: what writers put that cannot go back
BIT_RATES = {  # of MPEG audio, kbit/s: (whether it is MPEG 1, layer) → by index
    (True, 1): range(0, 480, 32),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = (44100, 48000, 32000)  # Hz, of MPEG 1


class Last(NamedTuple):
    """A file's last packet: how many there are with it, those of invisible frames included, where it begins and what
    it holds; no packets where they are not known to be all."""

    number: int
    position: int
    content: bytes


def lacks_end(format: str, source: str | os.PathLike[str] | bytes, last: Last) -> str:
    """What a file lacks at its end, '' where nothing is known to be missing.

    Args:
        format: the first of FFmpeg's names of the container's format.
        source: the file's path, or its content.
        last: of all of the file's packets.
    """
    begin, end, size = _both_ends(source)
    if format == "ogg":
        return _lacks_last_page(end)
    if format == "mpegts":
        length = packet_length(begin)
        return "its last packet is not whole" if length and size % length else ""
    if format in LAST_BYTES:
        return "" if end.rstrip(b"\0").endswith(LAST_BYTES[format]) else "its end is not marked as such"
    if format == "ivf" and len(begin) >= 32:
        (expected,) = struct.unpack_from("<I", begin, 24)  # FFmpeg writes a length, others the number of frames
        return f"{last.number} of {expected} frames are there" if last.number < expected < UNKNOWN_COUNT else ""
    properties = begin.find(FILE_PROPERTIES)
    if format == "asf" and 0 <= properties <= len(begin) - 92:
        expected, flags = struct.unpack_from("<40xQ40xI", begin, properties)
        return f"{size} of {expected} bytes are there" if size < expected and not flags & 1 else ""  # 1: a broadcast
    missing = 0
    if format in ("yuv4mpegpipe", "truehd") and last.number:  # a part of a frame becomes no packet
        missing = size - last.position - len(last.content)
    elif format == "mp3":
        missing = _frame_length(last.content) - len(last.content)
    return "its last frame is not whole" if missing > 0 else ""


def _both_ends(source: str | os.PathLike[str] | bytes) -> tuple[bytes, bytes, int]:
    """A file's first and last bytes, and their number."""
    if isinstance(source, bytes):
        return source[:LARGEST_PAGE], source[-LARGEST_PAGE:], len(source)
    with open(source, "rb") as file:
        begin, size = file.read(LARGEST_PAGE), os.fstat(file.fileno()).st_size
        file.seek(max(0, size - LARGEST_PAGE))
        return begin, file.read(), size


def _lacks_last_page(end: bytes) -> str:
    """An Ogg file's last page is marked as such."""
    page = end[end.rfind(b"OggS") :]  # version, flags, 20 bytes more, the number of segments, their lengths, the data
    if not page.startswith(b"OggS") or len(page) < 27 or not page[5] & 4:
        return "its last page is not marked as the last"
    return "" if len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]]) else "its last page is not whole"


def packet_length(begin: bytes) -> int:
    """Bytes of the packets of a transport stream, each of which begins with the same byte; 0 where they do not."""
    for length in LENGTHS:
        first = 4 if length == 192 else 0
        if begin[first : 5 * length : length] == b"G" * 5:
            return length
    return 0


def _frame_length(frame: bytes) -> int:
    """Bytes of a frame of MPEG audio as its header says; 0 where it has no valid header."""
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] < 0xE0:
        return 0
    version, layer = frame[1] >> 3 & 3, 4 - (frame[1] >> 1 & 3)  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bits, rate, padding = frame[2] >> 4, frame[2] >> 2 & 3, frame[2] >> 1 & 1
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return 0
    hertz = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits_a_second = 1000 * BIT_RATES[version == 3, layer][bits]
    if layer == 1:
        return 4 * (12 * bits_a_second // hertz + padding)
    return (72 if layer == 3 and version != 3 else 144) * bits_a_second // hertz + padding
