"""Published names and layouts of a model's tensors: one table of rules, made by a walk over the model, for both ways.

A rule says which arrays here make up one published tensor, and how. Queries, keys and values, and the two halves of
a pair's weight, are apart here and one tensor there. Buffers are tensors that the model here computes instead.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from av_mae import models
from av_mae.convert import head_names
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models.config import StreamConfig
from av_mae.models.encoder import Encoder, Stream
from av_mae.models.fusion import FactorizedAttention, FusionBlock, PairAttention, TokenAttention
from av_mae.models.kinds import flat_values
from av_mae.models.layers import sin_cos_2d
from av_mae.models.masked_autoencoder import Decoder, SwinBlock, relative_position_index, shift_mask

HEADS = {model: kind for kind, (model, _) in kinds.HEADS.items()}


Shape = tuple[int, ...]


class Layout(NamedTuple):
    """split(published array, n) → the n arrays here; join(those) → the published array; shape(theirs) → its shape.

    Views where possible.
    """

    split: Callable[[np.ndarray, int], list[np.ndarray]]
    join: Callable[[list[np.ndarray]], np.ndarray]
    shape: Callable[[list[Shape]], Shape]


def join_rows(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def join_pairs(parts: list[np.ndarray]) -> np.ndarray:
    return join_rows(
        [np.concatenate([first.T, second.T], axis=1) for first, second in zip(parts[::2], parts[1::2], strict=True)]
    )


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
    join_pairs,
    lambda shapes: (sum(shape[1] for shape in shapes[::2]), shapes[0][0] + shapes[1][0]),
)


def axes(order: tuple[int, ...]) -> Layout:
    """The published array with its axes in another order."""
    back = tuple(np.argsort(order))
    return Layout(
        lambda x, _: [x.transpose(order)],
        lambda parts: parts[0].transpose(back),
        lambda shapes: tuple(shapes[0][axis] for axis in back),
    )


def patches(config: StreamConfig) -> Layout:
    """A convolution [out, channels, rows, columns] as a linear layer over (row, column, channel)."""
    (rows, columns), channels = config.patch_size, config.channels
    return Layout(
        lambda x, _: [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])],
        lambda parts: parts[0].reshape(rows, columns, channels, -1).transpose(3, 2, 0, 1),
        lambda shapes: (shapes[0][1], channels, rows, columns),
    )


class Rule(NamedTuple):
    """The published tensor is made of the arrays `here`, by dotted path."""

    published: str
    here: tuple[str, ...]
    layout: Layout = ROWS

    def split(self, value: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.here, self.layout.split(value, len(self.here)), strict=True))

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.layout.join([np.asarray(arrays[path]) for path in self.here])

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The published shape, from the shapes here."""
        return self.layout.shape([shapes[path] for path in self.here])


class Buffer(NamedTuple):
    """A published tensor that the model computes: its shape, and how."""

    shape: Shape
    make: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Names:
    """What a published file of a model holds: rules and buffers by published name."""

    rules: dict[str, Rule]
    buffers: dict[str, Buffer]


def names_of(model: nnx.Module, prefix: str = "encoder.") -> Names:
    """The table of a model of any kind in models.kinds, which may be abstract.

    prefix: what published names of the encoder begin with.

    Raises:
      UserError: the published system has no such model.
    """
    if isinstance(model, Stream):
        return Names(by_name(stream_rules(model, "", "")), {})
    rules, buffers = encoder_rules(model.encoder, prefix), encoder_buffers(model.encoder, prefix)
    if isinstance(model, models.AVMAE):
        for stream, decoder in (("image", model.image_decoder), ("audio", model.audio_decoder)):
            rules += decoder_rules(decoder, f"{stream}_decoder")
            buffers |= decoder_buffers(decoder, f"{stream}_decoder")
    elif type(model) in HEADS:
        rules += head_rules(model)
    return Names(by_name(rules), buffers)


def by_name(rules: Iterable[Rule]) -> dict[str, Rule]:
    return {rule.published: rule for rule in rules}


def linear(published: str, *here: str, layout: Layout = LINEAR) -> list[Rule]:
    return [
        Rule(f"{published}.weight", tuple(f"{path}.kernel" for path in here), layout),
        Rule(f"{published}.bias", tuple(f"{path}.bias" for path in here)),
    ]


