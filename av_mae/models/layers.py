"""The layers that all models share: Linear, LayerNorm, MLP, attention and the transformer block.

The parameters' dtype is the dtype of the computation. Statistics, softmax and losses are computed in float32, or in
float64 where the parameters are float64. Kernels are [inputs, outputs]. Queries, keys and values have a kernel each:
one fused kernel, sliced inside the step, would be copied in every step.
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
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from av_mae.models.config import require

# Mesh axes by the name of a dimension; a dimension whose name is missing is not sharded.
Rules = Mapping[str, str | tuple[str, ...]]

_sharding: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within this context, traced layers shard their outputs over the mesh by the rules."""
    token = _sharding.set((mesh, rules))
    try:
        yield
    finally:
        _sharding.reset(token)


def constrain(x: Float[Array, "B *N D"], last: str) -> Float[Array, "B *N D"]:
    """Shards x over its batch and over its last dimension, whose name is `last`, as `activation_sharding` says."""
    mesh, rules = _sharding.get() or (None, {})
    if mesh is None or mesh.size == 1:
        return x
    spec = PartitionSpec(rules["batch"], *(None,) * (x.ndim - 2), rules.get(last))
    sharded: Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return sharded


# Names of the dimensions of a projection to queries, keys or values, and of the projection back to the width.
TO_HEADS, FROM_HEADS = ("width", "heads"), ("heads", "width")


