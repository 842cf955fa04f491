"""Encoders that run without this code: equal to `preprocess` and `av_mae.encode`, where only JAX and NumPy are."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import jax
import jax.export
import numpy as np
import pytest
from tiny_export import write_checkpoint
from tiny_training import MODEL

import av_mae
from av_mae import convert, preprocess
from av_mae.config import SoundConfig
from av_mae.data import audio as sound
from av_mae.errors import UserError
from av_mae.export import __main__ as command
from av_mae.export import encoders, load_encoder
from av_mae.export import encoders as program

# JAX and NumPy, with what JAX itself cannot do without.
ALONE = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy")
BATCHES = (1, 3, 8)
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.util, pathlib
import numpy as np
assert not any(importlib.util.find_spec(name) for name in ("av_mae", "flax", "orbax", "flatbuffers"))
inputs = np.load(sys.argv[2])
results = {}
for folder in map(pathlib.Path, sys.argv[4:]):
    spec = importlib.util.spec_from_file_location("load_encoder", folder / "load_encoder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    encode = module.load(folder)
    for batch in (1, 3, 8):
        features = encode(*(inputs[name][:batch] for name in encode.inputs))
        results |= {f"{folder.name}/{batch}/{name}": x for name, x in features.items()}
np.savez(sys.argv[3], **results)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """A folder with JAX and NumPy and nothing else to import."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ALONE:
        package = pathlib.Path(importlib.util.find_spec(name).origin).parent
        for path in (package, package.with_name(f"{name}.libs")):
            if path.exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("settings", [SoundConfig(), SoundConfig(8000, 400, 125, 64, 1e-3, -1.9, 1.4)])
def test_log_mel_is_that_of_the_data(settings):
    """Noise, a loud tone whose other bins are near the floor, and silence; odd lengths."""
    length = 2 * settings.rate + 77
    waveforms = np.stack(
        [0.1 * np.random.default_rng(0).standard_normal(length), np.sin(0.3 * np.arange(length)), np.zeros(length)]
    ).astype(np.float32)
    found = jax.jit(lambda x: program.log_mel(x, settings))(waveforms)
    np.testing.assert_allclose(found, [sound.log_mel(x, settings) for x in waveforms], rtol=0, atol=1e-4)


