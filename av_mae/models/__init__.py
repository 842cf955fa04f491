"""Models: `AVMAE(AVMAEConfig(...), rngs=nnx.Rngs(0))` and what it is made of."""

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
from av_mae.models.encoder import Encoder, Tokens, pool
from av_mae.models.flops import closed_form_flops
from av_mae.models.heads import Classifier, Segmenter, Separator, joint_score
from av_mae.models.localizer import Localizer, attention_map, occlusion_map, occlusion_noise
from av_mae.models.masked_autoencoder import AVMAE, Output
from av_mae.models.patches import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Mask,
    mask_noise,
    normalize_image,
    patchify,
    random_mask,
    targets,
    unpatchify,
)

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
