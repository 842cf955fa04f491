"""Positions, patches, masks, targets: against loops, NumPy and the published system's position tables."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from numpy_model import patches_of, positions_of

from av_mae import models
from av_mae.errors import UserError
from av_mae.models.encoder import take, with_channel
from av_mae.models.layers import sin_cos_2d
from av_mae.models.masked_autoencoder import masked_error


def stream(size, patch, channels=1, **options):
    return models.StreamConfig(
        **{"size": size, "patch": patch, "channels": channels, "width": 8, "depth": 1, "heads": 2, "mask_ratio": 0.5}
        | options
    )


@pytest.mark.parametrize("key,grid,width", [("2d_8x12_d64", (8, 12), 64), ("2d_14x14_d48", (14, 14), 48)])
def test_positions_of_the_published_system(shared, key, grid, width):
    with np.load(shared / "golden" / "heads.npz") as heads:
        np.testing.assert_allclose(sin_cos_2d(grid, width), heads[f"posembed/{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid,width", [((1, 5), 4), ((3, 2), 12), ((7, 1), 8)])
def test_positions_number_by_number(grid, width):
    found = sin_cos_2d(grid, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, positions_of(grid, width), rtol=0, atol=1e-7)


def test_positions_need_a_width_of_four():
    with pytest.raises(UserError, match="width=6 must be a multiple of 4"):
        sin_cos_2d((2, 2), 6)


@pytest.mark.parametrize(
    "size,patch,channels,batch", [((6, 10), (3, 2), 3, 2), ((4, 4), (1, 4), 1, 1), ((8, 4), (4, 4), 2, 1)]
)
def test_patchify_and_back(size, patch, channels, batch):
    config = stream(size, patch, channels, normalize_targets=False)
    x = np.arange(batch * size[0] * size[1] * channels, dtype=np.float32).reshape(batch, *size, channels)
    patches = models.patchify(jnp.asarray(x), patch)
    assert patches.shape == (batch, config.tokens, config.patch_values)
    np.testing.assert_array_equal(patches, np.stack([patches_of(clip, patch) for clip in x]))
    np.testing.assert_array_equal(models.unpatchify(patches, config), x)
    np.testing.assert_array_equal(models.targets(x, config), patches)


def test_targets_have_unbiased_variance():
    config = stream((6, 4), (3, 2), 1)
    x = 5 + 3 * np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    x[0, :3, :2] = 7  # a flat patch: variance 0
    patches = np.stack([patches_of(clip[..., None], (3, 2)) for clip in x.astype(np.float64)])
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    found = models.targets(jnp.asarray(x), config)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[0, 0], 0)
    biased = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)
    assert np.abs(biased - expected).max() > 0.05


def test_targets_and_losses_of_bfloat16_inputs_are_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), jnp.bfloat16)
    found = models.targets(x, stream((6, 4), (3, 2)))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, models.targets(x.astype(jnp.float32), stream((6, 4), (3, 2))))
    assert masked_error(x, x).dtype == jnp.float32


def test_targets_of_one_value_cannot_be_normalised():
    with pytest.raises(UserError, match="normalize_targets=True needs at least 2 values per patch, patch=1 .* has 1"):
        stream((4, 4), 1)
    assert stream((4, 4), 1, normalize_targets=False).patch_values == 1


def test_masked_error_is_a_mean_per_clip():
    prediction, target = np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype(np.float32)
    expected = [sum((p - t) ** 2 for p, t in zip(a.ravel(), b.ravel())) / 15 for a, b in zip(prediction, target)]
    np.testing.assert_allclose(masked_error(jnp.asarray(prediction), jnp.asarray(target)), expected, rtol=1e-6)


def test_random_mask_by_hand():
    noise = jnp.asarray([[0.5, 0.1, 0.9, 0.3, 0.7], [0.2, 0.2, 0.0, 0.2, 0.1]])  # ties: the earlier patch is kept
    mask = models.random_mask(noise, 2)
    np.testing.assert_array_equal(mask.keep, [[1, 3], [2, 4]])
    np.testing.assert_array_equal(mask.removed, [[0, 4, 2], [0, 1, 3]])
    np.testing.assert_array_equal(mask.mask, [[1, 0, 1, 0, 1], [1, 1, 0, 1, 0]])
    assert (mask.keep.dtype, mask.removed.dtype, mask.mask.dtype) == (jnp.int32, jnp.int32, jnp.float32)
    np.testing.assert_array_equal(take(noise[..., None], mask.keep)[..., 0], np.float32([[0.1, 0.3], [0.0, 0.1]]))


@pytest.mark.parametrize("tokens,ratio,keep", [(40, 0.8, 7), (96, 0.8, 19), (196, 0.75, 49), (10, 0.9, 0), (5, 0.5, 2)])
def test_kept_patches_in_double_precision(tokens, ratio, keep):
    config = lambda: stream((tokens, 2), (1, 2), mask_ratio=ratio)
    if keep == 0:  # 10 · (1 - 0.9) is 0.9999…
        with pytest.raises(UserError, match="mask_ratio=0.9 keeps 0 of 10 patches; at least one must be kept"):
            config()
    else:
        assert config().keep == keep


def test_mask_noise_is_uniform():
    noise = np.asarray(models.mask_noise(jax.random.key(3), 40, 100))
    assert noise.shape == (40, 100) and noise.dtype == np.float32
    assert 0 <= noise.min() and noise.max() < 1
    np.testing.assert_allclose(np.quantile(noise, np.linspace(0.1, 0.9, 9)), np.linspace(0.1, 0.9, 9), atol=0.03)


def test_normalize_image():
    image = np.array([[[0, 128, 255], [255, 0, 1]]], np.uint8)
    expected = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = models.normalize_image(jnp.asarray(image))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_inputs_of_another_size_are_refused():
    config = stream((6, 4), (3, 2))
    assert with_channel(jnp.zeros((2, 6, 4)), config).shape == (2, 6, 4, 1)
    for shape in ((2, 4, 6), (2, 6, 4, 3), (6, 4)):
        with pytest.raises(UserError, match=r"input shape \(.*\) must be \(B, \(6, 4, 1\)\)"):
            with_channel(jnp.zeros(shape), config)


@pytest.mark.parametrize("jit", [False, True])
def test_shapes_in_signatures_are_checked(jit):
    """Shapes that NumPy would broadcast: only the check of the signatures (conftest.py) refuses them."""
    error = jax.jit(masked_error) if jit else masked_error
    error(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)))
    for shape in ((1, 3, 4), (2, 1, 4), (3, 4)):
        with pytest.raises(jaxtyping.TypeCheckError, match="target"):
            error(jnp.ones((2, 3, 4)), jnp.ones(shape))
    with pytest.raises(jaxtyping.TypeCheckError, match="keep"):
        models.Encoder.__call__(None, jnp.ones((2, 8, 8, 3)), jnp.ones((2, 8, 8)), image_keep=jnp.ones((3, 4), int))