def test_stablehlo_with_jax_and_numpy_alone(checkpoint, alone, tmp_path):
    """Media in, pooled out, and tensors in, tokens out; against preprocess and encode, clip by clip."""
    model, random = av_mae.load(checkpoint), np.random.default_rng(0)
    frames = random.integers(0, 256, (8, 32, 48, 3), np.uint8)
    waveforms = (0.1 * random.standard_normal((8, 4000))).astype(np.float32)
    clips = [
        preprocess.load(
            frame=frame, waveform=waveform, rate=8000, start=0.0, duration=0.5, sound=model.sound, image_size=(32, 48)
        )
        for frame, waveform in zip(frames, waveforms)
    ]
    batch = {name: np.concatenate([clip[name] for clip in clips]) for name in ("image", "audio")}
    expected = av_mae.encode(model, batch)
    for name, options in (("media", []), ("tensors", ["--inputs=tensors", "--outputs=tokens"])):
        command.main([f"--checkpoint={checkpoint}", "--format=stablehlo", f"--output={tmp_path / name}", *options])
    normal = np.asarray(av_mae.loading.models.normalize_image(batch["image"]))
    np.savez(tmp_path / "inputs.npz", waveform=waveforms, audio=batch["audio"], image=frames)
    np.savez(tmp_path / "normal.npz", audio=batch["audio"], image=normal)
    for name, inputs, wanted in (
        ("media", "inputs.npz", expected.features),
        ("tensors", "normal.npz", expected.tokens._asdict()),
    ):
        subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                RUN,
                str(alone),
                str(tmp_path / inputs),
                str(tmp_path / "out.npz"),
                str(tmp_path / name),
            ],
            check=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"},
        )
        found = np.load(tmp_path / "out.npz")
        assert sorted(found) == sorted(
            f"{name}/{rows}/{stream}" for rows in BATCHES for stream in ("image", "audio", "fusion")
        )
        for key, x in found.items():
            rows, stream = int(key.split("/")[1]), key.split("/")[2]
            np.testing.assert_allclose(x, wanted[stream][:rows], rtol=0, atol=1e-5)
    about = json.loads((tmp_path / "media" / "encoder.json").read_text())
    exported = jax.export.deserialize(bytearray((tmp_path / "media" / "encoder.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
    assert about["inputs"] == {"image": [[32, 48, 3], "uint8"], "waveform": [[4000], "float32"]}


@pytest.fixture(scope="module")
def stored(checkpoint, tmp_path_factory) -> pathlib.Path:
    """An exported encoder."""
    output = tmp_path_factory.mktemp("stored") / "out"
    encoders.export_stablehlo(av_mae.load(checkpoint), output, "tensors", "pooled")
    return output


@pytest.mark.parametrize(
    "change,message",
    [
        ({"format": 0}, "has format 0, not 1: take its own loader, or export .* --format=stablehlo"),
        (
            {"calling_convention": 3, "jax": "0.4.1"},
            "calling convention 3 of JAX 0.4.1, but JAX .* runs .*: install one",
        ),
        ({"calling_convention": 99, "jax": "9.9.9"}, "convention 99 of JAX 9.9.9, but .* or export"),
        ({"sha256": "0" * 64}, "encoder.stablehlo is damaged or not the one of encoder.json"),
    ],
)
def test_loader_checks_versions(stored, tmp_path, change, message):
    for path in stored.glob("encoder.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((stored / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(about | change))
    with pytest.raises(RuntimeError, match=message):
        load_encoder.load(tmp_path)


def test_loader_says_what_it_takes(stored):
    encode = load_encoder.load(stored)
    with pytest.raises(ValueError, match=r"image must be float32 \[B, 32, 48, 3\], got uint8 \[1, 32, 48, 3\]"):
        encode(np.zeros((1, 32, 48, 3), np.uint8), np.zeros((1, 32, 32), np.float32))
    with pytest.raises(ValueError, match=r"audio must be float32 \[B, 32, 32\], got float32 \[1, 32, 31\]"):
        encode(np.zeros((1, 32, 48, 3), np.float32), np.zeros((1, 32, 31), np.float32))
    code = [line for line in pathlib.Path(load_encoder.__file__).read_text().split('"""')[2].splitlines() if line]
    assert len(code) <= 30


def test_safetensors_are_those_of_convert(checkpoint, tmp_path):
    command.main([f"--checkpoint={checkpoint}", "--format=safetensors", f"--output={tmp_path / 'out'}"])
    convert.export(checkpoint, tmp_path / "direct.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "direct.safetensors").read_bytes()


def test_refusals(checkpoint, stored, tmp_path, monkeypatch):
    arguments = [f"--checkpoint={checkpoint}", f"--output={stored}"]
    for more, message in (
        (["--format=stablehlo"], "is there already"),
        (["--format=safetensors"], "is there already"),
        ([], "--format=parquet needs --data"),
        (["--format=stablehlo", "--data=x"], "--data is for --format=parquet"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([*arguments, *more])
    monkeypatch.setattr(encoders, "LARGEST", 1000)
    with pytest.raises(UserError, match="GiB of weights, a file of this format holds less"):
        encoders.export_stablehlo(av_mae.load(checkpoint), tmp_path / "out", "tensors", "pooled")
    assert not (tmp_path / "out").exists()


def test_onnx_without_converter_or_with_media(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    arguments = [f"--checkpoint={checkpoint}", "--format=onnx", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="needs a converter .*pip install --no-deps jax2onnx"):
        command.main([*arguments, "--inputs=tensors"])
    with pytest.raises(UserError, match="--format=onnx takes --inputs=tensors only: .* refuses the DFT operator"):
        command.main(arguments)


ONNX = """
import sys
import numpy as np
import onnxruntime
from av_mae.export import __main__ as export
export.main(sys.argv[1:-2])
session = onnxruntime.InferenceSession(f"{sys.argv[-1]}/encoder.onnx", providers=["CPUExecutionProvider"])
inputs, results = np.load(sys.argv[-2]), {}
for batch in (1, 3, 8):
    found = session.run(None, {entry.name: inputs[entry.name][:batch] for entry in session.get_inputs()})
    results |= {f"{batch}/{entry.name}": x for entry, x in zip(session.get_outputs(), found, strict=True)}
np.savez(f"{sys.argv[-1]}/out.npz", **results)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["factorized", "dense", "token", "none"])
def test_onnx_runtime_gives_the_same(kind, tmp_path, root, onnx_python):
    """Every fusion kind, in an environment with the converter, which the package index gives."""
    model = dataclasses.replace(MODEL, fusion=dataclasses.replace(MODEL.fusion, kind=kind))
    checkpoint, random = write_checkpoint(tmp_path / "run", model), np.random.default_rng(0)
    batch = {
        "image": random.standard_normal((8, 32, 48, 3), np.float32),
        "audio": random.standard_normal((8, 32, 32), np.float32),
    }
    np.savez(tmp_path / "inputs.npz", **batch)
    subprocess.run(
        [
            onnx_python,
            "-c",
            ONNX,
            f"--checkpoint={checkpoint}",
            "--format=onnx",
            "--inputs=tensors",
            f"--output={tmp_path / 'out'}",
            str(tmp_path / "inputs.npz"),
            str(tmp_path / "out"),
        ],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    )
    found, expected = np.load(tmp_path / "out" / "out.npz"), av_mae.encode(av_mae.load(checkpoint), batch).features
    assert len(found) == 3 * len(expected)
    for key, x in found.items():
        rows, stream = key.removesuffix("_pooled").split("/")
        np.testing.assert_allclose(x, expected[stream][: int(rows)], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_python(tmp_path_factory) -> str:
    """The Python of an environment with this one's packages and the converter."""
    folder = tmp_path_factory.mktemp("onnx")
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    own = sysconfig.get_paths()["purelib"]
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    pathlib.Path(site, "own.pth").write_text(f"{own}\n")
    for arguments in (["onnx-ir==1.1.0", "onnxruntime==1.32.0"], ["--no-deps", "jax2onnx==0.17.1"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    return python
