"""The learning-rate schedule against the published one, AdamW against plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_training import numpy_adamw
from tiny_training import recipe

from av_mae.config import OptimizerConfig
from av_mae.errors import UserError
from av_mae.train import optimizer


def test_schedule_is_the_published_one(shared):
    rows = np.load(shared / "golden" / "heads.npz")["schedule/epoch_lr_pretrainedlr"]
    clips = 1000
    config = recipe(steps=0, epochs=200.0, batch_size=8, optimizer=OptimizerConfig(base_lr=3e-4 * 32, warmup=40.0))
    schedule = optimizer.learning_rate(config, optimizer.run_length(config, clips))
    ours = np.array([schedule(epoch * clips / 8) for epoch in rows[:, 0]])
    np.testing.assert_allclose(ours, rows[:, 1], rtol=1e-5, atol=1e-10)


def test_schedule_in_steps():
    config = recipe(steps=100, batch_size=512, optimizer=OptimizerConfig(base_lr=1e-3, warmup=10.0))
    length = optimizer.run_length(config, 7)
    schedule = optimizer.learning_rate(config, length)
    assert length == optimizer.Length(100, 10.0, 100.0)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 55, 100)], [0, 1e-3, 2e-3, 1e-3, 0], atol=1e-9)


@pytest.mark.parametrize(
    "kind, expected",
    [("constant", [0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3]), ("wsd", [0, 1e-3, 2e-3, 2e-3, 2e-3, 1e-3, 0])],
)
def test_other_schedules(kind, expected):
    """The last fifth of the run is the decay of 'wsd'."""
    config = recipe(steps=100, batch_size=512, optimizer=OptimizerConfig(base_lr=1e-3, warmup=10.0, schedule=kind))
    schedule = optimizer.learning_rate(config, optimizer.run_length(config, 7))
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 55, 80, 90, 100)], expected, atol=1e-9)


def test_a_longer_run_says_what_becomes_of_its_rate():
    def changed(kind: str, step: int, **changes) -> str:
        first = recipe(steps=100, batch_size=256, optimizer=OptimizerConfig(base_lr=1e-3, warmup=10.0, schedule=kind))
        return optimizer.rate_change(first, dataclasses.replace(first, **changes), 7, step)

    said = changed("cosine", 100, steps=200)
    assert "at step 100 the learning rate is 0.000541 where it was 0 (steps 100 → 200)" in said, said
    assert "batch_size 256 → 512" in changed("constant", 50, batch_size=512)
    assert "(optimizer)" in changed("cosine", 90, optimizer=OptimizerConfig(base_lr=1e-3, schedule="constant"))
    assert changed("wsd", 80, steps=200) == changed("constant", 100, steps=200) == changed("cosine", 90) == ""
    assert changed("wsd", 100, steps=200)


def test_epochs_become_steps_over_fractional_epochs():
    config = recipe(steps=0, epochs=3.0, batch_size=8, optimizer=OptimizerConfig(warmup=1.0))
    length = optimizer.run_length(config, 20)
    assert length == optimizer.Length(8, 2.5, 7.5)  # 60 clips are 7.5 batches


def test_no_warmup_starts_at_the_full_rate():
    config = recipe(steps=10, batch_size=256, optimizer=OptimizerConfig(base_lr=1e-3, warmup=0.0))
    schedule = optimizer.learning_rate(config, optimizer.run_length(config, 7))
    np.testing.assert_allclose(schedule(0), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_against_numpy(clip_norm):
    config = OptimizerConfig(weight_decay=0.3, clip_norm=clip_norm)
    random = np.random.default_rng(1)
    shapes = {"kernel": (3, 5), "bias": (5,), "token": (1, 1, 4)}
    params = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    gradients = [{name: random.standard_normal(shape) for name, shape in shapes.items()} for _ in range(6)]

    def rate(step):
        return 0.01 * (step + 1)

    transform = optimizer.make_optimizer(config, rate)
    ours = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    state = transform.init(ours)
    for gradient in gradients:
        updates, state = transform.update({n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
    for name, expected in numpy_adamw(dict(params), gradients, rate, config).items():
        np.testing.assert_allclose(ours[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_both_lengths_or_none_are_refused():
    with pytest.raises(UserError, match="exactly one of steps=0 and epochs=0.0"):
        recipe(steps=0)
    with pytest.raises(UserError, match="exactly one of steps=3 and epochs=2.0"):
        recipe(steps=3, epochs=2.0)
