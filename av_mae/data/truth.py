"""What a record knows besides frame and sound: labels, masks and objects, cut as the frame is, and clean sounds.

`DataConfig.truth` names what batches carry of it. Places that a clip does not fill are 0, labels -1.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from av_mae.config import MOST_MIXED, DataConfig, SoundConfig
from av_mae.data import sound as sounds
from av_mae.data.frames import Box
from av_mae.data.plans import MIDDLE

OBJECTS = 32  # boxes per clip that a batch has room for
SOURCES = MOST_MIXED  # clean sounds per clip that a batch has room for
# What of a record the truths are read from.
RECORD_FIELDS = {"label": (), "labels": ("labels",), "mask": ("masks", "mask_frames", "duration"),
                 "objects": ("boxes", "object_labels", "sounding", "box_annotators", "annotators"),
                 "sources": ("sources",), "waveforms": ("sources",)}
Spec = dict[str, tuple[tuple[int, ...], type]]


def spec(data: DataConfig, image_size: tuple[int, int], audio_size: tuple[int, int]) -> Spec:
    """Shapes and dtypes of the fields, per clip, that the truths of `data` add to a batch.

    label: nothing, but a clip whose class is unknown fails. labels: `label` int32 [classes], 1 for each class that the
    clip has, in place of its first class. mask: `mask` uint8 [H, W], 1 (or the class) where something sounds. objects:
    `boxes` float32 [OBJECTS, 4] (ymin, xmin, ymax, xmax in 0…1 of the image), int32 [OBJECTS] `object_labels`,
    `sounding` (1: sounds, 0: silent, -1: no box) and `box_annotators`, and int32 `annotators`, as in records.
    sources: `source` float32 [mels, frames], the log-mel of the sounding object's clean sound. waveforms: `mixture`
    float32 [samples] and `sources` float32 [SOURCES, samples], the sounding object's first.
    """
    samples = audio_size[1] * data.sound.hop
    fields: dict[str, Spec] = {
        "label": {}, "labels": {"label": ((data.classes,), np.int32)},
        "mask": {"mask": (image_size, np.uint8)},
        "objects": {"boxes": ((OBJECTS, 4), np.float32), "object_labels": ((OBJECTS,), np.int32),
                    "sounding": ((OBJECTS,), np.int32), "box_annotators": ((OBJECTS,), np.int32),
                    "annotators": ((), np.int32)},
        "sources": {"source": (audio_size, np.float32)},
        "waveforms": {"mixture": ((samples,), np.float32), "sources": ((SOURCES, samples), np.float32)}}
    return {name: entry for truth in data.truth for name, entry in fields[truth].items()}


def read_label(record: dict[str, Any], data: DataConfig) -> np.ndarray:
    """The class of a clip, int32 (-1: unknown), or where `data.truth` asks for 'labels' int32 [classes], 1 for each
    that the clip has.

    Raises ValueError where the truth 'label' or 'labels' is wanted and no class is known, or one is none of `classes`.
    """
    if {"label", "labels"} & set(data.truth) and record["label"] < 0:
        raise ValueError("the class is unknown")
    if "labels" not in data.truth:
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
            raise ValueError(f"the mask holds class {highest}, there are {classes} (0 to {classes - 1}); binary masks "
                             "have no classes")
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
    placed["boxes"][:len(boxes)] = np.clip(boxes, 0, 1)
    for name in ("object_labels", "sounding", "box_annotators"):
        placed[name] = np.full(OBJECTS, -1, np.int32)
        placed[name][:len(boxes)] = record[name]
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


def source_fields(wanted: tuple[str, ...], mixture: np.ndarray, sources: np.ndarray,
                  settings: SoundConfig) -> dict[str, np.ndarray]:
    """The fields of 'sources' and 'waveforms' from a mixture [samples] and its sources [m, samples]."""
    fields = {}
    if "sources" in wanted:
        fields["source"] = sounds.log_mel(sources[0], settings)
    if "waveforms" in wanted:
        fields["mixture"] = mixture
        fields["sources"] = np.zeros((SOURCES, len(mixture)), np.float32)
        fields["sources"][:len(sources)] = sources
    return fields
