"""Media files by FFmpeg: frames as they are meant to be seen and mono sound, near the times that are wanted.

Times are seconds from the file's beginning. Files are read near the wanted times only, and decoded by one thread.
Nothing here bounds the time that a damaged file takes: call it through bounded.Worker.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

from av_mae.errors import ClipFailure, stage

SEEK_BACK = 10.0  # seconds before the wanted time at which reading begins: key frames are rarely farther apart
PREROLL = 0.5  # seconds of sound decoded and dropped: a decoder's first samples depend on what it has heard before
GAP = 0.1  # seconds; timestamps that jump ahead by more leave silence, smaller steps are rounding
SHORTFALL = 0.5  # seconds that may be missing at the end before a file counts as cut off
MARGIN = 0.25  # seconds of sound around an excerpt, for the resampling filter
LARGEST_ASPECT = 8  # of a sample


class Track(NamedTuple):
    """A stream of a file: its number, and when it begins and ends. `indexed`: the file's index says so."""

    index: int
    begin: float
    end: float
    indexed: bool


class Excerpt(NamedTuple):
    """What one clip takes from a file.

    frame: uint8 [H, W, 3], the one shown in the middle of the excerpt, or None. waveform: float32 [samples], mono, at
    `rate` Hz, of which the excerpt begins at sample `first` (the rest is margin), or None. start: seconds.
    """

    frame: np.ndarray | None
    waveform: np.ndarray | None
    rate: int
    first: int
    start: float


