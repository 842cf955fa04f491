"""An opened published file and the model that it is of: what is read of it, checked, and left."""

import os
import re
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.errors import UserError
from av_mae.models import AVMAEConfig, kinds
from av_mae.published import head_names
from av_mae.published.infer import POSITION_TOLERANCE, Found, identify, infer
from av_mae.published.names import names_of
from av_mae.training.step import define_model
from av_mae.weight_files import WeightFile, open_weights
from av_mae.weight_files.refusals import shown

# What a file of a unimodal MAE holds besides its encoder: class token, positions, decoder, head of a fine-tuned one.
NOT_OF_THE_STREAM = re.compile(r"(cls_token|pos_embed|mask_token)$|(decoder_\w+|head|fc_norm)(\.|$)")
SHOWN = 5  # tensors in one line


class Survey(NamedTuple):
    """What one pass over all values finds.

    checksum: that of the model's arrays, as training.checkpoint has it.
    kept: tensors that the model cannot give back bit for bit.
    nonfinite: tensor → how many of its values are NaN, and how many infinite in the model's dtype.
    """

    checksum: int
    kept: list[str]
    nonfinite: dict[str, tuple[int, int]]


class Published:
    """A published file as the model that `found` says. No values are read but those that are asked for.

    Attributes: the model's `definition`, shapes of its `parameters` and of all its arrays (`shapes`) by dotted path,
    its `names`, `left_out` (tensors of the file that the model does not hold) and `missing` (buffers that the file
    does not have: the model computes them anyway).

    Raises:
      UserError: the file lacks a tensor of the model, or has another one, or one of another shape.
    """

    def __init__(self, file: WeightFile, found: Found):
        self.file, self.found, self.source = file, found, str(file.path)
        self.definition, self.parameters, statistics = define_model(found.build)
        self.shapes = self.parameters | statistics
        try:
            self.names = names_of(self.definition.merge(self.shapes), found.prefix)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from error
        unimodal = found.kind in kinds.STREAMS
        self.left_out = [name for name in file.tensors if unimodal and NOT_OF_THE_STREAM.match(name)]
        self.missing = [name for name in self.names.buffers if name not in file.tensors]
        self._check()
        self._place = {path: (rule, number) for rule in self.names.rules.values()
                       for number, path in enumerate(rule.here)}

    def _check(self) -> None:
        tensors, rules = self.file.tensors, self.names.rules
        for name in rules:
            if name not in tensors:
                raise UserError(f"{self.source} lacks the parameter {name}; check the model configuration")
        for name in tensors:
            if name not in rules and name not in self.names.buffers and name not in self.left_out:
                raise UserError(f"{self.source} has, beyond the configured model, the parameter {shown(name)}; check "
                                "the model configuration")
        shapes = {path: x.shape for path, x in self.shapes.items()}
        for name, rule in rules.items():
            if tensors[name].shape != rule.shape(shapes):
                raise UserError(f"{self.source} has {name} of shape {tensors[name].shape}, but the configured model "
                                f"needs {rule.shape(shapes)}")

    def read(self, path: str) -> np.ndarray:
        """One array of the model, in its dtype and layout, read from the file."""
        rule, number = self._place[path]
        value = self._cast(rule.published, self.file.tensors[rule.published].read(), self.shapes[path].dtype)
        return np.asarray(rule.layout.split(value, len(rule.here))[number], order="C")

    def _cast(self, name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "i":
            return head_names.as_count(f"{self.source}: {name}", value)
        with np.errstate(over="ignore"):
            return value.astype(dtype, copy=False)

    def survey(self) -> Survey:
        """Reads every tensor of the model once, one after the other.

        Raises:
          UserError: a buffer is not what the model computes: it would give other outputs than the published one.
        """
        checksum, kept, nonfinite = 0, list(self.left_out), {}
        for name, rule in self.names.rules.items():
            value = self.file.tensors[name].read()
            array = self._cast(name, value, self.shapes[rule.here[0]].dtype)
            checksum += int(array.view(np.uint32).sum(dtype=np.uint64))
            bad = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            if any(bad):
                nonfinite[name] = bad
            if array.dtype != value.dtype and not same_bits(array.astype(value.dtype), value):
                kept.append(name)
        kept += [name for name in self.names.buffers if name not in self.missing and not self._same_buffer(name)]
        return Survey(checksum % 2 ** 32, kept, nonfinite)

    def _same_buffer(self, name: str) -> bool:
        """Whether the model computes a buffer bit for bit. Raises UserError where it computes something else."""
        buffer, tensor = self.names.buffers[name], self.file.tensors[name]
        same = tensor.shape == buffer.shape
        if same:
            own, value = buffer.make(), tensor.read()
            tolerance = POSITION_TOLERANCE.get(str(value.dtype), 1e-5)
            same = np.abs(own - value.astype(np.float64)).max() <= tolerance
        if not same:
            raise UserError(f"{self.source}: {name} is not the table that the model here computes, so it would give "
                            "other outputs than the published one; check the model configuration")
        return same_bits(own.astype(value.dtype), value)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal down to the bits: NaNs count as what they are, -0 is not 0."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def complain(nonfinite: dict[str, tuple[int, int]]) -> str:
    """Values of a survey that are no numbers, in one line."""
    counts = [f"{name} ({nans} NaN, {infinite} infinite)" for name, (nans, infinite) in nonfinite.items()]
    more = f" and {len(counts) - SHOWN} more tensors" if len(counts) > SHOWN else ""
    return f"weights that are not finite numbers: {', '.join(counts[:SHOWN])}{more}"


def load_published(path: str | os.PathLike, config: AVMAEConfig | None = None) -> nnx.Module:
    """A published checkpoint (.pth, .pt or .safetensors) → the model it holds: AVMAE, Classifier, Separator,
    Segmenter or EncoderModel, float32, with its configuration as `.config`.

    config: of the encoder and, for pretraining checkpoints, the decoders; None: as far as the file tells it.

    Raises:
      UserError: the file cannot be read or holds a model of another configuration.
    """
    file = open_weights(path)
    kind, _ = identify(file.tensors, str(path))
    if kind in kinds.STREAMS:
        stream = kinds.STREAMS[kind]
        raise UserError(f"{path} holds a unimodal {stream} encoder, which is no whole model: start a run from it with "
                        f"--config.init_{stream}={path}")
    published = Published(file, infer(file.tensors, str(path), config=config))
    nonfinite = published.survey().nonfinite
    if nonfinite:
        warnings.warn(f"{path} has {complain(nonfinite)}", stacklevel=2)
    return published.definition.merge({name: jnp.asarray(published.read(name)) for name in published.shapes})
