"""The train step: against a plain formulation, over meshes, accumulation, precision, invalid clips, compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_training import numpy_adamw
from flax import nnx
from tiny_training import (
    FAST_COMPILE,
    batches,
    compile_step,
    first_parameters,
    first_state,
    make_step,
    on_mesh,
    recipe,
    run_steps,
    unfused,
)

from av_mae import models
from av_mae.models.kinds import define_model, flat_values
from av_mae.train import loop, sharding, step
from av_mae.train import sharding as mesh
from av_mae.train import step as objective

MESHES = [(2, 1), (2, 2), (2, 4)]


def noises_of(config, number, rows):
    """Mask noise of image and sound of step `number`."""
    drawn = step.prepare_rows(objective.Pretraining(config.model), config, number, {}, rows)
    return drawn["image_noise"], drawn["audio_noise"]


@pytest.fixture(scope="module")
def reference():
    """Losses of five steps on one device."""
    config = recipe()
    return run_steps(make_step(config), batches(config, 5))[1]


def test_same_masks_on_every_mesh():
    config = recipe()
    seen = []
    for data, fsdp in [(1, 1), *MESHES]:
        rows = on_mesh(config, data, fsdp).rows
        noises = jax.jit(lambda s, rows=rows: noises_of(config, s, rows))(jnp.int32(7))
        seen.append([models.random_mask(noise, 3).mask for noise in jax.device_get(noises)])
    for masks in seen[1:]:
        for ours, expected in zip(masks, seen[0], strict=True):
            np.testing.assert_array_equal(ours, expected)
    first, later = (noises_of(config, jnp.int32(s), on_mesh(config, 1, 1).rows)[0] for s in (0, 1))
    assert not np.array_equal(first, later) and len(np.unique(np.asarray(first), axis=0)) == config.batch_size


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_step_against_a_plain_one(weights):
    """Loss, gradient norm and new parameters, computed clip by clip from the model and NumPy's AdamW."""
    model = unfused()
    model = dataclasses.replace(
        model,
        **{
            name: dataclasses.replace(getattr(model, name), loss_weight=weight)
            for name, weight in zip(("image", "audio"), weights, strict=True)
        },
    )
    config = recipe(model, batch_size=4)
    train_step = make_step(config)
    batch = batches(config, 2)[1]
    before = first_parameters(config.model)
    noises = noises_of(config, jnp.int32(0), train_step.rows)
    good = np.flatnonzero(batch["valid"])

    def plain(params):
        model = train_step.definition.merge(params)
        image = (batch["image"][good] / np.float32(255) - models.IMAGENET_MEAN) / models.IMAGENET_DEVIATION
        image_loss, audio_loss = model.losses(image, batch["audio"][good], *(noise[good] for noise in noises))
        return sum(weights[0] * image_loss[i] + weights[1] * audio_loss[i] for i in range(3)) / 3

    loss, gradient = jax.jit(jax.value_and_grad(plain)).lower(before).compile(FAST_COMPILE)(before)
    state, (metrics,) = run_steps(train_step, [batch])
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in gradient.values()))
    assert metrics["valid"] == 3
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(
        metrics["loss"], weights[0] * metrics["image_loss"] + weights[1] * metrics["audio_loss"], rtol=1e-6
    )
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    moments = state.opt_state[1].mu
    for name, g in gradient.items():
        np.testing.assert_allclose(moments[name], 0.1 * g, rtol=1e-3, atol=1e-5 * norm, err_msg=name)
    assert metrics["learning_rate"] == 0 and int(state.step) == 1  # warm-up begins at 0
    for name, x in numpy_adamw(before, [gradient], lambda _: 0.0, config.optimizer).items():
        np.testing.assert_allclose(state.params[name], x, rtol=1e-6, err_msg=name)


