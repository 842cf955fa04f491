"""DeepAVFusion's names and layouts of a model's tensors: one table of rules, made by a walk over the model.

A rule says which arrays here make up one tensor there, and how; it works both ways. Queries, keys and values, and the
two halves of a pair's weight, are apart here and one tensor there. Buffers are tensors that the model here computes.
`HEADS` has one entry per task with a head.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from av_mae import models
from av_mae.convert.tensors import Tensors
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models.config import ClassifierConfig, SegmenterConfig, SeparatorConfig, StreamConfig
from av_mae.models.encoder import Encoder, Stream
from av_mae.models.fusion import FactorizedAttention, FusionBlock, PairAttention, TokenAttention
from av_mae.models.kinds import flat_values
from av_mae.models.layers import sin_cos_2d
from av_mae.models.masked_autoencoder import Decoder, SwinBlock, relative_position_index, shift_mask

Shape = tuple[int, ...]
Array = np.ndarray


class Layout(NamedTuple):
    """How one tensor of DeepAVFusion and n arrays here are made of each other; views where possible.

    split(tensor, n) → the n arrays; join(arrays) → the tensor; shape(shapes of the arrays) → the tensor's shape.
    """

    split: Callable[[Array, int], list[Array]]
    join: Callable[[list[Array]], Array]
    shape: Callable[[list[Shape]], Shape]


def join_rows(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# Vectors and tokens as they are, several one after the other (biases of queries, keys and values).
ROWS = Layout(np.split, join_rows, lambda shapes: (sum(shape[0] for shape in shapes), *shapes[0][1:]))
# A linear layer [out, in], or several of them one after the other, as kernels [in, out].
LINEAR = Layout(
    lambda x, n: [part.T for part in np.split(x, n)],
    lambda parts: join_rows([part.T for part in parts]),
    lambda shapes: (sum(shape[1] for shape in shapes), shapes[0][0]),
)
# Linear layers of a pair, [out, 2 in] each: the kernel of the first half, then that of the second.
PAIRS = Layout(
    lambda x, n: [half.T for rows in np.split(x, n // 2) for half in np.split(rows, 2, axis=1)],
    lambda parts: join_rows([np.concatenate([a.T, b.T], axis=1) for a, b in zip(parts[::2], parts[1::2], strict=True)]),
    lambda shapes: (sum(shape[1] for shape in shapes[::2]), shapes[0][0] + shapes[1][0]),
)


def axes(order: tuple[int, ...]) -> Layout:
    """DeepAVFusion's tensor with its axes in another order."""
    back = tuple(np.argsort(order))
    return Layout(
        lambda x, _: [x.transpose(order)],
        lambda parts: parts[0].transpose(back),
        lambda shapes: tuple(shapes[0][axis] for axis in back),
    )


SCALAR = axes(())
CONVOLUTION = axes((2, 3, 1, 0))  # [out, in, rows, columns] → [rows, columns, in, out]
TRANSPOSED = axes((2, 3, 0, 1))  # [in, out, rows, columns] → [rows, columns, in, out]


def patches(config: StreamConfig) -> Layout:
    """A convolution [out, channels, rows, columns] as a linear layer over (row, column, channel)."""
    (rows, columns), channels = config.patch_size, config.channels
    return Layout(
        lambda x, _: [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])],
        lambda parts: parts[0].reshape(rows, columns, channels, -1).transpose(3, 2, 0, 1),
        lambda shapes: (shapes[0][1], channels, rows, columns),
    )


class Rule(NamedTuple):
    """The tensor called `name` in DeepAVFusion is made of the arrays `here`, named by dotted path."""

    name: str
    here: tuple[str, ...]
    layout: Layout = ROWS

    def split(self, value: Array) -> dict[str, Array]:
        return dict(zip(self.here, self.layout.split(value, len(self.here)), strict=True))

    def join(self, arrays: Mapping[str, Array]) -> Array:
        return self.layout.join([np.asarray(arrays[path]) for path in self.here])

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The shape of DeepAVFusion's tensor, from the shapes here."""
        return self.layout.shape([shapes[path] for path in self.here])


class Buffer(NamedTuple):
    """A tensor that the model here computes: its shape, and how."""

    shape: Shape
    make: Callable[[], Array]


@dataclasses.dataclass(frozen=True)
class Names:
    """What DeepAVFusion's file of a model holds: rules and buffers by DeepAVFusion's name."""

    rules: dict[str, Rule]
    buffers: dict[str, Buffer]


