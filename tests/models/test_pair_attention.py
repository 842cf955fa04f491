"""The three implementations of pair attention against one another and against loops in plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae.errors import UserError
from av_mae.models.fusion import Dropout, KeysValues, chunked, materialized, separable

PLAIN_PAIR = {"sum": np.add, "product": np.multiply}
# B, I, A, F, H, K, V: random, odd, batch 1, single tokens.
SIZES = [(1, 7, 5, 3, 2, 3, 5), (3, 5, 9, 1, 1, 5, 2), (2, 1, 3, 4, 3, 2, 2)]


def draw(sizes, scale=1.0, seed=0):
    """q [B, F, H, K], image keys and values, audio keys and values, and a weight for each output; float64."""
    b, i, a, f, h, k, v = sizes
    generator = np.random.default_rng(seed)
    shapes = [(b, f, h, k), (b, i, h, k), (b, i, h, v), (b, a, h, k), (b, a, h, v), (b, f, h, v)]
    *arrays, weight = (generator.normal(size=shape) for shape in shapes)
    return [scale * arrays[0], *arrays[1:]], weight


def loops(arrays, scale, pair):
    """Outputs [B, F, H, V] and weights [B, H, F, I, A], one pair after the other; accepts complex numbers."""
    q, ki, vi, ka, va = arrays
    (b, f, h, _), i, a = q.shape, ki.shape[1], ka.shape[1]
    out = np.zeros((b, f, h, vi.shape[-1]), q.dtype)
    weights = np.zeros((b, h, f, i, a), q.dtype)
    for n, x, y in np.ndindex(b, f, h):
        logits = {
            (s, t): (q[n, x, y] * PLAIN_PAIR[pair](ki[n, s, y], ka[n, t, y])).sum() * scale
            for s in range(i)
            for t in range(a)
        }
        highest = max(logit.real for logit in logits.values())
        total = sum(np.exp(logit - highest) for logit in logits.values())
        for (s, t), logit in logits.items():
            weights[n, y, x, s, t] = np.exp(logit - highest) / total
            out[n, x, y] += weights[n, y, x, s, t] * PLAIN_PAIR[pair](vi[n, s, y], va[n, t, y])
    return out, weights


@functools.partial(jax.jit, static_argnums=(0, 2, 3), static_argnames=("pair", "chunk", "return_weights"))
def call(implementation, arrays, scale=0.7, pair="sum", **options):
    q, ki, vi, ka, va = arrays
    return implementation(q, KeysValues(ki, vi), KeysValues(ka, va), scale, pair, **options)


def candidates(pair):
    """Implementations that apply to `pair`, `chunked` with chunks that do and do not divide."""
    found = {"materialized": (materialized, {})} | {f"chunked {n}": (chunked, {"chunk": n}) for n in (3, 16)}
    return found | ({"separable": (separable, {})} if pair == "sum" else {})


def near(value, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("pair", ["sum", "product"])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_in_float64(double, sizes, pair):
    arrays, weight = draw(sizes, seed=sum(sizes))
    expected, _ = loops(arrays, 0.7, pair)
    # The derivative along a direction by a complex step: exact to rounding, and owes nothing to autodiff.
    directions, _ = draw(sizes, seed=100 + sum(sizes))
    moved = [x + 1e-30j * d for x, d in zip(arrays, directions)]
    slope = (loops(moved, 0.7, pair)[0].imag * weight).sum() / 1e-30
    gradients = {}
    for name, (implementation, options) in candidates(pair).items():

        def loss(arrays, implementation=implementation, options=options):
            out = call(implementation, arrays, pair=pair, **options)
            return (out * weight).sum(), out

        (_, out), gradients[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        assert out.dtype == jnp.float64
        near(out, expected)
        near(sum((g * d).sum() for g, d in zip(gradients[name], directions)), slope, 1e-11)
    for of_name in gradients.values():
        for gradient, other in zip(of_name, gradients["materialized"]):
            near(gradient, other)


@pytest.mark.parametrize("pair", ["sum", "product"])
def test_weights(double, pair):
    arrays, _ = draw(SIZES[0])
    expected_out, expected = loops(arrays, 0.7, pair)
    for name, (implementation, options) in candidates(pair).items():
        if name != "separable":
            out, weights = call(implementation, arrays, pair=pair, return_weights=True, **options)
            near(out, expected_out)
            near(weights, expected)
            near(weights.sum((-2, -1)), 1.0)
    if pair == "sum":  # the identity behind `separable`
        near(expected, expected.sum(-1, keepdims=True) * expected.sum(-2, keepdims=True))


@pytest.mark.parametrize("pair", ["sum", "product"])
def test_peaked_softmax_keeps_its_scale(double, pair):
    """Logits of thousands: every chunk that raises the maximum must shrink what came before it."""
    arrays, _ = draw(SIZES[0], scale=3000.0)
    expected, _ = loops(arrays, 0.7, pair)
    for implementation, options in candidates(pair).values():
        near(call(implementation, arrays, pair=pair, **options), expected, 1e-10)


def test_separable_refuses_products():
    with pytest.raises(UserError, match="separable pair attention needs pair='sum', got 'product'"):
        call(separable, draw(SIZES[0])[0], pair="product")


def test_dropout_does_not_depend_on_chunks(double):
    arrays, weight = draw(SIZES[0])
    dropout = Dropout(0.4, jax.random.key(5))

    def results(implementation, **options):
        def loss(arrays, dropout):
            out = call(implementation, arrays, pair="product", dropout=dropout, **options)
            return (out * weight).sum(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, dropout)
        return [out, *gradient]

    expected = results(materialized)
    plain, plain_weights = loops(arrays, 0.7, "product")
    assert np.abs(expected[0] - plain).max() > 0.1
    for value, of_all in zip(results(chunked, chunk=4), expected):
        near(value, of_all)
    for implementation, options in ((chunked, {"chunk": 1}), (chunked, {}), (materialized, {})):
        out, weights = call(implementation, arrays, pair="product", dropout=dropout, return_weights=True, **options)
        near(out, expected[0])
        near(weights, plain_weights)  # what is returned is attention before dropout


def test_dropout_drops_independently_at_its_rate():
    """Mean and variance over many keys; the variance is that of independent draws for every weight."""
    sizes, rate, draws = (1, 5, 3, 2, 2, 2, 3), 0.25, 4000
    arrays, _ = draw(sizes)
    out, weights = loops(arrays, 0.7, "sum")
    values = arrays[2][:, :, None] + arrays[4][:, None]
    variance = rate / (1 - rate) * np.einsum("bhfia,biahv->bfhv", weights**2, values**2)
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jax.vmap(lambda key: call(materialized, arrays, dropout=Dropout(rate, key)))(keys))
    assert (np.abs(found.mean(0) - out) < 5 * np.sqrt(variance / draws)).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=0.25)
    # Heads and fusion tokens draw apart.
    deviations = (found - found.mean(0)).reshape(draws, 4, 3)[:, :, 0]
    assert np.abs(np.corrcoef(deviations.T) - np.eye(4)).max() < 0.1


@pytest.mark.parametrize("implementation", [separable, chunked, materialized])
def test_bfloat16(implementation):
    arrays, _ = draw(SIZES[0])
    found = call(implementation, [jnp.asarray(x, jnp.bfloat16) for x in arrays])
    assert found.dtype == jnp.bfloat16
    expected, _ = loops(arrays, 0.7, "sum")
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=0.03 * np.abs(expected).max())


def temporary_bytes(implementation, tokens, gradient):
    """Temporary memory of the compiled call over `tokens` image and as many audio tokens."""
    b, f, h, k = 1, 3, 2, 4
    shapes = [(b, f, h, k)] + 4 * [(b, tokens, h, k)]
    loss = lambda *arrays: jnp.square(call(implementation, arrays, pair="product")).sum()
    function = jax.grad(loss, argnums=(0, 1, 2, 3, 4)) if gradient else loss
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_of_chunked_is_linear_in_tokens(gradient):
    small, large = (temporary_bytes(chunked, tokens, gradient) for tokens in (256, 512))
    assert small < large < 2.1 * small
    pairs = temporary_bytes(materialized, 512, gradient)
    assert pairs > 3.5 * temporary_bytes(materialized, 256, gradient)  # the measure does see pairs
    assert large < pairs / 4


@pytest.mark.parametrize("implementation", [chunked, separable])
def test_flops_count_the_work(implementation):
    """`separable` grows with I + A, `chunked` with I · A (counted with all in one chunk: loop bodies count once)."""

    def flops(i, a):
        shapes = [(1, 3, 2, 4)] + 2 * [(1, i, 2, 4)] + 2 * [(1, a, 2, 4)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        options = {"chunk": i} if implementation is chunked else {}
        return jax.jit(lambda *x: call(implementation, x, **options)).lower(*arrays).cost_analysis()["flops"]

    square, wide = flops(64, 64), flops(64, 128)
    assert wide < 1.6 * square if implementation is separable else wide > 1.9 * square
