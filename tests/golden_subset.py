"""The golden tensors in tests/data/golden: packed files, and models that hold a part of published weights."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from published import names_of

from av_mae import models

FOLDER = pathlib.Path(__file__).parent / "data" / "golden"
STREAMS = ("image", "audio", "fusion")
SAMPLES = 96  # entries of a gradient that are kept


def pack(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays bit for bit. The bytes of all float32 values lie in four planes, which compress better."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    floats = {name: x for name, x in arrays.items() if x.dtype == np.float32}
    values = np.concatenate([x.astype("<f4").ravel() for x in floats.values()] or [np.zeros(0, "<f4")])
    index = json.dumps({name: x.shape for name, x in floats.items()})
    np.savez_compressed(
        path,
        index=index,
        planes=np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4).T),
        **{name: x for name, x in arrays.items() if name not in floats},
    )


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file by name."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key not in ("index", "planes")}
        values = np.ascontiguousarray(file["planes"].T).reshape(-1).view("<f4")
        for key, shape in json.loads(str(file["index"])).items():
            size = int(np.prod(shape))
            arrays[key], values = values[:size].reshape(shape), values[size:]
    return arrays


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose name begins with the prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def sizes() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


def config(kind: str = "factorized", decoder: str = "plain", normalize: bool = True) -> models.AVMAEConfig:
    """Of the small models; those with Swin decoders have larger inputs."""
    c = sizes()["config"]
    inputs = sizes()["swin_sizes"] if decoder == "swin" else c
    stream = dict(width=c["width"], depth=c["depth"], heads=c["heads"], normalize_targets=normalize)
    return models.AVMAEConfig(
        image=models.StreamConfig(size=tuple(inputs["image"]), channels=3, mask_ratio=c["mask"][0], **stream),
        audio=models.StreamConfig(size=tuple(inputs["audio"]), channels=1, mask_ratio=c["mask"][1], **stream),
        fusion=models.FusionConfig(
            kind=kind, tokens=tuple(c["tokens"]), heads=c["heads"], attention_ratio=c["attn"], mlp_ratio=c["mlp"]
        ),
        decoder=models.DecoderConfig(kind=decoder, **c["dec"]),
    )


def with_weights(model: nnx.Module, tensors: dict[str, np.ndarray]) -> nnx.Module:
    """The model with published tensors in place of some of its variables; the others stay as they are."""
    names = names_of(model)
    arrays = {}
    for name in tensors.keys() - names.buffers.keys():
        arrays |= names.rules[name].split(tensors[name])
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(nnx.state(model))}
    changed = []
    for name, value in arrays.items():
        path, variable = flat[name]
        assert variable.shape == value.shape, name
        changed.append((path, variable.replace(jnp.asarray(value, variable.get_value().dtype))))
    nnx.update(model, nnx.from_flat_state(changed))
    return model


def as_published(gradients: nnx.State, model: nnx.Module) -> dict[str, np.ndarray]:
    """Gradients by published name and in published layouts."""
    arrays = {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(gradients)}
    return {name: rule.join(arrays) for name, rule in names_of(model).rules.items() if set(rule.here) <= arrays.keys()}


def sample(x: np.ndarray) -> np.ndarray:
    """SAMPLES entries, evenly spread over the array in its own order (all of a smaller one)."""
    x = np.asarray(x).ravel()
    return x[np.linspace(0, x.size - 1, min(x.size, SAMPLES)).astype(int)]


def model_inputs(arrays: dict[str, np.ndarray]) -> tuple:
    """image [B, H, W, 3], audio [B, mels, frames] and the noise of both masks."""
    return (
        jnp.asarray(arrays["image"]).transpose(0, 2, 3, 1),
        jnp.asarray(arrays["audio"])[:, 0],
        jnp.asarray(arrays["image_noise"]),
        jnp.asarray(arrays["audio_noise"]),
    )


def with_tokens(model: nnx.Module, tokens: models.Tokens) -> nnx.Module:
    """A copy of the model whose encoder gives these tokens, whatever it is asked."""
    made = nnx.merge(*nnx.split(model), copy=True)
    made.encoder = lambda *_, **__: tokens
    return made
