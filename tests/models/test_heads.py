"""The three heads: golden parity, other sizes against plain loops, published names both ways, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_heads
import pytest
from flax import nnx
from golden_heads import (
    FILES,
    MODELS,
    compiled,
    flat_variables,
    float64,
    golden_head,
    golden_inputs,
    load_golden,
    random_variables,
)
from safetensors.numpy import load_file

from av_mae import models
from av_mae.convert.deepavfusion import as_count
from av_mae.convert.infer import identify
from av_mae.convert.names import HEADS, head_rules, names_of
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models import losses as objectives


def near(value, expected, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def golden(shared):
    return load_golden(shared)


@pytest.mark.parametrize("name", ["classifier_plain", "classifier_norm"])
def test_golden_classifier(shared, golden, name):
    logits = compiled(golden_head(shared, name))(*golden_inputs(golden))
    expected = {stream: golden[f"{name}/{stream}_logits"] for stream in ("image", "audio", "fusion")}
    assert logits.keys() == expected.keys()
    for stream, value in expected.items():
        near(logits[stream], value)
    near(models.joint_score(logits), sum(expected.values()) / 3)


def test_golden_separator(shared, golden):
    """Evaluation mode with all four masks and losses, then a training batch."""
    model, (image, mixture) = compiled(golden_head(shared, "separation")), golden_inputs(golden)
    source = jnp.asarray(golden["separation/target_spec"])[:, 0]
    logits = model(image, mixture)
    near(logits, golden["separation/logits"][:, 0])
    for weighted in (0, 1):
        for binary in (0, 1):
            head = models.SeparatorConfig("binary" if binary else "ratio", bool(weighted))
            expected = f"separation/weighted{weighted}_binary{binary}"
            near(objectives.separation_mask(mixture, source, head.mask), golden[f"{expected}/mask"][:, 0], 1e-6)
            near(objectives.separation_loss(logits, mixture, source, head).mean(), golden[f"{expected}/loss"], 1e-6)
    logits = model(image, mixture, jnp.ones(len(image), bool))
    near(logits, golden["separation/train_mode/logits"][:, 0])
    loss = objectives.separation_loss(logits, mixture, source, models.SeparatorConfig("binary")).mean()
    near(loss, golden["separation/train_mode/loss"], 1e-6)


def test_golden_segmenter(shared, golden):
    logits = compiled(golden_head(shared, "segmentation5"))(*golden_inputs(golden, "segmentation/"))
    expected = golden["segmentation5/logits"].transpose(0, 2, 3, 1)
    near(logits, expected, 1e-5 * np.abs(expected).max())
    loss = objectives.segmentation_loss(logits, jnp.asarray(golden["segmentation5/target"])).mean()
    assert loss == pytest.approx(golden["segmentation5/loss"], rel=1e-6)


# Published names and layouts


@pytest.mark.parametrize("name", FILES)
def test_names_lead_back_bit_for_bit(shared, name):
    """Every tensor of a head is one array here and the same bytes again; all of the model comes from the file."""
    tensors, model = load_file(shared / "golden" / f"{name}.safetensors"), golden_head(shared, name)
    assert identify(tensors, name)[0] == FILES[name]
    rules, arrays = names_of(model).rules, flat_variables(model)
    head = {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    assert head.keys() == {key for key in rules if not key.startswith("encoder.")}
    assert {path for key in head for path in rules[key].here} == {
        path for path in arrays if not path.startswith("encoder.")
    }
    for key, value in head.items():
        ((path, array),) = rules[key].split(value).items()
        np.testing.assert_array_equal(arrays[path], array)
        assert rules[key].join({path: array}).tobytes() == value.tobytes(), key


@pytest.mark.parametrize(
    "name,config",
    [
        ("classifier_plain", models.ClassifierConfig(7)),
        ("classifier_norm", models.ClassifierConfig(7, input_norm=True)),
        ("separation", models.SeparatorConfig()),
        ("segmentation5", models.SegmenterConfig(5, 128)),
    ],
)
def test_configuration_from_published_tensors(shared, name, config):
    assert HEADS[FILES[name]].config(load_file(shared / "golden" / f"{name}.safetensors")) == config


def test_a_file_of_something_else():
    encoder = {"encoder.image.patch_embed.proj.weight": np.zeros(())}
    assert identify(encoder | {"image_decoder_pred.weight": np.zeros(())}, "file")[0] == "pretraining"
    assert identify(encoder, "file")[0] == "encoder"
    with pytest.raises(UserError, match="needs a tensor image_head.weight of at least one dimension"):
        HEADS["classifier"].config({"image_head.weight": np.zeros(())})


@pytest.mark.parametrize("value", [-1, 2**31, 0.5])
def test_counts_of_batches_that_are_refused(value):
    with pytest.raises(UserError, match=f"top.num_batches_tracked={value} must be a whole number from 0 to 2147483647"):
        as_count("top.num_batches_tracked", np.array(value))


# Other sizes


def encoder_of(fusion="factorized", image=None, audio=None):
    """Grids (2, 3) and (3, 2), different widths and depths."""
    image = {"size": (8, 12), "patch": 4, "width": 16, "depth": 3} | (image or {})
    audio = {"size": (24, 16), "patch": 8, "channels": 1, "width": 24, "depth": 2} | (audio or {})
    return models.AVMAEConfig(
        image=models.StreamConfig(heads=2, mask_ratio=0.5, **image),
        audio=models.StreamConfig(heads=2, mask_ratio=0.5, **audio),
        fusion=models.FusionConfig(kind=fusion, tokens=(2, 2, 2), heads=2, attention_ratio=0.5),
    )


def made(kind, config, head, seed=0):
    return random_variables(nnx.eval_shape(lambda: MODELS[kind](config, head, rngs=nnx.Rngs(0))), seed)


def inputs(config, batch, seed=0):
    random = np.random.default_rng(seed)
    return (
        jnp.asarray(random.standard_normal((batch, *config.image.size, 3)), jnp.float32),
        jnp.asarray(random.standard_normal((batch, *config.audio.size)), jnp.float32),
    )


def random_layers(config, batch):
    """A stand-in for the encoder: random tokens of as many layers as it has."""
    random = np.random.default_rng(4)

    def tokens(layers=()):
        shapes = (
            (config.image.tokens, config.image.width),
            (config.audio.tokens, config.audio.width),
            (0 if config.fusion.kind == "none" else 6, config.fusion_width),
        )
        return models.Tokens(
            *(jnp.asarray(random.standard_normal((batch, *shape)), jnp.float32) for shape in shapes), layers
        )

    return tokens(tuple(tokens() for _ in range(config.layers)))


def with_layers(model, tokens):
    """The compiled head over these tokens, and its variables in double precision."""
    return compiled(model, lambda *_, return_layers=False: tokens), float64(model)


@pytest.mark.parametrize("batch,train", [(1, None), (3, (True, False, True))])
@pytest.mark.parametrize("fusion,audio", [("factorized", {}), ("none", {"size": (4, 12), "patch": 2, "depth": 5})])
def test_separator_of_other_sizes(fusion, audio, batch, train):
    config = encoder_of(fusion, audio=audio)
    tokens, clips = random_layers(config, batch), inputs(config, batch)
    model, p = with_layers(made("separator", config, models.SeparatorConfig()), tokens)
    expected = numpy_heads.separate(
        p,
        [np.asarray(x.audio, np.float64) for x in tokens.layers[: config.audio.depth]],
        np.asarray(tokens.layers[-1].image, np.float64),
        config.audio.grid,
        {8: 3, 2: 1}[config.audio.patch],
        train,
    )
    found = model(*clips, None if train is None else jnp.array(train))
    assert found.shape == (batch, *config.audio.size)
    near(found, expected, 1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("batch,train", [(1, None), (3, (True, False, True))])
@pytest.mark.parametrize(
    "fusion,image,width",
    [
        ("factorized", {}, 6),
        ("none", {"size": (4, 6), "patch": 2}, 20),
        ("none", {"size": (8, 24), "patch": 8, "depth": 4}, 10),
    ],
)
def test_segmenter_of_other_sizes(fusion, image, width, batch, train):
    """The least width is below, above, and between the widths of the scales."""
    config = encoder_of(fusion, image=image)
    tokens, clips = random_layers(config, batch), inputs(config, batch)
    model, p = with_layers(made("segmenter", config, models.SegmenterConfig(3, width)), tokens)
    expected = numpy_heads.segment(
        p,
        [np.asarray(x.image, np.float64) for x in tokens.layers[: config.image.depth]],
        np.asarray(tokens.layers[-1].audio, np.float64),
        config.image.grid,
        {2: 1, 4: 2, 8: 3}[config.image.patch],
        train,
    )
    found = model(*clips, None if train is None else jnp.array(train))
    assert found.shape == (batch, *config.image.size, 3)
    near(found, expected, 1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("fusion,input_norm", [("factorized", True), ("none", False)])
def test_classifier_of_other_sizes(fusion, input_norm):
    config = encoder_of(fusion)
    tokens, clips = random_layers(config, 4), inputs(config, 4)
    model = made("classifier", config, models.ClassifierConfig(5, input_norm))
    run, p = with_layers(model, tokens)
    names = ("image", "audio") if fusion == "none" else ("image", "audio", "fusion")
    for train in (None, np.array([True, True, False, True])):
        logits = run(*clips, train)
        assert logits.keys() == set(names)
        for stream in names:
            x = np.asarray(getattr(tokens, stream), np.float64).mean(1)
            x = numpy_heads.batch_norm(p, f"norms.{stream}", x, train, 1e-6) if input_norm else x
            near(logits[stream], numpy_heads.linear(p, f"heads.{stream}", x))
    near(models.joint_score(logits), np.mean([np.asarray(x) for x in logits.values()], 0), 1e-6)
    near(model.classify(models.pool(tokens))["image"], run(*clips)["image"], 1e-6)


@pytest.mark.parametrize("fusion,input_norm", [("none", True), ("factorized", False)])
def test_late_fusion_is_one_classifier_of_all_streams_side_by_side(fusion, input_norm):
    config = encoder_of(fusion)
    tokens, clips = random_layers(config, 3), inputs(config, 3)
    model = made("classifier", config, models.ClassifierConfig(5, input_norm, concatenate=True))
    run, p = with_layers(model, tokens)
    names = ("image", "audio") if fusion == "none" else ("image", "audio", "fusion")
    for train in (None, np.array([True, False, True])):
        pooled = [np.asarray(getattr(tokens, stream), np.float64).mean(1) for stream in names]
        if input_norm:
            pooled = [
                numpy_heads.batch_norm(p, f"norms.{stream}", x, train, 1e-6)
                for stream, x in zip(names, pooled, strict=True)
            ]
        logits = run(*clips, train)
        assert logits.keys() == {"joint"}
        near(logits["joint"], numpy_heads.linear(p, "heads.joint", np.concatenate(pooled, 1)))
    near(models.joint_score(logits), logits["joint"], 1e-6)
    stored = models.pool(tokens)  # as jit gives them back: by name
    near(model.classify(dict(sorted(stored.items())))["joint"], run(*clips, None)["joint"], 1e-6)
    with pytest.raises(UserError, match="no classifier with heads.joint.* and so no names for its weights"):
        head_rules(model)


# What dense heads do not read: they take the layers as they are.
FINAL_NORMS = ("encoder.image.norm.", "encoder.audio.norm.")


@pytest.mark.parametrize(
    "kind,head",
    [
        ("classifier", models.ClassifierConfig(3, input_norm=True)),
        ("separator", models.SeparatorConfig()),
        ("segmenter", models.SegmenterConfig(1, 6)),
    ],
)
def test_gradients_reach_every_parameter(kind, head):
    """In training mode, through the encoder."""
    config = encoder_of(
        "factorized" if kind == "classifier" else "none",
        image={"depth": 1},
        audio={"size": (12, 8), "patch": 4, "depth": 1},
    )
    model, clips = made(kind, config, head), inputs(config, 4)
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)

    @jax.jit
    def gradient(params, statistics):
        def loss(params):
            out = nnx.merge(graph, params, statistics, copy=True)(*clips, jnp.ones(4, bool))
            out = models.joint_score(out) if kind == "classifier" else out
            return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).mean()

        return jax.grad(loss)(params)

    gradients = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(gradient(params, statistics))}
    assert gradients.keys() == flat_variables(model, nnx.Param).keys()
    for name, value in gradients.items():
        assert np.isfinite(value).all(), name
        if name.endswith("key.bias") or name.endswith("key_image.bias"):
            continue  # zero in theory: softmax does not see a constant
        assert value.any() != (kind != "classifier" and name.startswith(FINAL_NORMS)), name


def test_initial_values():
    """Xavier uniform linear layers, zero biases; every statistic knows how it begins."""
    config = encoder_of(image={"width": 64}, audio={"width": 96})
    model = nnx.eval_shape(lambda: models.Segmenter(config, models.SegmenterConfig(2, 8), rngs=nnx.Rngs(0)))
    kernel = np.asarray(model.audio_projections[0].kernel.get_metadata("initial")(jax.random.key(0)))
    bound = (6 / (96 + 64)) ** 0.5
    assert 0.98 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        initial = variable.get_metadata("initial")
        assert initial.shape == variable.shape and initial.dtype == variable.dtype, path
        if path[-1] in ("bias", "mean", "batches", "scale", "variance"):
            assert (initial.kind, initial.scale) == ("constant", path[-1] in ("scale", "variance")), path


# Refusals


@pytest.mark.parametrize(
    "config,message",
    [
        (lambda: models.ClassifierConfig(0), "classifier classes=0 must be at least 1"),
        (lambda: models.SeparatorConfig("soft"), "separator mask='soft' must be one of binary, ratio"),
        (lambda: models.SegmenterConfig(0), "segmenter classes=0 must be at least 1"),
        (lambda: models.SegmenterConfig(1, 7), "segmenter width=7 must be positive and even"),
        (lambda: models.SegmenterConfig(1, 0), "segmenter width=0 must be positive and even"),
    ],
)
def test_head_rules(config, message):
    with pytest.raises(UserError, match=message):
        config()


@pytest.mark.parametrize(
    "kind,head,streams,message",
    [
        (
            "separator",
            models.SeparatorConfig(),
            {"audio": {"patch": (8, 4)}},
            r"the separator doubles the patch grid .* patch=\(8, 4\) must be square and a power of two, at least 2",
        ),
        (
            "separator",
            models.SeparatorConfig(),
            {"audio": {"size": (12, 12), "patch": 6}},
            "so patch=6 must be square and",
        ),
        (
            "segmenter",
            models.SegmenterConfig(),
            {"image": {"size": (3, 4), "patch": 1}},
            "segmenter .* so patch=1 must",
        ),
        (
            "separator",
            models.SeparatorConfig(),
            {"audio": {"size": (32, 32), "patch": 16}},
            "halves the audio width 4 times, so patch=16 must divide width=24",
        ),
        (
            "segmenter",
            models.SegmenterConfig(),
            {"image": {"size": (64, 64), "patch": 32, "width": 24}},
            r"halves the image width 4 times, so 16 \(half of patch=32\) must divide width=24",
        ),
    ],
)
def test_encoders_that_a_head_does_not_fit(kind, head, streams, message):
    config = encoder_of(**streams)
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: MODELS[kind](config, head, rngs=nnx.Rngs(0)))


def test_a_localizer_is_a_model_of_its_kind():
    """With the names that checkpoints keep, and none that are published."""
    config, head = models.AVMAEConfig(), models.LocalizerConfig(width=10)
    model = nnx.eval_shape(lambda: kinds.build_model("localizer", config, head, nnx.Rngs(0)))
    assert isinstance(model, models.Localizer) and (model.config, model.head) == (config, head)
    with pytest.raises(UserError, match="DeepAVFusion has no localizer"):
        names_of(model)
    names = flat_variables(model).keys()
    assert {name for name in names if not name.startswith("encoder.")} == {
        "image_projection.kernel",
        "image_projection.bias",
        "audio_projection.kernel",
        "audio_projection.bias",
    }
