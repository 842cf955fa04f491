"""Localization: maps and losses against float64 NumPy and plain loops, over meshes, invalid clips, learning."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_heads import random_variables
from numpy_model import NumPyModel, softmax
from tiny_training import MODEL, batches, compile_step, recipe

from av_mae import models
from av_mae.config import MeshConfig, OptimizerConfig
from av_mae.errors import UserError
from av_mae.evaluate.localization import LocalizationObjective
from av_mae.models import losses as objectives
from av_mae.train import loop, optimizer, sharding, step
from av_mae.train import sharding as mesh

HEAD = models.LocalizerConfig(width=10, temperature=0.2)
UNFUSED = models.FusionConfig(kind="none")


def config_of(fusion="factorized", **changes):
    """Grids (2, 3) and (3, 2), different widths (where fusion allows it) and depths."""
    return models.AVMAEConfig(
        image=models.StreamConfig(size=(8, 12), patch=4, width=16, depth=3, heads=2, mask_ratio=0.5),
        audio=models.StreamConfig(
            size=(24, 16),
            channels=1,
            patch=8,
            width=16 if fusion == "token" else 24,
            depth=2,
            heads=2,
            mask_ratio=0.5,
            normalize_targets=False,
        ),
        fusion=models.FusionConfig(
            kind=fusion,
            tokens=(2, 3, 2),
            heads=2,
            attention_ratio=0.5,
            pair_attention="chunked" if fusion == "bilinear" else "separable",
            **changes,
        ),
        decoder=models.DecoderConfig(width=16, depth=1, heads=2),
    )


def inputs(config, batch, seed=0):
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((batch, *config.image.size, 3), np.float32),
        random.standard_normal((batch, *config.audio.size), np.float32),
    )


def made(model, config, *head):
    return random_variables(nnx.eval_shape(lambda: model(config, *head, rngs=nnx.Rngs(0))))


def run(model, function, *arrays):
    """function(model, *arrays) as one program."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, *arrays: function(nnx.merge(graph, state), *arrays))(state, *arrays)


def near(value, expected, tolerance=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def bilinear(values, size):
    """[R, C] → [H, W]: each pixel between the four nearest patch centres, the edge's values beyond them."""

    def place(pixel, pixels, patches):
        x = min(max((pixel + 0.5) * patches / pixels - 0.5, 0), patches - 1)
        first = min(int(x), patches - 2)
        return first, x - first

    found = np.zeros(size)
    for r, c in np.ndindex(*size):
        (i, y), (j, x) = place(r, size[0], values.shape[0]), place(c, size[1], values.shape[1])
        found[r, c] = (1 - y) * ((1 - x) * values[i, j] + x * values[i, j + 1]) + y * (
            (1 - x) * values[i + 1, j] + x * values[i + 1, j + 1]
        )
    return found


def as_inputs(image, audio):
    return {"image": np.asarray(image, np.float64), "audio": np.asarray(audio, np.float64)[..., None]}


def everything(config):
    return {"image": np.arange(config.image.tokens), "audio": np.arange(config.audio.tokens)}


# The trained localizer


def numpy_embed(model, image, audio):
    """Unit vectors [B, I, W] and [B, W] of a localizer, clip by clip, without fusion."""
    plain, places, sounds = NumPyModel(model, dataclasses.replace(model.config, fusion=UNFUSED)), [], []
    for clip in zip(image, audio, strict=True):
        tokens = plain.encode(as_inputs(*clip), everything(model.config))
        places.append(plain.linear("image_projection", tokens["image"]))
        sounds.append(plain.linear("audio_projection", sum(tokens["audio"]) / len(tokens["audio"])))
    return tuple(x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in map(np.array, (places, sounds)))


def loop_loss(scores, valid, temperature):
    """Symmetric InfoNCE, number by number."""
    clips, losses = [i for i in range(len(valid)) if valid[i]], np.zeros(len(valid))
    for i in clips:
        own = math.exp(scores[i, i] / temperature)
        sounds = sum(math.exp(scores[i, j] / temperature) for j in clips)
        images = sum(math.exp(scores[j, i] / temperature) for j in clips)
        losses[i] = -(math.log(own / sounds) + math.log(own / images)) / 2
    return losses


@pytest.mark.parametrize("fusion, batch", [("factorized", 3), ("none", 1)])
def test_maps_and_scores(fusion, batch):
    config = config_of(fusion)
    model, clips = made(models.Localizer, config, HEAD), inputs(config, batch)
    heat, scores = run(model, lambda model, *clips: (model(*clips), model.pairwise(*clips)), *clips)
    places, sounds = numpy_embed(model, *clips)
    near(heat, [bilinear((place @ sound).reshape(2, 3), (8, 12)) for place, sound in zip(places, sounds, strict=True)])
    near(scores, [[max(token @ sound for token in place) for sound in sounds] for place in places])


@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
def test_contrastive_loss_against_a_loop(valid):
    valid, random = np.array(valid, bool), np.random.default_rng(len(valid))
    scores = random.uniform(-1, 1, (5, 5)).astype(np.float32)
    near(objectives.contrastive_loss(scores, jnp.asarray(valid), 0.1), loop_loss(scores, valid, 0.1))
    top1 = objectives.contrastive_top1(scores, jnp.asarray(valid))
    clips = np.flatnonzero(valid)
    for i in clips:
        first = [scores[i, i] == max(scores[i, clips]), scores[i, i] == max(scores[clips, i])]
        assert top1[i] == sum(first) / 2
    gradient = jax.grad(lambda scores: objectives.contrastive_loss(scores, jnp.asarray(valid), 0.1).sum())(scores)
    assert np.isfinite(gradient).all() and not gradient[~valid].any() and not gradient[:, ~valid].any()


def test_half_precision_scores_are_compared_in_float32():
    scores = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 4)), jnp.bfloat16)
    loss = objectives.contrastive_loss(scores, jnp.ones(4, bool), 0.07)
    assert loss.dtype == jnp.float32
    near(loss, loop_loss(np.asarray(scores, np.float64), np.ones(4), 0.07))


