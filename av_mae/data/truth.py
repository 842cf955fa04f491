"""What a record knows besides frame and sound, cut as they are: the mask, the objects and the clean sounds of a clip.

`DataConfig.truth` names what batches carry of it. Places that a clip does not fill are 0, labels -1.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from av_mae.config import MOST_MIXED, SoundConfig
from av_mae.data import sound as sounds
from av_mae.data.frames import Box

OBJECTS = 8  # boxes per clip that a batch has room for
BINARY = 255  # the value of what sounds in a mask without classes
SOURCES = MOST_MIXED  # clean sounds per clip that a batch has room for
# What of a record the truths are read from.
RECORD_FIELDS = {"mask": ("masks", "mask_frames"),
                 "objects": ("boxes", "object_labels", "sounding", "box_annotators", "annotators"),
                 "sources": ("sources",), "waveforms": ("sources",)}
Spec = dict[str, tuple[tuple[int, ...], type]]


def spec(wanted: tuple[str, ...], image_size: tuple[int, int], audio_size: tuple[int, int], hop: int) -> Spec:
    """Shapes and dtypes of the fields, per clip, that the wanted truths add to a batch.

    mask: `mask` uint8 [H, W], 1 (or the class) where something sounds. objects: `boxes` float32 [OBJECTS, 4] (ymin,
    xmin, ymax, xmax in 0…1 of the image), int32 [OBJECTS] `object_labels`, `sounding` (1: sounds, 0: silent, -1: no
    box) and `box_annotators`, and int32 `annotators`, as in records.
    sources: `source` float32 [mels, frames], the log-mel of the sounding object's clean sound. waveforms: `mixture`
    float32 [samples] and `sources` float32 [SOURCES, samples], the sounding object's first.
    """
    samples = audio_size[1] * hop
    fields: dict[str, Spec] = {
        "mask": {"mask": (image_size, np.uint8)},
        "objects": {"boxes": ((OBJECTS, 4), np.float32), "object_labels": ((OBJECTS,), np.int32),
                    "sounding": ((OBJECTS,), np.int32), "box_annotators": ((OBJECTS,), np.int32),
                    "annotators": ((), np.int32)},
        "sources": {"source": (audio_size, np.float32)},
        "waveforms": {"mixture": ((samples,), np.float32), "sources": ((SOURCES, samples), np.float32)}}
    return {name: entry for truth in wanted for name, entry in fields[truth].items()}


def read_mask(record: dict[str, Any], frame: int, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    """The part `box` of a record's mask that is nearest to frame number `frame` → uint8 [H, W], cut as the frame is.

    Binary masks (255: what sounds) become 0 and 1, masks of several classes keep their numbers.
    Raises ValueError where the record has no mask, or one that is not 8-bit greyscale.
    """
    if len(record["masks"]) == 0:
        raise ValueError("the clip has no mask")
    mask = Image.open(io.BytesIO(record["masks"][int(np.argmin(np.abs(record["mask_frames"] - frame)))]))
    if mask.mode != "L":
        raise ValueError(f"a mask must be an 8-bit greyscale picture, got mode {mask.mode}")
    binary = mask.getextrema()[1] == BINARY
    pixels = np.asarray(mask.resize((size[1], size[0]), box=box, resample=Image.Resampling.BILINEAR if binary
                                    else Image.Resampling.NEAREST))
    pixels = (pixels >= 128).astype(np.uint8) if binary else pixels
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


def place_fields(wanted: tuple[str, ...], record: dict[str, Any], number: int, frame: tuple[int, int], box: Box,
                 size: tuple[int, int], flip: bool) -> dict[str, np.ndarray]:
    """The fields of 'mask' and 'objects' for the part `box` of frame `number`, of (height, width), resized to `size`."""
    fields = {}
    if "mask" in wanted:
        fields["mask"] = read_mask(record, number, box, size, flip)
    if "objects" in wanted:
        fields |= read_objects(record, box, frame, flip)
    return fields


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
