"""From stored records to batches. A clip that fails keeps its slot, with the reason."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np

from av_mae.config import DataConfig
from av_mae.data import frames, sound, truth
from av_mae.data.failures import ClipFailure, stage
from av_mae.data.plans import MIDDLE

FIELDS = ("id", "label", "frames", "frame_times", "sound")  # of a record that every batch is made of


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
            with stage("read"):
                return self._records[index]
        except ClipFailure as failure:
            return {"id": f"{self._name}[{index}]", "error": str(failure)}


def batch_fields(data: DataConfig, image_size: tuple[int, int], audio_size: tuple[int, int]) -> truth.Spec:
    """Shape and dtype, per clip, of the arrays in a batch."""
    fields = {"image": ((*image_size, 3), np.uint8), "audio": (tuple(audio_size), np.float32), "label": ((), np.int32),
              "start": ((), np.float32)}
    return fields | truth.spec(data, tuple(image_size), tuple(audio_size))


class Chosen(grain.MapDataset):
    """Clips with others beside them: with `choose(p)` = (clip, others, view), element p is that clip of `clips`, with
    `others` and with what `view` says. `length` elements."""

    def __init__(self, clips: grain.MapDataset, length: int, choose: Callable[[int], tuple[int, Iterable[int], dict]]):
        super().__init__(clips)
        self._length, self._choose = length, choose

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        clip, others, view = self._choose(index)
        return self._parent[clip] | {"others": [self._parent[other] for other in others], "view": view}


@dataclasses.dataclass(frozen=True)
class ClipLoader(grain.transforms.RandomMap):
    """Decodes, augments and computes the features of one clip.

    `augment` False: the window and mask that the record's `view` names (see plans), centred crop, no flip, no change
    of volume. `swap` 'image' or 'audio' takes the frame or the sound from the last of the record's `others`; the first
    ones are mixed in as `data.mix` says. Where masks are wanted, the frame is that of a mask, the sound is around it.
    """

    data: DataConfig
    image_size: tuple[int, int]
    audio_size: tuple[int, int]
    augment: bool
    swap: str = ""

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Record → `image` uint8 [H, W, 3], `audio` float32 [mels, frames], `label`, `start` (s), `id`, `error`, and
        what `data.truth` asks for.

        A clip that fails has `error` = 'clip ID: stage: cause' and neither image nor audio.
        """
        clip = {"id": str(element["id"]), "start": 0.0, "error": ""}
        try:
            for record in (element, *element.get("others", ())):
                if "error" in record:
                    raise ClipFailure(record["error"])
            return clip | self._load(self._swapped(element), rng)
        except ClipFailure as failure:
            return clip | {"error": f"clip {clip['id']}: {failure}"}

    def _swapped(self, record: dict[str, Any]) -> dict[str, Any]:
        if not self.swap:
            return record
        taken = ("frames", "frame_times") if self.swap == "image" else ("sound",)
        return record | {name: record["others"][-1][name] for name in taken}

    def _load(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        settings, samples = self.data.sound, self.audio_size[1] * self.data.sound.hop
        with stage("label"):
            clip = {"label": truth.read_label(record, self.data)}
        with stage("truth"):
            number, place = self._window(record, samples / settings.rate, rng)
        with stage("sound"):
            waveform, clip["start"], middle = sound.read_window(record["sound"], settings.rate, samples, place)
            waveform, sources = self._mix(record, waveform, place)
        with stage("features"):
            if self.augment and self.data.volume_db:
                gain = rng.uniform(-self.data.volume_db, self.data.volume_db)
                waveform, sources = (sound.change_volume(x, gain) for x in (waveform, sources))
            if self.data.sound_snr is not None:
                waveform = sound.add_noise(waveform, self.data.sound_snr, rng)
            clip["audio"] = sound.features(waveform, settings)
            clip |= truth.source_fields(self.data.truth, waveform, sources, settings)
        with stage("frame"):
            if len(record["frames"]) == 0:
                raise ValueError("the clip holds no frames")
            shown = int(np.argmin(np.abs(np.asarray(record["frame_times"]) - middle)))
            if number is not None and self.swap != "image":
                shown = record["mask_frames"][number]
            size = frames.frame_size(record["frames"][shown])
            box, flip = self._crop(*size, rng)
            clip["image"] = frames.decode_crop(record["frames"][shown], box, self.image_size, flip)
        with stage("truth"):
            if number is not None:
                clip["mask"] = truth.read_mask(record["masks"][number], self.data.classes, box, self.image_size, flip)
            if "objects" in self.data.truth:
                clip |= truth.read_objects(record, box, size, flip)
        return clip

    def _window(self, record: dict[str, Any], seconds: float, rng: np.random.Generator) -> tuple[int | None, float]:
        """The number of the mask that is looked at, where masks are wanted; the place of the window in the sound."""
        jitter = rng if self.augment and self.data.jitter else None
        if "mask" in self.data.truth:
            number = truth.mask_number(record, rng if self.augment else None)
            return number, truth.mask_window(record, number, seconds, jitter)
        return None, record.get("view", MIDDLE)["window"] if jitter is None else rng.uniform()

    def _mix(self, record: dict[str, Any], waveform: np.ndarray, place: float) -> tuple[np.ndarray, np.ndarray]:
        """What is heard [samples], and the clean sounds in it [m, samples] where they are asked for."""
        rate, samples = self.data.sound.rate, len(waveform)
        if self.data.mix > 1:
            others = [sound.read_window(other["sound"], rate, samples, place)[0]
                      for other in record["others"][:self.data.mix - 1]]
            sources = np.stack([waveform, *others])
            return sources.sum(0), sources
        if {"sources", "waveforms"} & set(self.data.truth):
            return waveform, truth.read_sources(record, rate, samples, place)
        return waveform, np.zeros((0, samples), np.float32)

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[frames.Box, bool]:
        if not self.augment:
            share = 1.0 if "mask" in self.data.truth else frames.EVALUATION_SHARE  # as published
            return frames.centre_box(height, width, self.image_size, share), False
        flip = self.data.flip and rng.uniform() < 0.5
        return frames.random_box(rng, height, width, self.data.crop_scale), flip


class HostBatches(grain.MapDataset):
    """This host's rows of the global batches that begin at global position `first` of a dataset of clips.

    Batch i holds positions first + i · batch_size + rows (`place`); `fields` has shape and dtype of what clips bring.
    Positions from `total` on are padding: zeros, `valid` False, `id` and `error` ''. A failed clip is zeros and `valid`
    False with its `id` and `error`.
    """

    def __init__(self, clips: grain.MapDataset, fields: truth.Spec, batch_size: int, rows: np.ndarray, first: int,
                 total: int):
        super().__init__(clips)
        self._fields = fields
        self._batch_size, self._rows, self._first, self._total = batch_size, [int(row) for row in rows], first, total

    def __len__(self) -> int:
        return -(-(self._total - self._first) // self._batch_size)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        count, begin = len(self._rows), self._first + index * self._batch_size
        batch = {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self._fields.items()}
        batch |= {"place": (begin + np.array(self._rows)).astype(np.int32), "valid": np.zeros(count, bool),
                  "id": np.full(count, "", object), "error": np.full(count, "", object)}
        for place, row in enumerate(self._rows):
            if begin + row < self._total:
                clip = self._parent[begin + row]
                batch["valid"][place] = not clip["error"]
                for name, value in clip.items():
                    batch[name][place] = value
        return batch
