"""Models: `AVMAE(AVMAEConfig(...), rngs=nnx.Rngs(0))` and what it is made of.

Shapes are written with one alphabet of dimensions, here and in the whole package:

| | |
|---|---|
| B | batch (clips) |
| N | tokens (patches), in general; I of the image, A of the audio, F fusion tokens |
| K, M | kept and masked patches of a stream; K also the head width in attention |
| D | width; Di, Da, Df of image, audio and fusion tokens where they may differ |
| H, K, V | heads, head width of queries and keys, head width of values |
| C | context tokens in attention; channels or classes of a map |
| P | patch values |
| L | encoder layers |

Sizes of inputs are words: `B height width 3`, `B mels frames`. `*name` is any number of axes, `#N` is N or 1, `_` is
anything.
"""

from av_mae.models.config import (
    AVMAEConfig,
    ClassifierConfig,
    DecoderConfig,
    FusionConfig,
    LocalizerConfig,
    SegmenterConfig,
    SeparatorConfig,
    StreamConfig,
)
from av_mae.models.encoder import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Encoder,
    Mask,
    Tokens,
    mask_noise,
    normalize_image,
    patchify,
    pool,
    random_mask,
    unpatchify,
)
from av_mae.models.flops import closed_form_flops
from av_mae.models.heads import Classifier, Segmenter, Separator, joint_score
from av_mae.models.localizer import Localizer, attention_map, occlusion_map, occlusion_noise
from av_mae.models.masked_autoencoder import AVMAE, Output, Reconstruction, targets

__all__ = [
    "AVMAE",
    "AVMAEConfig",
    "Classifier",
    "ClassifierConfig",
    "DecoderConfig",
    "Encoder",
    "FusionConfig",
    "IMAGENET_DEVIATION",
    "IMAGENET_MEAN",
    "Localizer",
    "LocalizerConfig",
    "Mask",
    "Output",
    "Reconstruction",
    "Segmenter",
    "SegmenterConfig",
    "Separator",
    "SeparatorConfig",
    "StreamConfig",
    "Tokens",
    "attention_map",
    "closed_form_flops",
    "joint_score",
    "mask_noise",
    "normalize_image",
    "occlusion_map",
    "occlusion_noise",
    "patchify",
    "pool",
    "random_mask",
    "targets",
    "unpatchify",
]