def test_invalid_clips_change_nothing():
    config = recipe(unfused())
    train_step = make_step(config)
    (clean,) = batches(config, 1)
    dirty = {**clean, "image": clean["image"].copy(), "audio": clean["audio"].copy()}
    dirty["image"][0], dirty["audio"][0] = 0, 0  # what the input puts in the place of a clip that failed
    empty = {**clean, "valid": np.zeros(config.batch_size, bool)}
    placed = [loop.to_global(batch, train_step.rows) for batch in (clean, dirty, empty)]
    compiled = compile_step(train_step)
    (a, ours), (b, theirs), (c, nothing) = (compiled(first_state(train_step), batch) for batch in placed)
    assert jax.device_get(ours) == jax.device_get(theirs)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert nothing["loss"] == 0 and nothing["valid"] == 0 and nothing["grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.device_get(c).params.values())


@pytest.mark.parametrize("data, fsdp, parts", [(2, 2, 2), pytest.param(1, 1, 4, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(monkeypatch, reference, data, fsdp, parts):
    monkeypatch.setattr(sharding, "SMALL", 64)
    config = recipe(grad_accumulation=parts)
    _, history = run_steps(on_mesh(config, data, fsdp), batches(config, 3))
    for ours, expected in zip(history, reference):
        for name in ("loss", "image_loss", "audio_loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5, err_msg=name)


def test_parts_keep_every_row_on_its_device():
    made = on_mesh(recipe(), 2, 2).mesh
    x = jax.device_put(np.arange(16), mesh.batch_sharding(made))
    parts = jax.jit(lambda x: step.split_rows(x, 2, made))(x)
    assert parts.shape == (2, 4, 2) and sorted(np.asarray(parts).ravel()) == list(range(16))
    for before, after in zip(x.addressable_shards, parts.addressable_shards, strict=True):
        assert before.device == after.device
        np.testing.assert_array_equal(np.sort(after.data.ravel()), before.data)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(reference, remat):
    config = recipe(remat=remat)
    _, history = run_steps(make_step(config), batches(config, 2))
    for ours, expected in zip(history, reference):
        np.testing.assert_allclose([*ours.values()], [*expected.values()], rtol=1e-5)


def test_rematerialisation_keeps_less():
    """The gradient computes more matrix products with 'full' than with 'none': those of the forward pass again."""
    products = {}
    for remat in ("none", "dots", "full"):
        train_step = make_step(recipe(remat=remat))
        rows = {
            name: jnp.zeros(shape)
            for name, shape in (
                ("image", (2, 32, 48, 3)),
                ("audio", (2, 32, 32)),
                ("image_noise", (2, 6)),
                ("audio_noise", (2, 4)),
                ("weight", (2,)),
            )
        }
        loss = functools.partial(train_step.weighted_loss, {}, {})
        gradient = jax.make_jaxpr(jax.grad(lambda params, loss=loss, rows=rows: loss(params, rows)[0]))
        products[remat] = str(gradient(train_step.abstract_state().params)).count("dot_general")
    assert products["none"] < products["dots"] < products["full"]


def test_bfloat16_is_close_and_keeps_float32_state(reference):
    config = recipe(dtype="bfloat16")
    state, history = run_steps(make_step(config), batches(config, 5))
    for ours, expected in zip(history, reference, strict=True):
        np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=0.02)
    assert history[0]["loss"] != reference[0]["loss"]
    assert {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[1].mu))} == {jnp.dtype("float32")}


def test_compiles_once_and_moves_nothing_between_host_and_devices():
    """50 steps on a mesh, the last batch uneven, under a guard that forbids transfers inside."""
    config = recipe(unfused(), steps=50)
    train_step = on_mesh(config, 2, 2)
    state = first_state(train_step)
    host = batches(config, 4)
    host[3]["valid"][5:] = False
    placed = [loop.to_global(batch, train_step.rows) for batch in host]
    for number in range(50):
        with jax.transfer_guard("disallow"):
            state, metrics = train_step.step(state, placed[3 if number == 49 else number % 3])
    assert train_step.step._cache_size() == 1
    assert int(state.step) == 50 and int(metrics["valid"]) == 4


def test_definition_and_flat_parameters_are_inverse():
    config = recipe().model
    model = models.AVMAE(config, rngs=nnx.Rngs(3))
    definition, shapes, statistics = define_model(lambda rngs: models.AVMAE(config, rngs=rngs))
    params = flat_values(model)
    assert statistics == {}
    assert {name: x.shape for name, x in params.items()} == {name: x.shape for name, x in shapes.items()}
    again = flat_values(definition.merge(params))
    assert all(again[name] is params[name] for name in params)
