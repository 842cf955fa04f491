"""Outputs of the published system that come with the repository (tests/data/golden/README.md has what they are).

The whole set of golden tensors, where it is there, is what test_golden.py and others compare with.
"""

import dataclasses
import functools
import json

import golden_subset
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_subset import STREAMS, load, part, sample
from published import names_of, read_state_dict
from tiny_training import recipe

from av_mae import models
from av_mae.config import OptimizerConfig, SoundConfig
from av_mae.data.audio import apply_mask, log_mel, mel_filter_bank
from av_mae.evaluate import cosine, neighbours
from av_mae.evaluate.bootstrap import Bootstrap
from av_mae.evaluate.segmentation import score_clip, segmentation_metrics
from av_mae.models import losses as objectives
from av_mae.models.layers import sin_cos_2d
from av_mae.train import optimizer

PAIRS = ("separable", "chunked", "materialized")


def near(value, expected, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=tolerance)


def made(kind, *configs):
    """A model with random weights."""
    return kind(*configs, rngs=nnx.Rngs(0))


def with_weights(model, arrays, prefix="weight/"):
    """Published weights, of which none is left over."""
    return golden_subset.with_weights(model, part(arrays, prefix))


def near_gradients(found, arrays):
    """Of the parameters whose samples there are."""
    names = part(arrays, "grad/")
    assert names
    for name, expected in names.items():
        if name.endswith("attn.k.bias"):
            assert np.abs(found[name]).max() < 1e-9  # zero in theory
        else:
            near(sample(found[name]), expected, 1e-5 * arrays[f"largest/{name}"])


# The whole model: factorized fusion, plain decoders


@functools.cache
def whole(normalize=True, pair="separable"):
    config = golden_subset.config(normalize=normalize)
    fusion = dataclasses.replace(config.fusion, pair_attention=pair)
    return with_weights(made(models.AVMAE, dataclasses.replace(config, fusion=fusion)), load("factorized_mmi"))


@pytest.mark.parametrize("pair", PAIRS)
def test_encoder(pair):
    arrays = load("factorized_mmi")
    encode = nnx.jit(lambda model, image, audio: model.encoder(image, audio, return_layers=True))
    tokens = encode(whole(pair=pair), *golden_subset.model_inputs(arrays)[:2])
    for stream in STREAMS:
        near(getattr(tokens, stream), arrays[f"full_{stream}_tokens"])
        for number, layer in enumerate(tokens.layers):
            near(sample(getattr(layer, stream)), arrays[f"layer{number}_{stream}"])
    assert len(tokens.layers) == 3


@pytest.mark.parametrize("pair", PAIRS)
def test_masks_predictions_and_losses(pair):
    arrays, model = load("factorized_mmi"), whole(pair=pair)
    image, audio, *noise = inputs = golden_subset.model_inputs(arrays)
    masks = model.masks(len(image), *noise)
    tokens = nnx.jit(lambda model, *args: model.encoder(*args))(model, image, audio, masks[0].keep, masks[1].keep)
    for stream, mask in zip(("image", "audio"), masks, strict=True):
        np.testing.assert_array_equal(mask.keep, arrays[f"{stream}_ids_keep"])
        np.testing.assert_array_equal(mask.mask, arrays[f"{stream}_mask"])
    for stream in STREAMS:
        near(getattr(tokens, stream), arrays[f"masked_{stream}_tokens"])
    out, by_clip = nnx.jit(lambda model, *inputs: (model(*inputs), model.losses(*inputs)))(model, *inputs)
    near(out.image_prediction[:, ::4, ::8], arrays["pred_image"])
    near(out.audio_prediction[:, ::4, ::8], arrays["pred_audio"])
    for losses in (out[:2], [loss.mean() for loss in by_clip]):
        near(losses[0], arrays["loss_image_norm"], 1e-6)
        near(losses[1], arrays["loss_audio_norm"], 1e-6)


def test_raw_target_losses():
    arrays = load("factorized_mmi")
    losses = nnx.jit(lambda model, *inputs: model.losses(*inputs))(whole(False), *golden_subset.model_inputs(arrays))
    for loss, stream in zip(losses, ("image", "audio"), strict=True):
        near(loss.mean(), arrays[f"loss_{stream}_raw"], 1e-6)


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients(pair):
    arrays, model = load("factorized_mmi"), whole(pair=pair)
    inputs = golden_subset.model_inputs(arrays)
    gradients = nnx.jit(nnx.grad(lambda model: sum(x.mean() for x in model.losses(*inputs))))(model)
    found = golden_subset.as_published(gradients, model)
    assert found.keys() == part(arrays, "grad/").keys()
    near_gradients(found, arrays)


# The other kinds of fusion: the last fusion block