def names_of(model: nnx.Module, prefix: str = "encoder.") -> Names:
    """The table of a model of any kind in models.kinds, which may be abstract. Raises UserError where it has no names.

    `prefix` is what DeepAVFusion's names of the encoder begin with.
    """
    buffers: dict[str, Buffer] = {}
    if isinstance(model, Stream):
        rules = stream_rules(model, "", "")
    else:
        encoder: Encoder = getattr(model, "encoder")  # noqa: B009 (the type of modules does not tell)
        rules, buffers = encoder_rules(encoder, prefix), encoder_buffers(encoder, prefix)
        if isinstance(model, models.AVMAE):
            for stream, decoder in (("image", model.image_decoder), ("audio", model.audio_decoder)):
                rules += decoder_rules(decoder, f"{stream}_decoder")
                buffers |= decoder_buffers(decoder, f"{stream}_decoder")
        else:
            rules += head_rules(model)
    return Names({rule.name: rule for rule in rules}, buffers)


def linear(name: str, *here: str, layout: Layout = LINEAR) -> list[Rule]:
    return [
        Rule(f"{name}.weight", tuple(f"{path}.kernel" for path in here), layout),
        Rule(f"{name}.bias", tuple(f"{path}.bias" for path in here)),
    ]


def norm(name: str, here: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (f"{here}.scale",)), Rule(f"{name}.bias", (f"{here}.bias",))]


def mlp(name: str, here: str) -> list[Rule]:
    return linear(f"{name}.fc1", f"{here}.fc1") + linear(f"{name}.fc2", f"{here}.fc2")


def cross_attention(name: str, here: str) -> list[Rule]:
    """Queries apart, keys and values in one."""
    keys_and_values = linear(f"{name}.kv", f"{here}.key", f"{here}.value")
    return linear(f"{name}.q", f"{here}.query") + keys_and_values + linear(f"{name}.proj", f"{here}.out")


def block(name: str, here: str) -> list[Rule]:
    """A ViT block, whose queries, keys and values are one tensor in DeepAVFusion."""
    parts = (f"{here}.attention.{part}" for part in ("query", "key", "value"))
    attention = linear(f"{name}.attn.qkv", *parts) + linear(f"{name}.attn.proj", f"{here}.attention.out")
    return (
        norm(f"{name}.norm1", f"{here}.norm1")
        + attention
        + norm(f"{name}.norm2", f"{here}.norm2")
        + mlp(f"{name}.mlp", f"{here}.mlp")
    )


def stream_rules(stream: Stream, name: str, here: str) -> list[Rule]:
    """One ViT without its positions; both prefixes end in a dot, or are empty."""
    rules = linear(f"{name}patch_embed.proj", f"{here}patch_embed", layout=patches(stream.config))
    for number in range(len(stream.blocks)):
        rules += block(f"{name}blocks.{number}", f"{here}blocks.{number}")
    return rules + norm(f"{name}norm", f"{here}norm")


def encoder_rules(encoder: Encoder, prefix: str) -> list[Rule]:
    rules: list[Rule] = []
    depths = (len(encoder.image.blocks), len(encoder.audio.blocks))
    if depths[0] != depths[1]:
        raise UserError(
            f"DeepAVFusion runs no layers beyond those of the shallower stream; the streams have {depths[0]} and "
            f"{depths[1]} layers, all of which run here"
        )
    for name, stream in (("image", encoder.image), ("audio", encoder.audio)):
        if any(bridge is not None for bridge in stream.bridges):
            raise UserError(
                "DeepAVFusion has no name for bridges: its streams and fusion tokens are equally wide; here the "
                f"{name} stream is {stream.config.width} wide, the fusion tokens {encoder.fusion_width}"
            )
        rules += stream_rules(stream, f"{prefix}{name}.", f"encoder.{name}.")
    if encoder.fusion_tokens is None:
        return rules
    rules.append(Rule(f"{prefix}fusion_tokens", ("encoder.fusion_tokens",)))
    for number, fusion in enumerate(encoder.fusion_blocks):
        if fusion is not None:
            rules += fusion_rules(fusion, f"{prefix}fusion_blocks.{number}", f"encoder.fusion_blocks.{number}")
    return rules + norm(f"{prefix}fusion_norm", "encoder.fusion_norm")


def fusion_rules(fusion: FusionBlock, name: str, here: str) -> list[Rule]:
    """`token` blocks have their two norms swapped in DeepAVFusion."""
    image, audio = "norm1_img", "norm1_aud"
    if isinstance(fusion.attention, TokenAttention):
        image, audio = audio, image
    return (
        norm(f"{name}.norm1_mm", f"{here}.norm_fusion")
        + norm(f"{name}.{image}", f"{here}.norm_image")
        + norm(f"{name}.{audio}", f"{here}.norm_audio")
        + fusion_attention(fusion.attention, f"{name}.attn", f"{here}.attention")
        + norm(f"{name}.norm2", f"{here}.norm2")
        + mlp(f"{name}.mlp", f"{here}.mlp")
    )


