"""Published names of the three heads' tensors ↔ paths of parameters and statistics here, and how their axes lie.

Everything below 'encoder.' is left out here: its names are those of the encoder.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from av_mae.errors import UserError
from av_mae.models.config import ClassifierConfig, SegmenterConfig, SeparatorConfig

# The published axes in the order in which they lie here.
Axes = tuple[int, ...]

LARGEST_COUNT = 2**31 - 1

COUNT, VECTOR = (), (0,)
MATRIX = (1, 0)  # [out, in] → [in, out]
CONVOLUTION = (2, 3, 1, 0)  # [out, in, rows, columns] → [rows, columns, in, out]
TRANSPOSED = (2, 3, 0, 1)  # [in, out, rows, columns] → [rows, columns, in, out]

# What the layers hold: the last part of the published name, of the path here, and the axes.
Leaf = tuple[str, str, Axes]
BIAS = ("bias", "bias", VECTOR)
LINEAR = (("weight", "kernel", MATRIX), BIAS)
NORM = (("weight", "scale", VECTOR), BIAS)
STATISTICS = (
    ("running_mean", "mean", VECTOR),
    ("running_var", "variance", VECTOR),
    ("num_batches_tracked", "batches", COUNT),
)
CONV = (("weight", "kernel", CONVOLUTION), BIAS)
TRANSPOSED_CONV = (("weight", "kernel", TRANSPOSED), BIAS)


class Entry(NamedTuple):
    """One tensor: its published name, its path here, and the published axes as they lie here."""

    published: str
    path: str
    axes: Axes


def layer(published: str, path: str, leaves: tuple[Leaf, ...]) -> list[Entry]:
    return [Entry(f"{published}.{there}", f"{path}.{here}", axes) for there, here, axes in leaves]


def double_conv(published: str, path: str) -> list[Entry]:
    """The published sequence counts its ReLUs: convolutions are 0 and 3, norms 1 and 4."""
    return (
        layer(f"{published}.double_conv.0", f"{path}.conv1", CONV[:1])
        + layer(f"{published}.double_conv.1", f"{path}.norm1", NORM + STATISTICS)
        + layer(f"{published}.double_conv.3", f"{path}.conv2", CONV[:1])
        + layer(f"{published}.double_conv.4", f"{path}.norm2", NORM + STATISTICS)
    )


def up(published: str, path: str) -> list[Entry]:
    return layer(f"{published}.up", f"{path}.transposed", TRANSPOSED_CONV) + double_conv(
        f"{published}.conv", f"{path}.convolutions"
    )


def classifier_entries(_: int) -> list[Entry]:
    """All that a classifier can have; fusion head and input norms are there or not."""
    found = []
    for stream in ("image", "audio", "fusion"):
        found += layer(f"{stream}_head", f"heads.{stream}", LINEAR)
        found += layer(f"{stream}_norm", f"norms.{stream}", STATISTICS)
    return found


def separator_entries(scales: int) -> list[Entry]:
    """Published scales count from 1, the finest; the norms among them from 0."""
    found = layer("avss_decoder.xv_norm", "condition_norm", NORM) + double_conv("avss_decoder.top", "top")
    for scale in range(scales):
        found += layer(f"avss_decoder.xa_norm.{scale}", f"audio_norms.{scale}", NORM)
        found += layer(f"avss_decoder.cond{scale + 1}", f"conditions.{scale}", LINEAR)
    for scale in range(scales - 1):
        found += up(f"avss_decoder.lat{scale + 1}", f"laterals.{scale}")
        found += up(f"avss_decoder.up{scale + 1}", f"ups.{scale}")
    return found + layer("avss_decoder.pred", "predict", CONV)


def segmenter_entries(scales: int) -> list[Entry]:
    """Published scales count from 0, the coarsest, which has neither lateral nor up."""
    found = double_conv("top", "top")
    for scale in range(scales):
        found += layer(f"normv.{scale}", f"image_norms.{scale}", NORM)
        found += layer(f"proja.{scale}", f"audio_projections.{scale}", LINEAR)
        found += layer(f"norma.{scale}", f"audio_norms.{scale}", NORM)
    for scale in range(scales - 1):
        found += up(f"lat.{scale}", f"laterals.{scale}") + up(f"up.{scale}", f"ups.{scale}")
    return found + layer("predictor.0", "predict1", CONV) + layer("predictor.2", "predict2", CONV)


class Head(NamedTuple):
    """A head's tensors by number of scales, and the patterns that name each scale once, there and here."""

    entries: Callable[[int], list[Entry]]
    published_scale: str
    scale: str

    def path_entries(self, paths: Collection[str]) -> dict[str, Entry]:
        """What a head of as many scales as `paths` show can have, by path here."""
        return {entry.path: entry for entry in self.entries(count(self.scale, paths))}


HEADS = {
    "classifier": Head(classifier_entries, r"image_head\.weight", r"heads\.image\.kernel"),
    "separator": Head(separator_entries, r"avss_decoder\.xa_norm\.\d+\.weight", r"audio_norms\.\d+\.scale"),
    "segmenter": Head(segmenter_entries, r"normv\.\d+\.weight", r"image_norms\.\d+\.scale"),
}


def count(pattern: str, names: Collection[str]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def head_kind(names: Collection[str]) -> str | None:
    """Which head published names belong to: 'classifier', 'separator', 'segmenter', or None."""
    return next((kind for kind, head in HEADS.items() if count(head.published_scale, names)), None)


def as_count(name: str, value: np.ndarray) -> np.ndarray:
    """A published int64 count of batches as int32."""
    if value.dtype.kind not in "iu" or not 0 <= int(value) <= LARGEST_COUNT:
        raise UserError(f"{name}={value} must be a whole number from 0 to {LARGEST_COUNT}")
    return value.astype(np.int32)


def head_config(kind: str, tensors: Mapping[str, np.ndarray]) -> ClassifierConfig | SeparatorConfig | SegmenterConfig:
    """The head's configuration as far as published tensors tell it (not the separator's kind of mask).

    Raises:
      UserError: the tensor that tells it is missing.
    """

    def outputs(name: str) -> int:
        if name not in tensors or not tensors[name].shape:
            raise UserError(f"a published {kind} needs a tensor {name} of at least one dimension")
        return tensors[name].shape[0]

    if kind == "classifier":
        return ClassifierConfig(outputs("image_head.weight"), input_norm="image_norm.running_mean" in tensors)
    if kind == "separator":
        return SeparatorConfig()
    return SegmenterConfig(outputs("predictor.2.weight"), outputs("predictor.0.weight"))