@pytest.mark.parametrize("name, kind", [("dense_mmi", "dense"), ("token", "token")])
def test_fusion_block(name, kind):
    arrays = load(name)
    model = with_weights(made(models.AVMAE, golden_subset.config(kind)), arrays)
    block, norm = model.encoder.fusion_blocks[2], model.encoder.fusion_norm
    given = {stream: jnp.asarray(arrays[f"layer1_{stream}"]) for stream in STREAMS}
    fusion = block(given["fusion"], given["image"], given["audio"])
    near(fusion, arrays["layer2_fusion"])
    near(norm(fusion), arrays["full_fusion_tokens"])

    given = {stream: jnp.asarray(arrays[f"ours/masked_layer1_{stream}"]) for stream in STREAMS}

    def fused(model):
        block, norm = model.encoder.fusion_blocks[2], model.encoder.fusion_norm
        return norm(block(given["fusion"], given["image"], given["audio"]))

    near(fused(model), arrays["masked_fusion_tokens"])
    gradients = nnx.grad(lambda model: (fused(model) * arrays["ours/loss_by_fusion"]).sum())(model)
    near_gradients(golden_subset.as_published(gradients, model), arrays)


# Swin decoder of the sound


@pytest.mark.parametrize("normalize", [True, False])
def test_swin_decoder(normalize):
    arrays = load("factorized_mmi_swin")
    model = with_weights(made(models.AVMAE, golden_subset.config("factorized", "swin", normalize)), arrays)
    audio, noise = jnp.asarray(arrays["audio"])[:, 0], (arrays["image_noise"], arrays["audio_noise"])
    masks = model.masks(len(audio), *noise)
    for stream, mask in zip(("image", "audio"), masks, strict=True):
        np.testing.assert_array_equal(mask.keep, arrays[f"{stream}_ids_keep"])
        np.testing.assert_array_equal(mask.mask, arrays[f"{stream}_mask"])
    image = jnp.zeros((len(audio), *model.config.image.size, 3))
    tokens = models.Tokens(
        jnp.zeros((*masks[0].keep.shape, model.config.image.width)),
        *(jnp.asarray(arrays[f"masked_{stream}_tokens"]) for stream in ("audio", "fusion")),
    )
    given = golden_subset.with_tokens(model, tokens)
    out, losses = given(image, audio, *noise), given.losses(image, audio, *noise)
    near(out.audio_prediction[:, ::4, ::8], arrays["pred_audio"])
    for loss in (out.audio_loss, losses[1].mean()):
        near(loss, arrays["loss_audio_norm" if normalize else "loss_audio_raw"], 1e-6)
    if normalize:
        gradients = nnx.grad(
            lambda model: golden_subset.with_tokens(model, tokens).losses(image, audio, *noise)[1].mean()
        )(model)
        near_gradients(golden_subset.as_published(gradients, model), arrays)


# Heads


@pytest.mark.parametrize("name", ["classifier_plain", "classifier_norm"])
def test_classifier(name):
    arrays = load("heads")
    head = models.ClassifierConfig(7, input_norm=name.endswith("norm"))
    model = with_weights(made(models.Classifier, golden_subset.config(), head), arrays, f"{name}/weight/")
    logits = model.classify({stream: jnp.asarray(arrays[f"ours/{name}/{stream}"]) for stream in STREAMS})
    expected = {stream: arrays[f"{name}/{stream}_logits"] for stream in STREAMS}
    assert logits.keys() == expected.keys()
    for stream, value in expected.items():
        near(logits[stream], value)
    near(models.joint_score(logits), sum(expected.values()) / 3)


def test_separator():
    """Evaluation mode with all four masks and losses, then a training batch."""
    arrays, mixture = load("heads"), jnp.asarray(load("factorized_mmi")["audio"])[:, 0]
    source, clips = jnp.asarray(arrays["separation/target_spec"])[:, 0], len(mixture)
    model = with_weights(
        made(models.Separator, golden_subset.config(), models.SeparatorConfig()), arrays, "separation/weight/"
    )
    image = jnp.asarray(arrays["ours/separation/last_image"])
    layers = tuple(
        models.Tokens(image, jnp.asarray(arrays[f"ours/separation/layer{number}_audio"]), image[:, :0])
        for number in range(3)
    )
    model = golden_subset.with_tokens(model, models.Tokens(image, layers[-1].audio, image[:, :0], layers))
    logits = model(jnp.zeros((clips, *model.config.image.size, 3)), mixture)
    near(logits[:, ::4, ::4], arrays["separation/logits"])
    for weighted in (0, 1):
        for binary in (0, 1):
            head = models.SeparatorConfig("binary" if binary else "ratio", bool(weighted))
            expected = part(arrays, f"separation/weighted{weighted}_binary{binary}/")
            near(objectives.separation_mask(mixture, source, head.mask)[:, ::4, ::4], expected["mask"], 1e-6)
            near(objectives.separation_loss(logits, mixture, source, head).mean(), expected["loss"], 1e-6)
    logits = model(jnp.zeros((clips, *model.config.image.size, 3)), mixture, jnp.ones(clips, bool))
    near(logits[:, ::4, ::4], arrays["separation/train_mode/logits"])
    loss = objectives.separation_loss(logits, mixture, source, models.SeparatorConfig("binary")).mean()
    near(loss, arrays["separation/train_mode/loss"], 1e-6)


