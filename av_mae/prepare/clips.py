"""One clip → one record: frames as JPEG, sound as FLAC, and what is odd about them.

Imported by the decoding processes: nothing here may need more than FFmpeg and codecs.
"""

import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from av_mae.data.audio import read_resampled
from av_mae.errors import ClipFailure, stage
from av_mae.media.decode import MARGIN, Media
from av_mae.media.encode import flac
from av_mae.prepare.readers.catalogue import SourceClip

BINARY = 255
CLASSES = 256


def read_mask(content: bytes, reader: str, size: tuple[int, int]) -> bytes:
    """A mask picture → PNG of (height, width): 0 and 255 ('binary'), or class numbers ('colours', 'numbers').

    'binary': whatever is not black sounds. 'colours': AVSBench's colour of each class. 'numbers': grey values.
    Raises ValueError for a colour that is no class.
    """
    picture = Image.open(io.BytesIO(content))
    if reader == "numbers":
        pixels = np.asarray(picture if picture.mode in ("L", "P") else picture.convert("L"))
    else:
        colours = np.asarray(picture.convert("RGB"))
        pixels = np.uint8(BINARY) * colours.any(axis=2) if reader == "binary" else _classes(colours)
    height, width = size
    resized = Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    resized.save(file, "PNG")
    return file.getvalue()


@functools.cache
def palette() -> np.ndarray:
    """AVSBench's (and PASCAL VOC's) colour of each class: uint8 [256, 3].

    Bits 0, 1 and 2 of the class are the highest bits of red, green and blue, bits 3, 4 and 5 the next ones, and so on.
    """
    colours = np.zeros((CLASSES, 3), np.uint8)
    for place in range(3):
        shifted = np.arange(CLASSES) >> 3 * place
        for channel in range(3):
            colours[:, channel] |= ((shifted >> channel & 1) << 7 - place).astype(np.uint8)
    return colours