def fusion_attention(module: nnx.Module, name: str, here: str) -> list[Rule]:
    """A pair's bias counts once and lies on the image half; pairs are [audio ; image] in `dense`, else the reverse."""
    if isinstance(module, TokenAttention):
        return cross_attention(name, here)
    if isinstance(module, FactorizedAttention):
        rules = cross_attention(f"{name}.attn_v", f"{here}.aggregate_image")
        rules += cross_attention(f"{name}.attn_a", f"{here}.aggregate_audio")
        here = f"{here}.pairs"
        for part, there in (("key", "k"), ("value", "v")):
            halves: tuple[str, ...] = (f"{here}.{part}_image.kernel", f"{here}.{part}_audio.kernel")
            rules.append(Rule(f"{name}.{there}.weight", halves, PAIRS))
            rules.append(Rule(f"{name}.{there}.bias", (f"{here}.{part}_image.bias",)))
    elif isinstance(module, PairAttention) and module.pair == "sum":
        halves = tuple(f"{here}.{part}_{half}.kernel" for part in ("key", "value") for half in ("audio", "image"))
        rules = [
            Rule(f"{name}.kv.weight", halves, PAIRS),
            Rule(f"{name}.kv.bias", (f"{here}.key_image.bias", f"{here}.value_image.bias")),
        ]
    else:
        raise UserError("DeepAVFusion has no bilinear fusion, and so no names for its weights")
    return linear(f"{name}.q", f"{here}.query") + rules + linear(f"{name}.proj", f"{here}.out")


def decoder_rules(decoder: Decoder, name: str) -> list[Rule]:
    """A decoder is called alike on both sides; its parts hang on '_' there and on '.' here."""
    rules = [Rule(f"{name}_mask_token", (f"{name}.mask_token",)), Rule(f"{name}_pos_embed", (f"{name}.positions",))]
    for number, module in enumerate(decoder.blocks):
        there, here = f"{name}_blocks.{number}", f"{name}.blocks.{number}"
        rules += block(there, here)
        if isinstance(module, SwinBlock):
            rules.append(Rule(f"{there}.attn.relative_position_bias_table", (f"{here}.relative_bias",)))
    return (
        rules
        + linear(f"{name}_embed", f"{name}.embed")
        + norm(f"{name}_norm", f"{name}.norm")
        + linear(f"{name}_pred", f"{name}.predict")
    )


def positions(config: StreamConfig) -> Array:
    return sin_cos_2d(config.grid, config.width)[None]


def encoder_buffers(encoder: Encoder, prefix: str) -> dict[str, Buffer]:
    """Fixed positions [1, N, D]."""
    return {
        f"{prefix}{name}.pos_embed": Buffer((1, config.tokens, config.width), functools.partial(positions, config))
        for name, config in (("image", encoder.image.config), ("audio", encoder.audio.config))
    }


