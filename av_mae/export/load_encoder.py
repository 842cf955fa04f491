"""Runs the encoder in this folder; needs JAX and NumPy alone.

from load_encoder import load
encode = load("FOLDER")           # with encoder.stablehlo and encoder.json; encode.inputs says what it takes
features = encode(first, second)  # {"image", "audio", "fusion"}: float32 arrays, a row for each clip
"""

import hashlib
import json
import pathlib
import sys

import jax.export
import numpy as np

FORMAT = 1


def load(folder=pathlib.Path(__file__).parent):
    folder = pathlib.Path(folder)
    about, program = json.loads((folder / "encoder.json").read_text()), (folder / "encoder.stablehlo").read_bytes()
    again = "export the encoder again with python -m av_mae.export --format=stablehlo"
    if about["format"] != FORMAT:
        raise RuntimeError(f"{folder} has format {about['format']}, not {FORMAT}: take its own loader, or {again}")
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= about["calling_convention"] <= newest:
        runs = f"of JAX {about['jax']}, but JAX {jax.__version__} runs {oldest} to {newest}: install one nearer to it"
        raise RuntimeError(f"{folder} has calling convention {about['calling_convention']} {runs}, or {again}")
    if hashlib.sha256(program).hexdigest() != about["sha256"]:
        raise RuntimeError(f"{folder}: encoder.stablehlo is damaged or not the one of encoder.json: {again}")
    sys.path.append(str(folder))  # jax.export reads with flatbuffers, which JAX does not bring: a copy lies there
    call = jax.jit(jax.export.deserialize(bytearray(program)).call)

    def encode(*arrays):
        for array, (name, (shape, dtype)) in zip(arrays, about["inputs"].items(), strict=True):
            if array.dtype != dtype or list(array.shape[1:]) != shape:
                wanted = f"{dtype} [B, {', '.join(map(str, shape))}]"
                raise ValueError(f"{name} must be {wanted}, got {array.dtype} {list(array.shape)}")
        return {name: np.asarray(x) for name, x in call(*arrays).items()}

    encode.inputs = about["inputs"]  # type: ignore[attr-defined]
    return encode
