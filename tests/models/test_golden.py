"""Golden parity: layers, outputs, predictions, losses, gradients and a training trajectory of the published system."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_models import golden_config, golden_model
from published import as_here

from av_mae import convert

NAMES = ("factorized_mmi", "dense_mmi", "token", "factorized_mmi_swin")
CASES = [
    (name, pair)
    for name in NAMES
    for pair in ("separable", "chunked", "materialized")
    if name != "token" or pair == "separable"
]


def golden_inputs(data):
    image, audio = jnp.asarray(data["image"]).transpose(0, 2, 3, 1), jnp.asarray(data["audio"])[:, 0]
    return image, audio


def near(value, expected, tolerance=3e-5):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def golden(shared):
    return {name: dict(np.load(shared / "golden" / f"{name}.npz")) for name in NAMES}


@pytest.mark.parametrize("name,pair", CASES)
def test_encoder_layers_and_outputs(shared, golden, name, pair):
    data, model = golden[name], golden_model(shared, name, pair=pair)
    tokens = model.encoder(*golden_inputs(data), return_layers=True)
    for stream in ("image", "audio", "fusion"):
        near(getattr(tokens, stream), data[f"full_{stream}_tokens"])
        for number, layer in enumerate(tokens.layers):
            near(getattr(layer, stream), data[f"layer{number}_{stream}"])
    assert len(tokens.layers) == 3


@pytest.mark.parametrize("name,pair", CASES)
def test_masked_forward(shared, golden, name, pair):
    data, model = golden[name], golden_model(shared, name, pair=pair)
    image, audio = golden_inputs(data)
    noise = data["image_noise"], data["audio_noise"]
    masks = model.masks(image.shape[0], *map(jnp.asarray, noise))
    for stream, mask in zip(("image", "audio"), masks, strict=True):
        np.testing.assert_array_equal(mask.keep, data[f"{stream}_ids_keep"])
        np.testing.assert_array_equal(mask.mask, data[f"{stream}_mask"])
    tokens = model.encoder(image, audio, masks[0].keep, masks[1].keep)
    for stream in ("image", "audio", "fusion"):
        near(getattr(tokens, stream), data[f"masked_{stream}_tokens"])
    out = model(image, audio, *noise)
    near(out.image_prediction, data["pred_image"])
    near(out.audio_prediction, data["pred_audio"])
    for losses in (out[:2], [loss.mean() for loss in model.losses(image, audio, *noise)]):
        near(losses[0], data["loss_image_norm"], 1e-6)
        near(losses[1], data["loss_audio_norm"], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_raw_target_losses(shared, golden, name):
    data, model = golden[name], golden_model(shared, name, normalize=False)
    image_loss, audio_loss = model.losses(*golden_inputs(data), data["image_noise"], data["audio_noise"])
    near(image_loss.mean(), data["loss_image_raw"], 1e-6)
    near(audio_loss.mean(), data["loss_audio_raw"], 1e-6)


def mean_loss(model, image, audio, image_noise, audio_noise):
    image_loss, audio_loss = model.losses(image, audio, image_noise, audio_noise)
    return image_loss.mean() + audio_loss.mean(), (image_loss.mean(), audio_loss.mean())


@pytest.mark.parametrize("name,pair", CASES)
def test_gradients(shared, golden, name, pair):
    data, model = golden[name], golden_model(shared, name, pair=pair)
    config = model.config
    args = (*golden_inputs(data), data["image_noise"], data["audio_noise"])
    gradients = nnx.grad(lambda *a: mean_loss(*a)[0])(model, *args)
    gradients = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}
    published = {key[5:]: value for key, value in data.items() if key.startswith("grad/")}
    assert as_here(published, config).keys() == gradients.keys()
    for name, whole in published.items():
        # A published weight may be several here (q, k, v; the halves of pairs): its largest entry is the measure.
        tolerance = 1e-5 * np.abs(whole).max()
        for path, part in as_here({name: whole}, config).items():
            if name.endswith("attn.k.bias"):
                # Zero in theory (softmax does not see a constant): rounding only, in the published system too.
                assert np.abs(gradients[path]).max() < 1e-9
            else:
                near(gradients[path], part, tolerance)


def test_trajectory(shared):
    data = dict(np.load(shared / "golden" / "trajectory_factorized_mmi.npz"))
    model = golden_model(shared, "factorized_mmi")
    graph, parameters = nnx.split(model, nnx.Param)
    decay = jax.tree.map(lambda p: p.ndim > 1, parameters)
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, mask=decay)

    @jax.jit
    def step(parameters, state, image_noise, audio_noise):
        loss = lambda p: mean_loss(nnx.merge(graph, p), *golden_inputs(data), image_noise, audio_noise)
        gradients, losses = jax.grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, jnp.stack(losses)

    state = optimizer.init(parameters)
    for number, expected in enumerate(data["losses"]):
        parameters, state, losses = step(
            parameters, state, data[f"image_noise_{number}"], data[f"audio_noise_{number}"]
        )
        near(losses, expected, 1e-5)
    final = as_here({key[6:]: value for key, value in data.items() if key.startswith("final/")}, model.config)
    found = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(parameters)}
    assert final.keys() == found.keys()
    differences = np.concatenate([np.abs(found[path] - value).ravel() for path, value in final.items()])
    assert differences.max() < 1e-3
    assert (differences < 2e-6).mean() > 0.99


def test_load_published_safetensors(shared):
    path = shared / "golden" / "factorized_mmi.safetensors"
    model = convert.load_published(path, golden_config(shared, "factorized_mmi"))
    other = golden_model(shared, "factorized_mmi")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), nnx.state(other, nnx.Param))


def test_load_published_of_another_model(shared, tmp_path):
    path = shared / "golden" / "factorized_mmi.safetensors"
    config = golden_config(shared, "factorized_mmi")
    with pytest.raises(ValueError, match=r"has encoder\.\S+ of shape .* needs"):
        convert.load_published(
            path, dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, attention_ratio=0.5))
        )
    with pytest.raises(ValueError, match="lacks the parameter"):
        convert.load_published(path, dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, depth=3)))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read weights from .*broken.safetensors"):
        convert.load_published(broken, config)
