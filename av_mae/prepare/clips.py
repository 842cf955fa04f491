"""What a preparation is asked for, and one clip → one record: frames as JPEG, audio as FLAC, and what is odd.

Imported by the decoding processes: nothing here may need more than FFmpeg and codecs.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from av_mae.data.audio import resample
from av_mae.errors import ClipFailure, stage
from av_mae.media.decode import GAP, MARGIN, SHORTFALL, Media
from av_mae.media.encode import flac
from av_mae.prepare.masks import read_mask
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.storage import Folder

LONGEST = 3600.0  # seconds
LACKING = 0.1  # of a part that a table gives: a file that ends earlier by more, or by SHORTFALL, is named
LONGER = 1.5  # times the annotated seconds: a file that lasts longer is not the annotated part alone
CLIPPED = 1.5  # of full scale, which decoders overshoot a little
SILENCE = 1e-3  # of full scale
BLACK = 20  # of 255, of the brightest hundredth of the pixels
STILL = 0.5  # of 255, the mean difference of successive frames

File = str | bytes  # a local path, or the content of a file


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """What a record depends on besides its clip.

    Args:
        frames: how many frames, evenly spaced; 0: `frame_rate` a second.
        frame_rate: frames per second.
        size: pixels of the frames' shorter side; smaller frames are not enlarged.
        quality: of the JPEGs, 1 to 100.
        rate: of the audio, Hz.
        shortest: seconds; shorter clips are reported.
        skip: causes (see catalogue.SKIPPABLE) that leave a clip out.
    """

    frames: int = 0
    frame_rate: float = 1.0
    size: int = 256
    quality: int = 90
    rate: int = 16000
    shortest: float = 1.0
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the decoding of one clip may take: seconds of time, bytes of memory."""

    seconds: float = 60.0
    memory: int = 4 << 30


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a preparation is asked for.

    Args:
        dataset: a name in readers.READERS.
        source: the data set as downloaded.
        output: the prepared set.
        table: of the clips, for the data set `folder`.
        splits: only these; empty: all.
        seed: of the clips' order.
        shard_clips: clips per shard.
        record: what each record holds.
        limits: of each clip.
        workers: decoding processes.
        on_error: 'fail' stops at the first clip that cannot be decoded, 'skip' leaves it out.
        max_failures: how many clips may fail; `None`: any number.
    """

    dataset: str
    source: Folder
    output: Folder
    table: str | None = None
    splits: tuple[str, ...] = ()
    seed: int = 0
    shard_clips: int = 1000
    record: RecordOptions = RecordOptions()
    limits: Limits = Limits()
    workers: int = 1
    on_error: str = "skip"
    max_failures: int | None = None


class Outcome(NamedTuple):
    """What becomes of a clip.

    Args:
        record: what is stored, `None` where the clip is left out.
        findings: (cause, stage, message) of each.
        facts: what the report counts.
    """

    record: dict[str, Any] | None
    findings: list[tuple[str, str, str]]
    facts: dict[str, Any]


def make_record(clip: SourceClip, files: Mapping[str, File], options: RecordOptions) -> Outcome:
    """Decodes a whole clip.

    Args:
        clip: what to decode.
        files: the file of each name in clip.files().
        options: what the record holds.

    Raises:
        ClipFailure: where the clip cannot be decoded.
    """
    media = Media(files[clip.media])
    clip, longer = _within(clip, media)
    end = media.duration if clip.end is None else min(clip.end, media.duration)
    duration = end - clip.start
    if clip.start >= media.duration:
        raise ClipFailure("", "open", f"begins at {clip.start:g} s, but the file lasts {media.duration:.2f} s")
    if not 0 < duration <= LONGEST:
        raise ClipFailure(
            "",
            "open",
            f"{duration:.2f} s from {clip.start:g} s on; a clip lasts up to {LONGEST:g} s and lies "
            f"within its file, which lasts {media.duration:.2f} s",
        )
    audio = _audio(media, clip.start, duration, options.rate)
    findings = list(_ends_early(clip, media, 0.0 if audio is None else len(audio) / options.rate))
    sources: list[np.ndarray] = []
    if clip.mixed_with is not None:
        second = Media(files[clip.mixed_with.media])
        audio, sources = _mixture(audio, second, clip.mixed_with, options)
        findings += _ends_early(clip.mixed_with, second, 0.0)
        media.damages = {kind: f"{clip.mixed_with.id}: {text}" for kind, text in second.damages.items()} | media.damages
    if clip.images:
        frames = list(_images(clip, files, duration))
    else:
        frames = list(_frames(media, clip.start, duration, options)) if media.video else []
    small = [_shrink(pixels, options.size) for _, pixels in frames]
    record = {
        "id": clip.id,
        "labels": np.array(clip.labels, np.int64),
        "duration": np.float32(duration),
        "source": clip.source,
        "source_start": np.float32(clip.source_start),
        "frames": [_jpeg(pixels, options.quality) for pixels in small],
        "frame_times": np.array([time for time, _ in frames], np.float32),
        "sound": b"" if audio is None else flac(audio, options.rate),
        "sources": [flac(source, options.rate) for source in sources],
    }
    record |= _annotations(clip, files, small)
    findings += _findings(clip, duration, small, audio, options)
    findings += [("damaged", kind, damage) for kind, damage in media.damages.items()]
    if longer:
        message = f"lasts {media.duration:.2f} s, of which {duration:.2f} s from {clip.start:g} s on are taken"
        findings.append(("too_long", "open", message))
    left_out = any(cause in options.skip for cause, _, _ in findings)
    return Outcome(None if left_out else record, findings, _facts(record, small, audio))


def _within(clip: SourceClip, media: Media) -> tuple[SourceClip, bool]:
    """The clip, and whether its file is longer than the annotated part, so that this part alone is taken.

    Raises ClipFailure where the file does not hold the part.
    """
    if clip.part is None or media.duration <= LONGER * clip.part[1]:
        return clip, False
    start, seconds = clip.part
    if min(start + seconds, media.duration) - start < seconds / LONGER:
        raise ClipFailure(
            "",
            "open",
            f"lasts {media.duration:.2f} s, neither {seconds:g} s nor long enough for those from {start:g} s on",
        )
    return dataclasses.replace(clip, start=start, end=start + seconds), True


def _ends_early(clip: SourceClip, media: Media, heard: float) -> Iterator[tuple[str, str, str]]:
    """Findings where the file ends before the annotated part does, or its picture or sound is far shorter than it.

    Clips of public lists are often a little short: of those, files that lack a third are named. `heard`: the seconds of
    sound that were decoded (an AVI file may say too few), 0 where that is not known.
    """
    start = _within(clip, media)[0].start
    there = seconds = media.duration - start
    enough = 0.0
    if clip.part is not None:
        seconds, enough = clip.part[1], clip.part[1] / LONGER
    elif clip.end is not None:
        seconds = clip.end - clip.start
        enough = seconds - max(GAP, min(SHORTFALL, LACKING * seconds))
    if there < enough:
        yield "ends_early", "open", f"{clip.id}: {there:.2f} s of {seconds:.2f} s are there"
    length = min(there, seconds)
    picture = 0.0 if media.video is None or clip.images else media.video.end - max(media.video.begin, start)
    for kind, name, lasts in (("frame", "picture", picture), ("sound", "sound", heard)):
        if 0 < lasts < length / LONGER:
            yield "ends_early", kind, f"{clip.id}: the {name} lasts {lasts:.2f} s of {length:.2f} s"


def _audio(media: Media, start: float, seconds: float, rate: int) -> np.ndarray | None:
    """float32 [samples] at `rate` Hz from second `start` on, silent before the audio begins; `None` without any."""
    if media.audio is None:
        return None
    waveform, own_rate, began = media.waveform(start - MARGIN, seconds + 2 * MARGIN)
    if not len(waveform):
        return None
    first = max(0, round((start - began) * own_rate))
    count = min(len(waveform), round((start + seconds - began) * own_rate)) - first
    if count <= 0:
        return None
    with stage("sound"):
        audio = resample(waveform, own_rate, rate, first, count)
        if not np.isfinite(audio).all():
            raise ValueError("samples are not finite")
    late = round((began - start) * rate)
    return np.concatenate([np.zeros(late, np.float32), audio]) if late > 0 else audio


def _mixture(
    first: np.ndarray | None, media: Media, other: SourceClip, options: RecordOptions
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sum of two clips' audio, as long as the shorter one, and the two; all quieter where the sum is beyond 1.

    Args:
        first: a clip's audio.
        media: the file of the other clip.
        other: the other clip.
        options: what the record holds.
    """
    other, _ = _within(other, media)
    end = media.duration if other.end is None else min(other.end, media.duration)
    second = _audio(media, other.start, end - other.start, options.rate)
    if first is None or second is None:
        raise ClipFailure("", "sound", "a pair needs two clips with audio")
    length = min(len(first), len(second))
    sources = np.stack([first[:length], second[:length]])
    sources /= max(1.0, float(np.abs(sources.sum(0)).max()), float(np.abs(sources).max()))
    return sources.sum(0), list(sources)


