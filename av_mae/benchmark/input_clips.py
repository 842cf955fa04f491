"""Clips for `benchmark input` where no prepared set is given, and video files of the clips of any set.

What decoders cost depends on how much there is to decode. Frames with the spectrum of natural images (power falling
with the square of the frequency) and sounds of notes over pink noise take as many bytes as real ones do.
"""

import io
import os
import pathlib

import numpy as np
import simplejpeg
import soundfile
import soxr
from PIL import Image

from av_mae.media import encode as clip_writer

SIZE, SECONDS, RATE = (256, 340), 10, 16000
JPEG_QUALITY = 90
VIDEO_RATE, SOUND_RATE = 25, 44100  # of the video files: frames and samples per second
# As most clips on the web are made: x264's own settings at quality 23, but encoded sooner.
VIDEO_OPTIONS = {"crf": "23", "preset": "veryfast", "threads": "1"}


def _falling(generator: np.random.Generator, shape: tuple[int, ...], exponent: float) -> np.ndarray:
    """Noise whose amplitudes fall with the frequency to the power `exponent`: float32, mean 0, deviation 1."""
    spectrum = np.fft.rfftn(generator.standard_normal(shape, np.float32))
    frequencies = np.meshgrid(*(np.fft.fftfreq(n) for n in shape[:-1]), np.fft.rfftfreq(shape[-1]), indexing="ij")
    spectrum /= np.maximum(np.sqrt(sum(np.square(f) for f in frequencies)), 1 / max(shape)) ** exponent
    noise = np.fft.irfftn(spectrum, shape, range(len(shape)))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _frames(generator: np.random.Generator) -> list[bytes]:
    """A camera that wanders over a scene and nears it, one JPEG frame per second."""
    height, width = SIZE
    grey, *colours = (_falling(generator, (2 * height, 2 * width), 1.5) for _ in range(4))
    scene = np.stack([118 + 48 * grey + 16 * colour for colour in colours], axis=-1)
    scene = Image.fromarray(np.clip(scene, 0, 255).astype(np.uint8))
    corner, drift = generator.uniform(0, 20, 2), generator.uniform(0, 12, 2)
    frames = []
    for second in range(SECONDS):
        zoom = 1 + 0.03 * second
        left, top = corner + second * drift
        frame = scene.resize(
            (width, height),
            Image.Resampling.BILINEAR,
            box=(left, top, left + 1.2 * width / zoom, top + 1.2 * height / zoom),
        )
        frames.append(simplejpeg.encode_jpeg(np.asarray(frame), quality=JPEG_QUALITY, colorsubsampling="420"))
    return frames


def _sound(generator: np.random.Generator) -> np.ndarray:
    """Two notes a second over pink noise: float32 [samples]."""
    time = np.arange(SECONDS * RATE) / RATE
    pitch = np.repeat(110 * 2 ** generator.uniform(0, 3, 2 * SECONDS), RATE // 2)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    note = sum(np.sin(k * phase) / k for k in range(1, 6)) * np.exp(-4 * (time % 0.5))
    return (0.06 * note + 0.002 * _falling(generator, (SECONDS * RATE,), 0.5)).astype(np.float32)


def compose(index: int) -> dict:
    """The record (see records.py) of the clip `index`: ten seconds, 340 × 256 pixels, 16 kHz."""
    generator = np.random.default_rng([2026, index])
    return {
        "id": f"made_up_{index:04d}",
        "duration": np.float32(SECONDS),
        "frames": _frames(generator),
        "frame_times": np.arange(SECONDS, dtype=np.float32),
        "sound": clip_writer.flac(_sound(generator), RATE),
    }


def write_video(record: dict, path: str | os.PathLike) -> float:
    """Writes the clip of a record as an mp4 file, the frames between the stored ones faded from one to the next.

    Files made so of frames of real videos took 0.8 to 1.0 × as long to read as the videos themselves. Returns how many
    seconds the file lasts.
    """
    pictures = [simplejpeg.decode_jpeg(frame) for frame in record["frames"]]
    height, width = (side // 2 * 2 for side in pictures[0].shape[:2])
    waveform, rate = soundfile.read(io.BytesIO(record["sound"]), dtype="float32")
    seconds = len(waveform) / rate
    frames = np.empty((max(1, round(seconds * VIDEO_RATE)), height, width, 3), np.uint8)
    for number, place in enumerate(
        np.interp(np.arange(len(frames)) / VIDEO_RATE, record["frame_times"], np.arange(len(pictures)))
    ):
        first, second = pictures[int(place)], pictures[min(int(place) + 1, len(pictures) - 1)]
        share = place - int(place)
        frames[number] = np.rint(first * (1 - share) + second * share)[:height, :width]
    mp4 = clip_writer.encode_mp4(
        frames, VIDEO_RATE, soxr.resample(waveform, rate, SOUND_RATE), SOUND_RATE, VIDEO_OPTIONS
    )
    pathlib.Path(path).write_bytes(mp4)
    return seconds
