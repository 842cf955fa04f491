"""The early-fusion encoder: two ViTs and fusion tokens that read both at every fused layer (paper section 3)."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.models.config import AVMAEConfig, StreamConfig
from av_mae.models.fusion import FusionBlock
from av_mae.models.layers import Block, Initial, LayerNorm, Linear, sin_cos_2d
from av_mae.models.patches import patchify, take, with_channel

Step = Callable[..., tuple]


def in_turn(step: Step, layers: Sequence, carry, inputs: Sequence) -> tuple:
    """Every layer by itself, its values where they are."""
    outputs = []
    for layer, given in zip(layers, inputs, strict=True):
        carry, output = step(layer, carry, given)
        outputs.append(output)
    return carry, outputs


def _kind(layer: tuple) -> tuple:
    """What layers that are one program have in common: all but their values."""
    graph, state = layer
    return graph, jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def run_layers(
    step: Step,
    layers: Sequence,
    carry,
    inputs: Sequence,
    *,
    read: Callable[[nnx.State], nnx.State],
    remat: Callable | None = None,
    scan: bool = True,
) -> tuple:
    """Each layer with its values turned from stored ones into those that it computes with by `read`; `remat`, a form of
    jax.checkpoint, wraps both.

    With `scan`, neighbours that differ in their values alone are a loop over their stacked values: the program has each
    kind of layer once, compiles sooner, and what a layer reads lives for one turn. Values that a layer changes (running
    statistics) are lost.
    """
    split = [nnx.split(layer) for layer in layers]
    members = zip(range(len(split)), split, inputs, strict=True)
    outputs = []
    for _, group in itertools.groupby(members, key=lambda member: _kind(member[1]) if scan else member[0]):
        (_, (graph, _), _), *_ = group = list(group)

        def turn(carry, given, graph=graph):
            state, own = given
            return step(nnx.merge(graph, read(state)), carry, own)

        # the passes of a loop cannot be merged with one another: only a layer by itself needs a barrier between them
        turn = turn if remat is None else remat(turn, prevent_cse=len(group) == 1)
        given = [(state, own) for _, (_, state), own in group]
        if len(given) == 1:
            carry, output = turn(carry, given[0])
            outputs.append(output)
            continue
        carry, stacked = jax.lax.scan(turn, carry, jax.tree.map(lambda *x: jnp.stack(x), *given))
        outputs += [jax.tree.map(lambda x, number=number: x[number], stacked) for number in range(len(given))]
    return carry, outputs


class Tokens(NamedTuple):
    """image [B, I, D], audio [B, A, D], fusion [B, F, D] after the final norms.

    `layers`, when asked for, holds the same three before the final norms, one Tokens per layer.
    """

    image: jax.Array
    audio: jax.Array
    fusion: jax.Array
    layers: tuple = ()


class Stream(nnx.Module):
    """One ViT: patch embedding with fixed positions, blocks, final norm.

    Where the stream is not as wide as the fusion tokens, `bridges` lead them into each fused layer.
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

    def embed(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Input [B, H, W, C] → tokens of the patches `keep` [B, K] (None: all), with positions."""
        patches = patchify(with_channel(x, self.config), self.config.patch_size)
        positions = jnp.asarray(sin_cos_2d(self.config.grid, self.config.width))
        if keep is not None:
            patches, positions = take(patches, keep), positions[keep]
        tokens = self.patch_embed(patches)
        return tokens + positions.astype(tokens.dtype)

    def part(self, number: int) -> tuple[Block | None, Linear | None]:
        """Block and bridge of layer `number`; None: there is none."""
        return self.blocks[number] if number < len(self.blocks) else None, self.bridges[number]


def run_part(
    part: tuple[Block | None, Linear | None], x: jax.Array, fusion: jax.Array | None, factors: jax.Array | None = None
) -> jax.Array:
    """A stream's block over [fusion ; x], of which only x is kept; a stream that is at its end stays."""
    block, bridge = part
    if block is None:
        return x
    return block(x, fusion if fusion is None or bridge is None else bridge(fusion), factors)


class Encoder(nnx.Module):
    """encoder(image, audio, image_keep=None, audio_keep=None, return_layers=False, fused=True, factors=None) → Tokens.

    Inputs are normalised images [B, H, W, 3] and log-mels [B, mels, frames(, 1)]; `*_keep` [B, K] names the visible
    patches. Not `fused`: without fusion tokens, so that neither stream sees the other. `factors` [B, layers, 2, 2] of
    `stochastic_depth` multiply the residual branches of both streams' blocks (fusion blocks have none). `run`
    takes the layers one after the other (models/encoder.py); a training step sets its own.
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
        image: jax.Array,
        audio: jax.Array,
        image_keep: jax.Array | None = None,
        audio_keep: jax.Array | None = None,
        fused: bool = True,
    ) -> Tokens:
        """The tokens that layer 0 reads; F is 0 where there are no fusion tokens."""
        image, audio = self.image.embed(image, image_keep), self.audio.embed(audio, audio_keep)
        if self.fusion_tokens is None or not fused:
            return Tokens(image, audio, jnp.zeros((image.shape[0], 0, self.fusion_width), image.dtype))
        fusion = self.fusion_tokens[...]
        return Tokens(image, audio, jnp.broadcast_to(fusion, (image.shape[0], *fusion.shape[1:])))

    def parts(self, number: int) -> tuple:
        """What layer `number` consists of: the part of each stream, and the fusion block or None."""
        return self.image.part(number), self.audio.part(number), self.fusion_blocks[number]

    def layer(self, parts: tuple, tokens: tuple[jax.Array, jax.Array, jax.Array], factors: jax.Array | None = None):
        """One layer: both blocks and the fusion block read the tokens (image, audio, fusion) from before the layer."""
        (image_part, audio_part, block), (image, audio, fusion) = parts, tokens
        block = block if fusion.shape[1] else None
        read = None if block is None else fusion
        image_factors, audio_factors = (None, None) if factors is None else (factors[:, 0], factors[:, 1])
        return (
            run_part(image_part, image, read, image_factors),
            run_part(audio_part, audio, read, audio_factors),
            fusion if block is None else block(fusion, image, audio),
        )

    def __call__(
        self,
        image: jax.Array,
        audio: jax.Array,
        image_keep: jax.Array | None = None,
        audio_keep: jax.Array | None = None,
        return_layers: bool = False,
        fused: bool = True,
        factors: jax.Array | None = None,
    ) -> Tokens:
        def step(parts: tuple, tokens: tuple, own: jax.Array | None):
            tokens = self.layer(parts, tokens, own)
            return tokens, tokens if return_layers else None

        numbers = range(len(self.fusion_blocks))
        inputs = [None if factors is None else factors[:, number] for number in numbers]
        tokens = self.start(image, audio, image_keep, audio_keep, fused)[:3]
        (image, audio, fusion), layers = self.run(step, [self.parts(number) for number in numbers], tokens, inputs)
        fusion = fusion if self.fusion_norm is None else self.fusion_norm(fusion)
        layers = tuple(Tokens(*layer) for layer in layers) if return_layers else ()
        return Tokens(self.image.norm(image), self.audio.norm(audio), fusion, layers)


def stochastic_depth(noise: jax.Array, rate: float, config: AVMAEConfig) -> jax.Array:
    """Factors of the residual branches for uniform `noise` [B, layers, 2 streams, 2 branches]: 0 or 1 / (1 - r).

    A clip's branch is dropped with the chance r that grows linearly from 0 in a stream's first block to `rate` in its
    last (published system).
    """
    depths = np.array([config.image.depth, config.audio.depth])
    done = np.arange(config.layers)[:, None] / np.maximum(depths - 1, 1)
    drop = (rate * np.minimum(done, 1))[:, :, None].astype(np.float32)
    return (noise >= drop) / (1 - drop)


def pool(tokens: Tokens) -> dict[str, jax.Array]:
    """Means over the tokens of each stream: {'image', 'audio', 'fusion'} → [B, D]; no 'fusion' without such tokens."""
    streams = {"image": tokens.image, "audio": tokens.audio, "fusion": tokens.fusion}
    return {name: x.mean(1) for name, x in streams.items() if x.shape[1]}
