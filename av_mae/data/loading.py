"""From stored records to batches. A clip that fails keeps its slot, with the reason."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from av_mae.config import DataConfig
from av_mae.data import frames, sound


FIELDS = ("id", "label", "frames", "frame_times", "sound")  # of a record that a batch is made of


class ClipFailure(Exception):
    """Why a clip cannot be used: 'stage: cause'."""


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ClipFailure that names the stage."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ClipFailure(f"{name}: {cause}") from error


class ClipSource:
    """Random access to the records of one prepared set that never raises.

    A record that cannot be read comes back as {'id', 'error'}. `records` is sent to the workers.
    """

    def __init__(self, name: str, records: Sequence[dict]):
        self._name = name
        self._records = records
        self._length = len(records)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with _stage("read"):
                return self._records[index]
        except ClipFailure as failure:
            return {"id": f"{self._name}[{index}]", "error": str(failure)}


@dataclasses.dataclass(frozen=True)
class ClipLoader(grain.transforms.RandomMap):
    """Decodes, augments and computes the features of one clip.

    `augment` False: middle of the clip, centred crop, no flip, no change of volume.
    """

    data: DataConfig
    image_size: tuple[int, int]
    audio_size: tuple[int, int]
    augment: bool

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Record → `image` uint8 [H, W, 3], `audio` float32 [mels, frames], `label`, `start` (s), `id`, `error`.

        A clip that fails has `error` = 'clip ID: stage: cause' and neither image nor audio.
        """
        clip = {"id": str(element["id"]), "label": element.get("label", 0), "start": 0.0, "error": ""}
        try:
            if "error" in element:
                raise ClipFailure(element["error"])
            return clip | self._load(element, rng)
        except ClipFailure as failure:
            return clip | {"error": f"clip {clip['id']}: {failure}"}

    def _load(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        settings = self.data.sound
        with _stage("sound"):
            place = rng.uniform() if self.augment and self.data.jitter else 0.5
            samples = self.audio_size[1] * settings.hop
            waveform, start, middle = sound.read_window(record["sound"], settings.rate, samples, place)
        with _stage("features"):
            if self.augment and self.data.volume_db:
                waveform = sound.change_volume(waveform, rng.uniform(-self.data.volume_db, self.data.volume_db))
            audio = sound.log_mel(waveform, settings)
            if not np.isfinite(audio).all():
                raise ValueError("the log-mel spectrogram is not finite")
        with _stage("frame"):
            if len(record["frames"]) == 0:
                raise ValueError("the clip holds no frames")
            nearest = int(np.argmin(np.abs(np.asarray(record["frame_times"]) - middle)))
            image = self._image(record["frames"][nearest], rng)
        return {"image": image, "audio": audio, "start": start}

    def _image(self, jpeg: bytes, rng: np.random.Generator) -> np.ndarray:
        height, width = frames.frame_size(jpeg)
        if not self.augment:
            return frames.decode_crop(jpeg, frames.centre_box(height, width, self.image_size), self.image_size)
        flip = self.data.flip and rng.uniform() < 0.5
        box = frames.random_box(rng, height, width, self.data.crop_scale)
        return frames.decode_crop(jpeg, box, self.image_size, flip)


class HostBatches(grain.MapDataset):
    """This host's rows of the global batches that begin at global position `first` of a dataset of clips.

    Batch i holds positions first + i · batch_size + rows. Positions from `total` on are padding: zeros, `valid` False,
    `id` and `error` ''. A failed clip is zeros and `valid` False with its `id` and `error`.
    """

    def __init__(self, clips: grain.MapDataset, sizes: tuple[tuple[int, int], tuple[int, int]], batch_size: int,
                 rows: np.ndarray, first: int, total: int):
        super().__init__(clips)
        self._image_size, self._audio_size = sizes
        self._batch_size, self._rows, self._first, self._total = batch_size, [int(row) for row in rows], first, total

    def __len__(self) -> int:
        return -(-(self._total - self._first) // self._batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        count, begin = len(self._rows), self._first + index * self._batch_size
        batch = {
            "image": np.zeros((count, *self._image_size, 3), np.uint8),
            "audio": np.zeros((count, *self._audio_size), np.float32),
            "label": np.zeros(count, np.int32),
            "start": np.zeros(count, np.float32),
            "valid": np.zeros(count, bool),
            "id": np.full(count, "", object),
            "error": np.full(count, "", object),
        }
        for place, row in enumerate(self._rows):
            if begin + row < self._total:
                clip = self._parent[begin + row]
                batch["valid"][place] = not clip["error"]
                for name, value in clip.items():
                    batch[name][place] = value
        return batch
