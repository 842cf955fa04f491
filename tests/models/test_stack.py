"""Layers run as a scan: outputs and gradients as of layers in turn, one loop for each run of equal layers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_training import MODEL, batches, make_step, on_mesh, recipe, run_steps

from av_mae import models
from av_mae.models import encoder as stack
from av_mae.models.encoder import stochastic_depth
from av_mae.models.kinds import define_model
from av_mae.train import sharding, step

REMATS = {"none": None, "full": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)}
scanned = functools.partial(stack.run_layers, read=lambda state: state)


def deep(image: int = 2, audio: int = 2, decoder: int = 3, fusion: dict | None = None) -> models.AVMAEConfig:
    """The tiny model with more layers; token counts are odd: 3 of 6 patches and 2 of 4 seen, 4 fusion tokens."""
    return dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, depth=image),
        audio=dataclasses.replace(MODEL.audio, depth=audio),
        fusion=dataclasses.replace(MODEL.fusion, **fusion or {}),
        decoder=dataclasses.replace(MODEL.decoder, depth=decoder),
    )


SWIN = deep(2, 2, 4)
SWIN = dataclasses.replace(
    SWIN,
    image=dataclasses.replace(SWIN.image, size=(64, 64)),
    decoder=dataclasses.replace(SWIN.decoder, kind="swin", window=(2, 2)),
)
# What is built, and how many loops its layers make: encoder, image decoder, audio decoder.
KINDS = {
    "factorized": (deep(), 3),
    "dense": (deep(4, 4, 2, {"kind": "dense"}), 1),  # one decoder block before the last
    "none": (deep(fusion={"kind": "none"}), 3),
    "some fused": (deep(4, 4, 1, {"layers": (2, 3)}), 2),
    "every other fused": (deep(4, 4, 1, {"layers": (0, 2)}), 0),
    "unlike depths": (deep(4, 2, 1), 2),
    "swin": (SWIN, 2),  # blocks of the 4 × 4 grid are shifted in turn, those of the 2 × 2 grid never
}


@functools.cache
def built(kind: str):
    return nnx.split(models.AVMAE(KINDS[kind][0], rngs=nnx.Rngs(0)))


def clips(config: models.AVMAEConfig, count: int):
    """image, audio, image_noise, audio_noise."""
    random, image, audio = np.random.default_rng(count), config.image, config.audio
    return (
        random.standard_normal((count, *image.size, 3), np.float32),
        random.standard_normal((count, *audio.size), np.float32),
        random.random((count, image.tokens)),
        random.random((count, audio.tokens)),
    )


def loss_of(graph, run, state, given, factors=None):
    """A number that all outputs of encoder and decoders, and of all layers, have a part in; and the outputs."""
    model = nnx.merge(graph, state)
    model.encoder.run = model.image_decoder.run = model.audio_decoder.run = run
    losses = model.losses(*given)
    tokens = model.encoder(*given[:2], return_layers=True, factors=factors)
    everything = (losses, tokens)
    return sum(x.sum() for x in losses) + sum((x * x).mean() for x in jax.tree.leaves(tokens)), everything


def loops(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count(" scan[")


@pytest.mark.parametrize(
    "kind, remat, count",
    [
        ("factorized", "full", 1),
        pytest.param("factorized", "none", 3, marks=pytest.mark.slow),
        *(pytest.param(kind, "full", 2, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_as_layers_in_turn(kind, remat, count):
    (graph, state), config = built(kind), KINDS[kind][0]
    noise = np.random.default_rng(3).random((count, config.layers, 2, 2), np.float32)
    factors = stochastic_depth(noise, 0.5, config)
    runs = functools.partial(scanned, remat=REMATS[remat]), stack.in_turn
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss_of, graph, run), has_aux=True))(
            state, clips(config, count), factors
        )
        for run in runs
    )
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))
    assert len(found[0][1][1].layers) == config.layers


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_loops(kind):
    """A loop for neighbours that are alike, none for layers that are not: the program has each kind of layer once."""
    (graph, state), (config, expected) = built(kind), KINDS[kind]

    def losses(run):
        def function(state, given):
            model = nnx.merge(graph, state)
            model.encoder.run = model.image_decoder.run = model.audio_decoder.run = run
            return model.losses(*given)

        return function

    assert loops(losses(scanned), state, clips(config, 1)) == expected
    assert loops(losses(stack.in_turn), state, clips(config, 1)) == 0


def test_a_running_sum():
    """Carry, inputs and outputs against numbers by hand: x → 10 x + weight + input."""

    def turn(layer, carry, given):
        carry = 10 * carry + layer.scale[...].sum() + given
        return carry, {"seen": carry}

    layers = [models.layers.LayerNorm(width, eps=1e-6) for width in (1, 1, 1, 2, 2)]
    for run in (stack.in_turn, scanned):
        carry, outputs = run(turn, layers, 0.0, [0.0, 1.0, 2.0, 3.0, 4.0])
        assert float(carry) == 12356 and [float(one["seen"]) for one in outputs] == [1, 12, 123, 1235, 12356]
    assert scanned(turn, [], 5.0, []) == (5.0, [])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 2),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 4, 2), (2, 2, 2))),
    ],
)
def test_steps_on_a_mesh(monkeypatch, shape):
    """Steps of scanned layers whose weights are cut, against one device on which layers run in turn."""
    config = recipe(deep(), scan_layers="on")
    host = batches(config, 3)
    _, expected = run_steps(make_step(dataclasses.replace(config, scan_layers="off")), host)
    monkeypatch.setattr(sharding, "SMALL", 64)
    train_step = on_mesh(config, *shape)
    _, history = run_steps(train_step, host)
    for ours, theirs in zip(history, expected, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4 if name == "grad_norm" else 1e-5)


def test_layers_are_found_by_name():
    """The parameters that layers gather by themselves: those of encoder and decoder blocks, and no others."""
    names = define_model(step.Pretraining(KINDS["unlike depths"][0]).build)[1]
    own = {name for name in names if sharding.LAYERS.search(name)}
    beginnings = {".".join(name.split(".")[:3]) for name in own}
    assert beginnings == {
        "encoder.image.blocks",
        "encoder.audio.blocks",
        "encoder.fusion_blocks.0",
        "encoder.fusion_blocks.1",
        "image_decoder.blocks.0",
        "audio_decoder.blocks.0",
    }
    assert {name.split(".")[0] for name in set(names) - own if name.split(".")[-1] in ("kernel", "scale")} == {
        "encoder",
        "image_decoder",
        "audio_decoder",
    }
