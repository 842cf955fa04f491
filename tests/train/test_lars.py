"""LARS against the formulation of MAE's linear probe in NumPy; its state in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import recipe

from av_mae import checkpoint
from av_mae.checkpoint import TrainState
from av_mae.config import OptimizerConfig
from av_mae.errors import UserError
from av_mae.train import optimizer

SHAPES = {
    "heads.image.kernel": (5, 3),
    "heads.image.bias": (3,),
    "zero.kernel": (2, 4),
    "still.kernel": (3, 3),
    "table.bias": (4, 2),
}
MULTIPLIERS = {"heads.image.kernel": 0.25, "table.bias": lambda step: 0.1 * (1 + step)}


def rate(step):
    return 0.3 * (step + 1)


def draw_parameters(random):
    """'zero' begins at 0."""
    return {name: random.standard_normal(shape) * (not name.startswith("zero")) for name, shape in SHAPES.items()}


def draw_gradient(random):
    """'still' has none."""
    return {name: random.standard_normal(shape) * (not name.startswith("still")) for name, shape in SHAPES.items()}


def numpy_lars(params, gradients, config, multipliers):
    """MAE's LARS, parameter by parameter in float64: no trust and no decay for biases."""
    speeds, params = {name: np.zeros_like(x) for name, x in params.items()}, dict(params)
    for number, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, g in gradient.items():
            p, update = params[name], scale * g
            if not name.endswith("bias"):
                update = update + config.weight_decay * p
                length, step = np.linalg.norm(p), np.linalg.norm(update)
                update = update * (config.trust * length / step if length > 0 and step > 0 else 1.0)
            speeds[name] = config.momentum * speeds[name] + update
            own = multipliers.get(name, 1.0)
            params[name] = p - rate(number) * (own(number) if callable(own) else own) * speeds[name]
    return params


def run(config, params, gradients, multipliers):
    """Parameters and state after make_optimizer's updates."""
    transform = optimizer.make_optimizer(config, rate, multipliers)
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    state = transform.init(params)
    update = jax.jit(transform.update)
    for gradient in gradients:
        updates, state = update({n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


@pytest.mark.parametrize(
    "changes, multipliers",
    [({}, {}), ({"weight_decay": 0.2, "clip_norm": 0.5, "trust": 0.03, "momentum": 0.5}, MULTIPLIERS)],
)
def test_against_numpy(changes, multipliers):
    config = OptimizerConfig(**{"kind": "lars", "weight_decay": 0.0, **changes})
    random = np.random.default_rng(1)
    params, gradients = draw_parameters(random), [draw_gradient(random) for _ in range(5)]
    ours, _ = run(config, params, gradients, multipliers)
    for name, expected in numpy_lars(params, gradients, config, multipliers).items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)
        assert (np.abs(expected - params[name]).max() > 1e-4) != (name == "still.kernel" and not config.weight_decay)


def test_first_step_by_hand():
    """|p| = 5, |g| = 13: the update is 0.001 · 5 / 13 of the gradient, times the rate 0.3; a bias gets all of it."""
    params = {"kernel": np.array([[3.0, 4.0]]), "bias": np.array([1.0, 1.0])}
    gradient = {"kernel": np.array([[5.0, -12.0]]), "bias": np.array([5.0, -12.0])}
    ours, _ = run(OptimizerConfig(kind="lars", weight_decay=0.0), params, [gradient], {})
    np.testing.assert_allclose(ours["kernel"], [[3 - 0.3 * 0.025 / 13, 4 + 0.3 * 0.06 / 13]], rtol=1e-6)
    np.testing.assert_allclose(ours["bias"], [1 - 0.3 * 5, 1 + 0.3 * 12], rtol=1e-6)


def test_checkpoints_hold_its_state(tmp_path):
    config, random = recipe(optimizer=OptimizerConfig(kind="lars", weight_decay=0.1)), np.random.default_rng(2)
    params, opt_state = run(config.optimizer, draw_parameters(random), [draw_gradient(random)] * 2, {})
    state = jax.device_put(TrainState(jnp.int32(2), params, {}, opt_state), jax.devices()[0])
    flat = checkpoint.flat_optimizer(state)
    traces = {name: x for name, x in flat.items() if ".trace." in name}
    assert {name.split(".trace.")[1] for name in traces} == set(SHAPES)
    assert set(flat) - set(traces) == {"4.count"} and flat["4.count"] == 2
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, state, config, position=32)
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(abstract, config).state
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "sgd"}, "optimizer.kind='sgd' must be one of adamw, lars"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0 must be at least 0 and below 1"),
        ({"trust": 0.0}, "optimizer.trust=0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes)
