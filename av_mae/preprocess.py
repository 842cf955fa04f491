"""Any media file, or a frame and a waveform → exactly what the model expects: a batch of one clip.

Window, crop and features are computed by the code that training and evaluation use. Files are decoded in a process
of its own, which the first of them starts (0.3 s) and which is killed when a file takes too long.
"""

import math
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from av_mae.config import LONGEST, SoundConfig
from av_mae.data import audio as waves
from av_mae.data import frames
from av_mae.errors import MOST, ClipFailure, UserError, check_local, stage
from av_mae.media import bounded
from av_mae.media import decode as media
from av_mae.models.config import LARGEST

VERSION = 1  # counts changes of what is made of the same clip, here and in evaluation: stored with embeddings
MOST_CHANNELS = 64
MOST_SECONDS = {"duration": LONGEST, "time_limit": 10**6}
SOUND = SoundConfig()
_local = threading.local()


def load(
    path: str | os.PathLike[str] | None = None,
    start: float | None = None,
    duration: float = 3.0,
    *,
    frame: np.ndarray | None = None,
    waveform: np.ndarray | None = None,
    rate: int | None = None,
    sound: SoundConfig = SOUND,
    image_size: tuple[int, int] = (224, 224),
    missing: str = "error",
    time_limit: float = 20.0,
    end: float | None = None,
) -> dict[str, np.ndarray]:
    """One clip as the model takes it, from a media file or from arrays.

    Args:
      path: a file that FFmpeg can read. Instead of it give `frame` and `waveform`, or one of them.
      start: where the audio begins, in seconds; `None` for the middle of the clip, as evaluation does.
      duration: seconds of audio. A waveform that ends sooner is extended by its reversal. The file's frame is the one
        in the middle of that audio.
      frame: uint8 [H, W, 3].
      waveform: [samples] or [channels, samples], floats in -1…1 or int16.
      rate: of `waveform`, Hz.
      sound: the log-mel features that the model takes.
      image_size: (H, W) of the image.
      missing: 'error', or 'zeros' for a stream that the clip lacks.
      time_limit: seconds for decoding a file.
      end: seconds at which the clip ends in a file that goes on; needs `start`.

    Returns:
      `image` uint8 [1, H, W, 3], `audio` float32 [1, mels, frames], `id` str [1] (the path), `start` float32 [1]
      (seconds), `has_image` and `has_audio` bool [1].

    Raises:
      UserError: the clip cannot be used; names file, stage and cause.
    """
    _check_settings(start, duration, sound, image_size, missing, time_limit)
    _check_end(path, start, end)
    samples = round(duration * sound.rate) // sound.hop * sound.hop
    seconds = samples / sound.rate
    arrays = {"frame": frame, "waveform": waveform, "rate": rate}
    given = [name for name, value in ({"path": path} | arrays).items() if value is not None]
    if not given or path is not None and len(given) > 1:
        raise UserError(
            f"give either a path, or frame and waveform with its rate; got {' and '.join(given) or 'none of them'}"
        )
    name = "" if path is None else _file_name(path)
    try:
        if path is None:
            clip = _from_arrays(frame, waveform, rate, start, seconds)
        else:
            length = seconds if end is None or start is None else min(seconds, end - start)
            clip = _decode(media.read_excerpt, name, start, length, time_limit=time_limit)
            if length < seconds and clip.waveform is not None:
                clip = clip._replace(waveform=clip.waveform[: clip.first + math.ceil(length * clip.rate)])
        return _batch(name, clip, samples, sound, image_size, missing)
    except ClipFailure as failure:
        raise UserError(f"{name}: {failure}" if name else str(failure)) from failure


def span(path: str | os.PathLike[str], time_limit: float = 20.0) -> tuple[float, float]:
    """When a file's audio begins and ends, in seconds; that of its video where there is no audio.

    Raises UserError, with file, stage and cause, for what cannot be used.
    """
    name = _file_name(path)
    try:
        return _decode(media.span, name, time_limit=time_limit)
    except ClipFailure as failure:
        raise UserError(f"{name}: {failure}") from failure


def _decode(function: Callable[..., Any], name: str, *arguments: Any, time_limit: float) -> Any:
    """`function` of a file in this thread's decoding process, which may have begun in another working folder."""
    if not hasattr(_local, "worker"):
        _local.worker = bounded.Worker()
    return _local.worker.call(function, os.path.abspath(name), *arguments, time_limit=time_limit)


