"""Models by the name of their kind, as checkpoints have it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from av_mae.models.config import AVMAEConfig, ClassifierConfig, LocalizerConfig, SegmenterConfig, SeparatorConfig
from av_mae.models.encoder import Encoder, Stream
from av_mae.models.heads import Classifier, Segmenter, Separator
from av_mae.models.layers import Initial
from av_mae.models.localizer import Localizer
from av_mae.models.masked_autoencoder import AVMAE


class EncoderModel(nnx.Module):
    """An encoder without decoders or head, in its place: `.encoder`, with `.config`."""

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)


PRETRAINING = "pretraining"
ENCODER = "encoder"
# Models with an encoder and a head: the class, and that of the head's configuration.
HEADS: Mapping[str, tuple[type[nnx.Module], type]] = {
    "classifier": (Classifier, ClassifierConfig),
    "separator": (Separator, SeparatorConfig),
    "segmenter": (Segmenter, SegmenterConfig),
    "localizer": (Localizer, LocalizerConfig),
}
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


Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its values, which are kept as flat dicts by dotted name."""

    graph: nnx.GraphDef
    paths: dict[str, tuple]
    initials: dict[str, Initial]

    def merge(self, values: Params) -> nnx.Module:
        """The model that computes with these parameters and statistics."""
        return nnx.merge(self.graph, nnx.from_flat_state([(self.paths[name], x) for name, x in values.items()]))


def flat_values(model: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> Params:
    """Values of one kind of a model by dotted name, e.g. 'encoder.image.blocks.0.mlp.fc1.kernel'."""
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def define_model(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[ModelDefinition, Params, Params]:
    """The structure of the model that `build` makes, and the shapes of its parameters and of its statistics.

    Nothing is allocated.
    """
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, state = nnx.split(model, (nnx.Param, nnx.BatchStat))
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    initials = {name: variable.get_metadata("initial") for name, (_, variable) in flat.items()}
    definition = ModelDefinition(graph, {name: path for name, (path, _) in flat.items()}, initials)
    return definition, flat_values(model), flat_values(model, nnx.BatchStat)
