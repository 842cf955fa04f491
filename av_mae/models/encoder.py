"""Patches, masks, and the early-fusion encoder: two ViTs, and fusion tokens that read both (paper section 3)."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from av_mae.models.config import AVMAEConfig, StreamConfig, require
from av_mae.models.fusion import FusionBlock
from av_mae.models.layers import Block, Initial, LayerNorm, Linear, sin_cos_2d

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

Maybe = TypeVar("Maybe", Array, np.ndarray)  # arrays of JAX or NumPy, and then the result is the same
Layer = TypeVar("Layer")
Carry = TypeVar("Carry")
Given = TypeVar("Given")
Out = TypeVar("Out")
# Computes one layer: step(layer, carry, given) → (carry, output).
Step = Callable[[Layer, Carry, Given], tuple[Carry, Out]]


def normalize_image(image: Shaped[Array | np.ndarray, "*B 3"]) -> Float[Array, "*B 3"]:
    """Images in 0…255 (uint8 or mixed) → float32 with ImageNet's mean and deviation, as models take them."""
    return (jnp.asarray(image).astype(jnp.float32) / 255 - IMAGENET_MEAN) / IMAGENET_DEVIATION


def with_channel(x: Float[Array, "B ..."], config: StreamConfig) -> Float[Array, "B rows columns C"]:
    """Adds the channel axis that a spectrogram [B, mels, frames] may lack.

    Raises:
      UserError: x has not the stream's shape.
    """
    x = x[..., None] if x.ndim == 3 else x
    expected = (*config.size, config.channels)
    require(x.ndim == 4 and x.shape[1:] == expected, f"input shape {x.shape} must be (B, {expected})")
    return x


