"""From stored records to batches. A clip that fails keeps its slot, with the reason."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from av_mae.config import MOST_MIXED, DataConfig, SoundConfig
from av_mae.data import audio as sound
from av_mae.data import audio as sounds
from av_mae.data import frames
from av_mae.data.frames import Box
from av_mae.data.plans import MIDDLE
from av_mae.errors import ClipFailure, stage

OBJECTS = 32  # boxes per clip that a batch has room for
SOURCES = MOST_MIXED  # clean sounds per clip that a batch has room for
# What of a record the annotations are read from.
RECORD_FIELDS = {
    "label": (),
    "labels": ("labels",),
    "mask": ("masks", "mask_frames", "duration"),
    "objects": ("boxes", "object_labels", "sounding", "box_annotators", "annotators"),
    "sources": ("sources",),
    "waveforms": ("sources",),
}
Spec = dict[str, tuple[tuple[int, ...], type]]


def annotation_fields(data: DataConfig, image_size: tuple[int, int], audio_size: tuple[int, int]) -> Spec:
    """Shapes and dtypes of the fields, per clip, that the annotations of `data` add to a batch.

    label: nothing, but a clip whose class is unknown fails. labels: `label` int32 [classes], 1 for each class that the
    clip has, in place of its first class. mask: `mask` uint8 [H, W], 1 (or the class) where something sounds. objects:
    `boxes` float32 [OBJECTS, 4] (ymin, xmin, ymax, xmax in 0…1 of the image), int32 [OBJECTS] `object_labels`,
    `sounding` (1: sounds, 0: silent, -1: no box) and `box_annotators`, and int32 `annotators`, as in records.
    sources: `source` float32 [mels, frames], the log-mel of the sounding object's clean sound. waveforms: `mixture`
    float32 [samples] and `sources` float32 [SOURCES, samples], the sounding object's first.
    """
    samples = audio_size[1] * data.sound.hop
    fields: dict[str, Spec] = {
        "label": {},
        "labels": {"label": ((data.classes,), np.int32)},
        "mask": {"mask": (image_size, np.uint8)},
        "objects": {
            "boxes": ((OBJECTS, 4), np.float32),
            "object_labels": ((OBJECTS,), np.int32),
            "sounding": ((OBJECTS,), np.int32),
            "box_annotators": ((OBJECTS,), np.int32),
            "annotators": ((), np.int32),
        },
        "sources": {"source": (audio_size, np.float32)},
        "waveforms": {"mixture": ((samples,), np.float32), "sources": ((SOURCES, samples), np.float32)},
    }
    return {name: entry for annotation in data.annotations for name, entry in fields[annotation].items()}


def read_label(record: dict[str, Any], data: DataConfig) -> np.ndarray:
    """The class of a clip, int32 (-1: unknown), or where `data.annotations` asks for 'labels' int32 [classes], 1 for each
    that the clip has.

    Raises ValueError where the annotation 'label' or 'labels' is wanted and no class is known, or one is none of `classes`.
    """
    if {"label", "labels"} & set(data.annotations) and record["label"] < 0:
        raise ValueError("the class is unknown")
    if "labels" not in data.annotations:
        return np.int32(record["label"])
    if max(record["labels"]) >= data.classes:
        raise ValueError(f"class {max(record['labels'])} is none of {data.classes}")
    label = np.zeros(data.classes, np.int32)
    label[record["labels"]] = 1
    return label


def mask_number(record: dict[str, Any], rng: np.random.Generator | None) -> int:
    """Which mask of a record is looked at: the one that `view` names (see plans), or any one, drawn from `rng`.

    Raises ValueError where the record has no mask.
    """
    if len(record["masks"]) == 0:
        raise ValueError("the clip has no mask")
    return int(record.get("view", MIDDLE)["mask"] if rng is None else rng.integers(len(record["masks"])))


def mask_window(record: dict[str, Any], number: int, seconds: float, rng: np.random.Generator | None) -> float:
    """The place (see sound.read_window) of a window of `seconds` with the frame of mask `number` at its centre, or
    anywhere in it, drawn from `rng`; a window that the sound does not hold moves into it."""
    time, spare = record["frame_times"][record["mask_frames"][number]], float(record["duration"]) - seconds
    if spare <= 0:
        return 0.5
    low, high = np.clip([time - seconds, time], 0, spare)
    start = np.clip(time - seconds / 2, 0, spare) if rng is None else rng.uniform(low, high)
    return float(start / spare)


def read_mask(encoded: bytes, classes: int, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    """The part `box` of a PNG mask → uint8 [H, W], cut as the frame is.

    classes: 0 or 1, 1 where the mask is not 0; more, the numbers of the classes.
    Raises ValueError where it is not 8-bit greyscale, or holds other classes.
    """
    mask = Image.open(io.BytesIO(encoded))
    if mask.mode != "L":
        raise ValueError(f"a mask must be an 8-bit greyscale picture, got mode {mask.mode}")
    shape = (size[1], size[0])
    if classes <= 1:
        marked = mask.point(lambda value: 255 if value else 0)
        pixels = (np.asarray(marked.resize(shape, Image.Resampling.BILINEAR, box=box)) >= 128).astype(np.uint8)
    else:
        highest = mask.getextrema()[1]
        if highest >= classes:
            raise ValueError(
                f"the mask holds class {highest}, there are {classes} (0 to {classes - 1}); binary masks "
                "have no classes"
            )
        pixels = np.asarray(mask.resize(shape, Image.Resampling.NEAREST, box=box))
    return pixels[:, ::-1] if flip else pixels


def read_objects(record: dict[str, Any], box: Box, frame: tuple[int, int], flip: bool) -> dict[str, np.ndarray]:
    """Boxes of a record (shares of the frame of (height, width)) as shares of the crop `box`; parts outside are cut."""
    boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
    if len(boxes) > OBJECTS:
        raise ValueError(f"the clip has {len(boxes)} boxes, at most {OBJECTS} can be read")
    left, top, right, bottom = box
    boxes = boxes * np.tile(np.array(frame, np.float32), 2)
    boxes = (boxes - np.array([top, left, top, left])) / np.tile([bottom - top, right - left], 2)
    if flip:
        boxes = np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], axis=1)
    placed = {"boxes": np.zeros((OBJECTS, 4), np.float32), "annotators": np.int32(record["annotators"])}
    placed["boxes"][: len(boxes)] = np.clip(boxes, 0, 1)
    for name in ("object_labels", "sounding", "box_annotators"):
        placed[name] = np.full(OBJECTS, -1, np.int32)
        placed[name][: len(boxes)] = record[name]
    return placed


def read_sources(record: dict[str, Any], rate: int, samples: int, place: float) -> np.ndarray:
    """The clean sounds of a record in the window that `place` names: float32 [m, samples].

    Raises ValueError where there is none.
    """
    if len(record["sources"]) == 0:
        raise ValueError("the clip has no clean sounds")
    if len(record["sources"]) > SOURCES:
        raise ValueError(f"the clip has {len(record['sources'])} clean sounds, at most {SOURCES} can be read")
    return np.stack([sounds.read_window(source, rate, samples, place)[0] for source in record["sources"]])


def source_fields(
    wanted: tuple[str, ...], mixture: np.ndarray, sources: np.ndarray, settings: SoundConfig
) -> dict[str, np.ndarray]:
    """The fields of 'sources' and 'waveforms' from a mixture [samples] and its sources [m, samples]."""
    fields = {}
    if "sources" in wanted:
        fields["source"] = sounds.log_mel(sources[0], settings)
    if "waveforms" in wanted:
        fields["mixture"] = mixture
        fields["sources"] = np.zeros((SOURCES, len(mixture)), np.float32)
        fields["sources"][: len(sources)] = sources
    return fields


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


def batch_fields(data: DataConfig, image_size: tuple[int, int], audio_size: tuple[int, int]) -> Spec:
    """Shape and dtype, per clip, of the arrays in a batch."""
    fields = {
        "image": ((*image_size, 3), np.uint8),
        "audio": (tuple(audio_size), np.float32),
        "label": ((), np.int32),
        "start": ((), np.float32),
    }
    return fields | annotation_fields(data, tuple(image_size), tuple(audio_size))


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
        what `data.annotations` asks for.

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
            clip = {"label": read_label(record, self.data)}
        with stage("annotations"):
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
            clip |= source_fields(self.data.annotations, waveform, sources, settings)
        with stage("frame"):
            if len(record["frames"]) == 0:
                raise ValueError("the clip holds no frames")
            shown = int(np.argmin(np.abs(np.asarray(record["frame_times"]) - middle)))
            if number is not None and self.swap != "image":
                shown = record["mask_frames"][number]
            size = frames.frame_size(record["frames"][shown])
            box, flip = self._crop(*size, rng)
            clip["image"] = frames.decode_crop(record["frames"][shown], box, self.image_size, flip)
        with stage("annotations"):
            if number is not None:
                clip["mask"] = read_mask(record["masks"][number], self.data.classes, box, self.image_size, flip)
            if "objects" in self.data.annotations:
                clip |= read_objects(record, box, size, flip)
        return clip

    def _window(self, record: dict[str, Any], seconds: float, rng: np.random.Generator) -> tuple[int | None, float]:
        """The number of the mask that is looked at, where masks are wanted; the place of the window in the sound."""
        jitter = rng if self.augment and self.data.jitter else None
        if "mask" in self.data.annotations:
            number = mask_number(record, rng if self.augment else None)
            return number, mask_window(record, number, seconds, jitter)
        return None, record.get("view", MIDDLE)["window"] if jitter is None else rng.uniform()

    def _mix(self, record: dict[str, Any], waveform: np.ndarray, place: float) -> tuple[np.ndarray, np.ndarray]:
        """What is heard [samples], and the clean sounds in it [m, samples] where they are asked for."""
        rate, samples = self.data.sound.rate, len(waveform)
        if self.data.mix > 1:
            others = [
                sound.read_window(other["sound"], rate, samples, place)[0]
                for other in record["others"][: self.data.mix - 1]
            ]
            sources = np.stack([waveform, *others])
            return sources.sum(0), sources
        if {"sources", "waveforms"} & set(self.data.annotations):
            return waveform, read_sources(record, rate, samples, place)
        return waveform, np.zeros((0, samples), np.float32)

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> tuple[frames.Box, bool]:
        if not self.augment:
            share = 1.0 if "mask" in self.data.annotations else frames.EVALUATION_SHARE  # as published
            return frames.centre_box(height, width, self.image_size, share), False
        flip = self.data.flip and rng.uniform() < 0.5
        return frames.random_box(rng, height, width, self.data.crop_scale), flip


class HostBatches(grain.MapDataset):
    """This host's rows of the global batches that begin at global position `first` of a dataset of clips.

    Batch i holds positions first + i · batch_size + rows (`index`); `fields` has shape and dtype of what clips bring.
    Positions from `total` on are padding: zeros, `valid` False, `id` and `error` ''. A failed clip is zeros and `valid`
    False with its `id` and `error`.
    """

    def __init__(
        self, clips: grain.MapDataset, fields: Spec, batch_size: int, rows: np.ndarray, first: int, total: int
    ):
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
        batch |= {
            "index": (begin + np.array(self._rows)).astype(np.int32),
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
