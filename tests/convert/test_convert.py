"""`python -m av_mae.convert` on golden files and changed ones: what is found, written, given back and refused."""

import dataclasses
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from convert_memory import peak_of_converting, write_checkpoint
from golden_heads import encoder_config, flat_variables
from golden_models import golden_config, golden_model
from published import ARGUMENTS, GOLDEN, GOLDEN_OPTIONS, assert_same_tensors, read_state_dict, written
from tiny_training import make_step, recipe

import av_mae
from av_mae import convert, models, recipes
from av_mae.checkpoint import Checkpoints, checksum, load_params, open_checkpoint, read_meta
from av_mae.config import sized_model
from av_mae.convert import store
from av_mae.convert.infer import infer
from av_mae.convert.weight_file import open_weights
from av_mae.loading import load
from av_mae.models import kinds
from av_mae.models.kinds import flat_values

KIND = {
    "separation": "separator",
    "segmentation5": "segmenter",
    "classifier_plain": "classifier",
    "classifier_norm": "classifier",
}


def configuration(shared, stem):
    """The model of a golden file, masked as published where it has no decoders."""
    if stem not in KIND:
        return golden_config(shared, stem)
    config = encoder_config(shared, stem)
    return dataclasses.replace(config, audio=dataclasses.replace(config.audio, mask_ratio=0.8))


@pytest.mark.parametrize("name", GOLDEN)
def test_configuration_of_golden_files(shared, converted, name):
    stem = name.partition(".")[0]
    checkpoint = open_checkpoint(str(converted(name)))
    assert checkpoint.kind == KIND.get(stem, "pretraining")
    assert checkpoint.config.model == configuration(shared, stem)
    assert recipes.load(converted(name) / "config.json") == checkpoint.config
    heads = {
        "classifier_plain": models.ClassifierConfig(7),
        "classifier_norm": models.ClassifierConfig(7, True),
        "separation": models.SeparatorConfig(),
        "segmentation5": models.SegmenterConfig(5),
    }
    assert checkpoint.head == heads.get(stem)


