"""The segmenter: a mask over the image for what sounds (published system)."""

import jax
import numpy as np
from flax import nnx

from av_mae.models.config import AVMAEConfig
from av_mae.models.convolutions import Convolution, DoubleConv, Up, as_map, beside, double_resolution
from av_mae.models.encoder import Encoder
from av_mae.models.head_config import SegmenterConfig, segmenter_scales
from av_mae.models.layers import LayerNorm, Linear


class Segmenter(nnx.Module):
    """segmenter(image, audio, train_rows=None) → logits [B, H, W, classes]; one class is a binary mask.

    A U-Net over image layers, with the mean of the projected sound of the last layer at each scale. Lists run from
    the coarsest scale, at the patch grid, to the finest at half the image's resolution; patches of 2^n make n scales.
    Inputs as for the encoder. `train_rows` [B] is given in training: the clips over which batch norms take their
    statistics.

    Raises:
      UserError: image patches are not 2^n × 2^n, or 2^(n - 1) does not divide the image width.
    """

    def __init__(self, config: AVMAEConfig, head: SegmenterConfig, *, rngs: nnx.Rngs):
        self.config, self.head = config, head
        widths, width = segmenter_scales(config.image, head.width), config.image.width
        self.encoder = Encoder(config, rngs=rngs)
        self.image_norms = nnx.List(LayerNorm(width, eps=1e-5) for _ in widths)
        self.audio_projections = nnx.List(Linear(config.audio.width, scale, rngs=rngs) for scale in widths)
        self.audio_norms = nnx.List(LayerNorm(scale, eps=1e-5) for scale in widths)
        self.top = DoubleConv(width + widths[0], widths[0], rngs=rngs)
        self.laterals = nnx.List(
            Up(width, widths[scale], 2 ** scale, rngs=rngs) for scale in range(1, len(widths)))
        self.ups = nnx.List(
            Up(widths[scale - 1], widths[scale], 2, skip=2 * widths[scale], rngs=rngs)
            for scale in range(1, len(widths)))
        self.predict1 = Convolution(widths[-1], head.width, rngs=rngs)
        self.predict2 = Convolution(head.width, head.classes, rngs=rngs)
        self.layers = tuple(np.linspace(0, config.image.depth - 1, len(widths)).astype(int).tolist())

    def __call__(self, image: jax.Array, audio: jax.Array, train_rows: jax.Array | None = None) -> jax.Array:
        layers = self.encoder(image, audio, return_layers=True).layers
        maps = [as_map(norm(layers[number].image), self.config.image.grid)
                for number, norm in zip(self.layers, self.image_norms, strict=True)]
        heard = [norm(project(layers[-1].audio)).mean(1)
                 for project, norm in zip(self.audio_projections, self.audio_norms, strict=True)]
        x = self.top(beside(maps[0], heard[0]), train_rows)
        for scale, (lateral, up) in enumerate(zip(self.laterals, self.ups, strict=True), 1):
            skip = beside(lateral(maps[scale], train_rows=train_rows), heard[scale])
            x = up(x, skip, train_rows)
        return self.predict2(double_resolution(self.predict1(x)))
