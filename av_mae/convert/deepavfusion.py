"""A weight file of DeepAVFusion (or of a unimodal MAE) as the model that it holds, and what it is in words."""

import dataclasses
import math
import os
import re
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.convert.infer import POSITION_TOLERANCE, Found, Options, identify, infer, learned_positions
from av_mae.convert.names import names_of
from av_mae.convert.tensors import shown
from av_mae.convert.weight_file import WeightFile, open_weights
from av_mae.errors import UserError, one_line
from av_mae.models import AVMAEConfig, StreamConfig, kinds
from av_mae.models.kinds import define_model

# What a file of a unimodal MAE holds besides its encoder: class token, positions, decoder, head of a fine-tuned one.
NOT_OF_THE_STREAM = re.compile(r"(cls_token|pos_embed|mask_token)$|(decoder_\w+|head|fc_norm)(\.|$)")
SHOWN = 5  # tensors in one line
LARGEST_COUNT = 2**31 - 1


class Survey(NamedTuple):
    """What one pass over all values finds.

    checksum: of the model's arrays, as av_mae.checkpoint computes it.
    kept: tensors that the model cannot give back bit for bit.
    nonfinite: by tensor, how many of its values are NaN, and how many infinite in the model's dtype.
    """

    checksum: int
    kept: list[str]
    nonfinite: dict[str, tuple[int, int]]