@pytest.mark.parametrize(
    "name", ["token.pth", "factorized_mmi_swin.pth", "classifier_norm.safetensors", "separation.safetensors"]
)
def test_checkpoint_holds_the_weights(shared, converted, name):
    """What av_mae.load finds in the checkpoint is what the file gives directly (test_golden.py and test_heads.py
    compare that with the published outputs)."""
    stem = name.partition(".")[0]
    direct = convert.load_published(shared / "golden" / name, configuration(shared, stem))
    loaded = av_mae.load(converted(name))
    assert type(loaded) is type(direct)
    assert_same_tensors(
        *({path: np.asarray(x) for path, x in flat_variables(model).items()} for model in (loaded, direct))
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_of_golden_files(shared, converted, tmp_path, name):
    """File → checkpoint → safetensors: names in their order, dtypes and bytes, buffers and counts included."""
    output = tmp_path / "back.safetensors"
    convert.main([f"--source={converted(name)}", "--to=safetensors", f"--output={output}"])
    assert_same_tensors(safetensors.numpy.load_file(output), read_state_dict(shared / "golden" / name))
    assert list(open_weights(output).tensors) == list(open_weights(shared / "golden" / name).tensors)


@pytest.mark.parametrize("name", ["factorized_mmi.pth", "classifier_norm.safetensors"])
def test_file_to_safetensors_directly(shared, tmp_path, name):
    convert.export(shared / "golden" / name, tmp_path / "same.safetensors")
    assert_same_tensors(
        safetensors.numpy.load_file(tmp_path / "same.safetensors"), read_state_dict(shared / "golden" / name)
    )


def test_round_trip_of_other_dtypes(golden, tmp_path):
    """Values that float32 cannot hold, NaNs with a payload and -0 among them, come back bit for bit."""
    dtypes = (np.float16, ml_dtypes.bfloat16, np.float64, np.float32)
    tensors = {name: value.astype(dtypes[number % 4]) for number, (name, value) in enumerate(golden().items())}
    for dtype in dtypes:
        odd = next(value for name, value in tensors.items() if name.endswith(".bias") and value.dtype == dtype)
        words = odd.view(f"u{odd.itemsize}")
        words[:3] = [1 << (8 * odd.itemsize - 1), *(np.array([np.nan], dtype).view(words.dtype) + 1), 1]
        odd[3] = 1 / 3
    source = tmp_path / "source.safetensors"
    store.write_safetensors(
        source,
        [(name, store.Lazy(value.shape, value.dtype, lambda value=value: value)) for name, value in tensors.items()],
    )
    convert.convert(source, tmp_path / "run", GOLDEN_OPTIONS)
    convert.export(tmp_path / "run", tmp_path / "back.safetensors")
    found = {name: tensor.read() for name, tensor in open_weights(tmp_path / "back.safetensors").tensors.items()}
    assert_same_tensors(found, tensors)
    loaded = av_mae.load(tmp_path / "run").encoder
    np.testing.assert_array_equal(loaded.fusion_tokens[...], tensors["encoder.fusion_tokens"].astype(np.float32))


def test_written_safetensors_are_read_by_their_own_package(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "scalar": np.int64(7).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "flags": random.random(5) < 0.5,
        "fortran": np.asfortranarray(random.normal(size=(3, 4))),
        "half": random.normal(size=(2, 3)).astype(np.float16),
        "bytes": np.arange(3, dtype=np.uint8),
    }
    store.write_safetensors(
        tmp_path / "file",
        [(name, store.Lazy(value.shape, value.dtype, lambda value=value: value)) for name, value in tensors.items()],
    )
    assert_same_tensors(safetensors.numpy.load_file(tmp_path / "file"), tensors)


def test_summary(shared, tmp_path, capsys):
    convert.main([f"--source={shared / 'golden' / 'factorized_mmi.pth'}", f"--output={tmp_path / 'run'}", *ARGUMENTS])
    said = capsys.readouterr().out
    sizes = {
        part: sum(
            value.size
            for name, value in read_state_dict(shared / "golden" / "factorized_mmi.pth").items()
            if name.startswith(begin) and not name.endswith("encoder.image.pos_embed")
        )
        for part, begin in (("image decoder", "image_decoder"), ("fusion", "encoder.fusion"))
    }
    assert "pretraining checkpoint (torch zip, 245 tensors" in said
    for part, size in sizes.items():
        line = next(line for line in said.splitlines() if line.strip().startswith(part))
        assert f" {size / 1e6:.2f} M " in line
    assert "ignored: n_steps, epoch" in said and "missing: nothing" in said
    assert "mask ratios 0.75 and 0.8" in said and "factorized, layers all, tokens (6, 4, 2), 4 heads" in said


def test_encoder_alone_with_and_without_prefix(shared, golden, tmp_path):
    expected = flat_values(golden_model(shared, "factorized_mmi").encoder)
    for number, prefix in enumerate(("encoder.", "")):
        tensors = {
            prefix + name.removeprefix("encoder."): value
            for name, value in golden().items()
            if name.startswith("encoder.")
        }
        del tensors[f"{prefix}image.pos_embed"], tensors[f"{prefix}audio.pos_embed"]
        options = dataclasses.replace(GOLDEN_OPTIONS, image_size=(64, 64), audio_size=(128, 64))
        run = tmp_path / str(number)
        said = convert.convert(written(tmp_path, tensors), run, options)
        assert "encoder (safetensors" in said and "missing: decoders, " in said
        assert f"{prefix}image.pos_embed (computed)" in said
        encoder = av_mae.load(run)
        assert isinstance(encoder, kinds.EncoderModel) and encoder.config.image.size == (64, 64)
        found = flat_values(encoder.encoder)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], x) for name, x in expected.items())
        convert.export(run, tmp_path / f"{number}.safetensors")
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / f"{number}.safetensors"), tensors)


def test_published_defaults_where_they_fit():
    """A file of published sizes needs no options; heads of 64, in MAE's huge encoder of 80."""
    for width, heads in ((768, 12), (1024, 16), (1280, 16)):
        shapes = {"patch_embed.proj.weight": (width, 3, 14, 14), "blocks.0.mlp.fc1.weight": (4 * width, width)}
        found = infer({name: Shaped(shape) for name, shape in shapes.items()}, "file")
        assert found.kind == "image_encoder"
        assert (found.config.image.heads, found.config.image.size, found.config.image.patch) == (heads, (224, 224), 14)


