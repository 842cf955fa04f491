"""`av_mae.load` and `av_mae.encode`: from every place, for every kind of model, compiled once."""

import logging
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from published import GOLDEN_OPTIONS
from tiny_training import MODEL, batches, first_state, make_step, recipe

import av_mae
from av_mae import convert, loading, models
from av_mae.checkpoint import Checkpoints
from av_mae.errors import UserError
from av_mae.models.kinds import flat_values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's work directory with two checkpoints of different weights, and the weights."""
    workdir, config = tmp_path_factory.mktemp("run"), recipe()
    first = first_state(make_step(config))
    later = jax.tree.map(lambda x: x + 1, first)
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step, state in ((2, first), (5, later)):
        checkpoints.save(step, state, config, position=0, skipped=0)
    checkpoints.close()
    return workdir, {2: first.params, 5: later.params}


@pytest.mark.parametrize("folder,step", [("", 5), ("checkpoints", 5), ("checkpoints/2", 2)])
def test_load_from_every_place(run, folder, step, caplog):
    workdir, params = run
    caplog.set_level(logging.WARNING, "absl")
    model = av_mae.load(workdir / folder if folder else str(workdir))
    assert not caplog.records  # of Orbax
    assert isinstance(model, models.AVMAE) and model.config == MODEL and model.sound.mels == 32
    found = flat_values(model)
    assert found.keys() == params[step].keys()
    for name, x in found.items():
        assert x.dtype == np.float32 and x.devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(x, params[step][name])


def test_encode_against_the_encoder(run):
    """uint8 images are normalised, floats are not; features are means over tokens; what else a batch has is left."""
    model = av_mae.load(run[0] / "checkpoints" / "2")
    batch = batches(recipe(batch_size=3), 1)[0]
    found = av_mae.encode(model, batch)
    image = models.normalize_image(batch["image"])
    expected = nnx.jit(lambda encoder, *inputs: encoder(*inputs))(model.encoder, image, batch["audio"])
    for stream in ("image", "audio", "fusion"):
        tokens = getattr(expected, stream)
        np.testing.assert_allclose(getattr(found.tokens, stream), tokens, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.features[stream], np.asarray(tokens).mean(1), rtol=1e-5, atol=1e-5)
    again = av_mae.encode(model, {"image": image, "audio": batch["audio"][..., None]})
    np.testing.assert_allclose(again.features["fusion"], found.features["fusion"], rtol=1e-5, atol=1e-5)


def test_encode_compiles_once(run, monkeypatch):
    """Models of one structure share the compiled function, whatever their weights."""
    traces, forward = [], models.Encoder.__call__
    monkeypatch.setattr(models.Encoder, "__call__", lambda *args, **named: traces.append(1) or forward(*args, **named))
    batch = batches(recipe(batch_size=5), 1)[0]
    means = [av_mae.encode(av_mae.load(run[0] / "checkpoints" / step), batch).features["image"] for step in "25"]
    assert len(traces) == 1 and not np.allclose(*means)


def test_features_of_a_head_give_its_published_logits(shared, tmp_path):
    """Golden inputs through a converted classifier: encode, then the head alone."""
    golden = np.load(shared / "golden" / "heads.npz")
    convert.convert(shared / "golden" / "classifier_norm.safetensors", tmp_path / "run", GOLDEN_OPTIONS)
    model = av_mae.load(tmp_path / "run")
    assert isinstance(model, models.Classifier) and model.head == models.ClassifierConfig(7, input_norm=True)
    features = av_mae.encode(model, {"image": golden["image"].transpose(0, 2, 3, 1), "audio": golden["audio"][:, 0]})
    for stream, logits in model.classify(features.features).items():
        np.testing.assert_allclose(logits, golden[f"classifier_norm/{stream}_logits"], rtol=0, atol=3e-5)


def test_published_file_directly(shared):
    """A file whose configuration needs options says which; one that needs none loads."""
    with pytest.raises(UserError, match="give --heads=N"):
        av_mae.load(shared / "golden" / "token.pth")


@pytest.mark.parametrize("make", [lambda path: path, lambda path: (path / "checkpoints").mkdir() or path])
def test_nothing_there(tmp_path, make):
    with pytest.raises(UserError, match="there is no checkpoint"):
        av_mae.load(make(tmp_path))


def test_import_is_light(root):
    """`import av_mae` brings in neither JAX nor anything else that is large; a wrong name is an error as usual."""
    code = "import sys, av_mae; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & sys.modules.keys())); av_mae.lod"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "[]\n" and "module 'av_mae' has no attribute 'lod'" in result.stderr
    assert av_mae.encode is loading.encode and av_mae.load is loading.load


def test_what_is_public(root):
    """`dir` and `import *` give the same names, without importing anything before it is used."""
    code = (
        "import sys, av_mae\n"
        "names = set(dir(av_mae))\n"
        "assert {'__version__', 'load', 'encode', 'models', 'convert', 'preprocess'} <= names, names\n"
        "assert 'jax' not in sys.modules\n"
        "from av_mae import *\n"
        "assert models is av_mae.models and load is av_mae.loading.load and names - {'__version__'} <= set(globals())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