def _frames(media: Media, start: float, duration: float, options: RecordOptions) -> Iterator[tuple[float, np.ndarray]]:
    """Frames with their times in the clip, at the middles of equal parts of it. The rest is decoded and dropped, so
    that damage is found wherever it is."""
    count = options.frames or max(1, round(duration * options.frame_rate))
    times = [start + (number + 0.5) * duration / count for number in range(count)]
    for number, (time, pixels) in enumerate(media.frames([start, *times, start + duration], every=True)):
        if 0 < number <= count:
            yield time - start, pixels


def _images(clip: SourceClip, files: Mapping[str, File], duration: float) -> Iterator[tuple[float, np.ndarray]]:
    times = clip.image_times or (duration / 2,) * len(clip.images)
    with stage("frame"):
        for time, name in zip(times, clip.images, strict=True):
            yield time, _rgb(Image.open(io.BytesIO(_content(files[name]))))


def _rgb(image: Image.Image) -> np.ndarray:
    """An image as a viewer shows it: turned as its camera says, grey of 16 bits by its upper 8; uint8 [H, W, 3]."""
    image = ImageOps.exif_transpose(image)
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("RGB"))
    grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _content(file: File) -> bytes:
    if isinstance(file, bytes):
        return file
    with open(file, "rb") as opened:
        return opened.read()


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] with a shorter side of at most `size`."""
    height, width = pixels.shape[:2]
    if min(height, width) <= size:
        return np.ascontiguousarray(pixels)
    scale = size / min(height, width)
    smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(smaller, Image.Resampling.BICUBIC, reducing_gap=3.0))


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420", fastdct=False)


def _annotations(clip: SourceClip, files: Mapping[str, File], small: list[np.ndarray]) -> dict[str, Any]:
    """The annotations of a record."""
    boxes = np.array(clip.boxes, np.float32).reshape(-1, 4)
    label = clip.labels[0] if clip.labels else -1
    with stage("mask"):
        masks = [
            _mask(clip, name, files[name], small[frame].shape[:2])
            for name, frame in zip(clip.masks, clip.mask_frames, strict=True)
        ]
    return {
        "boxes": boxes,
        "object_labels": np.full(len(boxes), label, np.int64),
        "sounding": np.ones(len(boxes), np.int64),
        "box_annotators": np.array(clip.box_annotators, np.int64),
        "annotators": np.int64(clip.annotators),
        "masks": masks,
        "mask_frames": np.array(clip.mask_frames, np.int64),
    }


def _mask(clip: SourceClip, name: str, file: File, size: tuple[int, int]) -> bytes:
    try:
        return read_mask(_content(file), clip.mask_reader, size, clip.mask_classes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _findings(
    clip: SourceClip, duration: float, small: list[np.ndarray], audio: np.ndarray | None, options: RecordOptions
) -> Iterator[tuple[str, str, str]]:
    if duration < options.shortest:
        yield "too_short", "open", f"lasts {duration:.2f} s"
    if audio is None:
        yield "no_sound", "sound", "the file has no audio in this part" if clip.start or clip.end else "no audio stream"
    elif np.abs(audio).max() < SILENCE:
        yield "silence", "sound", f"peak {_decibels(float(np.abs(audio).max()))} dB"
    elif np.abs(audio).max() > CLIPPED:
        yield "clipped", "sound", f"peak {_decibels(float(np.abs(audio).max()))} dB, what is above 0 dB is cut off"
    if clip.image_times and max(clip.image_times) > duration:
        yield "damaged", "frame", f"frames up to {max(clip.image_times):.2f} s, the audio lasts {duration:.2f} s"
    if not small:
        yield "no_picture", "frame", "no video stream"
        return
    brightest = max(float(np.percentile(pixels.mean(axis=2), 99)) for pixels in small)
    if brightest < BLACK:
        yield "black", "frame", f"no frame is brighter than {brightest:.0f} of 255"
    elif len(small) > 1 and all(pixels.shape == small[0].shape for pixels in small):
        moved = max(float(np.abs(later.astype(np.int16) - pixels).mean()) for pixels, later in zip(small, small[1:]))
        if moved < STILL:
            yield "still", "frame", f"successive frames differ by {moved:.2f} of 255 at most"


def _facts(record: dict[str, Any], small: list[np.ndarray], audio: np.ndarray | None) -> dict[str, Any]:
    peak = 0.0 if audio is None or not len(audio) else float(np.abs(audio).max())
    digest = hashlib.sha256(b"".join([*record["frames"], record["sound"]])).hexdigest()[:32]
    return {
        "seconds": round(float(record["duration"]), 3),
        "frames": len(record["frames"]),
        "size": list(small[0].shape[:2]) if small else [0, 0],
        "peak_db": _decibels(peak),
        "digest": digest,
    }


def _decibels(peak: float) -> float:
    return round(20 * math.log10(max(peak, 1e-5)), 1)
