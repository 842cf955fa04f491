"""Streams from unimodal encoders: the numbers of a plain ViT with the official names, and their learning rate."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import safetensors.numpy
from numpy_model import erf, positions_of, softmax
from published import assert_same_tensors, unimodal_tensors
from tiny_training import MODEL, make_step, recipe, unfused

import av_mae
from av_mae import convert
from av_mae.checkpoint import open_checkpoint
from av_mae.convert.infer import Options
from av_mae.convert.store import stream_arrays
from av_mae.errors import UserError
from av_mae.train import __main__ as train

WIDTH, HEADS, DEPTH = 32, 2, 2
RUN = dataclasses.replace(
    MODEL,
    image=dataclasses.replace(MODEL.image, depth=DEPTH, mlp_ratio=2.0),
    audio=dataclasses.replace(MODEL.audio, depth=DEPTH, mlp_ratio=2.0),
)
CHANNELS = {"image": 3, "audio": 1}


def official(stream):
    """A MAE on 4 × 4 patches, an AudioMAE on 8 × 4: other grids than the run's."""
    return unimodal_tensors(CHANNELS[stream], {"image": 16, "audio": 32}[stream])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Stream → its file, with its decoder."""
    folder = tmp_path_factory.mktemp("unimodal")
    for stream in CHANNELS:
        safetensors.numpy.save_file(official(stream), folder / f"{stream}.safetensors")
    return {stream: str(folder / f"{stream}.safetensors") for stream in CHANNELS}


@pytest.fixture(scope="module")
def folders(files, tmp_path_factory):
    """Stream → what the command made of it."""
    folder = tmp_path_factory.mktemp("converted")
    for stream, path in files.items():
        convert.main([f"--source={path}", f"--output={folder / stream}", "--heads=2", "--image_size=64,64"])
    return {stream: str(folder / stream) for stream in files}


def norm(t, name, x):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(t, name, x):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def official_vit(t, x):
    """The ViT that official names mean, on x [C, H, W]: a plain convolution, sin-cos positions, no class token."""
    t = {name: value.astype(np.float64) for name, value in t.items()}
    kernel, (_, rows, columns) = t["patch_embed.proj.weight"], np.array(x.shape) // 16
    tokens = (
        np.array(
            [
                [(x[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] * one).sum() for one in kernel]
                for r in range(rows)
                for c in range(columns)
            ]
        )
        + t["patch_embed.proj.bias"]
    )
    tokens = tokens + positions_of((rows, columns), WIDTH)
    for n in range(DEPTH):
        y = norm(t, f"blocks.{n}.norm1", tokens)
        q, k, v = np.split(linear(t, f"blocks.{n}.attn.qkv", y), 3, axis=1)
        heads = [
            softmax(qh @ kh.T / math.sqrt(WIDTH / HEADS)) @ vh
            for qh, kh, vh in zip(*(np.split(z, HEADS, axis=1) for z in (q, k, v)))
        ]
        tokens = tokens + linear(t, f"blocks.{n}.attn.proj", np.concatenate(heads, axis=1))
        hidden = linear(t, f"blocks.{n}.mlp.fc1", norm(t, f"blocks.{n}.norm2", tokens))
        tokens = tokens + linear(t, f"blocks.{n}.mlp.fc2", hidden * (1 + erf(hidden / math.sqrt(2))) / 2)
    return norm(t, "norm", tokens)


def test_outputs_against_a_plain_vit(files):
    """A run without fusion whose streams start from both encoders computes what these are, on the run's own grids."""
    config = dataclasses.replace(recipe(unfused(RUN)), init_image=files["image"], init_audio=files["audio"])
    step = make_step(config)
    state = step.init(train.first_weights(step, config))
    encoder = step.definition.merge(state.params).encoder
    random = np.random.default_rng(3)
    image = random.normal(size=(1, *RUN.image.size, 3)).astype(np.float32)
    audio = random.normal(size=(1, *RUN.audio.size)).astype(np.float32)
    tokens = encoder(image, audio)
    np.testing.assert_allclose(
        tokens.image[0], official_vit(official("image"), image[0].transpose(2, 0, 1)), rtol=2e-5, atol=2e-5
    )
    np.testing.assert_allclose(tokens.audio[0], official_vit(official("audio"), audio), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stream", CHANNELS)
def test_converted_folder_and_file_start_alike(files, folders, stream):
    found, expected = (stream_arrays(source[stream], stream, RUN) for source in (folders, files))
    assert_same_tensors(found, expected)
    assert len(found) == 2 + DEPTH * 16 + 2 and all(name.startswith(f"encoder.{stream}.") for name in found)


def test_what_converted_folders_say(folders, files, capsys):
    checkpoints = {stream: open_checkpoint(folder) for stream, folder in folders.items()}
    assert [checkpoints[stream].kind for stream in CHANNELS] == ["image_encoder", "audio_encoder"]
    assert checkpoints["image"].config.model.image == dataclasses.replace(RUN.image, size=(64, 64), mask_ratio=0.75)
    assert checkpoints["audio"].config.model.audio.size == (64, 128)
    for stream, source in [("image", folders["image"]), ("audio", files["audio"])]:
        with pytest.raises(UserError, match=f"start a run from it with --config.init_{stream}="):
            av_mae.load(source)


def test_summary_names_what_is_left_out(files, tmp_path):
    said = convert.convert(files["image"], tmp_path / "run", Options(heads=2))
    assert "unimodal MAE image encoder (safetensors, 36 tensors" in said
    assert "ignored: class token, positions (sin-cos of the run's grid take their place), decoder (6 tensors)" in said


def test_round_trip_keeps_all_of_the_file(folders, tmp_path):
    """Class token, positions and decoder come back too."""
    for stream, folder in folders.items():
        convert.export(folder, tmp_path / stream)
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / stream), official(stream))


