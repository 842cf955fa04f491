"""Which video and which audio of a file are taken."""

import os
from typing import Any

import av
from av.stream import Disposition

from av_mae.media.ends import packet_length

HEADER = 1 << 20  # bytes at the beginning of a transport stream that are searched for its tables


def chosen(
    container: av.container.InputContainer, format: str, source: str | os.PathLike[str] | bytes
) -> dict[str, Any]:
    """The streams 'video' and 'audio' of an open file, where it has them: each the default one or else the first.

    Pictures of a cover are no video. Of a transport stream with several programs, only the first that has both counts.

    Args:
        container: the file.
        format: the first of FFmpeg's names of the container's format.
        source: the file's path, or its content.
    """
    streams: list[Any] = [
        stream
        for stream in container.streams
        if stream.codec_context is not None
        and stream.type in ("video", "audio")
        and not stream.disposition & Disposition.attached_pic
    ]
    if format == "mpegts" and len(streams) > 2:
        for program in programs(_begin(source)):
            own = [stream for stream in streams if stream.id in program]
            if {stream.type for stream in own} == {"video", "audio"}:
                streams = own
                break
    found: dict[str, Any] = {}
    for stream in sorted(streams, key=lambda stream: not stream.disposition & Disposition.default):
        found.setdefault(stream.type, stream)
    return found


def programs(begin: bytes) -> list[set[int]]:
    """The numbers of the streams of each program of a transport stream, by its first tables (ISO/IEC 13818-1, 2.4.4).

    Tables that do not fit into one packet count as far as they are in their first one.
    """
    length, tables, found = packet_length(begin), list[int](), dict[int, set[int]]()
    for first in range(0, len(begin) - length + 1, length) if length else ():
        packet = begin[first + (4 if length == 192 else 0) :][:188]
        pid, starts = int.from_bytes(packet[1:3], "big") & 0x1FFF, packet[1] & 0x40
        payload = packet[5 + packet[4] if packet[3] & 0x20 else 4 :]
        section = payload[1 + payload[0] :] if payload else b""  # from the pointer on
        if not starts or len(section) < 12 or pid and pid not in tables:
            continue
        end = min(len(section), 3 + (int.from_bytes(section[1:3], "big") & 0xFFF) - 4)  # 4: the checksum
        if pid == 0 and section[0] == 0 and not tables:
            numbers = [(section[at : at + 2], section[at + 2 : at + 4]) for at in range(8, end - 3, 4)]
            tables = [int.from_bytes(table, "big") & 0x1FFF for program, table in numbers if program != b"\0\0"]
        elif pid and section[0] == 2 and pid not in found:
            at = 12 + (int.from_bytes(section[10:12], "big") & 0xFFF)
            found[pid] = set()
            while at + 5 <= end:
                found[pid].add(int.from_bytes(section[at + 1 : at + 3], "big") & 0x1FFF)
                at += 5 + (int.from_bytes(section[at + 3 : at + 5], "big") & 0xFFF)
    return [found[pid] for pid in tables if pid in found]


def _begin(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:HEADER]
    with open(source, "rb") as file:
        return file.read(HEADER)