def _classes(colours: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [H, W]."""
    weights = np.array([1 << 16, 1 << 8, 1])
    known, asked = palette().astype(np.int64) @ weights, colours.astype(np.int64) @ weights
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known[order], asked), CLASSES - 1)
    numbers = order[place]
    wrong = known[numbers] != asked
    if wrong.any():
        raise ValueError(f"colour {tuple(map(int, colours[wrong][0]))} of a mask is no class")
    return numbers.astype(np.uint8)


LONGEST = 3600.0  # seconds
SILENCE = 1e-3  # of full scale
BLACK = 20  # of 255, of the brightest hundredth of the pixels
STILL = 0.5  # of 255, the mean difference of successive frames

File = str | bytes  # a local path, or the content of a file


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """What a record depends on besides its clip. frames: how many, evenly spaced (0: `frame_rate` a second).

    size: pixels of the shorter side, never enlarged. quality: of the JPEGs. rate: of the sound, Hz. shortest: seconds.
    skip: causes (see catalogue.CAUSES) that leave a clip out.
    """

    frames: int = 0
    frame_rate: float = 1.0
    size: int = 256
    quality: int = 90
    rate: int = 16000
    shortest: float = 1.0
    skip: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """record: what is stored, or None. findings: (cause, stage, message). facts: what the report counts."""

    record: dict[str, Any] | None
    findings: list[tuple[str, str, str]]
    facts: dict[str, Any]


def make_record(clip: SourceClip, files: Mapping[str, File], options: RecordOptions) -> Outcome:
    """Decodes a clip whole. `files`: each of clip.files(). Raises ClipFailure where it cannot be decoded."""
    media = Media(files[clip.media])
    end = media.duration if clip.end is None else min(clip.end, media.duration)
    duration = end - clip.start
    if not 0 < duration <= LONGEST:
        raise ClipFailure(
            f"open: {duration:.2f} s from {clip.start:g} s on; a clip lasts up to {LONGEST:g} s and lies "
            f"within its file, which lasts {media.duration:.2f} s"
        )
    sound = _sound(media, clip.start, duration, options.rate)
    sources = []
    if clip.mixed_with is not None:
        sound, sources = _mixture(sound, clip.mixed_with, files, options)
    if clip.images:
        pictures = list(_images(clip, files, duration))
    else:
        pictures = list(_pictures(media, clip.start, duration, options)) if media.picture else []
    small = [_shrink(pixels, options.size) for _, pixels in pictures]
    record = {
        "id": clip.id,
        "labels": np.array(clip.labels, np.int64),
        "duration": np.float32(duration),
        "source": clip.source,
        "source_start": np.float32(clip.source_start),
        "frames": [_jpeg(pixels, options.quality) for pixels in small],
        "frame_times": np.array([time for time, _ in pictures], np.float32),
        "sound": b"" if sound is None else flac(sound, options.rate),
        "sources": [flac(source, options.rate) for source in sources],
    }
    record |= _truth(clip, files, small)
    findings = list(_findings(clip, duration, small, sound, options))
    left_out = any(cause in options.skip for cause, _, _ in findings)
    return Outcome(None if left_out else record, findings, _facts(record, small, sound))


def _sound(media: Media, start: float, seconds: float, rate: int) -> np.ndarray | None:
    """float32 [samples] at `rate` Hz from `start` on, silent before the sound begins; None without sound there."""
    if media.sound is None:
        return None
    waveform, own_rate, began = media.waveform(start - MARGIN, seconds + 2 * MARGIN)
    if not len(waveform):
        return None
    first = max(0, round((start - began) * own_rate))
    count = min(len(waveform), round((start + seconds - began) * own_rate)) - first
    if count <= 0:
        return None
    with stage("sound"):

        def read(place: int, length: int) -> np.ndarray:
            return waveform[place : place + length]

        sound = read_resampled(read, len(waveform), own_rate, rate, first, count)
        if not np.isfinite(sound).all():
            raise ValueError("samples are not finite")
    late = round((began - start) * rate)
    return np.concatenate([np.zeros(late, np.float32), sound]) if late > 0 else sound


def _mixture(
    sound: np.ndarray | None, other: SourceClip, files: Mapping[str, File], options: RecordOptions
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two clips' sounds added, as long as the shorter one, and the two; all quieter where the sum is beyond 1."""
    media = Media(files[other.media])
    second = _sound(media, other.start, media.duration - other.start, options.rate)
    if sound is None or second is None:
        raise ClipFailure("sound: a pair needs two clips with sound")
    length = min(len(sound), len(second))
    sources = np.stack([sound[:length], second[:length]])
    sources /= max(1.0, float(np.abs(sources.sum(0)).max()), float(np.abs(sources).max()))
    return sources.sum(0), list(sources)


def _pictures(
    media: Media, start: float, duration: float, options: RecordOptions
) -> Iterator[tuple[float, np.ndarray]]:
    """Frames with their times in the clip, at the middles of equal parts of it. The rest is decoded and dropped, so
    that damage is found wherever it is."""
    count = options.frames or max(1, round(duration * options.frame_rate))
    times = [start + (number + 0.5) * duration / count for number in range(count)]
    for number, (time, pixels) in enumerate(media.frames([*times, start + duration])):
        if number < count:
            yield time - start, pixels


def _images(clip: SourceClip, files: Mapping[str, File], duration: float) -> Iterator[tuple[float, np.ndarray]]:
    times = clip.image_times or (duration / 2,) * len(clip.images)
    with stage("frame"):
        for time, name in zip(times, clip.images, strict=True):
            yield time, np.asarray(Image.open(_opened(files[name])).convert("RGB"))


def _opened(file: File) -> io.BytesIO | str:
    return io.BytesIO(file) if isinstance(file, bytes) else file


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


def _truth(clip: SourceClip, files: Mapping[str, File], small: list[np.ndarray]) -> dict[str, Any]:
    """The annotations of a record."""
    boxes = np.array(clip.boxes, np.float32).reshape(-1, 4)
    label = clip.labels[0] if clip.labels else -1
    with stage("mask"):
        masks = [
            read_mask(_content(files[name]), clip.mask_reader, small[frame].shape[:2])
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


def _findings(
    clip: SourceClip, duration: float, small: list[np.ndarray], sound: np.ndarray | None, options: RecordOptions
) -> Iterator[tuple[str, str, str]]:
    if duration < options.shortest:
        yield "too_short", "open", f"lasts {duration:.2f} s"
    if sound is None:
        yield "no_sound", "sound", "the file has no sound in this part" if clip.start or clip.end else "no audio stream"
    elif np.abs(sound).max() < SILENCE:
        yield "silence", "sound", f"peak {_decibels(float(np.abs(sound).max()))} dB"
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


def _facts(record: dict[str, Any], small: list[np.ndarray], sound: np.ndarray | None) -> dict[str, Any]:
    peak = 0.0 if sound is None or not len(sound) else float(np.abs(sound).max())
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
