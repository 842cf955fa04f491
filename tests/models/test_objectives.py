"""Targets and losses of the heads against plain loops and closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae import models
from av_mae.models import losses as objectives


def near(value, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=tolerance, atol=tolerance)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def binary_entropy(logit, target):
    chance = 1 / (1 + math.exp(-float(logit)))
    return -float(target) * math.log(chance) - (1 - float(target)) * math.log(1 - chance)


def test_class_targets():
    np.testing.assert_array_equal(objectives.class_targets(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    near(objectives.class_targets(jnp.array([1]), 4, 0.1), [[0.025, 0.925, 0.025, 0.025]])
    several = objectives.class_targets(jnp.array([[1, 0, 1], [0, 0, 0]]), 3, 0.3)
    near(several, [[0.8, 0.1, 0.8], [0.1, 0.1, 0.1]])
    assert several.dtype == jnp.float32


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)])
def test_cross_entropies(weights):
    logits, targets = 3 * draw(4, 3), np.abs(draw(4, 3, seed=1)) / 3
    used = (1, 1, 1) if weights is None else weights
    softmax, binary = [], []
    for row, wanted in zip(logits.astype(float), targets, strict=True):
        total = math.log(sum(math.exp(x) for x in row))
        softmax.append(sum(w * float(t) * (total - x) for x, t, w in zip(row, wanted, used, strict=True)))
        binary.append(sum(w * binary_entropy(x, t) for x, t, w in zip(row, wanted, used, strict=True)) / 3)
    weights = None if weights is None else jnp.array(weights)
    near(objectives.softmax_cross_entropy(logits, targets, weights), softmax)
    near(objectives.binary_cross_entropy(logits, targets, weights), binary)


def test_losses_of_extreme_and_half_precision_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    targets = jnp.array([[0.0, 1.0, 0.5]])
    near(objectives.binary_errors(logits, targets), [[1e4, 1e4, math.log(2)]])
    gradient = jax.grad(lambda x: objectives.binary_errors(x, targets).sum())(logits)
    near(gradient, [[1, -1, 0]])
    half = jnp.asarray(draw(2, 3), jnp.bfloat16)
    exact = objectives.softmax_cross_entropy(half.astype(jnp.float32), objectives.class_targets(jnp.array([0, 2]), 3))
    found = objectives.softmax_cross_entropy(half, objectives.class_targets(jnp.array([0, 2]), 3))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, exact)


def test_log_odds():
    near(objectives.log_odds(jnp.array([0.0, 0.5, 1.0])), [math.log(1e-3 / 1.001), 0, math.log(1.001 / 1e-3)])


@pytest.mark.parametrize("mask", ["binary", "ratio", "share"])
@pytest.mark.parametrize("weighted", [True, False])
def test_separation(mask, weighted):
    """Levels far below and above the limits of the weight; equal powers are no source in a binary mask."""
    logits, mixture, source = (scale * draw(3, 5, 2, seed=seed) for seed, scale in enumerate((2, 3, 3)))
    mixture[0, 0, 0], mixture[1, 0, 0], source[2, 0, 0] = -7, 6, mixture[2, 0, 0]
    masks, losses = np.zeros(mixture.shape), np.zeros(3)
    for clip, row, column in np.ndindex(*mixture.shape):
        m, s = (10.0 ** float(x[clip, row, column]) for x in (mixture, source))
        value = {"binary": float(s > m), "ratio": s / (s + m + 1e-5), "share": s / m}[mask]
        masks[clip, row, column] = min(max(value, 0), 1)
        weight = min(max(math.log(1 + m), 1e-3), 10) if weighted else 1.0
        losses[clip] += weight * binary_entropy(logits[clip, row, column], masks[clip, row, column]) / 10
    near(objectives.separation_mask(mixture, source, mask), masks)
    near(objectives.separation_loss(logits, mixture, source, models.SeparatorConfig(mask, weighted)), losses, 2e-6)


def test_segmentation():
    logits = 2 * draw(2, 3, 4, 5)
    several, single = np.random.default_rng(1).integers(0, 5, (2, 3, 4)), draw(2, 3, 4, seed=2) > 0
    softmax, binary = np.zeros(2), np.zeros(2)
    for clip, row, column in np.ndindex(2, 3, 4):
        x = logits[clip, row, column].astype(float)
        softmax[clip] += (math.log(np.exp(x).sum()) - x[several[clip, row, column]]) / 12
        binary[clip] += binary_entropy(x[0], single[clip, row, column]) / 12
    near(objectives.segmentation_loss(logits, jnp.asarray(several)), softmax)
    near(objectives.segmentation_loss(logits[..., :1], jnp.asarray(single)), binary)
    near(objectives.segmentation_loss(logits[..., :1], jnp.asarray(single, jnp.float32)), binary)
