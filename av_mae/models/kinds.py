"""Models by the name of their kind, as checkpoints have it."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from av_mae.models.classifier import Classifier
from av_mae.models.config import AVMAEConfig
from av_mae.models.encoder import Encoder, Stream
from av_mae.models.head_config import ClassifierConfig, LocalizerConfig, SegmenterConfig, SeparatorConfig
from av_mae.models.localizer import Localizer
from av_mae.models.masked_autoencoder import AVMAE
from av_mae.models.segmenter import Segmenter
from av_mae.models.separator import Separator


class EncoderModel(nnx.Module):
    """An encoder without decoders or head, in its place: `.encoder`, with `.config`."""

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)


PRETRAINING = "pretraining"
ENCODER = "encoder"
# Models with an encoder and a head: the class, and that of the head's configuration.
HEADS: Mapping[str, tuple[type[nnx.Module], type]] = {
    "classifier": (Classifier, ClassifierConfig), "separator": (Separator, SeparatorConfig),
    "segmenter": (Segmenter, SegmenterConfig), "localizer": (Localizer, LocalizerConfig)}
# One ViT by itself, to start a stream of a run from.
STREAMS = {"image_encoder": "image", "audio_encoder": "audio"}


def build_model(kind: str, config: AVMAEConfig, head: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A model of kind 'pretraining', 'encoder', or one of HEADS (with the configuration `head`) or STREAMS, with random
    weights and its configuration as `.config`."""
    if kind == PRETRAINING:
        return AVMAE(config, rngs=rngs)
    if kind in HEADS:
        return HEADS[kind][0](config, head, rngs=rngs)
    if kind in STREAMS:
        stream = getattr(config, STREAMS[kind])
        return Stream(stream, stream.width, (), rngs=rngs)
    return EncoderModel(config, rngs=rngs)