def norm(published: str, here: str) -> list[Rule]:
    return [Rule(f"{published}.weight", (f"{here}.scale",)), Rule(f"{published}.bias", (f"{here}.bias",))]


def mlp(published: str, here: str) -> list[Rule]:
    return linear(f"{published}.fc1", f"{here}.fc1") + linear(f"{published}.fc2", f"{here}.fc2")


def attention(published: str, here: str) -> list[Rule]:
    """Self-attention: queries, keys and values in one."""
    return linear(f"{published}.qkv", *(f"{here}.{part}" for part in ("query", "key", "value"))) + linear(
        f"{published}.proj", f"{here}.out"
    )


def cross_attention(published: str, here: str) -> list[Rule]:
    """Queries apart, keys and values in one."""
    return (
        linear(f"{published}.q", f"{here}.query")
        + linear(f"{published}.kv", f"{here}.key", f"{here}.value")
        + linear(f"{published}.proj", f"{here}.out")
    )


def block(published: str, here: str) -> list[Rule]:
    return (
        norm(f"{published}.norm1", f"{here}.norm1")
        + attention(f"{published}.attn", f"{here}.attention")
        + norm(f"{published}.norm2", f"{here}.norm2")
        + mlp(f"{published}.mlp", f"{here}.mlp")
    )


def stream_rules(stream: Stream, published: str, here: str) -> list[Rule]:
    """One ViT without its positions; both prefixes end in a dot, or are empty."""
    rules = linear(f"{published}patch_embed.proj", f"{here}patch_embed", layout=patches(stream.config))
    for number in range(len(stream.blocks)):
        rules += block(f"{published}blocks.{number}", f"{here}blocks.{number}")
    return rules + norm(f"{published}norm", f"{here}norm")


def encoder_rules(encoder: Encoder, published: str) -> list[Rule]:
    here = "encoder."
    rules, depths = [], (len(encoder.image.blocks), len(encoder.audio.blocks))
    if depths[0] != depths[1]:
        raise UserError(
            f"the published system runs no layers beyond those of the shallower stream; the streams have "
            f"{depths[0]} and {depths[1]} layers, all of which run here"
        )
    for name, stream in (("image", encoder.image), ("audio", encoder.audio)):
        if any(bridge is not None for bridge in stream.bridges):
            raise UserError(
                "the published system has no name for bridges: its streams and fusion tokens are equally "
                f"wide; here the {name} stream is {stream.config.width} wide, the fusion tokens "
                f"{encoder.fusion_width}"
            )
        rules += stream_rules(stream, f"{published}{name}.", f"{here}{name}.")
    if encoder.fusion_tokens is None:
        return rules
    rules.append(Rule(f"{published}fusion_tokens", (f"{here}fusion_tokens",)))
    for number, fusion in enumerate(encoder.fusion_blocks):
        if fusion is not None:
            rules += fusion_rules(fusion, f"{published}fusion_blocks.{number}", f"{here}fusion_blocks.{number}")
    return rules + norm(f"{published}fusion_norm", f"{here}fusion_norm")


def fusion_rules(fusion: FusionBlock, published: str, here: str) -> list[Rule]:
    """`token` blocks have their two norms swapped in the published system."""
    image, audio = "norm1_img", "norm1_aud"
    if isinstance(fusion.attention, TokenAttention):
        image, audio = audio, image
    return (
        norm(f"{published}.norm1_mm", f"{here}.norm_fusion")
        + norm(f"{published}.{image}", f"{here}.norm_image")
        + norm(f"{published}.{audio}", f"{here}.norm_audio")
        + fusion_attention(fusion.attention, f"{published}.attn", f"{here}.attention")
        + norm(f"{published}.norm2", f"{here}.norm2")
        + mlp(f"{published}.mlp", f"{here}.mlp")
    )