def test_segmentation_loss():
    arrays = load("heads")
    logits = jnp.asarray(arrays["segmentation5/logits"]).transpose(0, 2, 3, 1)
    loss = objectives.segmentation_loss(logits, jnp.asarray(arrays["segmentation5/target"], jnp.int32)).mean()
    assert loss == pytest.approx(arrays["segmentation5/loss"], rel=1e-6)


# Training: learning rates, positions


def test_learning_rates():
    """Of the schedule, and of pretrained encoders."""
    rows, clips = load("heads")["schedule/epoch_lr_pretrainedlr"], 1000
    config = recipe(steps=0, epochs=200.0, batch_size=8, optimizer=OptimizerConfig(base_lr=3e-4 * 32, warmup=40.0))
    length = optimizer.run_length(config, clips)
    schedule = optimizer.learning_rate(config, length)
    (multiplier,) = optimizer.pretrained_multipliers(["encoder.image.norm.bias"], ["image"], length).values()
    rates = np.array([(schedule(step), schedule(step) * multiplier(step)) for step in rows[:, 0] * clips / 8])
    np.testing.assert_allclose(rates, rows[:, 1:], rtol=2e-5, atol=1e-10)


def test_layer_decay():
    table = json.loads((golden_subset.FOLDER / "separation_layer_decay.json").read_text())
    config = golden_subset.config()
    model = nnx.eval_shape(lambda: made(models.Separator, config, models.SeparatorConfig()))
    parameters = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    rules, seen = names_of(model).rules, []
    scales, decayed = optimizer.layer_multipliers(parameters, 0.75, config.layers), optimizer.decayed(parameters)
    for published, (scale, weight_decay) in table.items():
        for path in rules[published].here:
            assert (scales[path], 0.05 * decayed[path]) == (scale, weight_decay), path
            seen.append(path)
    assert sorted(seen) == sorted(parameters)


@pytest.mark.parametrize("key, grid, width", [("2d_8x12_d64", (8, 12), 64), ("2d_14x14_d48", (14, 14), 48)])
def test_positions(key, grid, width):
    near(sin_cos_2d(grid, width), load("heads")[f"posembed/{key}"], 1e-6)


# Sound


def waveform(name):
    return load("audio")[f"{name}/waveform"][0] / np.float32(32768)


@pytest.mark.parametrize("name", ["demo1", "demo2"])
def test_log_mel(name):
    near(log_mel(waveform(name), SoundConfig())[::4, ::2], load("audio")[f"{name}/log_mel"][0], 3e-4)


def test_filter_bank():
    near(mel_filter_bank(SoundConfig()), load("audio")["mel_filterbank"], 1e-6)


def test_masked_sound():
    arrays = load("audio")
    mask = 1 / (1 + np.exp(-arrays["masking/mask_logits"][0]))
    found = apply_mask(waveform("demo1") + waveform("demo2"), mask, SoundConfig())
    near(found[::16], arrays["masking/waveform"][0], 2e-6)


# Metrics


@pytest.mark.parametrize("classes", [1, 5])
def test_segmentation_metrics(classes):
    golden = part(load("metrics"), f"segmentation{classes}/")
    scores = [
        score_clip(logits, target.astype(int))
        for logits, target in zip(np.moveaxis(golden["logits"], 1, -1), golden["target"], strict=True)
    ]
    found = segmentation_metrics(scores, Bootstrap(6, 0, 100))
    for ours, theirs in {"miou": "miou", "precision": "precision", "recall": "recall", "f_score": "fscore"}.items():
        expected = [golden[f"{theirs}{end}"] for end in ("", "_noBg")]
        np.testing.assert_allclose([found[ours].value, found[f"{ours}_without_background"].value], expected, rtol=1e-6)


def test_nearest_neighbours():
    golden = part(load("metrics"), "knn/")
    found = cosine.nearest({stream: golden[f"{stream}_features"] for stream in STREAMS}, block=64)
    assert set(found) == {*STREAMS, "all"}
    for name, neighbour in found.items():
        accuracy = np.mean(neighbours.accuracies(neighbour, golden["labels"]))
        assert accuracy == pytest.approx(golden[f"{name}_accuracy"], abs=1e-4)


# The files


def test_weights_are_stored_bit_for_bit(shared):
    """Where the whole set is there: weights here are those there."""
    for name in ("factorized_mmi", "dense_mmi", "token", "factorized_mmi_swin"):
        there = read_state_dict(shared / "golden" / f"{name}.pth")
        here = part(load(name), "weight/")
        assert here
        for key, x in here.items():
            assert (x.dtype, x.shape, x.tobytes()) == (there[key].dtype, there[key].shape, there[key].tobytes()), key