def patchify(x: Shaped[Maybe, "B rows columns C"], patch: tuple[int, int]) -> Shaped[Maybe, "B N P"]:
    """Splits inputs into patches, row-major; the values of a patch are in (row, column, channel) order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch[0], patch[0], w // patch[1], patch[1], c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch[0] * patch[1] * c)


def unpatchify(patches: Shaped[Maybe, "B N P"], config: StreamConfig) -> Shaped[Maybe, "B rows columns C"]:
    """Inverse of `patchify`."""
    (rows, columns), (height, width) = config.grid, config.patch_size
    x = patches.reshape(-1, rows, columns, height, width, config.channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *config.size, config.channels)


def take(x: Float[Array, "B N D"], indices: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """The tokens of these indices, in each clip its own."""
    return jnp.take_along_axis(x, indices[..., None], axis=1, mode="clip")


class Mask(NamedTuple):
    """Patches of one stream that are kept and removed, by index and in the order of their noise.

    `mask` is 1 where a patch is removed, else 0.
    """

    keep: Int[Array, "B K"]
    removed: Int[Array, "B M"]
    mask: Float[Array, "B N"]


def mask_noise(key: Array, batch: int, tokens: int) -> Float[Array, "B N"]:
    """Uniform noise in [0, 1) for `random_mask`, float32 [batch, tokens]."""
    return jax.random.uniform(key, (batch, tokens))


def random_mask(noise: Float[Array, "B N"], keep: int) -> Mask:
    """Keeps the `keep` patches of least noise in each clip (paper section 3.3)."""
    order = jnp.argsort(noise, axis=1).astype(jnp.int32)
    rank = jnp.argsort(order, axis=1)
    return Mask(order[:, :keep], order[:, keep:], (rank >= keep).astype(jnp.float32))


def in_turn(
    step: Step[Layer, Carry, Given, Out], layers: Sequence[Layer], carry: Carry, inputs: Sequence[Given]
) -> tuple[Carry, list[Out]]:
    """Computes one layer after the other, each with its own parameters as they are."""
    outputs = []
    for layer, given in zip(layers, inputs, strict=True):
        carry, output = step(layer, carry, given)
        outputs.append(output)
    return carry, outputs


def _structure(layer: tuple[Any, Any]) -> tuple[Any, ...]:
    """What two layers have in common if they differ in the values of their parameters alone."""
    graph, state = layer
    return graph, jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def run_layers(
    step: Step[Layer, Carry, Given, Out],
    layers: Sequence[Layer],
    carry: Carry,
    inputs: Sequence[Given],
    *,
    read: Callable[[Any], Any],
    remat: Callable[..., Any] | None = None,
    scan: bool = True,
) -> tuple[Carry, list[Out]]:
    """Computes layers as a training step does: gathered, rematerialised and scanned as the recipe says.

    Args:
      step: computes one layer.
      layers: NNX modules, or tuples of them.
      carry: what the first layer reads.
      inputs: of each layer, a further argument of `step`.
      read: turns a layer's state, as it is sharded, into the state that the layer computes with.
      remat: a form of jax.checkpoint that wraps `read` and `step` together.
      scan: run neighbours that differ in their values alone as a loop over their stacked values. The program then
        holds each kind of layer once, compiles sooner, and what a layer reads lives for one turn. Values that a layer
        changes (running statistics) are lost.

    Returns:
      The carry after the last layer, and the output of each layer.
    """
    split = [nnx.split(layer) for layer in layers]
    numbered = zip(range(len(split)), split, inputs, strict=True)
    outputs: list[Out] = []
    for _, members in itertools.groupby(numbered, key=lambda member: _structure(member[1]) if scan else member[0]):
        group = list(members)
        graph = group[0][1][0]

        def turn(carry: Carry, given: tuple[Any, Given], graph: Any = graph) -> tuple[Carry, Out]:
            return step(nnx.merge(graph, read(given[0])), carry, given[1])

        # the turns of a loop cannot be merged with one another: only a layer by itself needs a barrier against it
        run = turn if remat is None else remat(turn, prevent_cse=len(group) == 1)
        given = [(state, own) for _, (_, state), own in group]
        if len(given) == 1:
            carry, output = run(carry, given[0])
            outputs.append(output)
            continue
        carry, stacked = jax.lax.scan(run, carry, jax.tree.map(lambda *x: jnp.stack(x), *given))
        outputs += [jax.tree.map(lambda x, index=index: x[index], stacked) for index in range(len(given))]
    return carry, outputs


class Tokens(NamedTuple):
    """The encoder's output: tokens of both streams and fusion tokens, after the final norms.

    `layers`, where asked for, holds the same of each layer, before the final norms. F is 0 without fusion tokens.
    """

    image: Float[Array, "B I Di"]
    audio: Float[Array, "B A Da"]
    fusion: Float[Array, "B F Df"]
    layers: tuple["Tokens", ...] = ()


# Image, audio and fusion tokens between two layers.
LayerTokens = tuple[Float[Array, "B I Di"], Float[Array, "B A Da"], Float[Array, "B F Df"]]
# The block of one stream in one layer (`None` after the stream's last layer), and what leads the fusion tokens to it.
StreamLayer = tuple[Block | None, Linear | None]


class Stream(nnx.Module):
    """One ViT: patch embedding with fixed positions, blocks, final norm.

    Args:
      config: sizes of the stream.
      fusion_width: width of the fusion tokens. Where the stream has another one, `bridges` lead fusion tokens to it.
      fused: of each layer, whether fusion tokens are read there.
      rngs: random keys for the weights.
    """

    def __init__(self, config: StreamConfig, fusion_width: int, fused: tuple[bool, ...], *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear(config.patch_values, config.width, rngs=rngs)
        self.blocks = nnx.List(
            Block(config.width, config.heads, config.mlp_ratio, eps=1e-6, rngs=rngs) for _ in range(config.depth)
        )
        self.norm = LayerNorm(config.width, eps=1e-6)
        needed = fusion_width != config.width
        self.bridges = nnx.List(Linear(fusion_width, config.width, rngs=rngs) if needed and f else None for f in fused)

    def embed(self, x: Float[Array, "B ..."], keep: Int[Array, "B K"] | None) -> Float[Array, "B N D"]:
        """Tokens, with positions, of the patches `keep`, or of all patches if it is `None`."""
        patches = patchify(with_channel(x, self.config), self.config.patch_size)
        positions = jnp.asarray(sin_cos_2d(self.config.grid, self.config.width))
        if keep is not None:
            patches, positions = take(patches, keep), positions[keep]
        tokens = self.patch_embed(patches)
        return tokens + positions.astype(tokens.dtype)

    def layer(self, number: int) -> StreamLayer:
        """Block and bridge of layer `number`: `None` where the stream has none."""
        return self.blocks[number] if number < len(self.blocks) else None, self.bridges[number]


class Encoder(nnx.Module):
    """Two ViTs and the fusion blocks between them.

    The attribute `run` computes the layers (`in_turn`, or `run_layers` with a training step's options).

    Args:
      config: of the whole masked autoencoder; decoder and masks are not read.
      rngs: random keys for the weights.
    """

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        fusion, width = config.fusion, config.fusion_width
        fused = tuple(number in config.fused_layers for number in range(config.layers))
        self.image = Stream(config.image, width, fused, rngs=rngs)
        self.audio = Stream(config.audio, width, fused, rngs=rngs)
        self.fusion_blocks = nnx.List(
            FusionBlock(width, config.image.width, config.audio.width, fusion, rngs=rngs) if f else None for f in fused
        )
        if config.fusion.kind == "none":
            self.fusion_tokens = self.fusion_norm = None
        else:
            shape = (1, sum(fusion.tokens), width)
            self.fusion_tokens = Initial("normal", shape, 0.02).parameter(rngs)
            self.fusion_norm = LayerNorm(width, eps=1e-5)
        self.fusion_width = width
        self.run = in_turn

    def start(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        image_keep: Int[Array, "B Ki"] | None = None,
        audio_keep: Int[Array, "B Ka"] | None = None,
        fused: bool = True,
    ) -> LayerTokens:
        """The tokens that the first layer reads. Arguments are those of `__call__`."""
        images, audios = self.image.embed(image, image_keep), self.audio.embed(audio, audio_keep)
        if self.fusion_tokens is None or not fused:
            return images, audios, jnp.zeros((image.shape[0], 0, self.fusion_width), images.dtype)
        fusion = self.fusion_tokens[...]
        return images, audios, jnp.broadcast_to(fusion, (image.shape[0], *fusion.shape[1:]))

    def parts(self, number: int) -> tuple[StreamLayer, StreamLayer, FusionBlock | None]:
        """What layer `number` consists of: both streams' layers, and the fusion block, `None` in an unfused layer."""
        return self.image.layer(number), self.audio.layer(number), self.fusion_blocks[number]

    def layer(
        self,
        parts: tuple[StreamLayer, StreamLayer, FusionBlock | None],
        tokens: LayerTokens,
        factors: Float[Array, "B 2 2"] | None = None,
    ) -> LayerTokens:
        """One layer. All its blocks, the fusion block too, read the tokens from before the layer.

        A stream's block runs over [fusion ; x], of which only x is kept. After its last block a stream stays as it is.
        """
        (image_layer, audio_layer, fusion_block), (image, audio, fusion) = parts, tokens
        fusion_block = fusion_block if fusion.shape[1] else None

        def stream(number: int, layer: StreamLayer, x: Array) -> Array:
            block, bridge = layer
            if block is None:
                return x
            read = None if fusion_block is None else fusion if bridge is None else bridge(fusion)
            return block(x, read, None if factors is None else factors[:, number])

        images, audios = stream(0, image_layer, image), stream(1, audio_layer, audio)
        return images, audios, fusion if fusion_block is None else fusion_block(fusion, image, audio)

    def __call__(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        image_keep: Int[Array, "B Ki"] | None = None,
        audio_keep: Int[Array, "B Ka"] | None = None,
        return_layers: bool = False,
        fused: bool = True,
        factors: Float[Array, "B L 2 2"] | None = None,
    ) -> Tokens:
        """Encodes clips.

        Args:
          image: normalised images.
          audio: log-mel spectrograms, [B, mels, frames] or [B, mels, frames, 1].
          image_keep: indices of the visible image patches; `None` means all.
          audio_keep: the same of the audio.
          return_layers: whether the result has the tokens after each layer.
          fused: `False` leaves the fusion tokens out, so that neither stream sees the other.
          factors: of each clip, layer, stream (image, audio) and branch (attention, MLP), what the branch's output is
            multiplied by (see `stochastic_depth`). Fusion blocks have none.

        Raises:
          UserError: an input does not have the size of its stream.
        """

        def step(
            parts: tuple[StreamLayer, StreamLayer, FusionBlock | None], tokens: LayerTokens, own: Array | None
        ) -> tuple[LayerTokens, LayerTokens | None]:
            tokens = self.layer(parts, tokens, own)
            return tokens, tokens if return_layers else None

        numbers = range(len(self.fusion_blocks))
        inputs = [None if factors is None else factors[:, number] for number in numbers]
        start = self.start(image, audio, image_keep, audio_keep, fused)
        (images, audios, fusion), outputs = self.run(step, [self.parts(number) for number in numbers], start, inputs)
        fusion = fusion if self.fusion_norm is None else self.fusion_norm(fusion)
        layers = tuple(Tokens(*tokens) for tokens in outputs if tokens is not None)
        return Tokens(self.image.norm(images), self.audio.norm(audios), fusion, layers)


@runtime_checkable
class WithEncoder(Protocol):
    """Any model with an encoder: the masked autoencoder, a head's model, or the encoder's own."""

    config: AVMAEConfig
    encoder: Encoder


def stochastic_depth(noise: Float[Array, "B L 2 2"], rate: float, config: AVMAEConfig) -> Float[Array, "B L 2 2"]:
    """Factors of the residual branches under stochastic depth: 0, or 1 / (1 - r) for the chance r of 0.

    r grows linearly from 0 in a stream's first block to `rate` in its last, as in DeepAVFusion.

    Args:
      noise: uniform in [0, 1), for each clip, layer, stream and branch.
      rate: chance that a branch of the last block is dropped.
      config: of the encoder, which tells the streams' depths.
    """
    depths = np.array([config.image.depth, config.audio.depth])
    done = np.arange(config.layers)[:, None] / np.maximum(depths - 1, 1)
    drop: np.ndarray = (rate * np.minimum(done, 1))[:, :, None].astype(np.float32)
    return (noise >= drop) / (1 - drop)


def pool(tokens: Tokens) -> dict[str, Float[Array, "B _"]]:
    """Means over the tokens of 'image', 'audio' and 'fusion'; no 'fusion' without such tokens."""
    streams = {"image": tokens.image, "audio": tokens.audio, "fusion": tokens.fusion}
    return {name: x.mean(1) for name, x in streams.items() if x.shape[1]}
