"""The encoder of a checkpoint on all devices of this process, and what of its output a table holds."""

import functools
import hashlib
import json

import jax
import numpy as np
from flax import nnx

from av_mae import models, recipes
from av_mae.config import MeshConfig
from av_mae.errors import UserError
from av_mae.exporting.inputs import Shape
from av_mae.loading import forward
from av_mae.training.checkpoint import FREE_FIELDS
from av_mae.training.mesh import batch_sharding, make_mesh, replicated, row_shards
from av_mae.training.step import flat_values


class Embedder:
    """embedder(image, audio) → columns: float32 arrays [B, …] by name, B a multiple of `devices`.

    Columns are `image`, `audio` and `fusion` [B, D], means over the tokens after the final norms (no `fusion` where
    the model has no such tokens); for each of `layers` the means before those norms, `image_layer3` …; and with
    `tokens` all tokens after them, `image_tokens` [B, N, D] ….
    """

    def __init__(self, model: nnx.Module, tokens: bool = False, layers: tuple[int, ...] = ()):
        depth = len(model.encoder.fusion_blocks)
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if wrong:
            raise UserError(f"--layers={','.join(map(str, layers))}: the encoder has layers 0 to {depth - 1}")
        self.config, self.sound = model.config, model.sound
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        self.rows, self.devices = batch_sharding(mesh), row_shards(mesh)
        self._graph, state = nnx.split(model.encoder)
        self._state = jax.device_put(state, replicated(mesh))
        self._tokens, self._layers = tokens, layers

    def __call__(self, image: jax.Array, audio: jax.Array) -> dict[str, jax.Array]:
        """Images uint8 [B, H, W, 3] and log-mels float32 [B, mels, frames], rows sharded as `rows`."""
        return _columns(self._state, image, audio, self._graph, self._tokens, self._layers)

    def columns(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each column."""
        size = self.config.image.size, self.config.audio.size
        found = jax.eval_shape(self.__call__, jax.ShapeDtypeStruct((1, *size[0], 3), np.uint8),
                               jax.ShapeDtypeStruct((1, *size[1]), np.float32))
        streams = [name for name in ("image", "audio", "fusion") if name in found]  # jax sorts names
        endings = ["", *(f"_layer{number}" for number in self._layers), *(["_tokens"] if self._tokens else [])]
        return {name + ending: found[name + ending].shape[1:] for ending in endings for name in streams}

    def shape(self, stride: float | None = None, missing: str = "error") -> Shape:
        """What clips are cut to for this encoder."""
        return Shape(self.config.image.size, self.config.audio.size, self.sound, stride, missing)


@functools.partial(jax.jit, static_argnames=("graph", "tokens", "layers"))
def _columns(state: nnx.State, image: jax.Array, audio: jax.Array, graph: nnx.GraphDef, tokens: bool,
             layers: tuple[int, ...]) -> dict[str, jax.Array]:
    encoded, features = forward(nnx.merge(graph, state), image, audio, return_layers=bool(layers))
    columns = dict(features)
    for number in layers:
        columns |= {f"{stream}_layer{number}": x for stream, x in models.pool(encoded.layers[number]).items()}
    if tokens:
        columns |= {f"{stream}_tokens": getattr(encoded, stream) for stream in features}
    return columns


def model_identity(model: nnx.Module) -> str:
    """SHA-256 of an encoder's parameters with their names: the same for the same embeddings, whatever head it has."""
    digest = hashlib.sha256()
    for name, x in sorted(flat_values(model.encoder).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()


def configuration_hash(model: nnx.Module) -> str:
    """SHA-256 of the configuration on which embeddings depend: streams, fusion and sound."""
    config = recipes.to_dict(model.config)
    for field in FREE_FIELDS:
        part, _, name = field.partition(".")
        config[part].pop(name)
    text = json.dumps([config["image"], config["audio"], config["fusion"], recipes.to_dict(model.sound)],
                      sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