# Training


def train_step(data=1, fsdp=1, encoder_rate=0.5, **changes):
    config = recipe(
        optimizer=OptimizerConfig(base_lr=0.05, warmup=0.0, weight_decay=0.0, clip_norm=0.0),
        mesh=MeshConfig(data, fsdp),
        **changes,
    )
    objective = LocalizationObjective(config.model, HEAD, encoder_rate)
    return step.TrainStep(
        config, mesh.make_mesh(config.mesh, jax.devices()[: data * fsdp]), optimizer.run_length(config, 1000), objective
    )


@functools.cache
def one_device():
    made = train_step(steps=80)
    return made, compile_step(made)


@functools.cache
def first_parameters():
    return jax.device_get(one_device()[0].init().params)


def steps(made, compiled, host):
    """The last state and the metrics of each step from the same first state."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made.abstract_state())
    params = {name: x.copy() for name, x in first_parameters().items()}  # the step writes into what it is given
    state, history = jax.device_put(dataclasses.replace(zeros, params=params), made.shardings), []
    rows = mesh.local_rows(made.rows, made.config.batch_size)
    for batch in host:
        placed = loop.to_global({name: x[rows] for name, x in batch.items()}, made.rows)
        state, metrics = compiled(state, placed)
        history.append({name: float(x) for name, x in metrics.items()})
    return state, history


def test_same_loss_on_eight_devices_as_clip_by_clip(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 64)
    made, compiled = one_device()
    host = batches(made.config, 2)
    _, expected = steps(made, compiled, host)
    sharded = train_step(2, 4, steps=80)
    _, history = steps(sharded, compile_step(sharded), host)
    for ours, theirs in zip(history, expected, strict=True):
        for name in ("loss", "contrastive_top1", "grad_norm", "valid"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)
    model = made.definition.merge(first_parameters())
    image = (host[0]["image"] / 255 - models.IMAGENET_MEAN) / models.IMAGENET_DEVIATION
    places, sounds = numpy_embed(model, image, host[0]["audio"])
    scores = np.einsum("biw,cw->bci", places, sounds).max(-1)
    loss = loop_loss(scores, host[0]["valid"], HEAD.temperature)
    np.testing.assert_allclose(expected[0]["loss"], loss.sum() / 15, rtol=1e-5)


def test_pairs_of_accumulated_parts_are_their_own():
    parts = train_step(grad_accumulation=2, steps=80)
    (batch,) = batches(parts.config, 1)
    _, (metrics,) = steps(parts, compile_step(parts), [batch])
    made, compiled = one_device()
    halves = [{**batch, "valid": batch["valid"] & half} for half in (np.arange(16) < 8, np.arange(16) >= 8)]
    each = [steps(made, compiled, [half])[1][0] for half in halves]
    weights = [half["valid"].sum() for half in halves]
    np.testing.assert_allclose(metrics["loss"], np.average([m["loss"] for m in each], weights=weights), rtol=1e-5)


def test_invalid_clips_change_nothing():
    made, compiled = one_device()
    (clean,) = batches(made.config, 1)
    dirty = {**clean, "image": clean["image"].copy(), "audio": clean["audio"].copy()}
    dirty["image"][0], dirty["audio"][0] = 0, 0
    (a, ours), (b, theirs) = (steps(made, compiled, [batch]) for batch in (clean, dirty))
    assert ours == theirs
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    c, (nothing,) = steps(made, compiled, [{**clean, "valid": np.zeros(16, bool)}])
    assert nothing["loss"] == 0 and nothing["grad_norm"] == 0
    assert all(np.isfinite(x).all() for x in jax.device_get(c).params.values())


def test_one_step_moves_what_is_trained():
    """Adam's first step moves each value by its learning rate; fusion, which is not read, stays and has no state."""
    made, compiled = one_device()
    before = first_parameters()
    state, (metrics,) = steps(made, compiled, batches(made.config, 1))
    fusion = {name for name in before if "fusion" in name}
    assert state.opt_state[1].mu.keys() == before.keys() - fusion and fusion
    for name, x in jax.device_get(state.params).items():
        moved = np.abs(x - before[name]).max() / metrics["learning_rate"]
        if not name.endswith("key.bias"):  # zero in theory: softmax does not see a constant
            rate = 0 if name in fusion else 0.5 if name.startswith("encoder.") else 1
            np.testing.assert_allclose(moved, rate, atol=0.02, err_msg=name)