def fusion_attention(module: nnx.Module, published: str, here: str) -> list[Rule]:
    """A pair's bias counts once and lies on the image half; pairs are [audio ; image] in `dense`, else the reverse."""
    if isinstance(module, TokenAttention):
        return cross_attention(published, here)
    if isinstance(module, FactorizedAttention):
        rules = cross_attention(f"{published}.attn_v", f"{here}.aggregate_image") + cross_attention(
            f"{published}.attn_a", f"{here}.aggregate_audio"
        )
        here = f"{here}.pairs"
        for part, there in (("key", "k"), ("value", "v")):
            halves = (f"{here}.{part}_image.kernel", f"{here}.{part}_audio.kernel")
            rules += [
                Rule(f"{published}.{there}.weight", halves, PAIRS),
                Rule(f"{published}.{there}.bias", (f"{here}.{part}_image.bias",)),
            ]
    elif isinstance(module, PairAttention) and module.pair == "sum":
        halves = tuple(f"{here}.{part}_{half}.kernel" for part in ("key", "value") for half in ("audio", "image"))
        rules = [
            Rule(f"{published}.kv.weight", halves, PAIRS),
            Rule(f"{published}.kv.bias", (f"{here}.key_image.bias", f"{here}.value_image.bias")),
        ]
    else:
        raise UserError("the published system has no bilinear fusion, so its weights have no published names")
    return linear(f"{published}.q", f"{here}.query") + rules + linear(f"{published}.proj", f"{here}.out")


def decoder_rules(decoder: Decoder, published: str) -> list[Rule]:
    """A decoder is called alike on both sides; its parts hang on '_' there and on '.' here."""
    here = published
    rules = [
        Rule(f"{published}_mask_token", (f"{here}.mask_token",)),
        Rule(f"{published}_pos_embed", (f"{here}.positions",)),
    ]
    for number, module in enumerate(decoder.blocks):
        rules += block(f"{published}_blocks.{number}", f"{here}.blocks.{number}")
        if isinstance(module, SwinBlock):
            rules.append(
                Rule(
                    f"{published}_blocks.{number}.attn.relative_position_bias_table",
                    (f"{here}.blocks.{number}.relative_bias",),
                )
            )
    return (
        rules
        + linear(f"{published}_embed", f"{here}.embed")
        + norm(f"{published}_norm", f"{here}.norm")
        + linear(f"{published}_pred", f"{here}.predict")
    )


def head_rules(model: nnx.Module) -> list[Rule]:
    """All but the encoder of a classifier, separator or segmenter."""
    own, kind = flat_values(model) | flat_values(model, nnx.BatchStat), HEADS[type(model)]
    if kind not in head_names.HEADS:
        raise UserError(f"the published system has no {kind}, so its weights have no published names")
    entries = head_names.HEADS[kind].path_entries(own)
    unnamed = [path for path in own if not path.startswith("encoder.") and path not in entries]
    if unnamed:
        raise UserError(f"the published system has no {kind} with {unnamed[0]}, so its weights have no published names")
    return [Rule(entry.published, (path,), axes(entry.axes)) for path, entry in entries.items() if path in own]


def encoder_buffers(encoder: Encoder, published: str) -> dict[str, Buffer]:
    """Fixed positions [1, N, D]."""
    streams = {"image": encoder.image.config, "audio": encoder.audio.config}
    return {
        f"{published}{name}.pos_embed": Buffer(
            (1, stream.tokens, stream.width),
            functools.partial(lambda stream: sin_cos_2d(stream.grid, stream.width)[None], stream),
        )
        for name, stream in streams.items()
    }


def decoder_buffers(decoder: Decoder, published: str) -> dict[str, Buffer]:
    """What Swin blocks look up: places in the bias table [N, N], and the mask of shifted windows [windows, N, N]."""
    buffers = {}
    for number, module in enumerate(decoder.blocks):
        if not isinstance(module, SwinBlock):
            continue
        name, places = f"{published}_blocks.{number}", math.prod(module.window)
        buffers[f"{name}.attn.relative_position_index"] = Buffer(
            (places, places), functools.partial(relative_position_index, module.window)
        )
        if any(module.shift):
            buffers[f"{name}.attn_mask"] = Buffer(
                (math.prod(module.grid) // places, places, places),
                functools.partial(shift_mask, module.grid, module.window, module.shift),
            )
    return buffers
