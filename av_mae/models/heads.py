"""The segmenter: a mask over the image for what sounds (published system)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.models.config import (
    AVMAEConfig,
    ClassifierConfig,
    SegmenterConfig,
    SeparatorConfig,
    segmenter_scales,
    separator_scales,
)
from av_mae.models.encoder import Encoder, pool
from av_mae.models.layers import Initial, LayerNorm, Linear, at_least_float32


class Convolution(nnx.Module):
    """3×3 convolution [B, R, C, inputs] → [B, R, C, outputs], zeros around. Kaiming normal weights (fan out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = Initial("normal", (3, 3, inputs, outputs), math.sqrt(2 / (9 * outputs))).parameter(rngs)
        self.bias = Initial("constant", (outputs,)).parameter() if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if self.bias is None else y + self.bias[...]


class TransposedConvolution(nnx.Module):
    """Transposed convolution whose kernel and stride are `factor`: [B, R, C, inputs] → [B, R f, C f, outputs].

    Kaiming normal weights; the fan out of a transposed weight counts the inputs, as in PyTorch.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, rngs: nnx.Rngs):
        deviation = math.sqrt(2 / (factor * factor * inputs))
        self.kernel = Initial("normal", (factor, factor, inputs, outputs), deviation).parameter(rngs)
        self.bias = Initial("constant", (outputs,)).parameter()

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, (b, rows, columns, _) = self.kernel[...], x.shape
        factor, _, _, outputs = kernel.shape
        y = jnp.einsum("brci,hwio->brhcwo", x.astype(kernel.dtype), kernel)
        return y.reshape(b, rows * factor, columns * factor, outputs) + self.bias[...]


class BatchNorm(nnx.Module):
    """Normalises the last axis of x [B, ..., C] over all others, in at least float32; returns x's dtype.

    In training the statistics are those of the rows marked in `train_rows` [B] of the whole batch, on whatever mesh
    (biased variance), and the running ones move a tenth of the way towards them (unbiased variance, as in PyTorch);
    a batch of fewer than two values moves nothing. `batches` counts the batches that moved them.
    """

    momentum = 0.1

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
        self.scale = Initial("constant", (width,), 1.0).parameter() if affine else None
        self.bias = Initial("constant", (width,)).parameter() if affine else None
        self.mean = Initial("constant", (width,)).statistic()
        self.variance = Initial("constant", (width,), 1.0).statistic()
        self.batches = Initial("constant", (), dtype=jnp.int32).statistic()
        self.eps = eps

    def __call__(self, x: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        y = at_least_float32(x)
        if train_rows is None:
            mean, variance = self.mean[...], self.variance[...]
        else:
            mean, variance = self.batch_statistics(y, train_rows)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.scale is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)

    def batch_statistics(self, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance [C] over the marked rows of x; moves the running statistics."""
        axes = tuple(range(x.ndim - 1))
        weight = rows.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        count = weight.sum() * math.prod(x.shape[1:-1])
        mean = (weight * x).sum(axes) / jnp.maximum(count, 1)
        variance = (weight * jnp.square(x - mean)).sum(axes) / jnp.maximum(count, 1)
        step = jnp.where(count > 1, self.momentum, 0.0)
        unbiased = variance * (count / jnp.maximum(count - 1, 1))
        self.mean[...] = (1 - step) * self.mean[...] + step * mean
        self.variance[...] = (1 - step) * self.variance[...] + step * unbiased
        self.batches[...] = self.batches[...] + (count > 1)
        return mean, variance


class DoubleConv(nnx.Module):
    """Twice (3×3 convolution without bias, batch norm, ReLU), both of width `outputs`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv1 = Convolution(inputs, outputs, bias=False, rngs=rngs)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = Convolution(outputs, outputs, bias=False, rngs=rngs)
        self.norm2 = BatchNorm(outputs)

    def __call__(self, x: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        x = jax.nn.relu(self.norm1(self.conv1(x), train_rows))
        return jax.nn.relu(self.norm2(self.conv2(x), train_rows))


class Up(nnx.Module):
    """x [B, R, C, inputs], skip [B, R f, C f, skip] → [B, R f, C f, outputs] for the factor f.

    A transposed convolution to inputs / f channels, the skip beside it, DoubleConv.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, skip: int = 0, rngs: nnx.Rngs):
        self.transposed = TransposedConvolution(inputs, inputs // factor, factor, rngs=rngs)
        self.convolutions = DoubleConv(inputs // factor + skip, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, skip: jax.Array | None = None, train_rows: jax.Array | None = None) -> jax.Array:
        x = self.transposed(x)
        return self.convolutions(x if skip is None else jnp.concatenate([x, skip], axis=-1), train_rows)


def as_map(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Tokens [B, N, D], row-major → [B, rows, columns, D]."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


def beside(x: jax.Array, vector: jax.Array) -> jax.Array:
    """[x ; vector]: the vector [B, D] repeated over the map x [B, R, C, W] → [B, R, C, W + D]."""
    repeated = jnp.broadcast_to(vector[:, None, None], (*x.shape[:3], vector.shape[-1]))
    return jnp.concatenate([x, repeated], axis=-1)


def double_resolution(x: jax.Array) -> jax.Array:
    """Bilinear ×2 with half-pixel centres: [B, R, C, D] → [B, 2 R, 2 C, D]."""
    b, rows, columns, width = x.shape
    return jax.image.resize(x, (b, 2 * rows, 2 * columns, width), "bilinear")


JOINT = "joint"


class Classifier(nnx.Module):
    """classifier(image, audio, train_rows=None) → {'image', 'audio', 'fusion'}: logits [B, classes].

    Without fusion tokens there is no 'fusion'; a head that concatenates the streams gives {'joint'} alone. Inputs as
    for the encoder. `train_rows` [B] is given in training: the clips over which input norms take their statistics.
    """

    def __init__(self, config: AVMAEConfig, head: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        self.encoder = Encoder(config, rngs=rngs)
        widths = {"image": config.image.width, "audio": config.audio.width}
        if config.fusion.kind != "none":
            widths["fusion"] = config.fusion_width
        self.streams = tuple(widths)
        self.norms = nnx.Dict(
            {name: BatchNorm(width, eps=1e-6, affine=False) for name, width in widths.items() if head.input_norm}
        )
        read = {JOINT: sum(widths.values())} if head.concatenate else widths
        self.heads = nnx.Dict({name: Linear(width, head.classes, rngs=rngs) for name, width in read.items()})

    def classify(self, features: dict[str, jax.Array], train_rows: jax.Array | None = None) -> dict[str, jax.Array]:
        """Logits of pooled features [B, D] by stream: all that a frozen encoder leaves to do."""
        if self.head.input_norm:
            features = {name: self.norms[name](x, train_rows) for name, x in features.items()}
        if self.head.concatenate:  # in an order of its own: features that come out of a jit are sorted by name
            features = {JOINT: jnp.concatenate([features[name] for name in self.streams], axis=-1)}
        return {name: head(features[name]) for name, head in self.heads.items()}

    def __call__(self, image: jax.Array, audio: jax.Array, train_rows: jax.Array | None = None) -> dict[str, jax.Array]:
        return self.classify(pool(self.encoder(image, audio)), train_rows)


def joint_score(logits: dict[str, jax.Array]) -> jax.Array:
    """The mean of the streams' logits, in at least float32: [B, classes]."""
    return at_least_float32(jnp.stack(list(logits.values()))).mean(0)


class Separator(nnx.Module):
    """separator(image, mixture, train_rows=None) → mask logits [B, mels, frames].

    A U-Net over audio layers, conditioned at each scale on the mean image token of the last layer. Lists run from the
    finest scale, which reads the deepest layer, to the coarsest at the patch grid; patches of 2^n make n + 1 scales.
    Inputs as for the encoder. `train_rows` [B] is given in training: the clips over which batch norms take their
    statistics.

    Raises:
      UserError: audio patches are not 2^n × 2^n, or 2^n does not divide the audio width.
    """

    def __init__(self, config: AVMAEConfig, head: SeparatorConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        widths, width, image_width = separator_scales(config.audio), config.audio.width, config.image.width
        top = len(widths) - 1
        self.encoder = Encoder(config, rngs=rngs)
        self.condition_norm = LayerNorm(image_width, eps=1e-5)
        self.audio_norms = nnx.List(LayerNorm(width, eps=1e-5) for _ in widths)
        self.conditions = nnx.List(Linear(image_width, scale, rngs=rngs) for scale in widths)
        self.top = DoubleConv(2 * width, width, rngs=rngs)
        self.laterals = nnx.List(Up(width, widths[scale], 2 ** (top - scale), rngs=rngs) for scale in range(top))
        self.ups = nnx.List(
            Up(widths[scale + 1], widths[scale], 2, skip=2 * widths[scale], rngs=rngs) for scale in range(top)
        )
        self.predict = Convolution(widths[0], 1, rngs=rngs)
        self.layers = tuple(np.linspace(0, config.audio.depth - 1, top + 1).astype(int)[::-1].tolist())

    def __call__(self, image: jax.Array, mixture: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        layers = self.encoder(image, mixture, return_layers=True).layers
        maps = [
            as_map(norm(layers[number].audio), self.config.audio.grid)
            for number, norm in zip(self.layers, self.audio_norms, strict=True)
        ]
        seen = self.condition_norm(layers[-1].image).mean(1)
        conditions = [linear(seen) for linear in self.conditions]
        x = self.top(beside(maps[-1], conditions[-1]), train_rows)
        for scale in reversed(range(len(self.ups))):
            lateral = self.laterals[scale](maps[scale], train_rows=train_rows)
            x = self.ups[scale](x, beside(lateral, conditions[scale]), train_rows)
        return self.predict(x)[..., 0]


class Segmenter(nnx.Module):
    """segmenter(image, audio, train_rows=None) → logits [B, H, W, classes]; one class is a binary mask.

    A U-Net over image layers, with the mean of the projected sound of the last layer at each scale. Lists run from
    the coarsest scale, at the patch grid, to the finest at half the image's resolution; patches of 2^n make n scales.
    Inputs as for the encoder. `train_rows` [B] is given in training: the clips over which batch norms take their
    statistics.

    Raises:
      UserError: image patches are not 2^n × 2^n, or 2^(n - 1) does not divide the image width.
    """

    def __init__(self, config: AVMAEConfig, head: SegmenterConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        widths, width = segmenter_scales(config.image, head.width), config.image.width
        self.encoder = Encoder(config, rngs=rngs)
        self.image_norms = nnx.List(LayerNorm(width, eps=1e-5) for _ in widths)
        self.audio_projections = nnx.List(Linear(config.audio.width, scale, rngs=rngs) for scale in widths)
        self.audio_norms = nnx.List(LayerNorm(scale, eps=1e-5) for scale in widths)
        self.top = DoubleConv(width + widths[0], widths[0], rngs=rngs)
        self.laterals = nnx.List(Up(width, widths[scale], 2**scale, rngs=rngs) for scale in range(1, len(widths)))
        self.ups = nnx.List(
            Up(widths[scale - 1], widths[scale], 2, skip=2 * widths[scale], rngs=rngs)
            for scale in range(1, len(widths))
        )
        self.predict1 = Convolution(widths[-1], head.width, rngs=rngs)
        self.predict2 = Convolution(head.width, head.classes, rngs=rngs)
        self.layers = tuple(np.linspace(0, config.image.depth - 1, len(widths)).astype(int).tolist())

    def __call__(self, image: jax.Array, audio: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        layers = self.encoder(image, audio, return_layers=True).layers
        maps = [
            as_map(norm(layers[number].image), self.config.image.grid)
            for number, norm in zip(self.layers, self.image_norms, strict=True)
        ]
        heard = [
            norm(project(layers[-1].audio)).mean(1)
            for project, norm in zip(self.audio_projections, self.audio_norms, strict=True)
        ]
        x = self.top(beside(maps[0], heard[0]), train_rows)
        for scale, (lateral, up) in enumerate(zip(self.laterals, self.ups, strict=True), 1):
            skip = beside(lateral(maps[scale], train_rows=train_rows), heard[scale])
            x = up(x, skip, train_rows)
        return self.predict2(double_resolution(self.predict1(x)))
