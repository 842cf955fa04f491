"""Layer-wise learning rates and the multiplier of pretrained encoders against the published tables."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_heads import encoder_config, flat_variables, load_golden
from tiny_training import MODEL, recipe

from av_mae import models
from av_mae.config import OptimizerConfig
from av_mae.convert.names import names_of
from av_mae.errors import UserError
from av_mae.train import optimizer


def test_scales_and_weight_decay_are_the_published_ones(shared):
    table = json.loads((shared / "golden" / "separation_layer_decay.json").read_text())
    config = encoder_config(shared, "separation")
    model = nnx.eval_shape(lambda: models.Separator(config, models.SeparatorConfig(), rngs=nnx.Rngs(0)))
    parameters, rules = flat_variables(model, nnx.Param), names_of(model).rules
    scales = optimizer.layer_multipliers(parameters, 0.75, config.layers)
    decayed, seen = optimizer.decayed(parameters), []
    for published, (scale, weight_decay) in table.items():
        for path in rules[published].here:
            assert (scales[path], 0.05 * decayed[path]) == (scale, weight_decay), path
            seen.append(path)
    assert sorted(seen) == sorted(parameters)


def test_layers_of_what_the_published_system_lacks():
    """Bridges belong to the fused layer that they lead into; every head is the last layer."""
    names = [
        "encoder.audio.bridges.1.kernel",
        "encoder.image.blocks.10.norm1.scale",
        "encoder.fusion_tokens",
        "encoder.fusion_blocks.0.mlp.fc1.bias",
        "heads.image.kernel",
        "encoder.audio.norm.scale",
        "encoder.audio.patch_embed.bias",
    ]
    assert list(optimizer.layer_multipliers(names, 0.5, 12).values()) == [
        0.5**11,
        0.5**2,
        0.5**13,
        0.5**12,
        1.0,
        1.0,
        0.5**13,
    ]


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1, float("nan")])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(UserError, match=f"layer decay={decay} must be above 0 and at most 1"):
        optimizer.layer_multipliers(["a"], decay, 3)


def test_pretrained_multiplier_is_the_published_one(shared):
    rows = load_golden(shared)["schedule/epoch_lr_pretrainedlr"]
    clips = 1000
    config = recipe(steps=0, epochs=200.0, batch_size=8, optimizer=OptimizerConfig(base_lr=3e-4 * 32, warmup=40.0))
    length = optimizer.run_length(config, clips)
    schedule = optimizer.learning_rate(config, length)
    (multiplier,) = optimizer.pretrained_multipliers(["encoder.image.norm.bias"], ["image"], length).values()
    ours = np.array([schedule(step) * multiplier(step) for step in rows[:, 0] * clips / 8])
    np.testing.assert_allclose(ours, rows[:, 2], rtol=2e-5, atol=1e-10)
    assert np.abs(ours - rows[:, 1]).max() > 2e-5  # it is not the rate of the others


def test_which_parameters_are_pretrained():
    model = nnx.eval_shape(lambda: models.AVMAE(MODEL, rngs=nnx.Rngs(0)))
    names, length = list(flat_variables(model)), optimizer.Length(10, 0.0, 10.0)
    found = optimizer.pretrained_multipliers(names + ["encoder.audio.bridges.0.kernel"], ["audio"], length)
    assert set(found) == {name for name in names if name.startswith("encoder.audio.")} and found
    both = optimizer.pretrained_multipliers(names, ["image", "audio"], length)
    assert {name.split(".")[1] for name in both} == {"image", "audio"}
    assert not optimizer.pretrained_multipliers(names, [], length)


def test_multipliers_scale_the_whole_update():
    """Numbers, schedules and none: the step of plain AdamW, weight decay included, times the multiplier."""
    config, random = OptimizerConfig(weight_decay=0.3, clip_norm=0.7), np.random.default_rng(2)
    names = ("half", "rising", "frozen", "plain")
    params = {name: jnp.asarray(random.standard_normal((3, 4)), jnp.float32) for name in names}
    multipliers = {"half": 0.5, "rising": lambda step: 0.1 * (1 + step), "frozen": 0.0}
    plain = optimizer.make_optimizer(config, lambda step: 0.01 * (step + 1))
    scaled = optimizer.make_optimizer(config, lambda step: 0.01 * (step + 1), multipliers)
    states = [plain.init(params), scaled.init(params)]
    for number in range(4):
        gradients = {name: jnp.asarray(random.standard_normal((3, 4)), jnp.float32) for name in names}
        expected, states[0] = plain.update(gradients, states[0], params)
        found, states[1] = scaled.update(gradients, states[1], params)
        factors = {"half": 0.5, "rising": 0.1 * (1 + number), "frozen": 0.0, "plain": 1.0}
        for name, factor in factors.items():
            np.testing.assert_allclose(found[name], factor * expected[name], rtol=1e-6, atol=0, err_msg=name)
            assert np.abs(expected[name]).max() > 0.001


def test_without_multipliers_nothing_changes():
    """State and updates of optax's own chain, to the bit: checkpoints from before stay valid."""
    config, random = OptimizerConfig(weight_decay=0.3), np.random.default_rng(3)
    rate = lambda step: 0.01 / (step + 1)
    theirs = optax.chain(
        optax.identity(),
        optax.scale_by_adam(0.9, 0.95, eps=1e-8),
        optax.add_decayed_weights(0.3, mask=optimizer.decayed),
        optax.scale_by_learning_rate(rate),
    )
    ours, params = optimizer.make_optimizer(config, rate), {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    states = [ours.init(params), theirs.init(params)]
    for _ in range(3):
        gradients = {name: jnp.asarray(random.standard_normal(x.shape), jnp.float32) for name, x in params.items()}
        found, states[0] = ours.update(gradients, states[0], params)
        expected, states[1] = theirs.update(gradients, states[1], params)
        for name in params:
            np.testing.assert_array_equal(found[name], expected[name])
    assert str(states[0]) == str(states[1])
