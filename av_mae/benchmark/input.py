"""`benchmark input`: how many clips a core makes ready for training, by stage, beside the mp4 files of the same clips.

Times are CPU seconds of this process, so that what else the machine does counts little: "per core" is per CPU second.
The files lie in the page cache. Transforms are those of training: a random window of the audio at a random volume, a
random crop of the frame.
"""

import dataclasses
import functools
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
import simplejpeg
import soundfile
import soxr
from PIL import Image

from av_mae import benchmark, models
from av_mae import config as sizes
from av_mae.benchmark.roofline import PEAK_FLOPS
from av_mae.config import DataConfig
from av_mae.console import Progress
from av_mae.data import audio, frames, records
from av_mae.data.loading import ClipLoader, ClipSource, HostBatches, batch_fields
from av_mae.data.pipeline import TrainingData, open_sources, open_training_data
from av_mae.errors import UserError
from av_mae.media import decode as media
from av_mae.media import encode as clip_writer
from av_mae.prepare.shards import write_set

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
    colourful = np.stack([118 + 48 * grey + 16 * colour for colour in colours], axis=-1)
    scene = Image.fromarray(np.clip(colourful, 0, 255).astype(np.uint8))
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
    """Writes the clip of a record as an mp4 file, those between the set's frames faded from one to the next.

    Files made so of frames of real videos took 0.8 to 1.0 × as long to read as the videos themselves. Returns how many
    seconds the file lasts.
    """
    stills = [simplejpeg.decode_jpeg(frame) for frame in record["frames"]]
    height, width = (side // 2 * 2 for side in stills[0].shape[:2])
    waveform, rate = soundfile.read(io.BytesIO(record["sound"]), dtype="float32")
    seconds = len(waveform) / rate
    frames = np.empty((max(1, round(seconds * VIDEO_RATE)), height, width, 3), np.uint8)
    for number, position in enumerate(
        np.interp(np.arange(len(frames)) / VIDEO_RATE, record["frame_times"], np.arange(len(stills)))
    ):
        first, second = stills[int(position)], stills[min(int(position) + 1, len(stills) - 1)]
        share = position - int(position)
        frames[number] = np.rint(first * (1 - share) + second * share)[:height, :width]
    mp4 = clip_writer.encode_mp4(
        frames, VIDEO_RATE, soxr.resample(waveform, rate, SOUND_RATE), SOUND_RATE, VIDEO_OPTIONS
    )
    pathlib.Path(path).write_bytes(mp4)
    return seconds


IMAGE, AUDIO = (224, 224), (128, 192)
BATCH = 32
ROWS = np.arange(BATCH)
VIDEOS = 16  # clips at most that are also read from mp4 files
LARGE = 1_000_000  # clips
WAIT_SECONDS = 10.0  # of training over which the share of waiting is measured
# Accelerators by their kind in roofline.PEAK_FLOPS, and the share of that peak that a training step is taken to reach.
CHIPS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "H100": "NVIDIA H100 80GB HBM3"}
MFU = 0.5
Item = TypeVar("Item")


class Stages(NamedTuple):
    """What the stages of n clips begin with: their numbers in the set; records; encoded frames and the crops' boxes;
    decoded frames and the boxes in them; positions of the windows in the audio, 0 to 1; windows; clips that
    ClipLoader made."""

    numbers: list[int]
    records: list[dict]
    encoded: list[tuple[bytes, frames.Box]]
    decoded: list[tuple[np.ndarray, frames.Box]]
    positions: list[float]
    windows: list[np.ndarray]
    clips: list[dict]


class LargeSet:
    """Some clips over and over, as many as large sets have: to shuffle a small set, Grain takes 0.1 ms per clip."""

    def __init__(self, source: ClipSource, numbers: list[int]):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return LARGE

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._numbers[index % len(self._numbers)]]


