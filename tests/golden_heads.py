"""The published heads of the golden files as models, and models by their variables' dotted paths, for tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae import models
from av_mae.convert import load_published

VARIABLES = (nnx.Param, nnx.BatchStat)
MODELS = {"classifier": models.Classifier, "separator": models.Separator, "segmenter": models.Segmenter}
FILES = {
    "classifier_plain": "classifier",
    "classifier_norm": "classifier",
    "separation": "separator",
    "segmentation5": "segmenter",
}


def encoder_config(shared, name):
    """Configuration of the encoder in a golden head's file."""
    sizes = json.loads((shared / "golden" / "config.json").read_text())
    c, large = sizes["config"], name.startswith("segmentation")
    stream = dict(
        width=sizes["seg_width"] if large else c["width"],
        depth=sizes["seg_depth"] if large else c["depth"],
        heads=c["heads"],
    )
    return models.AVMAEConfig(
        image=models.StreamConfig(size=tuple(sizes["seg_image"] if large else c["image"]), channels=3, **stream),
        audio=models.StreamConfig(size=tuple(c["audio"]), channels=1, **stream),
        fusion=models.FusionConfig(
            kind="factorized",
            tokens=tuple(c["tokens"]),
            heads=c["heads"],
            attention_ratio=c["attn"],
            mlp_ratio=c["mlp"],
        ),
    )


def flat_variables(model, kinds=VARIABLES):
    """Parameters and statistics by dotted path."""
    return {
        ".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model, kinds))
    }


def set_variables(model, arrays):
    """Sets all parameters and statistics of the model, which must be of these names and shapes."""
    flat = nnx.to_flat_state(nnx.state(model, VARIABLES))
    names = [".".join(map(str, path)) for path, _ in flat]
    assert set(names) == arrays.keys()
    for name, (_, variable) in zip(names, flat, strict=True):
        assert variable.shape == arrays[name].shape and variable.dtype == arrays[name].dtype, name
    nnx.update(
        model,
        nnx.from_flat_state(
            [
                (path, variable.replace(jnp.asarray(arrays[name])))
                for name, (path, variable) in zip(names, flat, strict=True)
            ]
        ),
    )
    return model


def golden_head(shared, name):
    """The model of a golden head's file with its weights."""
    return load_published(shared / "golden" / f"{name}.safetensors", encoder_config(shared, name))


def compiled(model, encoder=None):
    """model(*inputs) as one program, with another encoder if there is one; what training moves in it is lost."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, *inputs):
        model = nnx.merge(graph, state, copy=True)
        model.encoder = encoder or model.encoder
        return model(*inputs)

    return lambda *inputs: run(state, *inputs)


def load_golden(shared):
    return dict(np.load(shared / "golden" / "heads.npz"))


def golden_inputs(data, prefix=""):
    """image [B, H, W, 3] and audio [B, mels, frames] of heads.npz."""
    return jnp.asarray(data[f"{prefix}image"]).transpose(0, 2, 3, 1), jnp.asarray(data[f"{prefix}audio"])[:, 0]


def random_variables(model, seed=0):
    """The model with NumPy's draws as parameters and statistics, so that nothing is neutral."""
    random, arrays = np.random.default_rng(seed), {}
    for name, value in flat_variables(model).items():
        drawn = 0.3 * random.standard_normal(value.shape)
        if name.endswith(("scale", "variance")):
            drawn = 1 + np.abs(drawn)
        arrays[name] = np.asarray(drawn + 7 if name.endswith("batches") else drawn, value.dtype)
    return set_variables(model, arrays)


def float64(model):
    """Parameters and statistics by dotted path in double precision."""
    return {name: np.asarray(value, np.float64) for name, value in flat_variables(model).items()}
