"""Heads on the encoder: classifier, separator and segmenter, as in DeepAVFusion, and what they are made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from av_mae.models.config import (
    AVMAEConfig,
    ClassifierConfig,
    SegmenterConfig,
    SeparatorConfig,
    StreamConfig,
    require,
)
from av_mae.models.encoder import Encoder, pool
from av_mae.models.layers import Initial, LayerNorm, Linear, at_least_float32


def doublings(stream: StreamConfig, head: str) -> int:
    """How many times the grid of a stream is doubled to reach its input's resolution: n for patches of 2^n × 2^n.

    Raises:
      UserError: the patch is not square, not a power of two, or 1.
    """
    rows, columns = stream.patch_size
    require(
        rows == columns and rows > 1 and rows & (rows - 1) == 0,
        f"the {head} doubles the patch grid until it reaches the input's resolution, so patch={stream.patch} must "
        "be square and a power of two, at least 2 (the published one is 16)",
    )
    return rows.bit_length() - 1


def separator_scales(stream: StreamConfig) -> tuple[int, ...]:
    """Widths of the separator's scales, finest first: D / 2^n … D / 2, D.

    Raises:
      UserError: 2^n does not divide the audio stream's width D, or see `doublings`.
    """
    count, width = doublings(stream, "separator"), stream.width
    require(
        width % 2**count == 0,
        f"the separator halves the audio width {count} times, so patch={stream.patch} must divide {width=}",
    )
    return tuple(width >> number for number in reversed(range(count + 1)))


def segmenter_scales(stream: StreamConfig, least: int) -> tuple[int, ...]:
    """Widths of the segmenter's scales, coarsest first: max(least, D / 2^d) for d = 0 … n - 1.

    Raises:
      UserError: 2^(n - 1) does not divide the image stream's width D, or see `doublings`.
    """
    count, width = doublings(stream, "segmenter"), stream.width
    require(
        width % 2 ** (count - 1) == 0,
        f"the segmenter halves the image width {count - 1} times, so {2 ** (count - 1)} (half of "
        f"patch={stream.patch}) must divide {width=}",
    )
    return tuple(max(least, width >> number) for number in range(count))


class Convolution(nnx.Module):
    """3×3 convolution with zeros around, and Kaiming normal weights (fan out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = Initial("normal", (3, 3, inputs, outputs), math.sqrt(2 / (9 * outputs))).parameter(rngs)
        self.bias = Initial("constant", (outputs,)).parameter() if bias else None

    def __call__(self, x: Float[Array, "B rows columns inputs"]) -> Float[Array, "B rows columns outputs"]:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if self.bias is None else y + self.bias[...]


class TransposedConvolution(nnx.Module):
    """Transposed convolution with kernel and stride `factor`: a map grows by that factor.

    The weights are Kaiming normal. The fan out of a transposed weight counts the inputs, as in PyTorch.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, rngs: nnx.Rngs):
        deviation = math.sqrt(2 / (factor * factor * inputs))
        self.kernel = Initial("normal", (factor, factor, inputs, outputs), deviation).parameter(rngs)
        self.bias = Initial("constant", (outputs,)).parameter()

    def __call__(self, x: Float[Array, "B rows columns inputs"]) -> Float[Array, "B _ _ outputs"]:
        kernel, (b, rows, columns, _) = self.kernel[...], x.shape
        factor, _, _, outputs = kernel.shape
        y = jnp.einsum("brci,hwio->brhcwo", x.astype(kernel.dtype), kernel)
        return y.reshape(b, rows * factor, columns * factor, outputs) + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch norm of the last axis, in at least float32.

    In training the statistics are those of the marked rows of the whole batch, on whatever mesh (biased variance), and
    the running statistics move a tenth of the way towards them (unbiased variance, as in PyTorch). A batch of fewer
    than two values moves nothing. `batches` counts the batches that moved the statistics.

    Args:
      width: of the last axis.
      eps: added to the variance.
      affine: whether there are a learned scale and bias.
    """

    momentum = 0.1

    def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
        self.scale = Initial("constant", (width,), 1.0).parameter() if affine else None
        self.bias = Initial("constant", (width,)).parameter() if affine else None
        self.mean = Initial("constant", (width,)).statistic()
        self.variance = Initial("constant", (width,), 1.0).statistic()
        self.batches = Initial("constant", (), dtype=jnp.int32).statistic()
        self.eps = eps

    def __call__(
        self, x: Float[Array, "B *N C"], train_rows: Shaped[Array, " B"] | None = None
    ) -> Float[Array, "B *N C"]:
        """Normalises x, in training with the statistics of its rows marked in `train_rows`."""
        y = at_least_float32(x)
        if train_rows is None:
            mean, variance = self.mean[...], self.variance[...]
        else:
            mean, variance = self.batch_statistics(y, train_rows)
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)

    def batch_statistics(
        self, x: Float[Array, "B *N C"], rows: Shaped[Array, " B"]
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Mean and biased variance over the marked rows of x. Moves the running statistics."""
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
    """Twice: 3×3 convolution without bias, batch norm, ReLU. Both convolutions have width `outputs`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.conv1 = Convolution(inputs, outputs, bias=False, rngs=rngs)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = Convolution(outputs, outputs, bias=False, rngs=rngs)
        self.norm2 = BatchNorm(outputs)

    def __call__(
        self, x: Float[Array, "B rows columns inputs"], train_rows: Shaped[Array, " B"] | None = None
    ) -> Float[Array, "B rows columns outputs"]:
        x = jax.nn.relu(self.norm1(self.conv1(x), train_rows))
        return jax.nn.relu(self.norm2(self.conv2(x), train_rows))


class Up(nnx.Module):
    """Enlarges a map: a transposed convolution to inputs / factor channels, the skip beside it, a `DoubleConv`.

    Args:
      inputs: channels of the map.
      outputs: channels of the result.
      factor: by which rows and columns grow.
      skip: channels of the skip; 0 for none.
      rngs: random keys for the weights.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, skip: int = 0, rngs: nnx.Rngs):
        self.transposed = TransposedConvolution(inputs, inputs // factor, factor, rngs=rngs)
        self.convolutions = DoubleConv(inputs // factor + skip, outputs, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B rows columns inputs"],
        skip: Float[Array, "B up_rows up_columns S"] | None = None,
        train_rows: Shaped[Array, " B"] | None = None,
    ) -> Float[Array, "B up_rows up_columns outputs"]:
        """Enlarges x; `skip` already has the enlarged size."""
        x = self.transposed(x)
        return self.convolutions(x if skip is None else jnp.concatenate([x, skip], axis=-1), train_rows)


def as_map(tokens: Float[Array, "B N D"], grid: tuple[int, int]) -> Float[Array, "B rows columns D"]:
    """Tokens, row-major, as a map over the grid."""
    return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


def beside(x: Float[Array, "B rows columns C"], vector: Float[Array, "B D"]) -> Float[Array, "B rows columns CD"]:
    """[x ; vector]: the vector is repeated over the map and concatenated with its channels."""
    repeated = jnp.broadcast_to(vector[:, None, None], (*x.shape[:3], vector.shape[-1]))
    return jnp.concatenate([x, repeated], axis=-1)


def double_resolution(x: Float[Array, "B rows columns C"]) -> Float[Array, "B _ _ C"]:
    """Doubles rows and columns, bilinear with half-pixel centres."""
    b, rows, columns, width = x.shape
    doubled: Array = jax.image.resize(x, (b, 2 * rows, 2 * columns, width), "bilinear")
    return doubled


JOINT = "joint"


class Classifier(nnx.Module):
    """Linear classifiers of the pooled 'image', 'audio' and 'fusion' tokens.

    Without fusion tokens there is no 'fusion'. A head that concatenates the streams is one classifier, named 'joint'.

    Args:
      config: of the encoder.
      head: classes and form of the head.
      rngs: random keys for the weights.
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

    def classify(
        self, features: dict[str, Float[Array, "B _"]], train_rows: Shaped[Array, " B"] | None = None
    ) -> dict[str, Float[Array, "B classes"]]:
        """Logits from pooled features by stream. With a frozen encoder, only this is trained."""
        if self.head.input_norm:
            features = {name: self.norms[name](x, train_rows) for name, x in features.items()}
        if self.head.concatenate:  # by `streams`, since features that come out of a jit are sorted by name
            features = {JOINT: jnp.concatenate([features[name] for name in self.streams], axis=-1)}
        return {name: head(features[name]) for name, head in self.heads.items()}

    def __call__(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        train_rows: Shaped[Array, " B"] | None = None,
    ) -> dict[str, Float[Array, "B classes"]]:
        """Logits of clips.

        Args:
          image: normalised images.
          audio: log-mels.
          train_rows: given in training, the clips over which input norms take their statistics.
        """
        return self.classify(pool(self.encoder(image, audio)), train_rows)


def joint_score(logits: dict[str, Float[Array, "B classes"]]) -> Float[Array, "B classes"]:
    """The mean of the streams' logits, in at least float32."""
    return at_least_float32(jnp.stack(list(logits.values()))).mean(0)


class Separator(nnx.Module):
    """Predicts the mask of the sound source that the image shows, from a mixture.

    The head is a U-Net over audio layers, conditioned at each scale on the mean image token of the last layer. Lists
    run from the finest scale, which reads the deepest layer, to the coarsest at the patch grid. Patches of 2^n make
    n + 1 scales.

    Args:
      config: of the encoder.
      head: what mask the head learns.
      rngs: random keys for the weights.

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

    def __call__(
        self,
        image: Float[Array, "B height width 3"],
        mixture: Float[Array, "B mels frames *channel"],
        train_rows: Shaped[Array, " B"] | None = None,
    ) -> Float[Array, "B mels frames"]:
        """Mask logits.

        Args:
          image: normalised images.
          mixture: log-mels of mixtures.
          train_rows: given in training, the clips over which batch norms take their statistics.
        """
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
    """Segments what sounds in an image; one class is a binary mask.

    The head is a U-Net over image layers, with the mean of the projected audio tokens of the last layer at each scale.
    Lists run from the coarsest scale, at the patch grid, to the finest at half the image's resolution. Patches of 2^n
    make n scales.

    Args:
      config: of the encoder.
      head: classes and width of the head.
      rngs: random keys for the weights.

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

    def __call__(
        self,
        image: Float[Array, "B height width 3"],
        audio: Float[Array, "B mels frames *channel"],
        train_rows: Shaped[Array, " B"] | None = None,
    ) -> Float[Array, "B height width classes"]:
        """Logits of each pixel.

        Args:
          image: normalised images.
          audio: log-mels.
          train_rows: given in training, the clips over which batch norms take their statistics.
        """
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