def at_least_float32(x: Shaped[Array, "*N"]) -> Float[Array, "*N"]:
    """Casts half-precision and integer arrays to float32; float32 and float64 stay as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.lru_cache(maxsize=64)
def sin_cos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Positions of a (rows, columns) grid, row-major: float32 [rows · columns, width].

    The first half of the width encodes the column, the second half the row. Each half of n numbers is [sin…, cos…]
    with frequencies 10000^(-k / (n / 2)).
    """
    require(width % 4 == 0, f"{width=} must be a multiple of 4")
    rows, columns = (c.ravel().astype(np.float64) for c in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = [np.outer(coordinates, frequencies) for coordinates in (columns, rows)]
    return np.concatenate([wave(x) for x in angles for wave in (np.sin, np.cos)], axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Initial:
    """The initial value of a parameter.

    The initial value is kept in the parameter's metadata, so that a sharded run can draw each parameter by itself,
    straight into its shards.

    Attributes:
      kind: 'uniform' (within ± scale), 'normal' (scale is the standard deviation), 'constant' (scale is the value) or
        'positions' (sin-cos positions of `grid`).
      shape: of the parameter.
      scale: a number; of 'constant' also one number for each entry of the last axis.
      grid: (rows, columns) of 'positions'.
      dtype: of 'constant'; the other kinds are float32.
      axes: a name for each dimension, to shard by; empty for norms, tokens and convolutions.
    """

    kind: str
    shape: tuple[int, ...]
    scale: float | tuple[float, ...] = 0.0
    grid: tuple[int, int] | None = None
    dtype: type = jnp.float32
    axes: tuple[str, ...] = ()

    def __call__(self, key: Array | None) -> Array:
        """Draws the value; only 'uniform' and 'normal' need a random key."""
        if self.kind == "constant":
            return jnp.full(self.shape, jnp.asarray(self.scale), self.dtype)
        if self.grid is not None:
            return jnp.asarray(sin_cos_2d(self.grid, self.shape[-1])).reshape(self.shape)
        assert key is not None and isinstance(self.scale, float)
        if self.kind == "uniform":
            return jax.random.uniform(key, self.shape, jnp.float32, -self.scale, self.scale)
        return self.scale * jax.random.normal(key, self.shape, jnp.float32)

    def parameter(self, rngs: nnx.Rngs | None = None) -> nnx.Param[Array]:
        """A parameter with this initial value."""
        return nnx.Param(self(None if rngs is None else rngs.params()), initial=self)

    def statistic(self) -> nnx.BatchStat[Array]:
        """A running statistic, which training moves without a gradient."""
        return nnx.BatchStat(self(None), initial=self)


class Linear(nnx.Module):
    """x [..., inputs] → [..., outputs], with Xavier uniform weights and zero bias.

    Args:
      inputs: width of x.
      outputs: width of the result.
      bias: whether there is a bias.
      fan_out: outputs that the initialisation counts, by default `outputs`. DeepAVFusion has queries, keys and values
        in one weight of three times the outputs, which makes their initial values smaller.
      axes: names of the two dimensions. A layer with outputs 'heads' or 'mlp' is sharded like the next layer, whose
        inputs have that name.
      rngs: random keys for the weights.
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

    def __call__(self, x: Float[Array, "*N inputs"]) -> Float[Array, "*N outputs"]:
        kernel = self.kernel[...]
        y = constrain(x.astype(kernel.dtype) @ kernel, self.outputs)
        return y if self.bias is None else y + self.bias[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*N D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*N D"]:
    """Normalises x over its last axis in at least float32, then scales and shifts; the result has scale's dtype.

    The backward pass keeps x and two numbers a token. Plain differentiation would keep two more arrays of x's size.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, tuple[Array, ...]]:
    y = at_least_float32(x)
    mean = y.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    return ((y - mean) * rate * scale + bias).astype(scale.dtype), (x, mean, rate, scale)


def _layer_norm_backward(eps: float, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
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
    """`layer_norm` with learned scale and bias."""

    def __init__(self, width: int, *, eps: float):
        self.scale = Initial("constant", (width,), 1.0).parameter()
        self.bias = Initial("constant", (width,)).parameter()
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


@jax.custom_vjp
def gelu(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Exact GELU, x Φ(x), computed in at least float32. The backward pass keeps nothing but x."""
    # with erf, which takes two thirds of erfc's time on CPUs
    y = at_least_float32(x)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    y = at_least_float32(x)
    density = jnp.exp(-0.5 * jnp.square(y)) * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))) + y * density
    return ((slope * gradient).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class MLP(nnx.Module):
    """Linear → exact GELU → Linear; the hidden width is width × ratio."""

    def __init__(self, width: int, ratio: float, *, rngs: nnx.Rngs):
        hidden = int(width * ratio)
        self.fc1 = Linear(width, hidden, axes=("width", "mlp"), rngs=rngs)
        self.fc2 = Linear(hidden, width, axes=("mlp", "width"), rngs=rngs)

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return self.fc2(gelu(self.fc1(x)))


# What attention is made of; each head's values are contiguous.
SPLIT_HEADS, MERGE_HEADS = "b n (h k) -> b n h k", "b n h k -> b n (h k)"
Queries = Float[Array, "B N H K"]
Keys = Float[Array, "B C H K"]
Values = Float[Array, "B C H V"]
Bias = Float[Array, "#B #H #N #C"]


def attention_weights(q: Queries, k: Keys, scale: float, bias: Bias | None = None) -> Float[Array, "B H N C"]:
    """How much each query attends to each key, in at least float32: softmax(scale · q k + bias)."""
    # Heads are moved beside the batch first: with heads between tokens and head width, the CPU's matrix products were
    # measured at a third of this rate in the forward pass.
    logits = jnp.einsum(
        "bhnk,bhck->bhnc",
        jnp.swapaxes(q * scale, 1, 2),
        jnp.swapaxes(k, 1, 2),
        preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
    )
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


def plain_attention(q: Queries, k: Keys, v: Values, scale: float, bias: Bias | None = None) -> Float[Array, "B N H V"]:
    """`attend` as matrix products around a softmax."""
    weights = attention_weights(q, k, scale, bias).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhnc,bhck->bhnk", weights, jnp.swapaxes(v, 1, 2)), 1, 2)


def attend(q: Queries, k: Keys, v: Values, scale: float, bias: Bias | None = None) -> Float[Array, "B N H V"]:
    """Multi-head attention: softmax(scale · q k + bias) v.

    Only this function chooses the implementation: cuDNN's fused kernel on GPUs where it takes the shapes, else (CPUs,
    TPUs) plain matrix products.
    """
    # cuDNN takes no bias, half precision, and queries and values of one head width, a multiple of 8 and at most 128
    (*_, heads, width), half = q.shape, q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and bias is None and width == v.shape[-1] and width % 8 == 0 and width <= 128
    if fits and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    if jnp.dtype(v.dtype).itemsize >= 4:
        return plain_attention(q, k, v, scale, bias)

    # In half precision the backward pass computes the weights [B, H, N, C] again: on accelerators, writing them down
    # and reading them back costs several times what their matrix product does.
    @jax.checkpoint
    def attention(q: Array, k: Array, v: Array, bias: Array | None) -> Array:
        q, k, v = (rearrange(x, SPLIT_HEADS, h=heads) for x in (q, k, v))
        return plain_attention(q, k, v, scale, bias)

    # What is kept has its heads side by side: TPUs pad a last dimension of 32 or 64 to 128 numbers.
    out: Array = attention(*(rearrange(x, MERGE_HEADS) for x in (q, k, v)), bias)
    return out


class Attention(nnx.Module):
    """Multi-head attention of tokens over themselves or over context tokens.

    Args:
      width: of the tokens, D.
      heads: number of heads, which must divide the width.
      context_width: width of the context tokens, by default that of the tokens.
      fused: of query, key and value, how many share one weight in DeepAVFusion (3, or 2: keys and values). The
        initialisation counts the outputs of that weight.
      rngs: random keys for the weights.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, fused: int = 3, rngs: nnx.Rngs):
        context_width = context_width or width
        self.query = Linear(width, width, fan_out=width * (3 if fused == 3 else 1), axes=TO_HEADS, rngs=rngs)
        self.key = Linear(context_width, width, fan_out=width * fused, axes=TO_HEADS, rngs=rngs)
        self.value = Linear(context_width, width, fan_out=width * fused, axes=TO_HEADS, rngs=rngs)
        self.out = Linear(width, width, axes=FROM_HEADS, rngs=rngs)
        self.heads = heads
        self.scale = (width // heads) ** -0.5

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B C Dc"] | None = None,
        bias: Float[Array, "#B #H N #C"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Tokens x attend to the context, or to x itself without one; `bias` is added to the attention's logits."""
        context = x if context is None else context
        read = self.query(x), self.key(context), self.value(context)
        q, k, v = (rearrange(y, SPLIT_HEADS, h=self.heads) for y in read)
        return self.out(rearrange(attend(q, k, v, self.scale, bias), MERGE_HEADS))

    def weights(self, x: Float[Array, "B N D"], context: Float[Array, "B C Dc"]) -> Float[Array, "B H N C"]:
        """How much each token of x attends to each token of the context."""
        q, k = (rearrange(y, SPLIT_HEADS, h=self.heads) for y in (self.query(x), self.key(context)))
        return attention_weights(q, k, self.scale)


class Block(nnx.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual.

    Args:
      width: of the tokens, D.
      heads: attention heads.
      mlp_ratio: hidden width of the MLP in multiples of the width.
      eps: of the layer norms.
      rngs: random keys for the weights.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, eps: float, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_ratio, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B C D"] | None = None,
        factors: Float[Array, "B 2"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Updates the tokens x.

        Args:
          x: tokens.
          context: tokens that x attends to besides itself. They are keys and values only: neither queries, projection
            nor MLP are computed for them. So are fusion tokens in the encoder, and in a decoder's last block all
            tokens that are not predicted.
          factors: of each clip, what the outputs of attention and MLP are multiplied by (stochastic depth).
        """

        def scaled(y: Array, branch: int) -> Array:
            return y if factors is None else y * factors[:, branch, None, None].astype(y.dtype)

        y = self.norm1(x)
        read = y if context is None else jnp.concatenate([self.norm1(context), y], axis=1)
        x = x + scaled(self.attention(y, read), 0)
        return x + scaled(self.mlp(self.norm2(x)), 1)
