"""Encoders as files that run, or load, without this code: StableHLO, ONNX, and DeepAVFusion's names in safetensors."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

import av_mae
from av_mae import convert, recipes
from av_mae.config import SoundConfig
from av_mae.convert.store import whole_or_nothing
from av_mae.data.audio import mel_filter_bank
from av_mae.errors import UserError
from av_mae.export import load_encoder
from av_mae.export.embeddings import configuration_hash, model_identity
from av_mae.loading import LoadedModel, forward
from av_mae.storage import is_url

INPUTS, OUTPUTS = ("media", "tensors"), ("pooled", "tokens")


@dataclasses.dataclass(frozen=True)
class Program:
    """function(first, second) → {'image', 'audio', 'fusion'}: float32, means over tokens [B, D] or tokens [B, N, D].

    inputs: name → (shape of one row, dtype), in the order of the arguments.
    """

    function: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
    inputs: dict[str, tuple[tuple[int, ...], str]]

    def specs(self, batch) -> list[jax.ShapeDtypeStruct]:
        """The arguments for a batch of this many rows, which may be a symbol."""
        return [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in self.inputs.values()]


def make_program(model: LoadedModel, inputs: str, outputs: str) -> Program:
    """The encoder of a model.

    inputs 'tensors': `image` float32 [B, H, W, 3] with ImageNet's mean and deviation and `audio` float32
    [B, mels, frames], a standardised log-mel. 'media': `image` uint8 [B, H, W, 3], a frame already cropped and
    resized to the model's size, and `waveform` float32 [B, samples] in -1…1 at the model's rate, as long as the
    model's window. outputs: 'pooled' or 'tokens'.
    """
    encoder, sound, config = model.encoder, model.sound, model.config

    def from_tensors(image: jax.Array, audio: jax.Array) -> dict[str, jax.Array]:
        tokens, features = forward(encoder, image, audio)
        return features if outputs == "pooled" else {name: getattr(tokens, name) for name in features}

    def from_media(image: jax.Array, waveform: jax.Array) -> dict[str, jax.Array]:
        return from_tensors(image, log_mel(waveform, sound))

    size = (*config.image.size, 3)
    if inputs == "tensors":
        return Program(from_tensors, {"image": (size, "float32"), "audio": (tuple(config.audio.size), "float32")})
    samples = config.audio.size[1] * sound.hop
    return Program(from_media, {"image": (size, "uint8"), "waveform": ((samples,), "float32")})


def log_mel(waveform: jax.Array, sound: SoundConfig) -> jax.Array:
    """data.audio.log_mel of a batch: waveforms [B, samples] → [B, mels, samples // hop], samples above n_fft / 2."""
    half, count = sound.n_fft // 2, waveform.shape[1] // sound.hop
    padded = jnp.concatenate([waveform[:, half:0:-1], waveform, waveform[:, -2 : -half - 2 : -1]], axis=1)
    frames = padded[:, sound.hop * np.arange(count)[:, None] + np.arange(sound.n_fft)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(sound.n_fft) / sound.n_fft)
    spectrum = jnp.fft.rfft(frames * window.astype(np.float32))
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    mel = jnp.einsum("btf,fm->bmt", power, mel_filter_bank(sound), precision=jax.lax.Precision.HIGHEST)
    logarithm = jnp.log(mel + np.float32(sound.log_floor)) * np.float32(1 / (math.log(10) * sound.std))
    return logarithm - np.float32(sound.mean / sound.std)


PLATFORMS = ("cpu", "cuda", "tpu")
# The converter's own dependencies want an Orbax older than the one here, but it runs without them.
ONNX_INSTALL = "pip install onnx-ir onnxruntime, then pip install --no-deps jax2onnx"
LARGEST = 2**31  # bytes: what both formats can hold in one file


def export_stablehlo(model: LoadedModel, output: str | os.PathLike[str], inputs: str, outputs: str) -> str:
    """Writes `encoder.stablehlo` (jax.export, any batch size, for cpu, cuda and tpu), `encoder.json`, which says what
    it takes and is, and `load_encoder.py`, which runs it, with the library that jax.export reads with. Returns what
    was written, in a line.

    Raises:
      UserError: `output` is there already or cannot be written, or the encoder is too large.
    """
    import flatbuffers

    program = make_program(model, inputs, outputs)
    check_size(model)
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(program.function), platforms=PLATFORMS)(*program.specs(batch))
    data = bytes(exported.serialize())
    about = describe(model, program, outputs, data) | {
        "format": load_encoder.FORMAT,
        "calling_convention": exported.calling_convention_version,
        "platforms": PLATFORMS,
    }
    with whole_or_nothing(output) as (unfinished, _):
        unfinished.mkdir()
        (unfinished / "encoder.stablehlo").write_bytes(data)
        (unfinished / "encoder.json").write_text(json.dumps(about, indent=2) + "\n")
        shutil.copy(load_encoder.__file__, unfinished / "load_encoder.py")
        shutil.copytree(
            pathlib.Path(flatbuffers.__file__).parent,
            unfinished / "flatbuffers",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return f"{output}: encoder.stablehlo, {len(data) / 1e6:.1f} MB, takes {takes(program)}"


def export_onnx(model: LoadedModel, output: str | os.PathLike[str], inputs: str, outputs: str) -> str:
    """Writes `encoder.onnx` (any batch size) by jax2onnx, and `encoder.json`. Returns what was written, in a line.

    What comes out is called `image_pooled`, `audio_tokens` and so on.

    Only tensors in: of the log-mel's Fourier transform the converter makes a DFT that ONNX Runtime refuses.

    Raises:
      UserError: media as inputs, no converter, `output` is there or cannot be written, or the encoder is too large.
    """
    if inputs != "tensors":
        raise UserError(
            "--format=onnx takes --inputs=tensors only: ONNX Runtime refuses the DFT operator that the "
            "converter makes of the log-mel's Fourier transform; compute inputs by preprocess.load"
        )
    check_size(model)
    try:
        import jax2onnx
    except ImportError as error:
        raise UserError(f"--format=onnx needs a converter ({error}): {ONNX_INSTALL}") from error
    program = make_program(model, inputs, outputs)
    shapes = [("B", *shape) for shape, _ in program.inputs.values()]
    # Sorted is the order in which JAX flattens a dict.
    names = [f"{name}_{outputs}" for name in sorted(jax.eval_shape(program.function, *program.specs(1)))]
    data = jax2onnx.to_onnx(
        program.function, shapes, model_name="encoder", input_names=list(program.inputs), output_names=names
    ).SerializeToString()
    about = describe(model, program, outputs, data)
    with whole_or_nothing(output) as (unfinished, _):
        unfinished.mkdir()
        (unfinished / "encoder.onnx").write_bytes(data)
        (unfinished / "encoder.json").write_text(json.dumps(about, indent=2) + "\n")
    return f"{output}: encoder.onnx, {len(data) / 1e6:.1f} MB, takes {takes(program)}"


def export_safetensors(checkpoint: str, output: str | os.PathLike[str]) -> str:
    """Writes the whole model in DeepAVFusion's names as `model.safetensors`; see convert.export."""
    if not is_url(output) and os.path.exists(output):
        raise UserError(f"--output={output} is there already: name another one, or move it away")
    return f"{output}: model.safetensors, {convert.export(checkpoint, f'{os.fspath(output)}/model.safetensors')}"


def describe(model: LoadedModel, program: Program, outputs: str, data: bytes) -> dict:
    """What stands beside an encoder's file."""
    return {
        "av_mae": av_mae.__version__,
        "jax": jax.__version__,
        "sha256": hashlib.sha256(data).hexdigest(),
        "model": model_identity(model),
        "configuration": configuration_hash(model),
        "inputs": {name: [list(shape), dtype] for name, (shape, dtype) in program.inputs.items()},
        "outputs": outputs,
        "sound": recipes.to_dict(model.sound),
    }


def takes(program: Program) -> str:
    """The inputs in words."""
    return " and ".join(
        f"{name} {dtype} [B, {', '.join(map(str, shape))}]" for name, (shape, dtype) in program.inputs.items()
    )


def check_size(model: LoadedModel) -> None:
    """Raises UserError where the weights do not fit into one file."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model.encoder)))
    if size >= LARGEST:
        raise UserError(
            f"the encoder has {size / 2**30:.1f} GiB of weights, a file of this format holds less than "
            f"{LARGEST / 2**30:.0f}: export it with --format=safetensors"
        )