def measure(folder: str, clips: int, rounds: int, device_rate: float = 0.0, workers: int = 0) -> dict[str, Any]:
    """The metrics of `benchmark input` for the first `clips` clips of a prepared set.

    folder: '' makes a set. device_rate: clips/s that a host's accelerators take (0: waiting is not measured), served by
    `workers` processes. Raises UserError where the set cannot be opened or none of its clips can be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or _make_set(pathlib.Path(temporary, "set"), clips)
        data = DataConfig(path=folder, split=_split(folder))
        (source,) = open_sources(data, AUDIO)
        stages = _load_stages(data, source, min(clips, len(source)))
        videos = _write_videos(stages.records[:VIDEOS], pathlib.Path(temporary))
        large: Any = LargeSet(source, stages.numbers)  # reads as a ClipSource does
        training = TrainingData([large], data, IMAGE, AUDIO, BATCH, ROWS, seed=0)
        batches = training.host_batches(0, -(-len(stages.clips) // BATCH) * BATCH)
        runs = _stage_runs(data, source, stages) | {
            "whole": functools.partial(_each, batches.__getitem__, range(len(batches))),
            "video": functools.partial(_each, functools.partial(_read_video, data), videos),
        }
        counts = dict.fromkeys(runs, len(stages.clips)) | {"whole": BATCH * len(batches), "video": len(videos)}
        seconds = benchmark.in_turn(runs, rounds, time.process_time)
        metrics: dict[str, Any] = {"clips": len(stages.clips), "rounds": rounds}
        metrics |= _metrics({name: values / counts[name] for name, values in seconds.items()})
        if device_rate:
            metrics |= {
                "device_rate": device_rate,
                "workers": workers,
                "input_wait_share": wait_share(data, device_rate, workers),
                "cores_for_device_rate": device_rate / metrics["clips_per_second_per_core"],
            }
        return metrics


def wait_share(data: DataConfig, device_rate: float, workers: int) -> float:
    """The share of its time that a device of `device_rate` clips/s, which sleeps through its steps, waits for input."""
    step = BATCH / device_rate
    with open_training_data(dataclasses.replace(data, workers=workers), IMAGE, AUDIO, 0, BATCH, ROWS) as training:
        batches, waited, busy = training.batches(0), 0.0, 0.0
        for _ in range(2 * max(1, workers)):  # what the workers have ready at the beginning does not count
            next(batches)
        with Progress(round(WAIT_SECONDS), "waiting for input", "seconds") as progress:
            while waited + busy < WAIT_SECONDS:
                began = time.perf_counter()
                next(batches)
                waited += time.perf_counter() - began
                time.sleep(step)
                busy += step
                progress.update(min(progress.total, int(waited + busy)) - progress.done)
    return waited / (waited + busy)


def _split(folder: str) -> str:
    """The training split of a set, or its first one. Raises UserError where `folder` names several sets or none."""
    if len(DataConfig(path=folder).paths) != 1:
        raise UserError(f"--data={folder} must name one prepared set")
    splits = records.describe(folder).splits
    return next((split for split in ("train", *splits) if split in splits), "train")


def _shown(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with a bar that says how far they are taken."""
    with Progress(len(items), what) as progress:
        for item in items:
            yield item
            progress.update()


def _make_set(folder: pathlib.Path, clips: int) -> str:
    """Writes a set of made-up clips, as `prepare` would, into the new `folder`; returns its path."""
    folder.mkdir()
    made = lambda: map(compose, _shown(range(clips), "making clips"))
    write_set(folder, "made_up", "made up", ["unknown"], {"train": made}, clips)
    return os.fspath(folder)


def _load_stages(data: DataConfig, source: ClipSource, count: int) -> Stages:
    """What each stage begins with, of those of the first `count` clips that can be read."""
    generator, loader = np.random.default_rng(0), ClipLoader(data, IMAGE, AUDIO, augment=True)
    rows, errors = list[tuple[Any, ...]](), list[str]()
    for number in range(count):
        record = source[number]
        clip = loader.random_map(record, generator)
        if clip["stage"]:
            errors.append(f"clip {clip['id']}: {clip['stage']}: {clip['cause']}")
            continue
        position, samples = generator.uniform(), AUDIO[1] * data.sound.hop
        window, _, middle = audio.read_window(record["sound"], data.sound.rate, samples, position)
        encoded = record["frames"][int(np.argmin(np.abs(record["frame_times"] - middle)))]
        box = frames.random_box(generator, *frames.frame_size(encoded), data.crop_scale)
        decoded = frames.decode(encoded, box, IMAGE)
        rows.append((number, record, (encoded, box), decoded, position, window, clip))
    if not rows:
        raise UserError(f"none of the first {count} clips of {data.path} can be read; the first error: {errors[0]}")
    return Stages(*map(list, zip(*rows, strict=True)))


