"""The model against its plain formulation: losses, gradients, and the work that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from av_mae import models
from av_mae.benchmark.step import Plain, fuse


def small_config(kind="factorized", **fusion):
    stream = {"patch": 8, "width": 24, "depth": 2, "heads": 3}
    return models.AVMAEConfig(
        image=models.StreamConfig(size=(24, 40), channels=3, mask_ratio=0.6, **stream),
        audio=models.StreamConfig(size=(16, 56), channels=1, mask_ratio=0.7, **stream),
        fusion=models.FusionConfig(kind=kind, tokens=(3, 2, 4), heads=3, attention_ratio=0.5, mlp_ratio=2.0, **fusion),
        decoder=models.DecoderConfig(width=16, depth=2, heads=2),
    )


def inputs(config, batch):
    keys = jax.random.split(jax.random.key(batch), 4)
    return (
        jax.random.normal(keys[0], (batch, *config.image.size, 3)),
        jax.random.normal(keys[1], (batch, *config.audio.size)),
        jax.random.uniform(keys[2], (batch, config.image.tokens)),
        jax.random.uniform(keys[3], (batch, config.audio.tokens)),
    )


def perturbed(model, seed=1):
    """Flat parameters with noise, so that no bias or norm is at its initial value."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    keys = jax.random.split(jax.random.key(seed), len(state))
    return {path: v.get_value() + 0.1 * jax.random.normal(k, v.shape) for k, (path, v) in zip(keys, state)}


@pytest.mark.parametrize("kind, batch", [("factorized", 3), ("dense", 1)])
def test_model_equals_plain_formulation(kind, batch):
    config = small_config(kind)
    graph, state = nnx.split(models.AVMAE(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = perturbed(nnx.merge(graph, state))
    args = inputs(config, batch)
    weight = jnp.arange(1.0, batch + 1)

    def of_model(params):
        losses = nnx.merge(graph, nnx.from_flat_state(list(params.items()))).losses(*args)
        return (weight * losses[0]).sum() + 2 * (weight * losses[1]).sum(), losses

    def of_plain(params):
        named = fuse({".".join(map(str, path)): x for path, x in params.items()})
        losses = Plain(config).losses(named, *args)
        return (weight * losses[0]).sum() + 2 * (weight * losses[1]).sum(), losses

    (_, losses), gradients = jax.value_and_grad(of_model, has_aux=True)(params)
    (_, expected), expected_gradients = jax.value_and_grad(of_plain, has_aux=True)(params)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    largest = max(float(jnp.abs(g).max()) for g in expected_gradients.values())
    for path, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], gradient, rtol=1e-3, atol=1e-5 * largest, err_msg=str(path))


def forward_flops(losses, *args):
    return jax.jit(losses).lower(*args).compile().cost_analysis()["flops"]


def test_closed_form_flops_match_the_compiler():
    config = models.AVMAEConfig(
        image=models.StreamConfig(size=(64, 96), width=192, depth=2, heads=3),
        audio=models.StreamConfig(size=(64, 80), channels=1, width=192, depth=2, heads=3, mask_ratio=0.8),
        fusion=models.FusionConfig(heads=3),
        decoder=models.DecoderConfig(width=192, depth=2, heads=3),
    )
    graph, state = nnx.split(models.AVMAE(config, rngs=nnx.Rngs(0)), nnx.Param)
    args = inputs(config, 4)
    found = forward_flops(lambda s, *a: nnx.merge(graph, s).losses(*a), state, *args) / 4
    assert found == pytest.approx(models.closed_form_flops(config), rel=0.08)  # small widths: more elementwise work
    plain = fuse({".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)})
    assert found < 0.85 * forward_flops(Plain(config).losses, plain, *args) / 4


def test_separable_flops_grow_as_the_sum_of_tokens():
    from av_mae.models import flops

    config = small_config("dense")
    cost = lambda i, a, how: flops.fusion_block(config, i, a, how)
    assert cost(200, 100, "separable") - cost(100, 100, "separable") == cost(300, 100, "separable") - cost(
        200, 100, "separable"
    )
    assert cost(200, 200, "separable") - cost(200, 100, "separable") == cost(100, 200, "separable") - cost(
        100, 100, "separable"
    )
    assert cost(200, 200, "materialized") - cost(200, 100, "materialized") > 1.9 * (
        cost(100, 200, "materialized") - cost(100, 100, "materialized")
    )
