"""Models by the name of their kind, as checkpoints have it, and models without their values."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array

from av_mae.models.config import AVMAEConfig, ClassifierConfig, LocalizerConfig, SegmenterConfig, SeparatorConfig
from av_mae.models.encoder import Encoder, Stream
from av_mae.models.heads import Classifier, Segmenter, Separator
from av_mae.models.layers import Initial
from av_mae.models.localizer import Localizer
from av_mae.models.masked_autoencoder import AVMAE


class EncoderModel(nnx.Module):
    """A model with an encoder and nothing else: `.encoder`, with `.config`."""

    def __init__(self, config: AVMAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)


PRETRAINING = "pretraining"
ENCODER = "encoder"
# Models with an encoder and a head: the model's class, and the class of the head's configuration.
HEADS: Mapping[str, tuple[Callable[..., nnx.Module], type]] = {
    "classifier": (Classifier, ClassifierConfig),
    "separator": (Separator, SeparatorConfig),
    "segmenter": (Segmenter, SegmenterConfig),
    "localizer": (Localizer, LocalizerConfig),
}
# A unimodal ViT, from which a stream of a run can start.
STREAMS = {"image_encoder": "image", "audio_encoder": "audio"}


def build_model(kind: str, config: AVMAEConfig, head: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A model with random weights, and with its configuration as `.config`.

    Args:
      kind: 'pretraining', 'encoder', or a name in HEADS or STREAMS.
      config: of the model.
      head: configuration of the head, of the class that HEADS names; `None` for other kinds.
      rngs: random keys for the weights.
    """
    if kind == PRETRAINING:
        return AVMAE(config, rngs=rngs)
    if kind in HEADS:
        return HEADS[kind][0](config, head, rngs=rngs)
    if kind in STREAMS:
        stream = getattr(config, STREAMS[kind])
        return Stream(stream, stream.width, (), rngs=rngs)
    return EncoderModel(config, rngs=rngs)


Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its values, which are kept in flat dicts by dotted name.

    Attributes:
      graph: the model's structure.
      paths: of each value, where it is in the model.
      initials: of each value, how it is drawn.
    """

    graph: nnx.GraphDef[nnx.Module]
    paths: dict[str, tuple[Any, ...]]
    initials: dict[str, Initial]

    def merge(self, values: Params) -> nnx.Module:
        """The model with these parameters and statistics."""
        return nnx.merge(self.graph, nnx.from_flat_state([(self.paths[name], x) for name, x in values.items()]))


def flat_values(model: nnx.Module, kind: type[nnx.Variable[Any]] = nnx.Param) -> Params:
    """A model's values of one kind (parameters by default) by dotted name: 'encoder.image.blocks.0.mlp.fc1.kernel'."""
    state = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def define_model(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[ModelDefinition, Params, Params]:
    """The definition of the model that `build` makes, and the shapes of its parameters and statistics by dotted name.

    No array is allocated.
    """
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, state = nnx.split(model, (nnx.Param, nnx.BatchStat))
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    initials = {name: variable.get_metadata("initial") for name, (_, variable) in flat.items()}
    definition = ModelDefinition(graph, {name: path for name, (path, _) in flat.items()}, initials)
    return definition, flat_values(model), flat_values(model, nnx.BatchStat)
