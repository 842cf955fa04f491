"""The objective of classifiers: examples and losses against NumPy, meshes, frozen encoders, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import MODEL, batches, compile_step, recipe, unfused

from av_mae import checkpoint, models
from av_mae.config import OptimizerConfig
from av_mae.errors import UserError
from av_mae.evaluate.classification import ClassificationObjective, class_weights, degrade, row_keys
from av_mae.models.config import ClassificationSettings, ClassifierConfig
from av_mae.models.kinds import define_model
from av_mae.train import loop, optimizer, step
from av_mae.train import sharding as mesh

CLASSES = 5
DEEP = dataclasses.replace(
    MODEL, image=dataclasses.replace(MODEL.image, depth=2), audio=dataclasses.replace(MODEL.audio, depth=2)
)
FREQUENCY = np.array([0.4, 0.1, 0.3, 0.2, 0.0])
HEAD = ClassifierConfig(classes=CLASSES)
FINE_TUNING = ClassificationSettings(label_smoothing=0.1, mixup=1.0, drop_path=0.4, balanced=True, log_odds=True)
PROBE = OptimizerConfig(kind="lars", base_lr=1.0, warmup=0.0, weight_decay=0.0)


PLAIN = ClassificationSettings()


def objective(settings=PLAIN, head=HEAD, model=MODEL, **options) -> ClassificationObjective:
    return ClassificationObjective(model, head, settings, frequency=FREQUENCY, **options)


def labelled(config, count: int, **options) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(7)
    return [
        batch | {"label": random.integers(0, CLASSES - 1, config.batch_size).astype(np.int32)}
        for batch in batches(config, count, **options)
    ]


def arrays(batch) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch.items() if x.dtype != object}


class Run:
    """Steps of an objective from random weights (or those of another run): `first`, `history`, `state`, `flops`."""

    def __init__(self, config, made: ClassificationObjective, host, devices: int = 1, first=None):
        self.config, self.made, self.host = config, made, host
        on = mesh.make_mesh(config.mesh, jax.devices()[:devices])
        self.step = step.TrainStep(config, on, optimizer.run_length(config, 100), made)
        self.state = self.step.init(first)
        self.first = {name: np.array(x) for name, x in self.state.model.items()}
        compiled, self.history = compile_step(self.step), []
        for batch in host:
            self.state, metrics = compiled(self.state, loop.to_global(batch, self.step.rows))
            self.history.append({name: float(x) for name, x in metrics.items()})
        self.flops = compiled.cost_analysis()["flops"]


def numpy_examples(batch, rows, noise):
    """Mixed inputs and targets, clip by clip."""
    image = (batch["image"] / np.float32(255) - models.IMAGENET_MEAN) / models.IMAGENET_DEVIATION + noise
    targets = np.eye(CLASSES)[batch["label"]]
    last, share, mixed = len(image) - 1, float(rows["share"][0]), []
    for clip in range(len(image)):
        partner = last - clip
        own = share if batch["valid"][clip] and batch["valid"][partner] else 1.0
        mixed.append([own * x[clip] + (1 - own) * x[partner] for x in (image, batch["audio"], targets)])
    return [np.stack(x) for x in zip(*mixed, strict=True)]


def test_examples_against_numpy():
    """An odd batch, one clip of it invalid: it and its partner stay as they are."""
    made, config = objective(ClassificationSettings(mixup=1.0), image_noise=0.5), recipe(batch_size=7)
    batch = labelled(config, 2)[1]
    rows = made.draw(jax.random.key(3), 7)
    noise = [
        0.5 * np.asarray(jax.random.normal(jax.random.wrap_key_data(key), batch["image"].shape[1:]))
        for key in rows["noise_keys"]
    ]
    share = np.asarray(rows["share"])
    assert share.shape == (7,) and len(np.unique(share)) == 1 and 0.05 < share[0] < 0.95
    prepared = jax.jit(made.prepare)(arrays(batch) | rows)
    found = [prepared[name] for name in ("image", "audio", "target")]
    expected = numpy_examples(batch, rows, np.stack(noise))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found[1])[[1, 5]], batch["audio"][[1, 5]])
    assert np.abs(found[1][0] - batch["audio"][0]).max() > 0.1


def test_shares_follow_the_beta_distribution():
    made = objective(ClassificationSettings(mixup=0.4))
    shares = np.asarray(jax.vmap(lambda key: made.draw(key, 2)["share"][0])(jax.random.split(jax.random.key(0), 4000)))
    variance = 0.25 / (2 * 0.4 + 1)
    assert abs(shares.mean() - 0.5) < 4.5 * np.sqrt(variance / 4000)
    np.testing.assert_allclose(shares.var(), variance, rtol=0.1)


def test_noise_is_white_and_depends_on_the_row_key_alone():
    images = np.zeros((3, 20, 30, 3), np.float32)
    keys = row_keys(jax.random.key(1), jnp.array([4, 9, 2]))
    noisy = np.asarray(degrade(images, 2.0, keys))
    np.testing.assert_allclose(noisy.std((1, 2, 3)), 2, rtol=0.1)
    assert np.abs(noisy.mean((1, 2, 3))).max() < 0.25
    assert np.abs(np.corrcoef(noisy.reshape(3, -1)) - np.eye(3)).max() < 0.15
    alone = degrade(images[:1] + 1, 2.0, row_keys(jax.random.key(1), jnp.array([9])))
    np.testing.assert_allclose(alone[0], noisy[1] + 1, rtol=1e-6)


def score_of(model, features):
    """Joint score in float64 from the pooled tokens."""
    return np.mean(
        [
            np.asarray(features[name], float) @ np.asarray(head.kernel[...], float) + np.asarray(head.bias[...], float)
            for name, head in model.heads.items()
        ],
        axis=0,
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_losses_against_numpy(multi_label):
    settings = ClassificationSettings(label_smoothing=0.2, balanced=True, multi_label=multi_label)
    made, (batch,) = objective(settings), labelled(recipe(batch_size=3), 1, invalid=False)
    if multi_label:
        batch["label"] = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], np.int32)
    model, rows = made.build(nnx.Rngs(1)), arrays(batch)
    (loss, metrics), features = jax.jit(
        lambda rows: (
            made.losses(model, made.prepare(rows)),
            models.pool(model.encoder(models.normalize_image(rows["image"]), rows["audio"])),
        )
    )(rows)
    score = score_of(model, features)
    weights = np.array([1 / 0.4, 1 / 0.1, 1 / 0.3, 1 / 0.2, 0])
    weights = weights / weights[:4].mean()
    for clip in range(3):
        hot = batch["label"][clip] if multi_label else np.eye(CLASSES)[batch["label"][clip]]
        target, chance = 0.8 * hot + 0.2 / CLASSES, 1 / (1 + np.exp(-score[clip]))
        if multi_label:
            errors = -target * np.log(chance) - (1 - target) * np.log(1 - chance)
            expected = (weights * errors).mean()
        else:
            expected = -(weights * target * np.log(np.exp(score[clip]) / np.exp(score[clip]).sum())).sum()
        np.testing.assert_allclose(loss[clip], expected, rtol=1e-5)
        assert metrics["accuracy"][clip] == (hot[score[clip].argmax()] == 1)


def test_class_weights():
    np.testing.assert_allclose(class_weights(np.array([0.5, 0.25, 0.0, 0.25])), [0.6, 1.2, 0, 1.2])
    np.testing.assert_allclose(class_weights(FREQUENCY)[:4].mean(), 1)


@pytest.mark.parametrize(
    "frequency, options, message",
    [
        (None, {}, "need the classes' frequency"),
        (np.ones(3) / 3, {}, r"frequency of shape \(3,\) must be one share for each of 5 classes"),
        (np.zeros(5), {}, "frequencies must lie in 0 … 1, some above 0"),
        (np.array([1, 2, 3, 4, 5]), {}, "frequencies must lie in 0 … 1"),
        (FREQUENCY, {"encoder_rate": 0.0}, "drop_path=0.4 drops layers of an encoder that is trained"),
    ],
)
def test_settings_that_do_not_fit_are_refused(frequency, options, message):
    with pytest.raises(UserError, match=message):
        ClassificationObjective(MODEL, HEAD, FINE_TUNING, frequency=frequency, **options)


@pytest.mark.parametrize("changes", [{"label_smoothing": 1.0}, {"mixup": -0.1}, {"drop_path": 1.0}])
def test_settings_out_of_range_are_refused(changes):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=f"{name}={value} must be"):
        ClassificationSettings(**changes)


@pytest.fixture(scope="module")
def tuned() -> Run:
    """Four steps with everything that fine-tuning has, on one device."""
    config = recipe(DEEP, optimizer=OptimizerConfig(base_lr=0.01, warmup=1.0), steps=10)
    made = objective(FINE_TUNING, model=DEEP, layer_decay=0.5, image_noise=0.3)
    return Run(config, made, labelled(config, 4))


def test_head_biases_start_at_the_log_odds(tuned):
    expected = [np.log((f + 1e-3) / (1 - f + 1e-3)) for f in FREQUENCY]
    for stream in ("image", "audio", "fusion"):
        np.testing.assert_allclose(tuned.first[f"heads.{stream}.bias"], expected, rtol=1e-5)
    assert all(
        (x(None) == 0).all()
        for name, x in define_model(objective().build)[0].initials.items()
        if name.startswith("heads.") and name.endswith("bias")
    )


@pytest.fixture(scope="module")
def probe(tuned) -> Run:
    """Four steps of a linear probe from the same weights."""
    made = objective(head=ClassifierConfig(CLASSES, input_norm=True), model=DEEP, encoder_rate=0.0)
    return Run(recipe(DEEP, optimizer=PROBE), made, tuned.host, first=tuned.first)


@pytest.mark.parametrize("name", ["tuned", "probe"])
def test_same_on_one_and_eight_devices(request, name):
    one = request.getfixturevalue(name)
    eight = Run(one.config, one.made, one.host, 8, one.first)
    for ours, theirs in zip(eight.history, one.history, strict=True):
        for metric, value in theirs.items():
            np.testing.assert_allclose(ours[metric], value, rtol=1e-5, atol=1e-7, err_msg=metric)
    for parameter, value in one.state.model.items():
        if not parameter.endswith("key.bias"):  # which softmax makes irrelevant: AdamW follows its rounding errors
            np.testing.assert_allclose(eight.state.model[parameter], value, rtol=1e-3, atol=2e-5, err_msg=parameter)


def test_layers_learn_at_their_own_rates(tuned):
    """AdamW's first steps are of the size of the rate: those of layer l, 0.5^(layers + 1 - l) of the head's."""
    length = optimizer.run_length(tuned.config, 100)
    multipliers = tuned.made.multipliers(tuned.state.params, length)
    names = {
        "heads.image.kernel": 1.0,
        "encoder.image.blocks.1.mlp.fc1.kernel": 0.5,
        "encoder.image.blocks.0.mlp.fc1.kernel": 0.25,
        "encoder.image.patch_embed.kernel": 0.125,
    }
    moved = {name: np.abs(np.asarray(tuned.state.params[name]) - tuned.first[name]).mean() for name in names}
    for name, multiplier in names.items():
        assert multipliers[name] == multiplier
        assert 0.5 * multiplier < moved[name] / moved["heads.image.kernel"] < 2 * multiplier
    halved = objective(model=DEEP, encoder_rate=0.5).multipliers(tuned.state.params, length)
    assert halved["encoder.fusion_tokens"] == 0.5 and halved["heads.audio.bias"] == 1


def test_invalid_clips_do_not_leak_through_mixup(tuned):
    clean = tuned.host[2]
    dirty = {name: x.copy() for name, x in clean.items()}
    dirty["image"][2], dirty["audio"][2], dirty["label"][2] = 0, 9, 4
    run = tuned.step.forward(lambda model, rows: tuned.made.losses(model, rows)[0], drawn=True)
    before, after = (np.asarray(run(tuned.state, loop.to_global(batch, tuned.step.rows))) for batch in (clean, dirty))
    np.testing.assert_array_equal(np.delete(before, 2), np.delete(after, 2))
    assert before[2] != after[2]


def test_mixed_pairs_do_not_depend_on_accumulation():
    """The same steps in one part, and in two over two devices: parts of a batch hold other rows than the whole."""
    settings, runs = ClassificationSettings(mixup=1.0), []
    for parts, devices in ((1, 1), (2, 2)):
        config = recipe(
            unfused(),
            batch_size=8,
            steps=3,
            grad_accumulation=parts,
            optimizer=OptimizerConfig(kind="lars", base_lr=1.0, warmup=0.0, weight_decay=0.0),
        )
        made = objective(settings, model=unfused())
        runs.append(Run(config, made, labelled(config, 2), devices, runs[0].first if runs else None))
    for ours, theirs in zip(runs[1].history, runs[0].history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name, x in runs[0].state.params.items():
        np.testing.assert_allclose(runs[1].state.params[name], x, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_frozen_encoder_has_no_backward_pass_and_stays_as_it_is(tuned, probe):
    """Weights to the bit, no optimizer state but the heads', and a step costs what the encoder's forward pass costs."""
    for name, x in probe.state.params.items():
        assert np.array_equal(x, tuned.first[name]) == name.startswith("encoder."), name
    kept = {name.split(".trace.")[1] for name in checkpoint.flat_optimizer(probe.state) if ".trace." in name}
    assert kept == {f"heads.{stream}.{part}" for stream in ("image", "audio", "fusion") for part in ("kernel", "bias")}
    assert int(probe.state.statistics["norms.fusion.batches"]) == 4

    encode = probe.step.forward(lambda model, rows: model.encoder(models.normalize_image(rows["image"]), rows["audio"]))
    forward = encode.lower(probe.step.abstract_state(), arrays(tuned.host[0])).compile().cost_analysis()["flops"]
    assert 0.9 * forward < probe.flops < 1.1 * forward
    assert tuned.flops > 2.4 * forward
    closed = probe.made.flops * 16, tuned.made.flops * 16
    assert 0.75 * forward < closed[0] < forward and 2.9 * closed[0] < closed[1] < 3 * closed[0]


@pytest.mark.parametrize("frozen", [True, False])
def test_learns_eight_random_clips_by_heart(frozen):
    optimizing = (
        dataclasses.replace(PROBE, base_lr=320.0, trust=0.02)
        if frozen
        else OptimizerConfig(base_lr=0.16, warmup=5.0, weight_decay=0.0)
    )
    config = recipe(unfused(), batch_size=8, steps=60, optimizer=optimizing)
    made = objective(
        head=ClassifierConfig(CLASSES, input_norm=frozen), model=unfused(), encoder_rate=0.0 if frozen else 1.0
    )
    history = Run(config, made, labelled(config, 1, invalid=False) * 60).history
    assert history[0]["accuracy"] < 0.7 and history[-1]["accuracy"] == 1
