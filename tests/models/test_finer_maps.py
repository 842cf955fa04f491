"""Maps finer than the patch grid: means over images moved by parts of a patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from av_mae.models.localizer import finer


@pytest.mark.parametrize("shifts", [1, 2, 3])
def test_finer_maps_are_means_over_moved_images(shifts):
    """Against a plain loop that moves with NumPy; a map that reads pixels alone is not changed inside the frame."""
    image = np.random.default_rng(shifts).standard_normal((2, 24, 16, 3)).astype(np.float32)
    patch = (8, 4)

    def heat(x):
        means = x.mean(-1).reshape(len(x), 3, 8, 4, 4).mean((2, 4))
        return jax.image.resize(means, (len(x), 24, 16), "nearest")

    def offset(size):
        return [round(((k + 0.5) / shifts - 0.5) * size) for k in range(shifts)]

    padded = np.pad(image, ((0, 0), (8, 8), (4, 4), (0, 0)), mode="edge")
    total = np.zeros((2, 24, 16))
    for down in offset(8):
        for right in offset(4):
            own = np.asarray(heat(jnp.asarray(padded[:, 8 + down : 32 + down, 4 + right : 20 + right])))
            back = np.pad(own, ((0, 0), (8, 8), (4, 4)), mode="edge")
            total += back[:, 8 - down : 32 - down, 4 - right : 20 - right] / shifts**2
    np.testing.assert_allclose(finer(heat, jnp.asarray(image), patch, shifts), total, rtol=1e-5, atol=1e-6)


def test_finer_maps_find_a_border_inside_a_patch():
    """A bar that ends in the middle of a patch: one map says half everywhere, the mean says where."""
    image = jnp.zeros((1, 16, 16, 1)).at[:, :, :6].set(1)

    def heat(x):
        return jax.image.resize(x[..., 0].reshape(1, 2, 8, 2, 8).mean((2, 4)), (1, 16, 16), "nearest")

    one, four = (np.asarray(finer(heat, image, (8, 8), shifts))[0, 8] for shifts in (1, 4))
    assert one[5] == one[6] and four[3] > four[5] > four[9]
