"""The layers that all parts share, against plain formulas: values, gradients, what is kept for the backward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae.models import layers


def plain_norm(x, scale, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 16), (2, 3, 4, 9)])
def test_layer_norm(shape):
    """Output and gradients in float64 are those of the plain formula, differentiated by JAX."""
    with jax.enable_x64():
        x, gradient = jax.random.normal(jax.random.key(0), (2, *shape), jnp.float64) * 3 + 1
        scale, bias = jax.random.normal(jax.random.key(1), (2, shape[-1]), jnp.float64)
        expected, back = jax.vjp(lambda *given: plain_norm(*given, 1e-5), x, scale, bias)
        ours, our_back = jax.vjp(lambda *given: layers.layer_norm(*given, 1e-5), x, scale, bias)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(our_back(gradient), back(gradient), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def test_layer_norm_in_half_precision():
    """Statistics in float32, output and gradients in the dtypes given; x and two numbers a token are kept."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 32)) * 3 + 1
    scale, bias = (jnp.full(32, value, jnp.bfloat16) for value in (1.5, 0.25))
    ours, back = jax.vjp(lambda *given: layers.layer_norm(*given, 1e-5), x, scale, bias)
    np.testing.assert_allclose(ours.astype(jnp.float32), plain_norm(x, 1.5, 0.25, 1e-5), rtol=0.01, atol=0.01)
    assert ours.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in back(ours)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert sorted(kept.shape for kept in jax.tree.leaves(back)) == [(4, 6, 1), (4, 6, 1), (4, 6, 32), (32,)]


def test_attention_in_half_precision_keeps_no_weights():
    """Only queries, keys and values wait for the backward pass; in float32 the weights [B, H, N, M] do as well. The
    gradients are those of the same products with the weights kept."""
    given = jax.random.normal(jax.random.key(0), (3, 2, 37, 3, 8))
    for dtype, kept in ((jnp.bfloat16, False), (jnp.float32, True)):
        q, k, v = given.astype(dtype)
        attend = lambda q, k, v: layers.attend(q, k, v, 0.5)
        shapes = [one.shape for one in jax.tree.leaves(jax.vjp(attend, q, k, v)[1])]
        assert ((2, 3, 37, 37) in shapes) == kept, dtype
        gradients = [
            jax.grad(lambda *x, f=f: f(*x).astype(jnp.float32).var(), (0, 1, 2))(q, k, v)
            for f in (attend, lambda q, k, v: layers.plain_attention(q, k, v, 0.5))
        ]
        for one, other in zip(*gradients, strict=True):
            np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


@pytest.mark.parametrize(
    "shape, dtype, bias, fused",
    [
        ((2, 49, 3, 64), jnp.bfloat16, False, True),
        ((2, 49, 3, 64), jnp.float32, False, False),
        ((2, 49, 3, 12), jnp.bfloat16, False, False),
        ((2, 49, 3, 64), jnp.bfloat16, True, False),
    ],
)
def test_fused_attention_on_gpus(monkeypatch, shape, dtype, bias, fused):
    """What cuDNN takes goes to it (its XLA counterpart stands in here), and comes out as from the plain path."""
    q, k, v = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3))
    bias = jnp.ones((1, 3, 49, 49), dtype) if bias else None
    expected, asked = layers.attend(q, k, v, 0.125, bias), []

    def stand_in(q, k, v, *, scale, implementation, attention=jax.nn.dot_product_attention):
        asked.append(implementation)
        return attention(q, k, v, scale=scale, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    ours = layers.attend(q, k, v, 0.125, bias)
    assert asked == ["cudnn"] * fused
    np.testing.assert_allclose(ours.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02 if fused else 0)


def test_gelu():
    """x Φ(x) and its slope, against the error function of the standard library."""
    x = np.array([-6.0, -2.5, -1.0, -0.125, 0.0, 0.25, 1.75, 5.0], np.float32)
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    slope = phi + x * np.exp(-(x.astype(float) ** 2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(layers.gelu(x), x * phi, rtol=1e-6, atol=4e-7)
    np.testing.assert_allclose(jax.vjp(layers.gelu, jnp.asarray(x))[1](jnp.ones(8))[0], slope, rtol=1e-6, atol=4e-7)
    half = layers.gelu(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, jnp.asarray(x * phi, jnp.bfloat16).at[0].set(half[0]))
