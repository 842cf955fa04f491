"""Stochastic depth: rates, the encoder against a plain loop over clips, expectation, nothing in evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import MODEL

from av_mae import models
from av_mae.models.encoder import stochastic_depth
from av_mae.models.layers import Block

# Streams of different depths and widths: bridges lead the fusion tokens into the narrower one.
CONFIG = dataclasses.replace(
    MODEL, image=dataclasses.replace(MODEL.image, depth=3), audio=dataclasses.replace(MODEL.audio, depth=2, width=16)
)
CLIPS = 5


@pytest.fixture(scope="module")
def encoder() -> models.Encoder:
    return models.Encoder(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def inputs():
    random = np.random.default_rng(0)
    return (
        random.standard_normal((CLIPS, *CONFIG.image.size, 3), np.float32),
        random.standard_normal((CLIPS, *CONFIG.audio.size), np.float32),
    )


def draw_factors():
    noise = np.random.default_rng(1).random((CLIPS, 3, 2, 2), np.float32)
    return stochastic_depth(noise, 0.6, CONFIG)


def test_factors_against_a_loop():
    noise = np.random.default_rng(2).random((40, 3, 2, 2), np.float32)
    found = np.asarray(stochastic_depth(noise, 0.6, CONFIG))
    rates = {0: (0, 0.3, 0.6), 1: (0, 0.6, None)}  # by stream and layer; the audio stream has two
    for clip, layer, stream, branch in np.ndindex(noise.shape):
        chance = rates[stream][layer]
        if chance is not None:
            kept = noise[clip, layer, stream, branch] >= chance
            np.testing.assert_allclose(found[clip, layer, stream, branch], kept / (1 - chance), rtol=1e-6)
    assert (found == 0).any() and found.dtype == np.float32


def test_expectation_is_one_and_the_rate_is_that_of_the_layer():
    noise = jax.random.uniform(jax.random.key(3), (20000, 3, 2, 2))
    factors = np.asarray(stochastic_depth(noise, 0.6, CONFIG), float)
    rates = np.array([[0, 0], [0.3, 0.6], [0.6, 0.6]])[:, :, None]
    deviation = np.sqrt(rates / (1 - rates) / len(factors))
    assert (np.abs(factors.mean(0) - 1) <= 4.5 * deviation).all()
    assert (np.abs((factors == 0).mean(0) - rates) <= 4.5 * np.sqrt(rates * (1 - rates) / len(factors))).all()
    branches = np.corrcoef(factors[:, 2].reshape(-1, 4).T)
    assert np.abs(branches - np.eye(4)).max() < 0.05  # streams and branches are dropped independently


def test_a_stream_of_one_layer_drops_nothing():
    assert (np.asarray(stochastic_depth(np.zeros((4, 1, 2, 2), np.float32), 0.9, MODEL)) == 1).all()


def plain_block(block, x, read, attention_factor, mlp_factor):
    y = block.norm1(x)
    x = x + attention_factor * block.attention(y, y if read is None else jnp.concatenate([block.norm1(read), y], 1))
    return x + mlp_factor * block.mlp(block.norm2(x))


def plain_encoder(model, image, audio, factors):
    """One clip, layer by layer, every branch times its own number."""
    image, audio = model.image.embed(image[None], None), model.audio.embed(audio[None], None)
    fusion = model.fusion_tokens[...]
    for number in range(3):
        fused = number < 2
        seen = fusion if fused else None
        heard = model.audio.bridges[number](fusion) if fused else None
        new_image = plain_block(model.image.blocks[number], image, seen, *factors[number, 0])
        new_audio = plain_block(model.audio.blocks[number], audio, heard, *factors[number, 1]) if fused else audio
        fusion = model.fusion_blocks[number](fusion, image, audio) if fused else fusion
        image, audio = new_image, new_audio
    return model.image.norm(image)[0], model.audio.norm(audio)[0], model.fusion_norm(fusion)[0]


def test_encoder_against_a_plain_loop_over_clips(encoder):
    factors = draw_factors()
    found = jax.jit(lambda f: encoder(*inputs(), factors=f))(factors)
    plain = jax.jit(functools.partial(plain_encoder, encoder))
    for clip, (image, audio) in enumerate(zip(*inputs(), strict=True)):
        expected = plain(image, audio, factors[clip])
        for ours, theirs in zip(found[:3], expected, strict=True):
            np.testing.assert_allclose(ours[clip], theirs, rtol=1e-4, atol=1e-5)


def test_a_dropped_branch_is_as_if_it_were_not_there(encoder):
    """Each clip's output depends on its own factors alone; all branches dropped leave the embedding."""
    run = jax.jit(lambda f: encoder(*inputs(), factors=f)[:3])
    ones = np.ones((CLIPS, 3, 2, 2), np.float32)
    none = ones.copy()
    none[2] = 0
    whole, one_without = run(ones), run(none)
    for ours, theirs in zip(one_without[:2], whole[:2], strict=True):
        np.testing.assert_array_equal(np.delete(ours, 2, 0), np.delete(theirs, 2, 0))
        assert np.abs(ours[2] - theirs[2]).max() > 0.1
    embedded = jax.jit(lambda x: encoder.image.norm(encoder.image.embed(x, None)))(inputs()[0][2:3])
    np.testing.assert_allclose(one_without[0][2], embedded[0], rtol=1e-5, atol=1e-5)


def test_a_block_has_the_expectation_of_its_branch():
    """Over both outcomes of the last branch, weighted by their chances, a block gives what it gives without drop."""
    block, x = Block(16, 2, 2.0, eps=1e-6, rngs=nnx.Rngs(4)), jax.random.normal(jax.random.key(5), (3, 7, 16))
    factors = lambda mlp: jnp.tile(jnp.array([1.0, mlp]), (3, 1))
    run = jax.jit(lambda f: block(x, factors=f))
    mean = 0.3 * run(factors(0.0)) + 0.7 * run(factors(1 / 0.7))
    np.testing.assert_allclose(mean, run(factors(1.0)), rtol=1e-5, atol=1e-5)


def test_evaluation_is_unchanged_and_costs_nothing(encoder):
    image, audio = inputs()
    count = lambda *args: str(
        jax.make_jaxpr(lambda *x: encoder(*x[:2], factors=x[2] if x[2:] else None)[:3])(*args)
    ).count(" mul ")
    ones = np.ones((CLIPS, 3, 2, 2), np.float32)
    assert count(image, audio, ones) == count(image, audio) + 2 * (3 + 2)  # one product a branch, else none
    with_ones, without = (jax.jit(lambda f: encoder(image, audio, factors=f)[:3])(f) for f in (ones, None))
    for ours, theirs in zip(with_ones, without, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
