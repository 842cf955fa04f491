"""The layers that all parts share: Linear, LayerNorm, MLP, attention and the transformer block.

Compute dtype is the dtype of the parameters; statistics, softmax and losses are taken in float32 (float64 where
the parameters are float64). Kernels are stored [inputs, outputs], queries, keys and values apart: a weight that is
fused and sliced inside the step is copied each time.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae.models.config import require

# Mesh axes by the name of a dimension; a name that is not here stays whole.
Rules = Mapping[str, str | tuple[str, ...]]

_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("current", default=None)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """What is traced inside lies on the mesh as the rules say."""
    token = _current.set((mesh, rules))
    try:
        yield
    finally:
        _current.reset(token)


def constrain(x: jax.Array, last: str | None) -> jax.Array:
    """x [B, ..., last] cut over its batch and its last dimension, whole in between."""
    if _current.get() is None or _current.get()[0].size == 1:
        return x
    mesh, rules = _current.get()
    spec = PartitionSpec(rules["batch"], *(None,) * (x.ndim - 2), rules.get(last))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


# Dimensions of the projections to queries, keys and values, and of the one that leads back.
TO_HEADS, FROM_HEADS = ("width", "heads"), ("heads", "width")


def at_least_float32(x: jax.Array) -> jax.Array:
    """Half-precision arrays become float32; float32 and float64 stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sin_cos_1d(coordinates: np.ndarray, width: int) -> np.ndarray:
    """[N] coordinates → [N, width], laid out [sin…, cos…] with frequencies 10000^(-k / (width / 2))."""
    require(width % 2 == 0, f"width={width} of one coordinate must be even")
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(coordinates.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@functools.lru_cache(maxsize=64)
def sin_cos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Positions of a (rows, columns) grid, row-major: float32 [rows · columns, width].

    The first half of the width encodes the column, the second half the row.
    """
    require(width % 4 == 0, f"{width=} must be a multiple of 4")
    row, column = (c.ravel() for c in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    return np.concatenate([_sin_cos_1d(column, width // 2), _sin_cos_1d(row, width // 2)], axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Initial:
    """How a parameter begins: float32 `shape`, drawn by `kind` ('uniform' in ± scale, 'normal' with deviation scale),
    'constant' of value scale (or one for each of the last axis) and `dtype`, or 'positions' of the (rows, columns)
    `grid`. `axes` names the dimensions (models/layers.py; none named: a norm, a token, a convolution).

    It stays with the parameter, so that a sharded run can draw each one by itself, straight into its shards.
    """

    kind: str
    shape: tuple[int, ...]
    scale: float | tuple[float, ...] = 0.0
    grid: tuple[int, int] | None = None
    dtype: type = jnp.float32
    axes: tuple[str, ...] = ()

    def __call__(self, key: jax.Array | None) -> jax.Array:
        if self.kind == "uniform":
            return jax.random.uniform(key, self.shape, jnp.float32, -self.scale, self.scale)
        if self.kind == "normal":
            return self.scale * jax.random.normal(key, self.shape, jnp.float32)
        if self.kind == "constant":
            return jnp.full(self.shape, jnp.asarray(self.scale), self.dtype)
        return jnp.asarray(sin_cos_2d(self.grid, self.shape[-1])).reshape(self.shape)

    def parameter(self, rngs: nnx.Rngs | None = None) -> nnx.Param:
        return nnx.Param(self(None if rngs is None else rngs.params()), initial=self)

    def statistic(self) -> nnx.BatchStat:
        """A value that training moves without a gradient."""
        return nnx.BatchStat(self(None), initial=self)


class Linear(nnx.Module):
    """x [..., inputs] → [..., outputs]. Xavier uniform weights, zero bias.

    `fan_out` is the number of outputs that the initialisation counts: the published system keeps queries, keys and
    values in one weight of three times the outputs, which makes their initial values smaller. `axes` names inputs and
    outputs: of two layers in a row, one with outputs and one with inputs 'heads' or 'mlp' are cut alike over devices.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        fan_out: int | None = None,
        axes: tuple[str, str] = ("width", "width"),
        rngs: nnx.Rngs,
    ):
        bound = math.sqrt(6 / (inputs + (fan_out or outputs)))
        self.kernel = Initial("uniform", (inputs, outputs), bound, axes=axes).parameter(rngs)
        self.bias = Initial("constant", (outputs,), axes=axes[1:]).parameter() if bias else None
        self.outputs = axes[1]

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        y = constrain(x.astype(kernel.dtype) @ kernel, self.outputs)
        return y if self.bias is None else y + self.bias[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """x [..., D] normalised over its last axis in at least float32, times scale [D], plus bias [D]; of scale's dtype.

    The backward pass keeps x and two numbers a token, where plain differentiation would keep [..., D] twice more.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> tuple:
    y = at_least_float32(x)
    mean = y.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    return ((y - mean) * rate * scale + bias).astype(scale.dtype), (x, mean, rate, scale)


def _layer_norm_backward(eps: float, kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, rate, scale = kept
    normal, gradient = (at_least_float32(x) - mean) * rate, at_least_float32(gradient)
    tokens = tuple(range(x.ndim - 1))
    to_scale, to_bias = (gradient * normal).sum(tokens), gradient.sum(tokens)
    gradient = gradient * scale
    along = (gradient * normal).mean(-1, keepdims=True)
    to_x = rate * (gradient - gradient.mean(-1, keepdims=True) - normal * along)
    return to_x.astype(x.dtype), to_scale.astype(scale.dtype), to_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """Normalises the last axis of x [..., D] in float32; returns the scale's dtype."""

    def __init__(self, width: int, *, eps: float):
        self.scale = Initial("constant", (width,), 1.0).parameter()
        self.bias = Initial("constant", (width,)).parameter()
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Φ(x), in at least float32; the backward pass keeps nothing but x.

    Through erf, which takes two thirds of erfc's time on CPUs.
    """
    y = at_least_float32(x)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    y = at_least_float32(x)
    density = jnp.exp(-0.5 * jnp.square(y)) * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))) + y * density
    return ((slope * gradient).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class MLP(nnx.Module):
    """Linear → exact GELU → Linear on x [..., D]."""

    def __init__(self, width: int, ratio: float, *, rngs: nnx.Rngs):
        hidden = int(width * ratio)
        self.fc1 = Linear(width, hidden, axes=("width", "mlp"), rngs=rngs)
        self.fc2 = Linear(hidden, width, axes=("mlp", "width"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(x)))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, N, H K] → [B, N, H, K]; heads are contiguous."""
    b, n, width = x.shape
    return x.reshape(b, n, heads, width // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, H, K] → [B, N, H K]."""
    b, n, heads, k = x.shape
    return x.reshape(b, n, heads * k)


def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis in at least float32."""
    return jax.nn.softmax(at_least_float32(logits), axis=-1)


def attention_weights(q: jax.Array, k: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """How q [B, N, H, K] attend to k [B, M, H, K], in at least float32: [B, H, N, M], to which `bias` broadcasts.

    Heads are moved beside the batch first: with heads between tokens and head width the CPU's matrix products were
    measured at a third of this rate in the forward pass.
    """
    logits = jnp.einsum(
        "bhnk,bhmk->bhnm",
        jnp.swapaxes(q * scale, 1, 2),
        jnp.swapaxes(k, 1, 2),
        preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
    )
    return softmax(logits if bias is None else logits + bias)


def fused_on_gpu(q: jax.Array, v: jax.Array, bias: jax.Array | None) -> bool:
    """Whether cuDNN's fused attention takes q and v: half precision, heads of one width that is a multiple of 8 and at
    most 128, any number of tokens as long as there is no bias."""
    width = q.shape[-1]
    fits = bias is None and width == v.shape[-1] and width % 8 == 0 and width <= 128
    return fits and q.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu"


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """`attend` as matrix products around a softmax."""
    weights = attention_weights(q, k, scale, bias).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhnm,bhmk->bhnk", weights, jnp.swapaxes(v, 1, 2)), 1, 2)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, bias: jax.Array | None = None) -> jax.Array:
    """Attention of q [B, N, H, K] over k, v [B, M, H, K] → [B, N, H, K]; `bias` broadcasts to [B, H, N, M].

    The one place that chooses how: cuDNN's fused kernel on GPUs where it takes the shapes, else (CPUs, TPUs) plain
    matrix products. In half precision the backward pass takes the weights [B, H, N, M] anew: on accelerators
    to write them down and read them back costs several times what their matrix product does.
    """
    if fused_on_gpu(q, v, bias):
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    if jnp.dtype(v.dtype).itemsize >= 4:
        return plain_attention(q, k, v, scale, bias)

    @jax.checkpoint
    def attention(q, k, v, bias):
        return plain_attention(*(split_heads(x, heads) for x in (q, k, v)), scale, bias)

    # what is kept has its heads side by side: TPUs fill up a last dimension of 32 or 64 to 128 numbers
    heads = q.shape[2]
    return attention(*map(merge_heads, (q, k, v)), bias)


class Attention(nnx.Module):
    """Multi-head attention of x [B, N, D] over `context` [B, M, C] (default: over x itself)."""

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, fused: int = 3, rngs: nnx.Rngs):
        context_width = context_width or width
        self.query = Linear(width, width, fan_out=width * (3 if fused == 3 else 1), axes=TO_HEADS, rngs=rngs)
        self.key = Linear(context_width, width, fan_out=width * fused, axes=TO_HEADS, rngs=rngs)
        self.value = Linear(context_width, width, fan_out=width * fused, axes=TO_HEADS, rngs=rngs)
        self.out = Linear(width, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = heads
        self.scale = (width // heads) ** -0.5

    def __call__(self, x: jax.Array, context: jax.Array | None = None, bias: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.query(x), self.key(context), self.value(context)))
        return self.out(merge_heads(attend(q, k, v, self.scale, bias)))

    def weights(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """How x attends to the context: [B, H, N, M]."""
        return attention_weights(*(split_heads(y, self.heads) for y in (self.query(x), self.key(context))), self.scale)


def scaled(x: jax.Array, factors: jax.Array | None, branch: int) -> jax.Array:
    """x [B, N, D] times each clip's factor of a residual branch, factors [B, 2]; None: x."""
    return x if factors is None else x * factors[:, branch, None, None].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block on x [B, N, D].

    `context` [B, M, D] are tokens that x reads besides itself but that are not updated: keys and values only. So
    fusion tokens in the encoder, and all that is not predicted in a decoder's last block, cost neither queries nor
    projection nor MLP. `factors` [B, 2] multiply the two residual branches, attention and MLP (stochastic depth).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, eps: float, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_ratio, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array | None = None, factors: jax.Array | None = None) -> jax.Array:
        y = self.norm1(x)
        read = y if context is None else jnp.concatenate([self.norm1(context), y], axis=1)
        x = x + scaled(self.attention(y, read), factors, 0)
        return x + scaled(self.mlp(self.norm2(x)), factors, 1)
