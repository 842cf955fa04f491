"""Media files by FFmpeg: frames as they are meant to be seen and mono waveforms, near the times that are wanted.

Times are seconds from the file's beginning. Files are read near the wanted times only, and decoded by one thread.
Nothing here bounds the time that a damaged file takes: call it through bounded.Worker.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np

from av_mae.errors import ClipFailure, stage
from av_mae.media.choice import chosen
from av_mae.media.ends import Last, lacks_end
from av_mae.media.promises import EXACT, TIMED, end_of_edits, lacks, promised, since_begin
from av_mae.media.shown import corrupt_jpeg, mono, upright

# What FFmpeg may take a file for. Others name further files or addresses (concat, hls, sdp, image2, …) or are no media.
DEMUXERS = (
    "mov matroska avi flv live_flv asf mpegts mpeg mpegvideo ogg wav w64 flac mp3 aac loas aiff caf au amr ac3 eac3 "
    "dts truehd tta wv ape mpc mpc8 mxf rm nut dv wtv ivf gif apng h264 hevc vvc obu m4v mjpeg vc1 yuv4mpegpipe "
    "jpeg_pipe png_pipe bmp_pipe webp_pipe"
).split()
COUNTED = {"ogg", "flac", "mp3", "aac"}  # times are counted from the samples: a gap is what was lost
CHAINED = COUNTED | TIMED  # files that may be several, one after the other, each with times from 0 on
CHECKED = {"flac"}  # codecs whose blocks have checksums, which FFmpeg compares only where it is told to
SEEK_BACK = 10.0  # seconds before the wanted time at which reading begins: key frames are rarely farther apart
PREROLL = 0.5  # seconds of audio decoded and dropped: a decoder's first samples depend on what it has heard before
GAP = 0.1  # seconds; timestamps that jump ahead by more leave silence, smaller steps are rounding
LOSS = 0.01  # seconds; where times are counted, a jump by more is what was lost
SHORT = 0.05  # seconds that may be missing of an exact length without a word
SHORTFALL = 0.5  # seconds that may be missing at the end before a file counts as cut off
MARGIN = 0.25  # seconds of audio around an excerpt, for the resampling filter
LARGEST_ASPECT = 8  # of a sample
LOUDEST = 8.0  # decoders overshoot 1 a little; 16-bit samples given as floats go far beyond

File = str | os.PathLike[str] | bytes  # a path, or a file's content


class Track(NamedTuple):
    """A stream of a file: its number, and when it begins and ends. `promised`: the file says when it ends."""

    number: int
    begin: float
    end: float
    promised: bool


class Excerpt(NamedTuple):
    """What one clip takes from a file.

    frame: uint8 [H, W, 3], the one shown in the middle of the excerpt, or `None`. waveform: float32 [samples], mono, at
    `rate` Hz, of which the excerpt begins at sample `first` (the rest is margin), or `None`. start: seconds.
    """

    frame: np.ndarray | None
    waveform: np.ndarray | None
    rate: int
    first: int
    start: float


class Media:
    """One media file, a path or its bytes; of its videos and of its audios the default one, or else the first.

    `video` and `audio` are Tracks or `None` (a cover picture is no video), `duration` is in seconds. What cannot be
    read raises ClipFailure with the stage ('open', 'frame', 'sound') and the cause. `damages` grows while the file is
    read: stage → damage that costs little, as half a packet at the end.
    """

    def __init__(self, source: File):
        self._source = source
        self.damages: dict[str, str] = {}
        if av.logging.get_level() is None:  # else PyAV does not count FFmpeg's errors
            av.logging.set_level(av.logging.PANIC)
        with _part("open"), self._open() as container:
            self._format = container.format.name.split(",")[0]
            self._origin = (container.start_time or 0) / av.time_base
            self._chained, self._last, self._chunks = False, Last(0, 0, b""), 0.0
            self.video, self.audio = self._tracks(container)
            if self.video is None and self.audio is None:
                raise ValueError("the file holds neither a picture nor a sound that can be decoded")
            if self.video:
                video: Any = container.streams[self.video.number]
                self._aspect = float(video.sample_aspect_ratio or 1)
                if not 1 / LARGEST_ASPECT <= self._aspect <= LARGEST_ASPECT:
                    raise ValueError(f"the sample aspect ratio {self._aspect:g} is beyond {LARGEST_ASPECT} to 1")
            length, ends = self._length, [track.end for track in (self.video, self.audio) if track]
            known = length is not None and self._format not in EXACT | TIMED and max(ends) < length + GAP
            self.duration = length if known and length else max(ends)
            there = self._chunks if self._format == "avi" else max(ends)  # where FFmpeg shows H.264 some frames late
            if length is not None and self._format not in TIMED and there > length + SHORTFALL / 2:
                self.damages["open"] = f"its packets end at {there:.2f} s, but it says {length:.2f} s"
            if missing := lacks_end(self._format, source, self._last):
                self.damages["open"] = missing

    @property
    def main(self) -> Track:
        """The audio, or the video where there is no audio."""
        track = self.audio or self.video
        assert track is not None
        return track

    def frames(self, times: Sequence[float], every: bool = False) -> Iterator[tuple[float, np.ndarray]]:
        """For each of the rising `times` the nearest frame: its time, and uint8 [H, W, 3].

        Turned and mirrored as the file says, with square pixels; ten bits become eight, without tone mapping. `every`:
        what lies between the times is decoded, however far they are apart, so that damage there is found.
        """
        with _part("frame"):
            decoded: Iterator[tuple[float, Any]] = iter(())
            before = after = None
            for time in times:
                if after is None or time > after[0] + SEEK_BACK and not every:
                    decoded, before = self._decoded(self.video, time), None
                    after = next(decoded, None)
                if after is None:
                    raise ValueError("no frame can be decoded")
                while after[0] < time and (following := next(decoded, None)) is not None:
                    before, after = after, following
                nearest = before if before and time - before[0] <= after[0] - time else after
                yield nearest[0], upright(nearest[1], self._aspect)

    def waveform(self, start: float, seconds: float) -> tuple[np.ndarray, int, float]:
        """The audio from `start` (or where it begins, if later) for `seconds`, channels averaged.

        Returns (float32 [samples], its rate in Hz, the time of its first sample, up to a block before `start`); fewer
        samples where the audio ends, none where it has ended before.
        """
        blocks: list[np.ndarray] = []
        gaps: list[tuple[float, float]] = []
        samples, rate, first, wanted = 0, 0, math.nan, 0
        with _part("sound"):
            for time, frame in self._decoded(self.audio, start - PREROLL, strict_from=start):
                if not blocks and time + frame.samples / frame.sample_rate <= start:
                    continue
                if not blocks:
                    rate, first = frame.sample_rate, time
                    wanted = math.ceil((max(first, start) + seconds - first) * rate)
                if frame.sample_rate != rate:
                    raise ValueError(f"the rate changes from {rate} to {frame.sample_rate} Hz at {time:.2f} s")
                silence = round((time - first) * rate) - samples
                counted = self._format in COUNTED
                if silence > (LOSS if counted else GAP) * rate:
                    if counted:
                        raise ValueError(f"{silence / rate:.2f} s are lost at {time - silence / rate:.2f} s")
                    if len(blocks) > 1 or silence > SHORTFALL * rate:  # FFmpeg's fragments begin with such a gap
                        gaps.append((first + samples / rate, min(silence, wanted - samples) / rate))
                    blocks.append(np.zeros(min(silence, wanted - samples), np.float32))
                    samples += len(blocks[-1])
                elif silence < -GAP * rate and self._format != "avi":  # whose chunks of sound may share a time
                    self.damages.setdefault(
                        "sound", f"{-silence / rate:.2f} s more than its times say, at {time:.2f} s"
                    )
                blocks.append(mono(frame))
                samples += len(blocks[-1])
                if samples >= wanted:
                    break
            waveform = np.concatenate([np.zeros(0, np.float32), *blocks])
            if gaps:
                total, places = sum(seconds for _, seconds in gaps), f"{len(gaps)} time{'s' * (len(gaps) > 1)}"
                message = f"its times jump ahead {places}, {total:.2f} s of silence, first at {gaps[0][0]:.2f} s"
                self.damages.setdefault("sound", message)
            loudest = float(np.abs(waveform).max(initial=0.0))
            if loudest > LOUDEST:
                raise ValueError(f"samples reach {loudest:g}, but floats must lie in -1…1; divide 16-bit ones by 32768")
        return waveform, rate, first

    def _open(self) -> av.container.InputContainer:
        source: Any = io.BytesIO(self._source) if isinstance(self._source, bytes) else f"file:{os.fspath(self._source)}"
        protocols = "none" if isinstance(self._source, bytes) else "file"
        options = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": protocols}
        try:
            # A title that is no UTF-8 is no reason to fail.
            return av.open(source, "r", options=options, metadata_errors="ignore")
        except av.ArgumentError as error:
            raise ValueError(
                "the file holds neither a picture nor a sound that can be decoded; lists and scripts that name other "
                "files are not followed"
            ) from error

    def _tracks(self, container: av.container.InputContainer) -> tuple[Track | None, Track | None]:
        """The video and the audio of a file."""
        streams = chosen(container, self._format, self._source)
        length = promised(container, self._format, self._source)
        ends: dict[int, float] = {}
        if self._format != "mov" or any(stream.duration is None for stream in streams.values()):
            ends = self._last_ends(length)
            length = since_begin(length, self._format, self._origin, max(ends.values(), default=0.0))
        self._length = length
        exact = self._format not in TIMED or any(stream.duration is None for stream in streams.values())
        cut_off = exact and length is not None and max(ends.values(), default=length) + SHORTFALL < length
        tracks: dict[str, Track] = {}
        for kind, stream in streams.items():
            begin = 0.0 if stream.start_time is None else self._seconds(stream.start_time, stream)
            if stream.index in ends:
                end = length if cut_off and length else ends[stream.index]
                if missing := lacks(self._format, stream, ends[stream.index], length, SHORT):
                    self.damages["frame" if kind == "video" else "sound"] = missing
            else:
                end = begin + float((stream.duration or 0) * stream.time_base)
                if begin + self._origin > GAP and (edited := end_of_edits(stream, end, self._origin)) < end:
                    end, self._length = edited, None
            tracks[kind] = Track(stream.index, begin, end, cut_off or self._format == "mov")
        return tracks.get("video"), tracks.get("audio")

    def _last_ends(self, known: float | None) -> dict[int, float]:
        """When the last packet of each stream ends, found near `known` or by reading all (`None`); decodes nothing."""
        ends: dict[int, float] = {}
        count, last = 0, None
        with self._open() as container, contextlib.suppress(av.FFmpegError):
            if known is not None and known > SEEK_BACK:
                container.seek(int((known - SEEK_BACK + self._origin) * av.time_base))
            for packet in container.demux():
                if packet.size:
                    count, last = count + 1, packet
                end = ends.get(packet.stream_index, 0.0)
                begin = end if packet.pts is None else self._seconds(packet.pts, packet)
                if packet.stream.type == "audio" and begin < end - GAP and self._format in CHAINED:
                    begin, self._chained = end, True
                ends[packet.stream_index] = max(end, begin + _times(packet.duration or 0, packet.time_base))
                if packet.dts is not None:
                    self._chunks = max(self._chunks, self._seconds(packet.dts + (packet.duration or 0), packet))
        if last:
            self._last = Last(count, last.pos or 0, bytes(last))
        if known is None or ends and (self._format not in EXACT or abs(max(ends.values()) - known) < GAP):
            return ends
        # FFmpeg seeks in ADPCM by a byte rate that may be wrong.
        whole = self._last_ends(None)
        self._chained |= any(abs(whole[number] - end) > LOSS for number, end in ends.items())
        return whole

    def _seconds(self, timestamp: int, timed: Any) -> float:
        """A timestamp of a stream, packet or frame in seconds."""
        return _times(timestamp, timed.time_base) - self._origin

    def _decoded(self, track: Track | None, time: float, strict_from: float = -math.inf) -> Iterator[tuple[float, Any]]:
        """Decoded frames from the one at or before `time` on, with their times, which never fall.

        Raises ValueError at a damaged packet from `strict_from` on, and where the file ends before it says.
        """
        assert track is not None
        unopened, _ = av.logging.get_last_error()
        container, packets, whole = self._packets(track.number, time)
        shown, following, read, ended_early = -math.inf, 0.0, 0.0, False
        kind = "frame" if track is self.video else "sound"
        # FFmpeg also reports what a decoder misses that begins in the middle: that is no damage.
        strict_log = strict_from if whole else max(strict_from, time)
        with container:
            errors, opening = av.logging.get_last_error()
            in_opening = errors > unopened and whole and strict_log <= track.begin
            for packet in packets:
                begin = read if packet.pts is None else self._seconds(packet.pts, packet)
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if begin < strict_from:
                        continue
                    raise ValueError(f"cannot be decoded at {begin:.2f} s: {error.strerror}") from error
                count, last = av.logging.get_last_error()
                end = begin + _times(packet.duration or 0, packet.time_base)
                damage = ""
                if begin >= strict_log:  # what is only decoded on the way there need not be looked at
                    damage = " ".join(last[2].split()) if count > errors and last else corrupt_jpeg(packet)
                if damage:
                    if 2 * end - begin >= track.end:  # files that were cut by others often end in half a packet
                        self.damages[kind] = f"damaged at {begin:.2f} s: {damage}"
                    elif ended_early := damage.endswith(("ended prematurely", "partial file")):
                        break
                    else:
                        raise ValueError(f"damaged at {begin:.2f} s: {damage}")
                elif packet.is_corrupt and begin >= strict_log:
                    self.damages[kind] = f"damaged at {begin:.2f} s: the packet is marked or not whole"
                errors = count
                for frame in frames:
                    own = following if frame.pts is None else self._seconds(frame.pts, frame)
                    if self._chained and own < following - GAP:
                        own = following
                    elif own < shown - (GAP if kind == "sound" else SHORTFALL):  # B frames of AVI fall a little
                        raise ValueError(f"the times fall from {shown:.2f} to {own:.2f} s")
                    elif kind == "sound" and own < following - SHORT:
                        self.damages[kind] = f"at {own:.2f} s a block begins {following - own:.2f} s too early"
                    elif self._format != "avi" and own < shown - GAP:
                        self.damages[kind] = f"the times fall from {shown:.2f} to {own:.2f} s"
                    shown = max(shown, own)
                    yield shown, frame
                    if isinstance(frame, av.AudioFrame):
                        following = shown + frame.samples / frame.sample_rate
                    else:
                        following = shown + _times(frame.duration or 0, frame.time_base)
                read = max(read, end)
        # Opening reads seconds ahead, and what FFmpeg has said then concerns those who read all of the file.
        if in_opening and opening and opening[1] == container.format.name:
            raise ValueError(f"damaged: {' '.join(opening[2].split())}")
        if ended_early or track.promised and read + SHORTFALL < track.end:
            raise ValueError(f"the file is cut off: {read:.2f} of {track.end:.2f} s are there")

    def _packets(self, number: int, time: float) -> tuple[av.container.InputContainer, Iterator[Any], bool]:
        """The file, open, the packets of a stream from the last key packet at or before `time` on, and whether they
        begin with the stream's first packet.

        Without such a packet from the first key packet on, or from the first packet where none is a key.
        """
        if time > SEEK_BACK and not self._chained:
            with contextlib.suppress(av.FFmpegError):  # what cannot seek is read up to there
                container, lead, packets, _ = self._lead(number, time, time - SEEK_BACK)
                if lead[0].is_keyframe and lead[0].pts is not None and self._seconds(lead[0].pts, lead[0]) <= time:
                    return container, itertools.chain(lead, packets), False
        container, lead, packets, whole = self._lead(number, time, None)
        return container, itertools.chain(lead, packets), whole

    def _lead(
        self, number: int, time: float, seek_to: float | None
    ) -> tuple[av.container.InputContainer, list[Any], Iterator[Any], bool]:
        """The open file, a stream's packets from the last key packet up to `time`, an iterator over the rest, and
        whether these packets are all of the stream."""
        container = self._open()
        stream: Any = container.streams[number]
        stream.codec_context.thread_count = 1
        if stream.codec_context.name in CHECKED:
            stream.codec_context.options = {"err_detect": "crccheck"}
        if seek_to is not None:
            container.seek(int((seek_to + self._origin) / stream.time_base), stream=stream)
        lead: list[Any] = []
        packets, whole = container.demux(stream), True
        # Audio is decoded from its first packet on, which says how many samples an edit list cuts off.
        keep = self._chained or stream.type == "audio" and seek_to is None
        for packet in packets:
            begin = None if packet.pts is None else self._seconds(packet.pts, packet)
            keyless = lead and not lead[0].is_keyframe
            if packet.is_keyframe and begin is not None and (begin <= time or keyless) and lead and not keep:
                if keyless and begin > time and seek_to is None:
                    self.damages["frame"] = f"the first key frame is at {begin:.2f} s"
                lead, whole = [], False
            lead.append(packet)
            if packet.dts is not None and self._seconds(packet.dts, packet) > time and lead[0].is_keyframe:
                break
        return container, lead, packets, whole


def _times(count: int, unit: Fraction | None) -> float:
    """`float(count * unit)`, rounded alike, in a tenth of the time; 0 without a unit."""
    return count * unit.numerator / unit.denominator if unit else 0.0


def span(source: File) -> tuple[float, float]:
    """When a file's audio begins and ends, in seconds; that of its video where there is no audio."""
    media = Media(source)
    track = media.main
    return track.begin, track.end


def read_excerpt(source: File, start: float | None, seconds: float) -> Excerpt:
    """`seconds` of a file from `start` on (`None`: its middle), by the audio where there is one; less where it ends.

    Raises ClipFailure where the file cannot be read, or has nothing there.
    """
    media = Media(source)
    track = media.main
    if start is None:
        start = track.begin + max(0.0, (track.end - track.begin - seconds) / 2)
    waveform, rate, first, end = None, 0, 0, track.end
    if media.audio:
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
    if media.video:
        _, frame = next(media.frames([start + min(seconds, end - start) / 2]))
    return Excerpt(frame, waveform, rate, first, start)


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """A stage whose errors have FFmpeg's message without its number."""
    with stage(name):
        try:
            yield
        except av.FFmpegError as error:
            raise ValueError(error.strerror) from error