def decoder_buffers(decoder: Decoder, prefix: str) -> dict[str, Buffer]:
    """What Swin blocks look up: positions in the bias table [N, N], and the mask of shifted windows [windows, N, N]."""
    buffers = {}
    for number, module in enumerate(decoder.blocks):
        if not isinstance(module, SwinBlock):
            continue
        name, tokens = f"{prefix}_blocks.{number}", math.prod(module.window)
        make = functools.partial(relative_position_index, module.window)
        buffers[f"{name}.attn.relative_position_index"] = Buffer((tokens, tokens), make)
        if any(module.shift):
            make = functools.partial(shift_mask, module.grid, module.window, module.shift)
            buffers[f"{name}.attn_mask"] = Buffer((math.prod(module.grid) // tokens, tokens, tokens), make)
    return buffers


def statistics(name: str, here: str) -> list[Rule]:
    return [
        Rule(f"{name}.running_mean", (f"{here}.mean",)),
        Rule(f"{name}.running_var", (f"{here}.variance",)),
        Rule(f"{name}.num_batches_tracked", (f"{here}.batches",), SCALAR),
    ]


def double_conv(name: str, here: str) -> list[Rule]:
    """DeepAVFusion's sequence counts its ReLUs: convolutions are 0 and 3, norms 1 and 4."""
    rules = []
    for number, position in ((1, 0), (2, 3)):
        there = f"{name}.double_conv.{position + 1}"
        rules.append(Rule(f"{name}.double_conv.{position}.weight", (f"{here}.conv{number}.kernel",), CONVOLUTION))
        rules += norm(there, f"{here}.norm{number}") + statistics(there, f"{here}.norm{number}")
    return rules


def up(name: str, here: str) -> list[Rule]:
    transposed = linear(f"{name}.up", f"{here}.transposed", layout=TRANSPOSED)
    return transposed + double_conv(f"{name}.conv", f"{here}.convolutions")


def classifier_rules(_: int) -> list[Rule]:
    """All that a classifier can have; a fusion head and input norms may be missing."""
    rules = []
    for stream in ("image", "audio", "fusion"):
        rules += linear(f"{stream}_head", f"heads.{stream}") + statistics(f"{stream}_norm", f"norms.{stream}")
    return rules


def separator_rules(scales: int) -> list[Rule]:
    """DeepAVFusion counts scales from 1, the finest; the norms among them from 0."""
    rules = norm("avss_decoder.xv_norm", "condition_norm") + double_conv("avss_decoder.top", "top")
    for scale in range(scales):
        rules += norm(f"avss_decoder.xa_norm.{scale}", f"audio_norms.{scale}")
        rules += linear(f"avss_decoder.cond{scale + 1}", f"conditions.{scale}")
    for scale in range(scales - 1):
        rules += up(f"avss_decoder.lat{scale + 1}", f"laterals.{scale}")
        rules += up(f"avss_decoder.up{scale + 1}", f"ups.{scale}")
    return rules + linear("avss_decoder.pred", "predict", layout=CONVOLUTION)


def segmenter_rules(scales: int) -> list[Rule]:
    """DeepAVFusion counts scales from 0, the coarsest, which has neither lateral nor up."""
    rules = double_conv("top", "top")
    for scale in range(scales):
        rules += norm(f"normv.{scale}", f"image_norms.{scale}")
        rules += linear(f"proja.{scale}", f"audio_projections.{scale}") + norm(f"norma.{scale}", f"audio_norms.{scale}")
    for scale in range(scales - 1):
        rules += up(f"lat.{scale}", f"laterals.{scale}") + up(f"up.{scale}", f"ups.{scale}")
    for position, path in ((0, "predict1"), (2, "predict2")):
        rules += linear(f"predictor.{position}", path, layout=CONVOLUTION)
    return rules


HeadConfig = ClassifierConfig | SeparatorConfig | SegmenterConfig


class Head(NamedTuple):
    """A task's head in DeepAVFusion.

    rules: of its tensors, without the encoder's, by number of scales. name, path: patterns of the one tensor that each
    scale has, there and here. config: the head's configuration as far as DeepAVFusion's tensors tell it.
    """

    rules: Callable[[int], list[Rule]]
    name: str
    path: str
    config: Callable[[Tensors], HeadConfig]


def outputs(tensors: Tensors, name: str) -> int:
    if name not in tensors or not tensors[name].shape:
        raise UserError(f"a head of DeepAVFusion needs a tensor {name} of at least one dimension")
    return tensors[name].shape[0]


def classifier_config(tensors: Tensors) -> ClassifierConfig:
    return ClassifierConfig(outputs(tensors, "image_head.weight"), input_norm="image_norm.running_mean" in tensors)


def segmenter_config(tensors: Tensors) -> SegmenterConfig:
    return SegmenterConfig(outputs(tensors, "predictor.2.weight"), outputs(tensors, "predictor.0.weight"))


HEADS = {
    "classifier": Head(classifier_rules, r"image_head\.weight", r"heads\.image\.kernel", classifier_config),
    # The kind of the separator's mask is in no tensor.
    "separator": Head(
        separator_rules, r"avss_decoder\.xa_norm\.\d+\.weight", r"audio_norms\.\d+\.scale", lambda _: SeparatorConfig()
    ),
    "segmenter": Head(segmenter_rules, r"normv\.\d+\.weight", r"image_norms\.\d+\.scale", segmenter_config),
}


def count(pattern: str, names: Collection[str]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def head_rules(model: nnx.Module) -> list[Rule]:
    """All but the encoder of a classifier, separator or segmenter; nothing of a model that has no head."""
    kind = next((kind for kind, (made, _) in kinds.HEADS.items() if type(model) is made), None)
    if kind is None:
        return []
    if kind not in HEADS:
        raise UserError(f"DeepAVFusion has no {kind}, and so no names for its weights")
    own = flat_values(model) | flat_values(model, nnx.BatchStat)
    rules = {rule.here[0]: rule for rule in HEADS[kind].rules(count(HEADS[kind].path, own))}
    unnamed = [path for path in own if not path.startswith("encoder.") and path not in rules]
    if unnamed:
        raise UserError(f"DeepAVFusion has no {kind} with {unnamed[0]}, and so no names for its weights")
    return [rule for path, rule in rules.items() if path in own]
