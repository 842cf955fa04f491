"""Convolutions, batch norm with its running statistics, DoubleConv and Up against plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_heads
import pytest
from flax import nnx
from golden_heads import flat_variables, float64, random_variables
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae.models import heads as convolutions


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def near(value, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance)


def made(make):
    return random_variables(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 3), (1, 4, 2, 3)])
def test_convolution(shape):
    layer, x = made(lambda rngs: convolutions.Convolution(3, 4, rngs=rngs)), draw(*shape)
    near(layer(x), numpy_heads.convolve(x, *map(np.asarray, (layer.kernel[...], layer.bias[...]))))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_transposed_convolution(factor):
    layer, x = made(lambda rngs: convolutions.TransposedConvolution(3, 5, factor, rngs=rngs)), draw(2, 2, 3, 3)
    near(layer(x), numpy_heads.transpose_convolve(x, *map(np.asarray, (layer.kernel[...], layer.bias[...]))))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 1), (1, 1, 4, 3)])
def test_double_resolution_has_half_pixel_centres(shape):
    x = draw(*shape)
    near(convolutions.double_resolution(x), numpy_heads.bilinear_double(x.astype(np.float64)), 1e-6)


def test_layers_made_of_others():
    block = made(lambda rngs: convolutions.DoubleConv(3, 4, rngs=rngs))
    lift = made(lambda rngs: convolutions.Up(6, 5, 2, skip=3, rngs=rngs))
    bare = made(lambda rngs: convolutions.Up(6, 2, 3, rngs=rngs))
    x, low, skip = draw(3, 4, 5, 3), draw(3, 2, 3, 6), draw(3, 4, 6, 3, seed=1)
    p = (
        {f"a.{name}": value for name, value in float64(block).items()}
        | {f"b.{name}": value for name, value in float64(lift).items()}
        | {f"c.{name}": value for name, value in float64(bare).items()}
    )
    for train in (None, np.array([True, False, True])):
        rows = None if train is None else jnp.asarray(train)
        near(block(x, rows), numpy_heads.double_conv(p, "a", x, train))
        near(lift(low, skip, rows), numpy_heads.up(p, "b", low, skip, train))
        near(bare(low, train_rows=rows), numpy_heads.up(p, "c", low, train=train))


@pytest.mark.parametrize("affine,eps", [(True, 1e-5), (False, 1e-6)])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3)])
def test_batch_norm_and_its_running_statistics(affine, eps, shape):
    """Torch's convention: biased variance normalises, unbiased variance runs on, momentum 0.1."""
    norm = made(lambda rngs: convolutions.BatchNorm(3, eps=eps, affine=affine))
    p, x = {f"n.{name}": value for name, value in float64(norm).items()}, 3 + 2 * draw(*shape)
    near(norm(x), numpy_heads.batch_norm(p, "n", x.astype(np.float64), eps=eps))
    assert flat_variables(norm)["batches"] == p["n.batches"]  # evaluation moves nothing
    np.testing.assert_array_equal(norm.mean[...], p["n.mean"].astype(np.float32))
    rows = np.array([True, True, False, True, True][: shape[0]])
    near(norm(x, jnp.asarray(rows)), numpy_heads.batch_norm(p, "n", x.astype(np.float64), rows, eps))
    values = x[rows].reshape(-1, 3).astype(np.float64)
    near(norm.mean[...], 0.9 * p["n.mean"] + 0.1 * values.mean(0), 1e-6)
    near(norm.variance[...], 0.9 * p["n.variance"] + 0.1 * values.var(0, ddof=1), 1e-6)
    assert norm.batches[...] == p["n.batches"] + 1 and norm.batches[...].dtype == jnp.int32


@pytest.mark.parametrize("batch,rows", [(1, [True]), (3, [False, True, False]), (2, [False, False])])
def test_a_batch_of_fewer_than_two_values_moves_nothing(batch, rows):
    norm = made(lambda rngs: convolutions.BatchNorm(3))
    before = flat_variables(norm)
    assert np.isfinite(norm(draw(batch, 3), jnp.asarray(rows))).all()
    for name, value in flat_variables(norm).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_batch_norm_in_half_precision_keeps_its_statistics_in_float32():
    norm = convolutions.BatchNorm(4)
    x = jnp.asarray(100 + draw(64, 4), jnp.bfloat16)
    assert norm(x, jnp.ones(64, bool)).dtype == jnp.bfloat16
    values = np.asarray(x, np.float64)
    near(norm.mean[...], 0.1 * values.mean(0), 1e-6)
    near(norm.variance[...], 0.9 + 0.1 * values.var(0, ddof=1), 1e-5)


def test_statistics_are_those_of_the_whole_batch_on_a_mesh():
    """Rows over 8 devices; parameters and statistics are flat dicts, the block is merged inside the loss."""
    block = made(lambda rngs: convolutions.DoubleConv(3, 4, rngs=rngs))
    graph, _ = nnx.split(block)
    params, statistics = (
        {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(block, kind))}
        for kind in (nnx.Param, nnx.BatchStat)
    )
    rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))

    @jax.jit
    def run(params, statistics, x, valid):
        def loss(params):
            block = nnx.merge(graph, nnx.from_flat_state((params | statistics).items()))
            y = block(x, valid)
            moved = nnx.to_flat_state(nnx.state(block, nnx.BatchStat))
            return (y**2).mean(), (y, {path: variable.get_value() for path, variable in moved})

        return jax.value_and_grad(loss, has_aux=True)(params)

    x, valid = draw(16, 2, 3, 3) * np.arange(1, 17)[:, None, None, None] / 8, np.arange(16) % 5 > 0
    (_, (y, moved)), gradients = run(params, statistics, *jax.device_put((x, valid), rows))
    (_, (whole_y, whole_moved)), whole_gradients = run(params, statistics, x, valid)
    near(y, numpy_heads.double_conv({f"a.{n}": v for n, v in float64(block).items()}, "a", x, valid))
    for found, whole in ((y, whole_y), (moved, whole_moved), (gradients, whole_gradients)):
        jax.tree.map(lambda a, b: near(a, b, 1e-5), found, whole)
    assert all((moved[path] != value).any() for path, value in statistics.items())


def test_kaiming_normal_initial_values():
    """Fan out: 9 × outputs; PyTorch counts the inputs of a transposed weight. Statistics begin at 0, 1 and 0."""
    lift = convolutions.Up(96, 64, 2, skip=32, rngs=nnx.Rngs(3))
    last = convolutions.Convolution(64, 32, rngs=nnx.Rngs(1))
    for layer, fan_out in (
        (lift.transposed, 4 * 96),
        (lift.convolutions.conv1, 9 * 64),
        (lift.convolutions.conv2, 9 * 64),
        (last, 9 * 32),
    ):
        kernel = np.asarray(layer.kernel[...])
        assert kernel.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        assert abs(kernel.mean()) < 0.05 * kernel.std()
        assert 3 < np.abs(kernel).max() / kernel.std() < 6  # normal, not uniform
    for name, value in flat_variables(lift).items():
        if not name.endswith("kernel"):
            assert (value == name.endswith(("scale", "variance"))).all(), name