def _stage_runs(data: DataConfig, source: ClipSource, stages: Stages) -> dict[str, Callable[[], None]]:
    """One function per stage that does its work for all clips."""
    settings, samples = data.sound, AUDIO[1] * data.sound.hop
    order = np.random.default_rng(1).permutation(stages.numbers).tolist()
    joined = HostBatches(
        grain.MapDataset.source(stages.clips), batch_fields(data, IMAGE, AUDIO), BATCH, ROWS, 0, len(stages.clips)
    )
    encoded_sounds = [(record["sound"], position) for record, position in zip(stages.records, stages.positions)]
    return {
        "read": functools.partial(_each, source.__getitem__, order),
        "jpeg": functools.partial(_each, lambda it: frames.decode(it[0], it[1], IMAGE), stages.encoded),
        "crop": functools.partial(_each, lambda it: frames.resize_box(it[0], it[1], IMAGE, flip=True), stages.decoded),
        "sound": functools.partial(
            _each, lambda it: audio.read_window(it[0], settings.rate, samples, it[1]), encoded_sounds
        ),
        "log_mel": functools.partial(
            _each, lambda window: audio.features(audio.change_volume(window, 3.0), settings), stages.windows
        ),
        "batch": functools.partial(_each, joined.__getitem__, range(len(joined))),
    }


def _each(function: Callable[..., object], values: Iterable[Any]) -> None:
    for value in values:
        function(value)


def _write_videos(clips: list[dict], folder: pathlib.Path) -> list[tuple[str, float, np.random.Generator]]:
    """The mp4 file of each record, how long it is, and the random draws for reading it."""
    paths = [os.fspath(folder / f"{number}.mp4") for number in range(len(clips))]
    written = zip(paths, _shown(clips, "writing mp4 files"), strict=True)
    return [
        (path, write_video(clip, path), np.random.default_rng(number)) for number, (path, clip) in enumerate(written)
    ]


def _read_video(data: DataConfig, video: tuple[str, float, np.random.Generator]) -> None:
    """A clip for training straight from its mp4 file, decoded near its window only, as av_mae.preprocess does."""
    path, length, generator = video
    samples = AUDIO[1] * data.sound.hop
    seconds = samples / data.sound.rate
    excerpt = media.read_excerpt(path, generator.uniform() * max(0.0, length - seconds), seconds)
    if excerpt.frame is None or excerpt.waveform is None:
        raise UserError(f"{path} has lost a stream since it was written")
    height, width = excerpt.frame.shape[:2]
    box = frames.random_box(generator, height, width, data.crop_scale)
    frames.resize_box(excerpt.frame, box, IMAGE, flip=True)
    waveform = audio.cut(excerpt.waveform, excerpt.rate, data.sound.rate, excerpt.first, samples)
    audio.features(audio.change_volume(waveform, 3.0), data.sound)


def _metrics(seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rates and the ratio of whole and video, medians over rounds, from CPU seconds per clip in each round."""
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    stages = {name: value for name, value in median.items() if name not in ("whole", "video")}
    flops = 3 * models.closed_form_flops(sizes.sized_model("base"))
    rates = {name: MFU * PEAK_FLOPS[kind] / flops for name, kind in CHIPS.items()}
    return {
        "clips_per_second_per_core": 1 / median["whole"],
        "video_clips_per_second_per_core": 1 / median["video"],
        "times_video": float(np.median(seconds["video"] / seconds["whole"])),
        "stages": {name: 1 / value for name, value in stages.items()},
        "seconds_per_clip": median | {"other": median["whole"] - sum(stages.values())},
        "chips": {name: {"clips_per_second": rate, "cores": rate * median["whole"]} for name, rate in rates.items()},
    }


def tables(metrics: dict[str, Any]) -> list[benchmark.Table]:
    """What the command prints: the time of each stage, the cores that an accelerator of each kind needs, and ratios."""
    stages = [
        (name, f"{1e3 * seconds:.3f}", f"{1 / seconds:.0f}" if seconds > 0 else "")
        for name, seconds in metrics["seconds_per_clip"].items()
    ]
    chips = [
        (name, f"{chip['clips_per_second']:.0f}", f"{chip['cores']:.1f}") for name, chip in metrics["chips"].items()
    ]
    ratios = ("times_video", "device_rate", "workers", "input_wait_share", "cores_for_device_rate")
    return [
        [("stage", "ms per clip", "clips/s per core"), *stages],
        [("one accelerator, ViT-B", "clips/s", "cores"), *chips],
        benchmark.metric_rows({name: metrics[name] for name in ratios if name in metrics}),
    ]
