"""Swin decoder block with fusion tokens in every window, as in the published system."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from av_mae.models.config import fit_window
from av_mae.models.layers import MLP, Attention, Initial, LayerNorm
from av_mae.models.patches import take


def relative_position_index(window: tuple[int, int]) -> np.ndarray:
    """int [N, N] for the N places of a window: (dy + rows - 1) · (2 columns - 1) + (dx + columns - 1)."""
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 2)
    dy, dx = np.moveaxis(places[:, None] - places[None], -1, 0)
    return (dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1


def shift_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """float32 [windows, N, N]: -100 between places that were not neighbours before the cyclic shift, else 0."""
    bands = [np.digitize(np.arange(n), [n - w, n - s]) if s else np.zeros(n, int)
             for n, w, s in zip(grid, window, shift, strict=True)]
    region = bands[0][:, None] * 3 + bands[1][None]
    region = rearrange(region, "(a h) (b w) -> (a b) (h w)", h=window[0], w=window[1])
    return np.where(region[:, :, None] != region[:, None, :], -100.0, 0.0).astype(np.float32)


class SwinBlock(nnx.Module):
    """block(x [B, N, D], fusion [B, F, D], positions=None) → (x, fusion).

    Fusion tokens join every window with the same norm, projections and MLP as the patches, without relative bias
    and shift mask; their attention outputs are averaged over windows. With `positions` [B, M] only those patches
    are carried through the MLP and returned. A grid no larger than the window on its shorter side is one window of
    that side, unshifted.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, grid: tuple[int, int], window: tuple[int, int],
                 shifted: bool, rngs: nnx.Rngs):
        fits = any(g <= w for g, w in zip(grid, window, strict=True))
        self.window = fit_window(grid, window)
        shift = (0, 0) if fits or not shifted else (self.window[0] // 2, self.window[1] // 2)
        self.norm1 = LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, rngs=rngs)
        biases = ((2 * self.window[0] - 1) * (2 * self.window[1] - 1), heads)
        self.relative_bias = Initial("normal", biases, 0.02).parameter(rngs)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, mlp_ratio, rngs=rngs)
        self.grid, self.shift = grid, shift

    def __call__(self, x: jax.Array, fusion: jax.Array, positions: jax.Array | None = None):
        y, f = self.norm1(x), self.norm1(fusion)
        y, f = self.attend_windows(y, f)
        if positions is not None:
            x, y = take(x, positions), take(y, positions)
        x, fusion = x + y, fusion + f
        return x + self.mlp(self.norm2(x)), fusion + self.mlp(self.norm2(fusion))

    def attend_windows(self, x: jax.Array, fusion: jax.Array):
        """Normed patches [B, N, D] and fusion tokens [B, F, D] → their attention outputs, fusion averaged."""
        (rows, columns), (height, width), fusions = self.grid, self.window, fusion.shape[1]
        windows = (rows // height) * (columns // width)
        x = rearrange(x, "b (r c) d -> b r c d", r=rows)
        x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = rearrange(x, "b (a h) (e w) d -> (b a e) (h w) d", h=height, w=width)
        y = jnp.concatenate([jnp.repeat(fusion, windows, axis=0), x], axis=1)
        y = self.attention(y, bias=self.bias(fusions, y.shape[0] // windows))
        fusion = rearrange(y[:, :fusions], "(b n) f d -> b n f d", n=windows).mean(1)
        x = rearrange(y[:, fusions:], "(b a e) (h w) d -> b (a h) (e w) d", a=rows // height, e=columns // width,
                      h=height)
        x = jnp.roll(x, self.shift, (1, 2))
        return rearrange(x, "b r c d -> b (r c) d"), fusion

    def bias(self, fusions: int, batch: int) -> jax.Array:
        """Relative bias and shift mask among patches, 0 wherever a fusion token is part: [B · windows, H, N, N]."""
        bias = jnp.moveaxis(self.relative_bias[...][relative_position_index(self.window)], -1, 0)[None]
        if any(self.shift):
            mask = jnp.asarray(shift_mask(self.grid, self.window, self.shift))[:, None]
            bias = jnp.tile(bias + mask.astype(bias.dtype), (batch, 1, 1, 1))
        return jnp.pad(bias, [(0, 0), (0, 0), (fusions, 0), (fusions, 0)])
