"""The way of a clip from its shard into a batch; this file follows it from top to bottom.

ClipSource reads the record, WithOthers puts other clips beside it where several are mixed, ClipLoader makes an image
and a log-mel of it, HostBatches joins the rows of a batch. A clip that fails keeps its row, with the reason.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np
from PIL import Image

from av_mae.config import MOST_MIXED, DataConfig
from av_mae.data import Record, Records, audio, frames
from av_mae.data.frames import Box, Size
from av_mae.data.plans import MIDDLE
from av_mae.errors import ClipFailure, stage

OBJECTS = 32  # boxes per clip that a batch has room for
SOURCES = MOST_MIXED  # clean waveforms per clip that a batch has room for
FIELDS = ("id", "label", "frames", "frame_times", "sound")  # of a record that every batch is made of
# The fields of a record that each of `data.annotations` is read from.
ANNOTATION_FIELDS: dict[str, tuple[str, ...]] = {
    "label": (),
    "labels": ("labels",),
    "mask": ("masks", "mask_frames", "duration"),
    "objects": ("boxes", "object_labels", "sounding", "box_annotators", "annotators"),
    "sources": ("sources",),
    "waveforms": ("sources",),
}
Spec = dict[str, tuple[tuple[int, ...], type]]


def batch_fields(data: DataConfig, image_size: Size, audio_size: Size) -> Spec:
    """Shape and dtype, per clip, of the arrays in a batch.

    Besides `image`, `audio`, `label` and `start` those that `data.annotations` ask for. label: nothing, but a clip
    whose class is unknown fails. labels: `label` int32 [classes], 1 for each class that the clip has, instead of its
    first class. mask: `mask` uint8 [H, W], 1 (or the class) where something sounds. objects: `boxes` float32 [OBJECTS,
    4] (ymin, xmin, ymax, xmax in 0…1 of the image), int32 [OBJECTS] `object_labels`, `sounding` (1: sounds, 0: silent,
    -1: no box) and `box_annotators`, and int32 `annotators`, as in records. sources: `source` float32 [mels, frames],
    the log-mel of the sounding object's clean waveform. waveforms: `mixture` float32 [samples] and `sources` float32
    [SOURCES, samples], the sounding object's first.
    """
    samples = audio_size[1] * data.sound.hop
    annotated: dict[str, Spec] = {
        "label": {},
        "labels": {"label": ((data.classes,), np.int32)},
        "mask": {"mask": (tuple(image_size), np.uint8)},
        "objects": {
            "boxes": ((OBJECTS, 4), np.float32),
            "object_labels": ((OBJECTS,), np.int32),
            "sounding": ((OBJECTS,), np.int32),
            "box_annotators": ((OBJECTS,), np.int32),
            "annotators": ((), np.int32),
        },
        "sources": {"source": (tuple(audio_size), np.float32)},
        "waveforms": {"mixture": ((samples,), np.float32), "sources": ((SOURCES, samples), np.float32)},
    }
    fields: Spec = {
        "image": ((*image_size, 3), np.uint8),
        "audio": (tuple(audio_size), np.float32),
        "label": ((), np.int32),
        "start": ((), np.float32),
    }
    for name in data.annotations:
        fields |= annotated[name]
    return fields


class ClipSource:
    """Random access to the records of one prepared set that never raises.

    A record that cannot be read comes back as {'id', 'failure'}. `records` is sent to the workers.
    """

    def __init__(self, name: str, records: Records):
        self._name = name
        self._records = records
        self._length = len(records)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        try:
            with stage("read"):
                return self._records[index]
        except ClipFailure as failure:
            identifier = f"{self._name}[{index}]"
            return {"id": identifier, "failure": failure.named(identifier)}


class WithOthers(grain.MapDataset):
    """Clips with others beside them: with `choose(p)` = (clip, others, view), element p is that clip of `clips`, with
    `others` and with what `view` says of its window and mask (see plans). `length` elements."""

    def __init__(
        self, clips: grain.MapDataset, length: int, choose: Callable[[int], tuple[int, Iterable[int], dict[str, Any]]]
    ):
        super().__init__(clips)
        self._length, self._choose = length, choose

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        clip, others, view = self._choose(index)
        return self._parent[clip] | {"others": [self._parent[other] for other in others], "view": view}


@dataclasses.dataclass(frozen=True)
class ClipLoader(grain.transforms.RandomMap):
    """Decodes, augments and computes the features of one clip.

    `augment` False: the window and mask that the record's `view` names (see plans), centred crop, no flip, no change
    of volume. `swap` 'image' or 'audio' takes that stream from the last of the record's `others`; the first ones are
    mixed in as `data.mix` says. Where masks are wanted, the frame is that of a mask, the audio is around it.
    """

    data: DataConfig
    image_size: Size
    audio_size: Size
    augment: bool
    swap: str = ""

    def random_map(self, element: Record, rng: np.random.Generator) -> dict[str, Any]:
        """Record → `image` uint8 [H, W, 3], `audio` float32 [mels, frames], `label`, `start` (s), `id`, `stage`,
        `cause`, and what `data.annotations` ask for.

        A clip that fails has `stage` and `cause`, '' in others, and neither image nor audio.
        """
        clip = {"id": str(element["id"]), "start": 0.0, "stage": "", "cause": ""}
        try:
            for record in (element, *element.get("others", ())):
                if "failure" in record:
                    raise record["failure"]
            if self.swap:
                fields = ("frames", "frame_times") if self.swap == "image" else ("sound",)
                element = element | {name: element["others"][-1][name] for name in fields}
            with stage("label"):
                label = read_label(element, self.data)
            heard, mask, middle = self._load_audio(element, rng)
            return clip | {"label": label} | heard | self._load_image(element, rng, mask, middle)
        except ClipFailure as failure:
            return clip | {"stage": failure.stage, "cause": failure.cause}

    def _load_audio(self, record: Record, rng: np.random.Generator) -> tuple[dict[str, Any], int | None, float]:
        """The fields that are heard; the number of the mask that is looked at (None where none is wanted); the middle
        of the audio in seconds."""
        data, rate, samples = self.data, self.data.sound.rate, self.audio_size[1] * self.data.sound.hop
        jitter, mask = rng if self.augment and data.jitter else None, None
        with stage("annotations"):
            if "mask" in data.annotations:
                mask, position = choose_mask(record, samples / rate, rng if self.augment else None, jitter)
            else:
                position = record.get("view", MIDDLE)["window"] if jitter is None else rng.uniform()
        with stage("sound"):
            waveform, start, middle = audio.read_window(record["sound"], rate, samples, position)
            sources = np.zeros((0, samples), np.float32)
            if data.mix > 1:
                mixed = [other["sound"] for other in record["others"][: data.mix - 1]]
                others = [audio.read_window(encoded, rate, samples, position)[0] for encoded in mixed]
                sources = np.stack([waveform, *others])
                waveform = sources.sum(0)
            elif {"sources", "waveforms"} & set(data.annotations):
                sources = read_sources(record, rate, samples, position)
        with stage("features"):
            if self.augment and data.volume_db:
                gain = rng.uniform(-data.volume_db, data.volume_db)
                waveform, sources = audio.change_volume(waveform, gain), audio.change_volume(sources, gain)
            if data.sound_snr is not None:
                waveform = audio.add_noise(waveform, data.sound_snr, rng)
            clip: dict[str, Any] = {"start": start, "audio": audio.features(waveform, data.sound)}
            if "sources" in data.annotations:
                clip["source"] = audio.log_mel(sources[0], data.sound)
            if "waveforms" in data.annotations:
                clip["mixture"] = waveform
                clip["sources"] = np.zeros((SOURCES, samples), np.float32)
                clip["sources"][: len(sources)] = sources
        return clip, mask, middle

    def _load_image(
        self, record: Record, rng: np.random.Generator, mask: int | None, middle: float
    ) -> dict[str, np.ndarray]:
        """The fields that are seen, of the frame nearest to `middle` or that of mask number `mask`."""
        with stage("frame"):
            if len(record["frames"]) == 0:
                raise ValueError("the clip holds no frames")
            shown = int(np.argmin(np.abs(np.asarray(record["frame_times"]) - middle)))
            if mask is not None and self.swap != "image":
                shown = record["mask_frames"][mask]
            jpeg = record["frames"][shown]
            size = frames.frame_size(jpeg)
            flip = self.augment and self.data.flip and rng.uniform() < 0.5
            if self.augment:
                box = frames.random_box(rng, *size, self.data.crop_scale)
            else:
                whole = "mask" in self.data.annotations  # annotated frames are judged whole, as published
                box = frames.centre_box(*size, self.image_size, 1.0 if whole else frames.EVALUATION_SHARE)
            clip = {"image": frames.resize_box(*frames.decode(jpeg, box, self.image_size), self.image_size, flip)}
        with stage("annotations"):
            if mask is not None:
                clip["mask"] = read_mask(record["masks"][mask], self.data.classes, box, self.image_size, flip)
            if "objects" in self.data.annotations:
                clip |= read_objects(record, box, size, flip)
        return clip


class HostBatches(grain.MapDataset):
    """This host's rows of the global batches that begin at global position `first` of a dataset of clips.

    Batch i holds positions first + i · batch_size + rows (`index`); `fields` has shape and dtype of what clips bring.
    Positions from `total` on are padding: zeros, `valid` False, `id`, `stage` and `cause` ''. A failed clip is zeros
    and `valid` False with its `id`, `stage` and `cause`.
    """

    def __init__(
        self, clips: grain.MapDataset, fields: Spec, batch_size: int, rows: np.ndarray, first: int, total: int
    ):
        super().__init__(clips)
        self._fields = fields
        self._batch_size, self._rows, self._first, self._total = batch_size, [int(row) for row in rows], first, total

    def __len__(self) -> int:
        return -(-(self._total - self._first) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        count, begin = len(self._rows), self._first + index * self._batch_size
        batch: dict[str, np.ndarray] = {
            name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self._fields.items()
        }
        batch |= {
            "index": (begin + np.array(self._rows)).astype(np.int32),
            "valid": np.zeros(count, bool),
            **{name: np.full(count, "", object) for name in ("id", "stage", "cause")},
        }
        for number, row in enumerate(self._rows):
            if begin + row < self._total:
                clip = self._parent[begin + row]
                batch["valid"][number] = not clip["stage"]
                for name, value in clip.items():
                    batch[name][number] = value
        return batch


def read_label(record: Record, data: DataConfig) -> np.ndarray | np.int32:
    """The class of a clip, int32 (-1: unknown), or where `data.annotations` ask for 'labels' int32 [classes], 1 for
    each that the clip has.

    Raises ValueError where 'label' or 'labels' is asked for and no class is known, or one is none of `data.classes`.
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


