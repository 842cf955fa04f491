"""The separator: a mask on the log-mel of a mixture for the source seen in the image (published system)."""

import jax
import numpy as np
from flax import nnx

from av_mae.models.config import AVMAEConfig
from av_mae.models.convolutions import Convolution, DoubleConv, Up, as_map, beside
from av_mae.models.encoder import Encoder
from av_mae.models.head_config import SeparatorConfig, separator_scales
from av_mae.models.layers import LayerNorm, Linear


class Separator(nnx.Module):
    """separator(image, mixture, train_rows=None) → mask logits [B, mels, frames].

    A U-Net over audio layers, conditioned at each scale on the mean image token of the last layer. Lists run from the
    finest scale, which reads the deepest layer, to the coarsest at the patch grid; patches of 2^n make n + 1 scales.
    Inputs as for the encoder. `train_rows` [B] is given in training: the clips over which batch norms take their
    statistics.

    Raises:
      UserError: audio patches are not 2^n × 2^n, or 2^n does not divide the audio width.
    """

    def __init__(self, config: AVMAEConfig, head: SeparatorConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        widths, width, image_width = separator_scales(config.audio), config.audio.width, config.image.width
        top = len(widths) - 1
        self.encoder = Encoder(config, rngs=rngs)
        self.condition_norm = LayerNorm(image_width, eps=1e-5)
        self.audio_norms = nnx.List(LayerNorm(width, eps=1e-5) for _ in widths)
        self.conditions = nnx.List(Linear(image_width, scale, rngs=rngs) for scale in widths)
        self.top = DoubleConv(2 * width, width, rngs=rngs)
        self.laterals = nnx.List(
            Up(width, widths[scale], 2 ** (top - scale), rngs=rngs) for scale in range(top))
        self.ups = nnx.List(
            Up(widths[scale + 1], widths[scale], 2, skip=2 * widths[scale], rngs=rngs) for scale in range(top))
        self.predict = Convolution(widths[0], 1, rngs=rngs)
        self.layers = tuple(np.linspace(0, config.audio.depth - 1, top + 1).astype(int)[::-1].tolist())

    def __call__(self, image: jax.Array, mixture: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        layers = self.encoder(image, mixture, return_layers=True).layers
        maps = [as_map(norm(layers[number].audio), self.config.audio.grid)
                for number, norm in zip(self.layers, self.audio_norms, strict=True)]
        seen = self.condition_norm(layers[-1].image).mean(1)
        conditions = [linear(seen) for linear in self.conditions]
        x = self.top(beside(maps[-1], conditions[-1]), train_rows)
        for scale in reversed(range(len(self.ups))):
            lateral = self.laterals[scale](maps[scale], train_rows=train_rows)
            x = self.ups[scale](x, beside(lateral, conditions[scale]), train_rows)
        return self.predict(x)[..., 0]