def _batch(
    name: str, clip: media.Excerpt, samples: int, sound: SoundConfig, image_size: tuple[int, int], missing: str
) -> dict[str, np.ndarray]:
    image = np.zeros((*image_size, 3), np.uint8)
    audio = np.zeros((sound.mels, samples // sound.hop), np.float32)
    for part, value in (("frame", clip.frame), ("sound", clip.waveform)):
        if value is None and missing == "error":
            raise ClipFailure("", part, "there is none; missing='zeros' takes zeros instead")
    if clip.frame is not None:
        with stage("frame"):
            height, width = clip.frame.shape[:2]
            box = frames.centre_box(height, width, image_size)
            image = frames.resize_box(clip.frame, box, image_size)
    if clip.waveform is not None:
        with stage("features"):
            waveform = waves.cut(clip.waveform, clip.rate, sound.rate, clip.first, samples)
            audio = waves.features(waveform, sound)
    return {
        "image": image[None],
        "audio": audio[None],
        "id": np.array([name], object),
        "start": np.array([clip.start], np.float32),
        "has_image": np.array([clip.frame is not None]),
        "has_audio": np.array([clip.waveform is not None]),
    }


def _from_arrays(frame: Any, waveform: Any, rate: Any, start: float | None, seconds: float) -> media.Excerpt:
    frame = None if frame is None else _check_frame(np.asarray(frame))
    if waveform is None:
        if rate is not None:
            raise UserError(f"rate={rate!r} comes without a waveform")
        return media.Excerpt(frame, None, 0, 0, start or 0.0)
    if not (_is_number(rate) and 0 < rate <= LARGEST["rate"] and int(rate) == rate):
        raise UserError(
            f"rate={rate!r} must be the waveform's samples per second, a whole number above 0, "
            f"at most {LARGEST['rate']:.0f}"
        )
    mono = _check_waveform(np.asarray(waveform))
    spare = max(0, len(mono) - math.ceil(seconds * rate))
    first = round(spare / 2 if start is None else start * rate)
    if first >= len(mono):
        raise UserError(f"start={start} is beyond the end of the waveform, {len(mono) / rate:.2f} s")
    return media.Excerpt(frame, mono, int(rate), first, first / rate)


def _check_settings(
    start: Any, duration: Any, sound: SoundConfig, image_size: Any, missing: Any, time_limit: Any
) -> None:
    if start is not None and not (_is_number(start) and 0 <= start <= MOST):
        raise UserError(f"start={start!r} must be 0 or more seconds, or None for the middle of the clip")
    for name, value in (("duration", duration), ("time_limit", time_limit)):
        if not (_is_number(value) and 0 < value <= MOST_SECONDS[name]):
            raise UserError(f"{name}={value!r} must be a number of seconds above 0, at most {MOST_SECONDS[name]}")
    waves.check_sound(sound)
    if round(duration * sound.rate) < sound.hop:
        raise UserError(f"duration={duration} is shorter than one frame of sound, {sound.hop / sound.rate:g} s")
    whole = np.shape(image_size) == (2,) and all(isinstance(side, (int, np.integer)) for side in image_size)
    if not whole or not 1 <= min(image_size) <= max(image_size) <= LARGEST["size"]:
        raise UserError(f"image_size={image_size!r} must be (height, width) in pixels, 1 to {LARGEST['size']:.0f}")
    if missing not in ("error", "zeros"):
        raise UserError(f"missing={missing!r} must be 'error' or 'zeros'")


def _check_end(path: Any, start: Any, end: Any) -> None:
    if end is not None and not (path is not None and start is not None and _is_number(end) and MOST >= end > start):
        raise UserError(f"end={end!r} must be a number of seconds above {start=}, and is for files only")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _file_name(path: Any) -> str:
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise UserError(f"path={path!r} must be the path of a file") from None
    check_local("path", name)
    if not os.path.isfile(name):
        what = "is a folder, not a media file" if os.path.isdir(name) else "there is no such file"
        raise UserError(f"{name or repr(name)}: open: {what}")
    return name


def _check_frame(frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise UserError(f"frame must be uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    return frame


def _check_waveform(waveform: np.ndarray) -> np.ndarray:
    """The waveform with its channels averaged: float32 [samples]."""
    if waveform.dtype not in (np.int16, np.float16, np.float32, np.float64) or waveform.ndim not in (1, 2):
        raise UserError(
            "waveform must be floats or int16, [samples] or [channels, samples], got "
            f"{waveform.dtype} {list(waveform.shape)}"
        )
    if waveform.size == 0:
        raise UserError(f"waveform holds no samples: {list(waveform.shape)}")
    if waveform.ndim == 2 and len(waveform) > MOST_CHANNELS:
        raise UserError(
            f"waveform {list(waveform.shape)} has {len(waveform)} channels, at most {MOST_CHANNELS} make "
            "sense; transpose [samples, channels]"
        )
    if waveform.dtype == np.int16:
        waveform = waveform / np.float32(32768)
    bad = int(np.sum(~np.isfinite(waveform)))
    if bad:
        raise UserError(f"{bad} of the waveform's {waveform.size} samples are not finite")
    loudest = float(np.abs(waveform).max())
    if loudest > media.LOUDEST:
        raise UserError(
            f"the waveform reaches {loudest:g}, but floats must lie in -1…1; divide 16-bit samples by 32768"
        )
    return np.atleast_2d(waveform).mean(axis=0, dtype=np.float32)
