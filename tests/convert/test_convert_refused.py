"""Weight files that `python -m av_mae.convert` refuses, and conversions that end early: nothing is left of them."""

import os
import signal

import numpy as np
import pytest
from published import GOLDEN_OPTIONS, refused

from av_mae import convert
from av_mae.convert import store
from av_mae.convert.deepavfusion import DeepAVFusionFile
from av_mae.convert.infer import Options
from av_mae.errors import UserError


def set_table(tensors, name, value):
    tensors[name] = value
    return tensors


CHANGES = {
    "unknown name": (
        lambda t: t | {"encoder.image.blocks.0.ls1.gamma": np.ones(48, np.float32)},
        "has, beyond the configured model, the parameter 'encoder.image.blocks.0.ls1.gamma'",
    ),
    "long name": (lambda t: t | {"x" * 900: np.ones(1, np.float32)}, "the parameter 'xxxx"),
    "missing tensor": (
        lambda t: {n: x for n, x in t.items() if n != "image_decoder_norm.bias"},
        "lacks the parameter image_decoder_norm.bias",
    ),
    "missing block": (
        lambda t: {n: x for n, x in t.items() if ".image.blocks.1." not in n},
        "must have blocks encoder.image.blocks.0, 1, … without a gap, 64 at most; it has 2: [0, 2]",
    ),
    "missing size": (
        lambda t: {n: x for n, x in t.items() if n != "encoder.image.blocks.0.mlp.fc1.weight"},
        "lacks the parameter encoder.image.blocks.0.mlp.fc1.weight",
    ),
    "wrong shape": (
        lambda t: set_table(t, "encoder.image.blocks.1.attn.qkv.weight", np.ones((144, 50), np.float32)),
        "has encoder.image.blocks.1.attn.qkv.weight of shape (144, 50), but the configured model needs (144, 48)",
    ),
    "wrong dimensions": (
        lambda t: set_table(t, "encoder.image.patch_embed.proj.weight", np.ones((48, 3), np.float32)),
        "DeepAVFusion's tensor of this name has 4 dimensions",
    ),
    "empty": (
        lambda t: set_table(t, "encoder.image.patch_embed.proj.weight", np.ones((48, 0, 16, 16), np.float32)),
        "none of them 0",
    ),
    "learned positions": (
        lambda t: set_table(t, "encoder.image.pos_embed", t["encoder.image.pos_embed"] + 1e-3),
        "encoder.image.pos_embed is no sin-cos table",
    ),
    "unlike decoders": (
        lambda t: {n: x for n, x in t.items() if not n.startswith("image_decoder_blocks.1.")},
        "has unlike decoders",
    ),
    "no fusion": (lambda t: {n: x for n, x in t.items() if "fusion_blocks" not in n}, "fusion tokens but no fusion"),
    "unequal depth": (
        lambda t: {n: x for n, x in t.items() if "audio.blocks.2" not in n},
        "the streams have 3 and 2 layers",
    ),
    "something else": (lambda t: {"weight": np.ones(3, np.float32)}, "is no model of DeepAVFusion or MAE"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_refused(golden, tmp_path, change):
    make, message = CHANGES[change]
    said = refused(tmp_path, make(golden()))
    assert message in said and len(said) < 1000


def test_files_that_claim_a_large_model_are_refused_without_building_it(golden, tmp_path):
    """Layers, widths and tables come out of the file: none of them may cost more than what the file holds."""
    deep = golden() | {f"encoder.image.blocks.{n}.x": np.zeros(0, np.float32) for n in range(3000)}
    assert "64 at most; it has 3000" in refused(tmp_path, deep)
    os.remove(tmp_path / "changed.safetensors")
    width, tables = 65_536, {}
    for stream, channels in (("image", 3), ("audio", 1)):
        begin = f"encoder.{stream}."
        tables |= {
            f"{begin}patch_embed.proj.weight": np.zeros((width, channels, 1, 2), np.float32),
            f"{begin}blocks.0.mlp.fc1.weight": np.zeros((1, width), np.float32),
        }
    wide = refused(tmp_path, tables, Options(heads=4, image_size=(4, 4), audio_size=(4, 4)))
    assert "lacks the parameter encoder.image.patch_embed.proj.bias" in wide
    os.remove(tmp_path / "changed.safetensors")
    table = golden() | {
        "image_decoder_embed.weight": np.zeros((65_536, 48), np.float32),
        "audio_decoder_embed.weight": np.zeros((65_536, 48), np.float32),
    }
    said = refused(tmp_path, table)
    assert "image_decoder_pos_embed of shape (1, 16, 32), but the rest of the file needs (1, 16, 65536)" in said


def test_other_window_shift_is_refused(golden, tmp_path):
    tensors = golden("factorized_mmi_swin.pth")
    tensors["image_decoder_blocks.1.attn_mask"] = np.zeros_like(tensors["image_decoder_blocks.1.attn_mask"])
    assert "image_decoder_blocks.1.attn_mask is not the table" in refused(tmp_path, tensors)


@pytest.mark.parametrize(
    "options,message",
    [
        (
            Options(),
            "does not tell how many attention heads its 48 wide blocks have, and no model of DeepAVFusion has such",
        ),
        (Options(heads=5), "--heads=5 must divide the 48 wide blocks"),
        (Options(heads=4), "12 fusion tokens and does not tell how many"),
        (Options(heads=4, tokens=(6, 4, 1)), r"--tokens=(6, 4, 1) are 11"),
        (Options(heads=4, tokens=(6, 4, 2)), "give --decoder_heads=N"),
        (
            Options(heads=4, tokens=(6, 4, 2), image_size=(32, 128)),
            "is the table of a patch grid (4, 4), but --image_size",
        ),
        (Options(heads=4, tokens=(6, 4, 2), image_size=(60, 64)), "must be a multiple of the patch (16, 16)"),
    ],
)
def test_options_that_are_needed_or_wrong(golden, tmp_path, options, message):
    assert message in refused(tmp_path, golden(), options)


def test_output_that_is_there_is_left_alone(shared, converted, tmp_path):
    source = shared / "golden" / "token.pth"
    (tmp_path / "there").write_text("mine")
    for call in (
        lambda: convert.convert(source, tmp_path / "there", GOLDEN_OPTIONS),
        lambda: convert.export(source, tmp_path / "there"),
    ):
        with pytest.raises(UserError, match="is there already"):
            call()
    assert (tmp_path / "there").read_text() == "mine" and len(os.listdir(tmp_path)) == 1


def test_interrupted_conversions_leave_nothing(shared, converted, tmp_path, monkeypatch):
    def interrupt(path, tensors, between):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(shared / "golden" / "token.pth", tmp_path / "run", GOLDEN_OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        convert.export(shared / "golden" / "token.pth", tmp_path / "file.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number,end", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_writing_leaves_nothing(shared, tmp_path, monkeypatch, number, end):
    """It comes in the midst of what Orbax writes, is kept until that is written, and then ends the conversion."""
    read, before, reads = DeepAVFusionFile.read, signal.getsignal(number), []

    def read_and_signal(self, path):
        reads.append(path)
        if len(reads) == 20:
            os.kill(os.getpid(), number)
        return read(self, path)

    monkeypatch.setattr(DeepAVFusionFile, "read", read_and_signal)
    monkeypatch.setattr(store, "BATCH", 2**12)
    with pytest.raises(end):
        convert.convert(shared / "golden" / "token.pth", tmp_path / "run", GOLDEN_OPTIONS)
    assert os.listdir(tmp_path) == [] and signal.getsignal(number) is before
    assert 20 <= len(reads) < 100


def test_no_checkpoint_to_export(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        convert.export(tmp_path, tmp_path / "file.safetensors")
    assert os.listdir(tmp_path) == []
