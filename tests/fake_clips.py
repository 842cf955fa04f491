"""Records of made-up clips, drawn from their number alone, in the layout that prepared sets have."""

import io

import numpy as np
import simplejpeg
import soundfile

from av_mae.config import DataConfig, SoundConfig

SOUND = SoundConfig(rate=8000, n_fft=400, hop=125, mels=64, log_floor=1e-3)
SMALL_SOUND = SoundConfig(rate=4000, n_fft=128, hop=64, mels=16, log_floor=1e-3)
SMALL = ((16, 16), (16, 16))  # image and sound of tests about order: a quarter of a second


def flac(waveform: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="FLAC")
    return file.getvalue()


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95, colorsubsampling="444")


def record(name: str, index: int, size=(24, 32), seconds: float = 0.5, rate: int = 4000, frames: int = 3) -> dict:
    """Clip `index` of a set: noise as sound, smooth noise as frames; its label is its index."""
    generator = np.random.default_rng(index)
    small = generator.integers(0, 255, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8)
    image = np.ascontiguousarray(np.kron(small, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]])
    waveform = 0.1 * generator.standard_normal(int(seconds * rate)).astype(np.float32)
    return {
        "id": f"{name}-{index}",
        "label": np.int64(index),
        "duration": np.float32(seconds),
        "frames": [jpeg(image)] * frames,
        "sound": flac(waveform, rate),
        "frame_times": np.linspace(0, seconds, frames, dtype=np.float32),
    }


class FakeSet:
    """A set of `length` records; `broken` maps a record's number to the field that is cut short ('read': raises)."""

    def __init__(self, name: str, length: int, broken: dict[int, str] | None = None, **options):
        self.name, self.length, self.broken, self.options = name, length, broken or {}, options

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        clip, broken = record(self.name, index, **self.options), self.broken.get(index)
        if broken == "read":
            raise OSError("the shard breaks off")
        if broken == "sound":
            clip["sound"] = clip["sound"][: len(clip["sound"]) // 2]
        if broken == "frame":
            clip["frames"] = [frame[: len(frame) // 2] for frame in clip["frames"]]
        return clip


def small_config(**changes) -> DataConfig:
    return DataConfig(**({"path": "fake", "sound": SMALL_SOUND} | changes))