def test_audiomae_grid_counts_time_in_rows(tmp_path):
    """The official 1024 × 128 input: its sin-cos table has 64 rows of 8; here mels come first."""
    tensors = unimodal_tensors(1, 512, decoder=False)
    tensors["pos_embed"] = np.concatenate([np.zeros((1, WIDTH)), positions_of((64, 8), WIDTH)])[None].astype(np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "audio.safetensors")
    said = convert.convert(tmp_path / "audio.safetensors", tmp_path / "run", Options(heads=2))
    assert "unimodal AudioMAE encoder" in said and "input 128×1024 in patches of 16×16" in said
    assert stream_arrays(str(tmp_path / "run"), "audio", RUN)["encoder.audio.patch_embed.kernel"].shape == (256, WIDTH)


def test_other_positions_do_not_matter(tmp_path):
    """Learned ones, say: they are left out, so the file is taken; 512 patches are 128 mels × 1024 frames."""
    safetensors.numpy.save_file(unimodal_tensors(1, 512, decoder=False), tmp_path / "audio.safetensors")
    said = convert.convert(tmp_path / "audio.safetensors", tmp_path / "run", Options(heads=2))
    assert "input 128×1024 in patches of 16×16" in said


def test_without_class_token_and_decoder(tmp_path):
    tensors = {
        name: value
        for name, value in official("image").items()
        if not name.startswith(("cls_token", "pos_embed", "mask_token", "decoder"))
    }
    safetensors.numpy.save_file(tensors, tmp_path / "image.safetensors")
    found = stream_arrays(str(tmp_path / "image.safetensors"), "image", RUN)
    assert_same_tensors(found, dict(found))
    np.testing.assert_array_equal(found["encoder.image.norm.scale"], tensors["norm.weight"])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda f, d: (f["audio"], "image"), "must be a unimodal image encoder, but it holds: audio_encoder"),
        (lambda f, d: (d["image"], "audio"), "must be a unimodal audio encoder, but it holds: image_encoder"),
        (lambda f, d: (f["image"] + "x", "image"), "there is no checkpoint"),
    ],
)
def test_other_files_are_refused(files, folders, make, message):
    path, stream = make(files, folders)
    with pytest.raises(UserError, match=message):
        stream_arrays(path, stream, RUN)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"depth": 1}, "beyond the configured model, the parameter 'blocks.1."),
        ({"depth": 3}, "lacks the parameter blocks.2.norm1.weight"),
        ({"mlp_ratio": 4.0}, "blocks.0.mlp.fc1.weight of shape (64, 32), but the configured model needs (128, 32)"),
        ({"patch": (16, 8)}, "of shape (32, 3, 16, 16), but the configured model needs (32, 3, 16, 8)"),
    ],
)
def test_another_stream_is_refused(files, folders, change, message):
    config = dataclasses.replace(RUN, image=dataclasses.replace(RUN.image, **change))
    with pytest.raises(UserError) as error:
        stream_arrays(files["image"], "image", config)
    assert message in str(error.value)
    with pytest.raises(UserError, match="is a checkpoint of another model: parameter"):
        stream_arrays(folders["image"], "image", config)


def test_init_and_streams_exclude_each_other():
    with pytest.raises(UserError, match="set either init, or init_image and init_audio"):
        recipe(init="run", init_image="file")


def test_only_the_rate_of_these_streams_differs(files):
    """Updates of a run that starts its image stream from a MAE, beside those of one that does not: half a cosine from
    0 to 1 over the first half of training for that stream, and nothing else."""
    plain = make_step(recipe(RUN))
    pretrained = make_step(dataclasses.replace(recipe(RUN), init_image=files["image"]))
    chosen = [
        f"encoder.{name}"
        for name in (
            "image.patch_embed.kernel",
            "image.blocks.1.mlp.fc2.bias",
            "image.norm.scale",
            "audio.patch_embed.kernel",
            "fusion_tokens",
            "fusion_blocks.0.norm_image.scale",
        )
    ] + ["image_decoder.embed.kernel"]
    random = np.random.default_rng(0)
    params = {name: random.standard_normal(plain.shapes.params[name].shape).astype(np.float32) for name in chosen}
    gradients = {name: random.standard_normal(x.shape).astype(np.float32) for name, x in params.items()}
    states = [step.optimizer.init(params) for step in (plain, pretrained)]
    update = [jax.jit(step.optimizer.update) for step in (plain, pretrained)]
    for number in range(20):
        expected = 0.5 - 0.5 * math.cos(math.pi * min(number / 10, 1))
        updates = [None, None]
        for run in range(2):
            updates[run], states[run] = update[run](gradients, states[run], params)
        for name, x in updates[0].items():
            share = expected if name.startswith("encoder.image.") else 1.0
            np.testing.assert_allclose(updates[1][name], share * x, rtol=1e-5, atol=1e-12, err_msg=name)


def test_a_run_takes_over_all_of_the_stream_and_nothing_else(files):
    """Fusion, the other stream and the decoders, with their positions, begin at random as without `init_image`."""
    config = dataclasses.replace(recipe(RUN), init_image=files["image"])
    step = make_step(config)
    weights = train.first_weights(step, config)
    assert sorted(weights) == sorted(name for name in step.shapes.params if name.startswith("encoder.image."))
    assert all(x.sharding == step.shardings.params[name] for name, x in weights.items())
    arrays = {name: np.asarray(x) for name, x in weights.items()}
    assert_same_tensors(arrays, stream_arrays(files["image"], "image", RUN))
    assert train.first_weights(step, recipe(RUN)) is None