class Media:
    """One media file, a path or its bytes; its first picture and its first sound that FFmpeg has a decoder for.

    `picture` and `sound` are Tracks or None (a cover picture is none), `duration` is in seconds. What cannot be read
    raises ClipFailure with the stage ('open', 'frame', 'sound') and the cause.
    """

    def __init__(self, source: str | os.PathLike | bytes):
        self._source = source
        with _part("open"), self._open() as container:
            self._origin = (container.start_time or 0) / av.time_base
            self.picture, self.sound = self._track(container, "video"), self._track(container, "audio")
            if self.picture is None and self.sound is None:
                raise ValueError("the file holds neither a picture nor a sound that can be decoded")
            if self.picture:
                self._aspect = float(container.streams[self.picture.index].sample_aspect_ratio or 1)
                if not 1 / LARGEST_ASPECT <= self._aspect <= LARGEST_ASPECT:
                    raise ValueError(f"the sample aspect ratio {self._aspect:g} is beyond {LARGEST_ASPECT} to 1")
            longest = max(track.end for track in (self.picture, self.sound) if track)
            self.duration = longest if container.duration is None else container.duration / av.time_base

    def frames(self, times: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
        """For each of the rising `times` the nearest frame: its time, and uint8 [H, W, 3].

        Turned and mirrored as the file says, with square pixels; ten bits become eight, without tone mapping.
        """
        with _part("frame"):
            decoded = before = after = None
            for time in times:
                if after is None or time > after[0] + SEEK_BACK:
                    decoded, before = self._decoded(self.picture, time), None
                    after = next(decoded, None)
                if after is None:
                    raise ValueError("no frame can be decoded")
                while after[0] < time and (following := next(decoded, None)) is not None:
                    before, after = after, following
                nearest = before if before and time - before[0] <= after[0] - time else after
                yield nearest[0], self._upright(nearest[1])

    def waveform(self, start: float, seconds: float) -> tuple[np.ndarray, int, float]:
        """The sound from `start` (or where it begins, if later) for `seconds`, channels averaged.

        Returns (float32 [samples], its rate in Hz, the time of its first sample, up to a block before `start`); fewer
        samples where the sound ends, none where it has ended before.
        """
        blocks, samples, rate, first = [], 0, 0, math.nan
        with _part("sound"):
            for time, frame in self._decoded(self.sound, start - PREROLL, strict_from=start):
                if not blocks and time + frame.samples / frame.sample_rate <= start:
                    continue
                if not blocks:
                    rate, first = frame.sample_rate, time
                    wanted = math.ceil((max(first, start) + seconds - first) * rate)
                if frame.sample_rate != rate:
                    raise ValueError(f"the rate changes from {rate} to {frame.sample_rate} Hz at {time:.2f} s")
                silence = round((time - first) * rate) - samples
                if silence > GAP * rate:
                    blocks.append(np.zeros(min(silence, wanted - samples), np.float32))
                    samples += len(blocks[-1])
                blocks.append(_mono(frame))
                samples += len(blocks[-1])
                if samples >= wanted:
                    break
        return np.concatenate([np.zeros(0, np.float32), *blocks]), rate, first

    def _open(self) -> av.container.InputContainer:
        named = not isinstance(self._source, bytes)
        source = f"file:{os.fspath(self._source)}" if named else io.BytesIO(self._source)
        return av.open(source, metadata_errors="ignore")  # a title that is no UTF-8 is no reason to fail

    def _track(self, container: av.container.InputContainer, kind: str) -> Track | None:
        for stream in container.streams:
            if stream.type != kind or stream.codec_context is None or stream.disposition & Disposition.attached_pic:
                continue
            begin = 0.0 if stream.start_time is None else self._seconds(stream.start_time, stream)
            if stream.duration is None:
                guess = 0.0 if container.duration is None else container.duration / av.time_base
                return Track(stream.index, begin, self._last_end(stream.index, guess), indexed=False)
            end = begin + float(stream.duration * stream.time_base)
            return Track(stream.index, begin, end, indexed=container.format.name.startswith("mov"))
        return None

    def _last_end(self, index: int, guess: float) -> float:
        """When the last packet of a stream ends, found near `guess` or by reading all of it; decodes nothing."""
        container, packets = self._packets(index, guess)
        with container:
            return max(
                (
                    self._seconds(packet.pts + (packet.duration or 0), packet)
                    for packet in packets
                    if packet.pts is not None
                ),
                default=0.0,
            )

    def _seconds(self, timestamp: int, timed: av.stream.Stream | av.Packet | av.frame.Frame) -> float:
        return float(timestamp * timed.time_base) - self._origin

    def _decoded(
        self, track: Track, time: float, strict_from: float = -math.inf
    ) -> Iterator[tuple[float, av.VideoFrame | av.AudioFrame]]:
        """Decoded frames from the one at or before `time` on, with their times, which never fall.

        Raises ValueError at a damaged packet from `strict_from` on, and where the file ends before its index says.
        """
        container, packets = self._packets(track.index, time)
        shown = read = 0.0
        with container:
            for packet in packets:
                begin = read if packet.pts is None else self._seconds(packet.pts, packet)
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if begin < strict_from:
                        continue
                    raise ValueError(f"cannot be decoded at {begin:.2f} s: {error.strerror}") from error
                for frame in frames:
                    shown = shown if frame.pts is None else max(shown, self._seconds(frame.pts, frame))
                    yield shown, frame
                read = max(read, begin + float((packet.duration or 0) * packet.time_base))
        if track.indexed and read + SHORTFALL < track.end:
            raise ValueError(f"the file is cut off: {read:.2f} of {track.end:.2f} s are there")

    def _packets(self, index: int, time: float) -> tuple[av.container.InputContainer, Iterator[av.Packet]]:
        """The file, open, and the packets of a stream from the last key packet at or before `time` on.

        Without such a packet from the first key packet on, or from the first packet where none is a key.
        """
        if time > SEEK_BACK:
            with contextlib.suppress(av.FFmpegError):  # what cannot seek is read up to there
                container, lead, packets = self._lead(index, time, time - SEEK_BACK)
                if lead[0].is_keyframe and lead[0].pts is not None and self._seconds(lead[0].pts, lead[0]) <= time:
                    return container, itertools.chain(lead, packets)
        container, lead, packets = self._lead(index, time, None)
        return container, itertools.chain(lead, packets)

    def _lead(self, index: int, time: float, seek_to: float | None):
        """The open file, a stream's packets from the last key packet up to `time`, and an iterator over the rest."""
        container = self._open()
        stream = container.streams[index]
        stream.codec_context.thread_count = 1
        if seek_to is not None:
            container.seek(int((seek_to + self._origin) / stream.time_base), stream=stream)
        packets, lead = container.demux(stream), []
        for packet in packets:
            begin = None if packet.pts is None else self._seconds(packet.pts, packet)
            keyless = lead and not lead[0].is_keyframe
            if packet.is_keyframe and begin is not None and (begin <= time or keyless):
                lead = []
            lead.append(packet)
            if packet.dts is not None and self._seconds(packet.dts, packet) > time and lead[0].is_keyframe:
                break
        return container, lead, packets

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """A decoded frame as it is meant to be seen: uint8 [H, W, 3]."""
        width = max(1, round(frame.width * self._aspect))
        pixels = frame.reformat(width=width, format="rgb24", threads=1).to_ndarray()
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
        if matrix is None:
            return pixels
        # A point (x, y) is shown at (a x + c y, b x + d y); of the angles, the nearest quarter turn counts.
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def span(source: str | os.PathLike | bytes) -> tuple[float, float]:
    """When a file's sound begins and ends, in seconds; that of its picture where there is no sound."""
    media = Media(source)
    track = media.sound or media.picture
    return track.begin, track.end


def read_excerpt(source: str | os.PathLike | bytes, start: float | None, seconds: float) -> Excerpt:
    """`seconds` of a file from `start` on (None: its middle), by the sound where there is one; less where it ends.

    Raises ClipFailure where the file cannot be read, or has nothing there.
    """
    media = Media(source)
    track = media.sound or media.picture
    if start is None:
        start = track.begin + max(0.0, (track.end - track.begin - seconds) / 2)
    waveform, rate, first, end = None, 0, 0, track.end
    if media.sound:
        waveform, rate, began = media.waveform(start - MARGIN, seconds + 2 * MARGIN)
        first = max(0, round((start - began) * rate)) if len(waveform) else 0
        if first >= len(waveform) or began >= start + seconds:
            raise ClipFailure(
                "",
                "sound",
                f"none from {start:.2f} to {start + seconds:.2f} s, "
                f"it lasts from {track.begin:.2f} to {track.end:.2f} s",
            )
        start, end = began + first / rate, began + len(waveform) / rate
    elif start > end:
        raise ClipFailure(
            "", "frame", f"none at {start:.2f} s, the picture lasts from {track.begin:.2f} to {end:.2f} s"
        )
    frame = None
    if media.picture:
        _, frame = next(media.frames([start + min(seconds, end - start) / 2]))
    return Excerpt(frame, waveform, rate, first, start)


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """Channels averaged, whole numbers scaled to -1…1: float32 [samples]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean = samples.mean(axis=0, dtype=np.float32)
    if samples.dtype == np.uint8:  # silence is 128
        return mean / 128 - 1
    return mean / -float(np.iinfo(samples.dtype).min) if samples.dtype.kind == "i" else mean


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """A stage whose errors have FFmpeg's message without its number."""
    with stage(name):
        try:
            yield
        except av.FFmpegError as error:
            raise ValueError(error.strerror) from error
