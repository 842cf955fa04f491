"""python make.py GOLDEN (with tests/ and the repository on PYTHONPATH): the subset here from the folder of all golden
tensors of the published system. Arrays under `ours/` are computed by av_mae from published weights; README.md."""

import pathlib
import shutil
import sys

import jax
import numpy as np
from golden_subset import FOLDER, STREAMS, config, model_inputs, pack, part, sample, with_tokens
from published import read_state_dict
from safetensors.numpy import load_file

from av_mae import convert, models

MASKED = (
    "image_noise",
    "audio_noise",
    "image_ids_keep",
    "audio_ids_keep",
    "image_mask",
    "audio_mask",
    "masked_image_tokens",
    "masked_audio_tokens",
    "masked_fusion_tokens",
    "loss_image_norm",
    "loss_audio_norm",
    "loss_image_raw",
    "loss_audio_raw",
)
FULL = tuple(f"full_{stream}_tokens" for stream in STREAMS)


def chosen(arrays, *names):
    return {name: arrays[name] for name in names}


def gradients(arrays, prefix=""):
    """A sample of each, and its largest entry."""
    found = {}
    for name, x in part(arrays, "grad/").items():
        if name.startswith(prefix):
            found |= {f"grad/{name}": sample(x), f"largest/{name}": np.abs(x).max()}
    return found


def weights(tensors, prefix=""):
    return {f"weight/{name}": x for name, x in tensors.items() if name.startswith(prefix)}


def whole(golden):
    """The factorized model: all weights; layers, predictions and gradients as samples."""
    arrays = dict(np.load(golden / "factorized_mmi.npz"))
    layers = {
        f"layer{number}_{stream}": sample(arrays[f"layer{number}_{stream}"])
        for number in range(3)
        for stream in STREAMS
    }
    predictions = {name: arrays[name][:, ::4, ::8] for name in ("pred_image", "pred_audio")}
    pack(
        FOLDER / "factorized_mmi.npz",
        chosen(arrays, "image", "audio", *MASKED, *FULL)
        | layers
        | predictions
        | gradients(arrays)
        | weights(read_state_dict(golden / "factorized_mmi.pth")),
    )


def fusion_block(golden, name, kind):
    """The last fusion block of another kind, with what it reads and how the loss changes with what it gives."""
    arrays, block = dict(np.load(golden / f"{name}.npz")), "encoder.fusion_blocks.2."
    model = convert.load_published(golden / f"{name}.pth", config(kind))
    image, audio, *noise = inputs = model_inputs(arrays)
    masks = model.masks(len(image), *noise)
    tokens = model.encoder(image, audio, masks[0].keep, masks[1].keep, return_layers=True)
    ours = {f"ours/masked_layer1_{stream}": getattr(tokens.layers[1], stream) for stream in STREAMS}

    def loss(fusion):
        given = with_tokens(model, models.Tokens(tokens.image, tokens.audio, fusion))
        return sum(x.mean() for x in given.losses(*inputs))

    ours["ours/loss_by_fusion"] = jax.grad(loss)(tokens.fusion)
    tensors = read_state_dict(golden / f"{name}.pth")
    pack(
        FOLDER / f"{name}.npz",
        chosen(
            arrays,
            *(f"layer1_{stream}" for stream in STREAMS),
            "layer2_fusion",
            "full_fusion_tokens",
            "masked_fusion_tokens",
        )
        | ours
        | gradients(arrays, block)
        | gradients(arrays, "encoder.fusion_norm.")
        | weights(tensors, block)
        | weights(tensors, "encoder.fusion_norm."),
    )


def swin(golden):
    """The sound's Swin decoder."""
    name = "factorized_mmi_swin"
    arrays = dict(np.load(golden / f"{name}.npz"))
    keep = [name for name in MASKED if name not in ("masked_image_tokens", "loss_image_norm", "loss_image_raw")]
    pack(
        FOLDER / f"{name}.npz",
        chosen(arrays, "audio", *keep)
        | {"pred_audio": arrays["pred_audio"][:, ::4, ::8]}
        | gradients(arrays, "audio_decoder")
        | weights(read_state_dict(golden / f"{name}.pth"), "audio_decoder"),
    )


def heads(golden):
    """Classifiers and separator without their encoders, whose tokens are ours; segmentation without weights."""
    arrays = dict(np.load(golden / "heads.npz"))
    found = chosen(
        arrays,
        "schedule/epoch_lr_pretrainedlr",
        "posembed/2d_8x12_d64",
        "posembed/2d_14x14_d48",
        "separation/target_spec",
        "separation/train_mode/loss",
        "segmentation5/logits",
        "segmentation5/loss",
    )
    found["segmentation5/target"] = arrays["segmentation5/target"].astype(np.uint8)
    for name, x in arrays.items():
        if name.startswith("separation/weighted"):
            found[name] = x if name.endswith("loss") else x[:, 0, ::4, ::4]
        if name.startswith("separation/") and name.endswith("logits"):
            found[name] = x[:, 0, ::4, ::4]
        if name.startswith("classifier_"):
            found[name] = x
    image, audio = model_inputs(arrays | {"image_noise": 0, "audio_noise": 0})[:2]
    for name in ("classifier_plain", "classifier_norm", "separation"):
        path = golden / f"{name}.safetensors"
        encoder = convert.load_published(path, config()).encoder
        tokens = encoder(image, audio, return_layers=True)
        if name == "separation":
            found |= {f"ours/separation/layer{number}_audio": layer.audio for number, layer in enumerate(tokens.layers)}
            found["ours/separation/last_image"] = tokens.layers[-1].image
        else:
            found |= {f"ours/{name}/{stream}": x for stream, x in models.pool(tokens).items()}
        found |= {f"{name}/weight/{key}": x for key, x in load_file(path).items() if not key.startswith("encoder.")}
    pack(FOLDER / "heads.npz", found)


def sound_and_metrics(golden):
    arrays = dict(np.load(golden / "audio.npz"))
    found = {"mel_filterbank": arrays["mel_filterbank"]}
    for name in ("demo1", "demo2"):  # whole numbers of 16 bits
        found[f"{name}/waveform"] = np.round(32768 * arrays[f"{name}/waveform"]).astype(np.int16)
        np.testing.assert_array_equal(found[f"{name}/waveform"] / np.float32(32768), arrays[f"{name}/waveform"])
        found[f"{name}/log_mel"] = arrays[f"{name}/log_mel"][:, ::4, ::2]
    mixture = arrays["demo1/waveform"] + arrays["demo2/waveform"]
    np.testing.assert_array_equal(arrays["masking/mixture"], mixture)
    found |= {
        "masking/mask_logits": arrays["masking/mask_logits"],
        "masking/waveform": arrays["masking/waveform"][:, ::16],
    }
    pack(FOLDER / "audio.npz", found)
    arrays = dict(np.load(golden / "metrics.npz"))
    pack(
        FOLDER / "metrics.npz",
        {name: x.astype(np.uint8) if name.endswith("target") else x for name, x in arrays.items()},
    )


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    for file in ("config.json", "separation_layer_decay.json"):
        shutil.copyfile(source / file, FOLDER / file)
    whole(source)
    fusion_block(source, "dense_mmi", "dense")
    fusion_block(source, "token", "token")
    swin(source)
    heads(source)
    sound_and_metrics(source)