def choose_mask(
    record: Record, seconds: float, rng: np.random.Generator | None, jitter: np.random.Generator | None
) -> tuple[int, float]:
    """Which annotated frame of a clip is looked at, and the window around it.

    Args:
      record: with `masks`, `mask_frames`, `frame_times` and `duration`.
      seconds: of the window.
      rng: draws the mask; `None` for the one that the record's `view` names.
      jitter: draws where in the window the frame lies; `None` for its centre. A window that the audio does not hold
        moves into it.

    Returns:
      The mask's number, and the window's position (see audio.read_window).

    Raises:
      ValueError: the record has no mask.
    """
    if len(record["masks"]) == 0:
        raise ValueError("the clip has no mask")
    number = int(record.get("view", MIDDLE)["mask"] if rng is None else rng.integers(len(record["masks"])))
    time, spare = record["frame_times"][record["mask_frames"][number]], float(record["duration"]) - seconds
    if spare <= 0:
        return number, 0.5
    low, high = np.clip([time - seconds, time], 0, spare)
    start = np.clip(time - seconds / 2, 0, spare) if jitter is None else jitter.uniform(low, high)
    return number, float(start / spare)


def read_mask(encoded: bytes, classes: int, box: Box, size: Size, flip: bool) -> np.ndarray:
    """The part `box` of a PNG mask, cropped and resized as the frame is.

    Args:
      encoded: the PNG file, 8-bit greyscale.
      classes: 0 or 1 for a binary mask, else how many classes the values number.
      box: in pixels, see frames.
      size: (H, W) of the result.
      flip: whether the frame is mirrored.

    Returns:
      uint8 [H, W]: 1 where a binary mask is not 0, or the numbers of the classes.

    Raises:
      ValueError: the mask is not 8-bit greyscale, or holds other classes.
    """
    mask = Image.open(io.BytesIO(encoded))
    if mask.mode != "L":
        raise ValueError(f"a mask must be an 8-bit greyscale picture, got mode {mask.mode}")
    shape = (size[1], size[0])
    if classes <= 1:
        marked = mask.point(lambda value: 255 if value else 0)
        pixels = (np.asarray(marked.resize(shape, Image.Resampling.BILINEAR, box=box)) >= 128).astype(np.uint8)
    else:
        highest = int(np.asarray(mask).max())
        if highest >= classes:
            raise ValueError(
                f"the mask holds class {highest}, there are {classes} (0 to {classes - 1}); binary masks "
                "have no classes"
            )
        pixels = np.asarray(mask.resize(shape, Image.Resampling.NEAREST, box=box))
    return pixels[:, ::-1] if flip else pixels


