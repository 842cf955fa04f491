"""Weights as other programs keep them: wrapped names, several files, learned positions, files that change."""

import json
import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import weight_file_bytes as made
from published import unimodal_tensors
from safetensors.numpy import save_file

from av_mae import convert
from av_mae.convert.weight_file import open_weights
from av_mae.errors import UserError

NAMES = ("encoder.image.norm.weight", "image_decoder_norm.bias")


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "model.{}",
        "model._orig_mod.{}",
        "_forward_module.module.{}",
        "ema_model.module.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_wrapped_names(tmp_path, wrap):
    save_file({wrap.format(name): np.ones(3, np.float32) for name in NAMES}, tmp_path / "a.safetensors")
    tensors = open_weights(tmp_path / "a.safetensors").tensors
    assert set(tensors) == set(NAMES) and all(tensor.name == name for name, tensor in tensors.items())


def test_wrappers_within_names(tmp_path):
    names = ("encoder._orig_mod.image._checkpoint_wrapped_module.norm.weight", "image_decoder_norm.bias")
    save_file({name: np.ones(3, np.float32) for name in names}, tmp_path / "a.safetensors")
    assert set(open_weights(tmp_path / "a.safetensors").tensors) == set(NAMES)
    save_file({name: np.ones(3, np.float32) for name in ("a._orig_mod.b", "a.b")}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="two tensors have the same name"):
        open_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("keys", [("module",), ("ema",), ("teacher",), ("model", "state_dict"), ("ema", "module")])
def test_keys_that_lead_to_the_weights(tmp_path, keys):
    state = made.items(("a", made.tensor()))
    for key in reversed(keys):
        state = made.items((key, made.EMPTY_DICT + state))
    (tmp_path / "a.pt").write_bytes(made.torch_zip(b"\x80\x02" + made.EMPTY_DICT + state + b"."))
    assert list(open_weights(tmp_path / "a.pt").tensors) == ["a"]


def write_sharded(folder, **change):
    arrays = {name: np.full(3, number, np.float32) for number, name in enumerate(("a", "b", "c"))}
    save_file({"model.a": arrays["a"], "model.b": arrays["b"]}, folder / "1.safetensors")
    save_file({"model.c": arrays["c"]}, folder / "2.safetensors")
    files = {"model.a": "1.safetensors", "model.b": "1.safetensors", "model.c": "2.safetensors"} | change
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {name: x for name, x in files.items() if x}}))
    return path


def test_weights_in_several_files(tmp_path):
    opened = open_weights(write_sharded(tmp_path))
    assert opened.format == "safetensors in 2 files"
    assert {name: tensor.read()[0] for name, tensor in opened.tensors.items()} == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model.c": "../2.safetensors"}, "must be the name of a weight file beside it"),
        ({"model.c": "/etc/passwd"}, "must be the name of a weight file beside it"),
        ({"model.c": "3.safetensors"}, "its file 3.safetensors: No such file"),
        ({"model.d": "2.safetensors"}, "its file 2.safetensors lacks the tensor 'model.d'"),
        ({"model.b": None}, "has a tensor 'model.b' that the index does not place there"),
    ],
)
def test_indexes_that_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        open_weights(write_sharded(tmp_path, **change))


def test_learned_positions_are_warned_of(tmp_path, capsys):
    save_file(unimodal_tensors(3, 16, decoder=False), tmp_path / "vit.safetensors")
    convert.main([f"--source={tmp_path / 'vit.safetensors'}", "--heads=2", f"--output={tmp_path / 'run'}"])
    assert "has learned positions (pos_embed is no sin-cos table)" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["renamed", "written over"])
def test_a_file_that_is_replaced_is_not_read(tmp_path, how):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path)
    save_file({"a": np.ones(3, np.float32)}, other)
    tensor = open_weights(path).tensors["a"]
    time.sleep(0.05)
    if how == "renamed":
        os.replace(other, path)
    else:
        path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="another file, or another content, has taken its place"):
        tensor.read()


def refused_within(path, seconds):
    began = time.process_time()
    with pytest.raises(UserError) as error:
        open_weights(path)
    assert time.process_time() - began < seconds
    return str(error.value)


def test_a_shape_of_two_million_numbers(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[' + b"1," * 2_000_000 + b'1],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "at most 8; it has 2000001 dimensions" in refused_within(tmp_path / "a.safetensors", 5)


@pytest.mark.parametrize("kind", ["integers", "fractions"])
def test_keys_that_share_a_chain(tmp_path, kind):
    """Numbers whose hashes differ in high bits alone: a dict of them looks at all of them for each."""
    pack = (
        (lambda n: b"\x8a\x08" + struct.pack("<q", n << 40))
        if kind == "integers"
        else (lambda n: b"G" + struct.pack(">d", float(n << 40)))
    )
    keys = b"".join(pack(number + 1) + b"N" for number in range(100_000))
    data = b"\x80\x02" + made.EMPTY_DICT + b"(" + keys + b"u."
    (tmp_path / "a.pt").write_bytes(made.torch_zip(data))
    assert "more than 1000 keys that are large numbers" in refused_within(tmp_path / "a.pt", 5)


def test_control_characters_of_metadata_are_escaped(tmp_path, capsys):
    fake = "epoch\n\x1b[32mwritten to runs/fake"
    save_file(unimodal_tensors(3, 16), tmp_path / "a.safetensors", {fake: "1"})
    convert.main([f"--source={tmp_path / 'a.safetensors'}", "--heads=2", f"--output={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\nwritten to runs/fake" not in said and "epoch\\n\\x1b" in said


def test_names_in_an_ascii_locale(tmp_path, ascii_locale):
    """Not even Python's UTF-8 mode, which such a locale brings by itself: names beyond ASCII are read and written."""
    save_file(unimodal_tensors(3, 16), tmp_path / "vít.safetensors")
    result = subprocess.run(
        [sys.executable, "-m", "av_mae.convert", "--heads=2", "--source=vít.safetensors", "--output=rün"],
        cwd=tmp_path,
        capture_output=True,
        env=ascii_locale,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert "written to rün" in result.stdout.decode() and (tmp_path / "rün" / "checkpoints" / "0").is_dir()
