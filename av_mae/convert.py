"""Published weights (PyTorch layout, safetensors) → models of this package."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from av_mae.errors import UserError
from av_mae.models import AVMAE, AVMAEConfig

# Published path → path here, in order. The fusion norms of `token` are swapped in the published system.
RENAMES = (
    (r"_decoder_blocks\.", "_decoder.blocks."),
    (r"_decoder_pos_embed$", "_decoder.positions"),
    (r"_decoder_mask_token$", "_decoder.mask_token"),
    (r"_decoder_pred\.", "_decoder.predict."),
    (r"_decoder_(embed|norm)\.", r"_decoder.\1."),
    (r"patch_embed\.proj\.", "patch_embed."),
    (r"\.attn\.attn_v\.", ".attention.aggregate_image."),
    (r"\.attn\.attn_a\.", ".attention.aggregate_audio."),
    (r"\.attn\.relative_position_bias_table$", ".relative_bias"),
    (r"\.attn\.", ".attention."),
    (r"norm1_mm\.", "norm_fusion."),
    (r"norm1_img\.", "norm_image."),
    (r"norm1_aud\.", "norm_audio."),
    (r"\.proj\.", ".out."),
    (r"\.q\.", ".query."),
    (r"\.k\.", ".key."),
    (r"\.v\.", ".value."),
)
BUFFERS = re.compile(r"^encoder\.(image|audio)\.pos_embed$|\.attn_mask$|\.relative_position_index$")
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def unfuse(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Splits rows of fused weights and biases: q, k, v or k, v in this order."""
    match = re.search(r"\.(qkv|kv)\.", name)
    if match is None:
        return {name: value}
    parts = FUSED[match.group(1)]
    return {name.replace(match.group(0), f".{part}."): rows
            for part, rows in zip(parts, np.split(value, len(parts)), strict=True)}


def split_pairs(name: str, value: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Splits a pair's key or value weight [out, 2 D] into its halves; the bias counts once, on the image half.

    The first half multiplies sound in `dense` and the image in `factorized`.
    """
    match = re.match(r"(encoder\.fusion_blocks\.\d+\.attention)\.(query|key|value|out)\.(weight|bias)$", name)
    if match is None or kind not in ("dense", "factorized"):
        return {name: value}
    base, part, leaf = match.groups()
    base = f"{base}.pairs" if kind == "factorized" else base
    if part in ("query", "out"):
        return {f"{base}.{part}.{leaf}": value}
    if leaf == "bias":
        return {f"{base}.{part}_image.bias": value}
    halves = ("audio", "image") if kind == "dense" else ("image", "audio")
    return {f"{base}.{part}_{half}.weight": columns
            for half, columns in zip(halves, np.split(value, 2, axis=1), strict=True)}


def to_layout(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Leaf names and layouts: kernels [in, out], patch embedding as a linear layer over (row, column, channel)."""
    if name.endswith("patch_embed.weight"):
        out = value.shape[0]
        return name.replace("weight", "kernel"), value.transpose(2, 3, 1, 0).reshape(-1, out)
    if name.endswith(".weight"):
        return (name[:-6] + "kernel", value.T) if value.ndim == 2 else (name[:-6] + "scale", value)
    return name, value


def from_published(tensors: dict[str, np.ndarray], config: AVMAEConfig) -> dict[str, np.ndarray]:
    """Published tensors by name → parameters here by dotted path; buffers are dropped."""
    result = {}
    for name, value in tensors.items():
        if BUFFERS.search(name):
            continue
        name = rename(name)
        if config.fusion.kind == "token":
            swap = {"norm_image.": "norm_audio.", "norm_audio.": "norm_image."}
            name = re.sub(r"norm_(image|audio)\.", lambda match: swap[match.group(0)], name)
        for part, rows in unfuse(name, value).items():
            for half, columns in split_pairs(part, rows, config.fusion.kind).items():
                path, array = to_layout(half, columns)
                result[path] = array
    return result


def load_parameters(model: nnx.Module, tensors: dict[str, np.ndarray], source: str = "the file") -> None:
    """Sets all parameters of `model` from dotted path → array. Raises UserError naming the first that does not fit."""
    parameters = {".".join(map(str, path)): variable
                  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for path in (*sorted(parameters.keys() - tensors.keys()), *sorted(tensors.keys() - parameters.keys())):
        what = "lacks" if path in parameters else "has, beyond the configured model,"
        raise UserError(f"{source} {what} the parameter {path}; check the model configuration")
    for path, variable in parameters.items():
        if variable.shape != tensors[path].shape:
            raise UserError(f"{source} has {path} of shape {tensors[path].shape}, "
                            f"but the configured model needs {variable.shape}")
    state = nnx.state(model, nnx.Param)
    flat = [(path, variable.replace(jnp.asarray(tensors[".".join(map(str, path))])))
            for path, variable in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(flat))


def load_published(path: str | pathlib.Path, config: AVMAEConfig) -> AVMAE:
    """A published pretraining checkpoint in safetensors → AVMAE with its weights.

    Raises UserError when the file cannot be read or holds a model of another configuration.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from error
    model = AVMAE(config, rngs=nnx.Rngs(0))
    load_parameters(model, from_published(tensors, config), str(path))
    return model