def read_objects(record: Record, box: Box, frame: tuple[int, int], flip: bool) -> dict[str, np.ndarray]:
    """The boxes of a record as shares of the crop; parts outside are cut off.

    Args:
      record: with `boxes` in shares of the frame.
      box: the crop, in pixels of the frame.
      frame: (height, width) of the frame, in pixels.
      flip: whether the crop is mirrored.

    Returns:
      The fields of 'objects', see `batch_fields`.

    Raises:
      ValueError: there are more than OBJECTS boxes.
    """
    boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
    if len(boxes) > OBJECTS:
        raise ValueError(f"the clip has {len(boxes)} boxes, at most {OBJECTS} can be read")
    left, top, right, bottom = box
    boxes = boxes * np.tile(np.array(frame, np.float32), 2)
    boxes = (boxes - np.array([top, left, top, left])) / np.tile([bottom - top, right - left], 2)
    if flip:
        boxes = np.stack([boxes[:, 0], 1 - boxes[:, 3], boxes[:, 2], 1 - boxes[:, 1]], axis=1)
    fields = {"boxes": np.zeros((OBJECTS, 4), np.float32), "annotators": np.asarray(record["annotators"], np.int32)}
    fields["boxes"][: len(boxes)] = np.clip(boxes, 0, 1)
    for name in ("object_labels", "sounding", "box_annotators"):
        fields[name] = np.full(OBJECTS, -1, np.int32)
        fields[name][: len(boxes)] = record[name]
    return fields


def read_sources(record: Record, rate: int, samples: int, position: float) -> np.ndarray:
    """The clean waveforms of a record in a window (see audio.read_window): float32 [m, samples].

    Raises ValueError where there are none, or more than SOURCES.
    """
    if len(record["sources"]) == 0:
        raise ValueError("the clip has no clean sounds")
    if len(record["sources"]) > SOURCES:
        raise ValueError(f"the clip has {len(record['sources'])} clean sounds, at most {SOURCES} can be read")
    return np.stack([audio.read_window(source, rate, samples, position)[0] for source in record["sources"]])