@dataclasses.dataclass
class Shaped:
    """A tensor that nobody reads."""

    shape: tuple[int, ...]


def test_grid_comes_from_the_positions(golden, shared):
    """(4, 4) and (8, 4) patches are told apart from (2, 8) and (4, 8) by what the tables hold."""
    found = infer(open_weights(shared / "golden" / "token.pth").tensors, "file", GOLDEN_OPTIONS)
    assert (found.config.image.grid, found.config.audio.grid) == ((4, 4), (8, 4))


def test_training_run_to_published_names_and_back(tmp_path):
    """A run's checkpoint → safetensors → load_published gives the run's weights; positions are there for PyTorch."""
    config = recipe()
    step, random = make_step(config), np.random.default_rng(0)
    params = {name: random.normal(size=x.shape).astype(np.float32) for name, x in step.shapes.params.items()}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step.abstract_state())
    state = jax.device_put(dataclasses.replace(zeros, params=params), step.shardings)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(3, state, config, position=48, skipped=0)
    checkpoints.close()
    convert.export(tmp_path / "run", tmp_path / "run.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "run.safetensors")
    assert tensors["encoder.image.pos_embed"].shape == (1, 6, 32) and tensors["encoder.image.pos_embed"].any()
    model = convert.load_published(tmp_path / "run.safetensors", config.model)
    assert_same_tensors({name: np.asarray(x) for name, x in flat_values(model).items()}, params)


def test_converted_checkpoint_starts_a_run_and_an_evaluation(shared, converted):
    run = str(converted("factorized_mmi.pth"))
    config, model = open_checkpoint(run).config, load(run)
    assert config.model == golden_config(shared, "factorized_mmi") and config.data.sound.mels == 128
    step = make_step(dataclasses.replace(recipe(model=config.model), init=run))
    params = load_params(run, step.abstract_state().params)
    assert all(np.array_equal(params[name], x) for name, x in flat_values(model).items())
    meta = read_meta(open_checkpoint(run).folder)
    assert meta["checksums"]["model"] == int(checksum(params))


def test_nan_and_infinity_are_counted(golden, tmp_path, capsys):
    tensors = golden()
    tensors["encoder.fusion_norm.bias"][:2] = np.nan
    tensors["encoder.audio.norm.weight"][3] = -np.inf
    source = written(tmp_path, tensors)
    convert.main([f"--source={source}", f"--output={tmp_path / 'run'}", *ARGUMENTS])
    warning = capsys.readouterr().err
    assert "encoder.fusion_norm.bias (2 NaN, 0 infinite)" in warning
    assert "encoder.audio.norm.weight (0 NaN, 1 infinite)" in warning and warning.count("\n") == 1
    convert.export(tmp_path / "run", tmp_path / "back.safetensors")
    assert_same_tensors(safetensors.numpy.load_file(tmp_path / "back.safetensors"), tensors)


@pytest.mark.slow
def test_memory(tmp_path):
    """A 1.9 GB file with 1.4 GB of optimizer; convert_memory.py does the same at 5 GB."""
    model = write_checkpoint(tmp_path / "checkpoint.pth", sized_model("small"))
    assert (tmp_path / "checkpoint.pth").stat().st_size > 3.9 * model
    assert peak_of_converting(tmp_path / "checkpoint.pth", tmp_path / "run") < 1.5 * model


@pytest.mark.parametrize(
    "arguments,status,message",
    [
        (["--source=nowhere.pth", "--output=out"], 2, "error: cannot read weights from nowhere.pth: No such file"),
        (["--source=x", "--output=y", "--tokens=6,4"], 2, "invalid 3 whole numbers, separated by commas"),
        (["--help"], 0, ""),
    ],
)
def test_command(tmp_path, root, arguments, status, message):
    result = subprocess.run(
        [sys.executable, "-m", "av_mae.convert", *arguments],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr
    assert (
        status or "python -m av_mae.convert --source=checkpoint_latest.pth --output=runs/deepavfusion" in result.stdout
    )
