"""What the two dense heads are built of: convolutions, batch norm, DoubleConv and Up (published system).

Maps are [B, rows, columns, C]; kernels are [rows, columns, inputs, outputs]. `train_rows` is the mark of training:
bool [B], the clips over which batch norms take their statistics; without it they use the running ones.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from av_mae.models.layers import Initial, at_least_float32


class Convolution(nnx.Module):
    """3×3 convolution [B, R, C, inputs] → [B, R, C, outputs], zeros around. Kaiming normal weights (fan out)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = Initial("normal", (3, 3, inputs, outputs), math.sqrt(2 / (9 * outputs))).parameter(rngs)
        self.bias = Initial("constant", (outputs,)).parameter() if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(x.astype(kernel.dtype), kernel, (1, 1), "SAME",
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
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