def test_a_frozen_encoder():
    made = train_step(encoder_rate=0.0)
    trained = made.abstract_state().opt_state[1].mu
    assert trained.keys() == {
        f"{part}_projection.{value}" for part in ("image", "audio") for value in ("kernel", "bias")
    }


def test_parameters_that_are_not_read_are_those_without_gradient():
    """With bridges, in a model of different widths."""
    config = config_of()
    objective, clips = LocalizationObjective(config, HEAD), inputs(config, 3)
    graph, params = nnx.split(made(models.Localizer, config, HEAD))

    def loss(params):
        scores = nnx.merge(graph, params).pairwise(*clips)
        return objectives.contrastive_loss(scores, jnp.ones(3, bool), 0.2).sum()

    gradients = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
    for path, x in gradients:
        name = ".".join(map(str, path))
        if not name.endswith("key.bias"):
            assert np.asarray(x.get_value()).any() == objective.trained(name), name


def test_learns_random_pairs():
    made, compiled = one_device()
    (batch,) = batches(made.config, 1, invalid=False)
    _, history = steps(made, compiled, [batch] * 80)
    assert history[0]["contrastive_top1"] < 0.5 and history[0]["loss"] > 0.8 * math.log(16)
    assert history[-1]["contrastive_top1"] == 1 and history[-1]["loss"] < 0.2


def test_flops_count_both_streams_and_projections():
    c = MODEL

    def vit(stream):
        n, d = stream.tokens, stream.width
        return 2 * n * stream.patch_values * d + stream.depth * (24 * n * d * d + 4 * n * n * d)

    expected = vit(c.image) + vit(c.audio) + 2 * c.image.tokens * 32 * 10 + 2 * 32 * 10
    assert LocalizationObjective(c, HEAD).flops == 3 * expected


# Untrained maps