class DeepAVFusionFile:
    """A weight file as the model that `found` says. No values are read but those that are asked for.

    Attributes:
      definition, names: the model's structure, and its table of names.
      parameters, shapes: the shapes of the model's parameters, and of all its arrays, by dotted path.
      left_out: tensors of the file that the model does not hold.
      missing: buffers that the file does not have; the model computes them anyway.

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
        self._rules = {
            path: (rule, number) for rule in self.names.rules.values() for number, path in enumerate(rule.here)
        }

    def _check(self) -> None:
        tensors, rules = self.file.tensors, self.names.rules
        for name in rules:
            if name not in tensors:
                raise UserError(f"{self.source} lacks the parameter {name}; check the model configuration")
        for name in tensors:
            if name not in rules and name not in self.names.buffers and name not in self.left_out:
                raise UserError(
                    f"{self.source} has, beyond the configured model, the parameter {shown(name)}; check "
                    "the model configuration"
                )
        shapes = {path: x.shape for path, x in self.shapes.items()}
        for name, rule in rules.items():
            if tensors[name].shape != rule.shape(shapes):
                raise UserError(
                    f"{self.source} has {name} of shape {tensors[name].shape}, but the configured model "
                    f"needs {rule.shape(shapes)}"
                )

    def read(self, path: str) -> np.ndarray:
        """One array of the model, in its dtype and layout, read from the file."""
        rule, number = self._rules[path]
        value = self._cast(rule.name, self.file.tensors[rule.name].read(), self.shapes[path].dtype)
        return np.asarray(rule.layout.split(value, len(rule.here))[number], order="C")

    def _cast(self, name: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "i":
            return as_count(f"{self.source}: {name}", value)
        with np.errstate(over="ignore"):
            return value.astype(dtype, copy=False)

    def survey(self) -> Survey:
        """Reads every tensor of the model once, one after the other.

        Raises:
          UserError: a buffer is not what the model computes: it would give other outputs than DeepAVFusion.
        """
        checksum, kept = 0, list(self.left_out)
        nonfinite: dict[str, tuple[int, int]] = {}
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
        return Survey(checksum % 2**32, kept, nonfinite)

    def _same_buffer(self, name: str) -> bool:
        """Whether the model computes a buffer bit for bit. Raises UserError where it computes something else."""
        buffer, tensor = self.names.buffers[name], self.file.tensors[name]
        same = tensor.shape == buffer.shape
        if same:
            own, value = buffer.make(), tensor.read()
            tolerance = POSITION_TOLERANCE.get(str(value.dtype), 1e-5)
            same = np.abs(own - value.astype(np.float64)).max() <= tolerance
        if not same:
            raise UserError(
                f"{self.source}: {name} is not the table that the model here computes, so it would give "
                "other outputs than DeepAVFusion; check the model configuration"
            )
        return same_bits(own.astype(value.dtype), value)


def as_count(name: str, value: np.ndarray) -> np.ndarray:
    """DeepAVFusion's int64 count of batches as int32."""
    if value.dtype.kind not in "iu" or not 0 <= int(value) <= LARGEST_COUNT:
        raise UserError(f"{name}={value} must be a whole number from 0 to {LARGEST_COUNT}")
    return value.astype(np.int32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal down to the bits: NaNs count as what they are, -0 is not 0."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def complaints(weights: DeepAVFusionFile, survey: Survey) -> list[str]:
    """What a user should know of a file before the model is used, each in one line."""
    found = []
    if survey.nonfinite:
        counts = [f"{name} ({nans} NaN, {infinite} infinite)" for name, (nans, infinite) in survey.nonfinite.items()]
        more = f" and {len(counts) - SHOWN} more tensors" if len(counts) > SHOWN else ""
        found.append(f"has weights that are not finite numbers: {', '.join(counts[:SHOWN])}{more}")
    if weights.found.kind in kinds.STREAMS and learned_positions(weights.file.tensors, weights.source):
        found.append(
            "has learned positions (pos_embed is no sin-cos table): the run's sin-cos positions take their place, so "
            "this encoder computes something else until it is trained further"
        )
    return [f"{weights.source} {complaint}" for complaint in found]


def load_published(path: str | os.PathLike, config: AVMAEConfig | None = None) -> nnx.Module:
    """The model that a weight file of DeepAVFusion (.pth, .pt, .safetensors or .index.json) holds.

    Args:
      path: the file.
      config: of the encoder and, for pretraining checkpoints, the decoders. `None` if the file tells all of it.

    Returns:
      AVMAE, Classifier, Separator, Segmenter or EncoderModel, float32, with its configuration as `.config`.

    Raises:
      UserError: the file cannot be read or holds a model of another configuration.
    """
    file = open_weights(path)
    kind, _ = identify(file.tensors, str(path))
    if kind in kinds.STREAMS:
        stream = kinds.STREAMS[kind]
        raise UserError(
            f"{path} holds a unimodal {stream} encoder, which is no whole model: start a run from it with "
            f"--config.init_{stream}={path}"
        )
    weights = DeepAVFusionFile(file, infer(file.tensors, str(path), config=config))
    for complaint in complaints(weights, weights.survey()):
        warnings.warn(complaint, stacklevel=2)
    return weights.definition.merge({name: jnp.asarray(weights.read(name)) for name in weights.shapes})


KINDS = {
    kinds.PRETRAINING: "pretraining checkpoint",
    "image_encoder": "unimodal MAE image encoder",
    "audio_encoder": "unimodal AudioMAE encoder",
}
PARTS = {
    "image.": "image encoder",
    "audio.": "audio encoder",
    "fusion_": "fusion",
    "image_decoder.": "image decoder",
    "audio_decoder.": "audio decoder",
}


def summarize(weights: DeepAVFusionFile, options: Options) -> str:
    """Kind, parts with their parameters and sizes, what was ignored, what is missing, what was assumed."""
    file, found = weights.file, weights.found
    counts = parameters_by_part(weights)
    sizes = describe(found.config)
    if found.head is not None:
        sizes["head"] = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(found.head).items())
    lines = [
        f"{file.path}: {KINDS.get(found.kind, found.kind)} ({file.format}, {len(file.tensors)} tensors, "
        f"{sum(counts.values()) / 1e6:.2f} M parameters)"
    ]
    lines += [f"  {part:<14}{count / 1e6:9.2f} M  {sizes.get(part, '')}".rstrip() for part, count in counts.items()]
    for title, entries in (
        ("ignored", ignored(weights)),
        ("missing", ["decoders"] * (found.kind == kinds.ENCODER) + [f"{name} (computed)" for name in weights.missing]),
        ("not told by the file", assumed(weights, options)),
    ):
        lines.append(f"  {title}: {one_line(', '.join(entries)) or 'nothing'}")
    if found.kind == "audio_encoder":
        lines.append(
            "  patches as they are: AudioMAE has time in rows, here they are mels; DeepAVFusion does not "
            "turn them either"
        )
    return "\n".join(lines)