class Watched(NumPyModel):
    """Keeps the weights of each attention, averaged over heads, by its name."""

    def attend(self, name, q, k, v, heads, scale, bias=None):
        self.seen[name] = np.mean(
            [softmax(qh @ kh.T * scale) for qh, kh in zip(np.split(q, heads, -1), np.split(k, heads, -1), strict=True)],
            axis=0,
        )
        return super().attend(name, q, k, v, heads, scale, bias)

    def attention_map(self, clip):
        """[I]: the mean over layers of the tokens' mean."""
        self.seen, c = {}, self.config
        self.encode(clip, everything(c))
        return np.mean(
            [
                self.layer(f"encoder.fusion_blocks.{number}.attention").mean(0)
                for number in ((0, 1) if c.fusion.layers == "all" else c.fusion.layers)
            ],
            axis=0,
        )

    def layer(self, name):
        image, audio = self.config.image.tokens, self.config.audio.tokens
        if self.config.fusion.kind == "token":
            return self.seen[name][:, :image]
        if self.config.fusion.kind != "factorized":
            return self.seen[name].reshape(-1, image, audio).sum(2)
        read, pairs = self.seen[f"{name}.aggregate_image"], self.seen[f"{name}.pairs"].reshape(2, 3, 2)
        through = [sum(pairs[f, v, a] * read[v] for v in range(3) for a in range(2)) for f in range(2)]
        return np.array([*through, *read])


@pytest.mark.parametrize(
    "fusion, layers, batch", [("factorized", "all", 2), ("dense", (1,), 1), ("token", "all", 2), ("bilinear", (0,), 2)]
)
def test_attention_map(fusion, layers, batch):
    config = config_of(fusion, layers=layers)
    model, clips = made(models.AVMAE, config), inputs(config, batch)
    plain = Watched(model, config)
    expected = [bilinear(plain.attention_map(as_inputs(*clip)).reshape(2, 3), (8, 12)) for clip in zip(*clips)]
    near(run(model, models.attention_map, *clips), expected)


def loop_occlusion(plain, clip, noises):
    """[I]: the errors of the sound without each image token, less those with all, one pass at a time."""
    c, inputs, found = plain.config, as_inputs(*clip), np.zeros(plain.config.image.tokens)
    target = plain.target(inputs["audio"], c.audio)
    for noise in noises:
        order = np.argsort(noise)
        keep, removed = order[:3], order[3:]

        def error(image_keep, keep=keep, removed=removed):
            tokens = plain.encode(inputs, {"image": image_keep, "audio": keep})
            prediction = plain.decode("audio", tokens["audio"], tokens["fusion"], keep, c.audio)
            return ((prediction - target)[removed] ** 2).mean()

        everything = list(range(c.image.tokens))
        for token in everything:
            found[token] += error([i for i in everything if i != token]) - error(everything)
    return found / len(noises)


@pytest.mark.parametrize("fusion, batch, masks, chunk", [("factorized", 2, 3, 4), ("dense", 1, 1, 100)])
def test_occlusion_map(fusion, batch, masks, chunk):
    """18 passes in chunks of 4; all 6 in one."""
    config = config_of(fusion)
    model, clips = made(models.AVMAE, config), inputs(config, batch)
    noise = np.random.default_rng(1).random((batch, masks, config.audio.tokens), np.float32)
    plain = NumPyModel(model, config)
    expected = [
        bilinear(loop_occlusion(plain, clip, noises).reshape(2, 3), (8, 12))
        for *clip, noises in zip(*clips, noise, strict=True)
    ]
    heat = run(model, functools.partial(models.occlusion_map, chunk=chunk), *clips, noise)
    assert np.abs(expected).max() > 1e-3
    near(heat, expected, 1e-4)


def test_occlusion_noise_depends_on_the_clips_key_alone():
    stream, keys = MODEL.audio, jax.random.split(jax.random.key(3), 5)
    noise = np.asarray(models.occlusion_noise(keys, 4, stream))
    assert noise.shape == (5, 4, stream.tokens) and noise.dtype == np.float32
    assert noise.min() >= 0 and noise.max() < 1 and len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(models.occlusion_noise(keys[2:3], 4, stream)[0], noise[2])


# Refusals


def test_maps_need_fusion_tokens():
    config = config_of("none")
    model = nnx.eval_shape(lambda: models.AVMAE(config, rngs=nnx.Rngs(0)))
    for function, more in ((models.attention_map, ()), (models.occlusion_map, (np.zeros((1, 2, 6)),))):
        with pytest.raises(UserError, match="map needs a model with fusion tokens, fusion kind='none' has none"):
            function(model, *inputs(config, 1), *more)