def parameters_by_part(weights: DeepAVFusionFile) -> dict[str, int]:
    """Part → number of parameters; all that is no part of encoder or decoder is the head."""
    only = kinds.STREAMS.get(weights.found.kind)
    counts: dict[str, int] = {}
    for path, x in weights.parameters.items():
        path = f"{only}.{path}" if only else path.removeprefix("encoder.")
        part = next((name for begin, name in PARTS.items() if path.startswith(begin)), "head")
        counts[part] = counts.get(part, 0) + math.prod(x.shape)
    return dict(sorted(counts.items(), key=lambda item: [*PARTS.values(), "head"].index(item[0])))


def describe(config: AVMAEConfig) -> dict[str, str]:
    """Part → its sizes."""

    def stream(stream: StreamConfig) -> str:
        (rows, columns), patch = stream.size, "×".join(map(str, stream.patch_size))
        return (
            f"{stream.width} wide, {stream.depth} layers, {stream.heads} heads, MLP ratio {stream.mlp_ratio:g}, "
            f"input {rows}×{columns} in patches of {patch}"
        )

    fusion, decoder = config.fusion, config.decoder
    layers = fusion.layers if fusion.layers == "all" else ", ".join(map(str, fusion.layers))
    decoders = (
        f"{decoder.kind}, {decoder.width} wide, {decoder.depth} layers, {decoder.heads} heads, MLP ratio "
        f"{decoder.mlp_ratio:g}" + (f", window {decoder.window}" if decoder.kind == "swin" else "")
    )
    return {
        "image encoder": stream(config.image),
        "audio encoder": stream(config.audio),
        "fusion": f"{fusion.kind}, layers {layers}, tokens {fusion.tokens}, {fusion.heads} heads, attention ratio "
        f"{fusion.attention_ratio:g}, MLP ratio {fusion.mlp_ratio:g}",
        "image decoder": decoders,
        "audio decoder": decoders,
    }


def ignored(weights: DeepAVFusionFile) -> list[str]:
    """What the file holds besides the model."""
    file = weights.file
    entries = [f"{name} ({size / 1e6:.1f} MB)" if size else name for name, size in file.ignored.items()]
    entries += list(file.metadata)
    left = weights.left_out
    named = {"cls_token": "class token", "pos_embed": "positions (sin-cos of the run's grid take their place)"}
    entries += [said for name, said in named.items() if name in left]
    decoder = [name for name in left if name.startswith("decoder_") or name == "mask_token"]
    rest = [name for name in left if name not in named and name not in decoder]
    return entries + ([f"decoder ({len(decoder)} tensors)"] if decoder else []) + rest


def assumed(weights: DeepAVFusionFile, options: Options) -> list[str]:
    """What no tensor tells and nobody said: taken from DeepAVFusion."""
    kind, config = weights.found.kind, weights.found.config
    entries = [] if options.heads else ["heads"]
    if config.fusion.kind == "factorized" and options.tokens is None:
        entries.append("tokens")
    if kind == kinds.PRETRAINING:
        if config.decoder.kind == "plain" and options.decoder_heads is None:
            entries.append("decoder heads")
        entries += [f"mask ratios {config.image.mask_ratio} and {config.audio.mask_ratio}", "normalised targets"]
    if kind == "separator":
        entries.append("the kind of mask and the loss")
    return entries
