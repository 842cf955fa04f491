"""Weight files of PyTorch and safetensors: the same values as PyTorch reads, and no byte before it is asked for."""

import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import weight_file_bytes as made
import weight_file_process
from published import read_state_dict
from safetensors.numpy import load_file, save_file

from av_mae.convert.pickles import PickleReader
from av_mae.convert.tensors import Record, Symbol
from av_mae.convert.weight_file import open_weights
from av_mae.errors import UserError

TORCH = pathlib.Path(__file__).parents[1] / "data" / "torch_files"
FORMATS = {
    "types_zip": "torch zip",
    "types_legacy": "torch legacy",
    "types_big_endian": "torch zip",
    "types_protocol_4": "torch zip",
    "unsigned_zip": "torch zip",
    "checkpoint_zip": "torch zip",
    "checkpoint_legacy": "torch legacy",
}


def check_values(tensors, expected):
    """`expected`: what PyTorch read, bfloat16 as float32, with the type of each tensor as `dtype/NAME`."""
    names = [name for name in expected.files if not name.startswith("dtype/")]
    assert list(tensors) == names
    for name in names:
        tensor, values = tensors[name], tensors[name].read()
        assert tensor.dtype.name == values.dtype.name == str(expected[f"dtype/{name}"])
        assert tensor.name == name and tensor.shape == values.shape == expected[name].shape
        assert values.flags.c_contiguous and values.flags.writeable and values.dtype.isnative
        assert tensor.nbytes == values.nbytes
        assert values.astype(expected[name].dtype).tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_that_pytorch_reads(name):
    """All types, strided views, shared and empty storages, parameters; made and read by PyTorch 2.13.0."""
    opened = open_weights(TORCH / f"{name}.pt")
    assert opened.format == FORMATS[name] and opened.path == TORCH / f"{name}.pt"
    check_values(opened.tensors, np.load(TORCH / f"{name.partition('_')[0]}.npz"))


def test_every_good_file_is_tested():
    assert {path.stem for path in TORCH.glob("*.pt")} == set(FORMATS)


def test_arrays_share_nothing():
    tensors = open_weights(TORCH / "types_zip.pt").tensors
    whole, row, again = tensors["whole"].read(), tensors["row"].read(), tensors["whole"].read()
    np.testing.assert_array_equal(row, whole[2])
    whole[:] = 0
    assert row.all() and again.all()


@pytest.mark.parametrize("name", ["checkpoint_zip", "checkpoint_legacy"])
def test_what_lies_beside_the_model(name):
    """The zip file's names begin with 'module.', which is dropped. AdamW keeps two moments and a step per parameter."""
    opened = open_weights(TORCH / f"{name}.pt")
    parameters = ("0.weight", "0.bias", "1.weight", "1.bias")
    moments = 2 * sum(opened.tensors[name].nbytes for name in parameters)
    assert opened.metadata == {"epoch": 3, "n_steps": 12, "name": "small", "loss": 0.25}
    assert opened.ignored == {
        "optimizer": moments + 4 * len(parameters),
        "scaler": 0,
        "args": 0,
        "config": 0,
        "best": 0,
        "history": 0,
        "kinds": 0,
        "counts": 0,
    }


@pytest.mark.parametrize("name", ["factorized_mmi", "dense_mmi", "token", "factorized_mmi_swin"])
def test_golden_checkpoints(shared, name):
    opened = open_weights(shared / "golden" / f"{name}.pth")
    expected = read_state_dict(shared / "golden" / f"{name}.pth")
    assert list(opened.tensors) == list(expected) and opened.metadata == {"epoch": 3, "n_steps": 7}
    for key, values in expected.items():
        np.testing.assert_array_equal(opened.tensors[key].read(), values, strict=True)


@pytest.mark.parametrize("name", ["factorized_mmi", "separation", "classifier_norm"])
def test_golden_safetensors(shared, name):
    opened, expected = (
        open_weights(shared / "golden" / f"{name}.safetensors"),
        load_file(shared / "golden" / f"{name}.safetensors"),
    )
    assert opened.format == "safetensors" and set(opened.tensors) == set(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(opened.tensors[key].read(), values, strict=True)


def test_safetensors_of_every_type(tmp_path):
    generator = np.random.default_rng(0)
    kinds = (
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        ml_dtypes.bfloat16,
    )
    expected = {f"module.{np.dtype(kind).name}": (generator.random((3, 5)) * 90).astype(kind) for kind in kinds}
    expected |= {"module.scalar": np.array(1.5), "module.empty": np.zeros((0, 3), np.float32)}
    save_file(expected, tmp_path / "a.safetensors", {"epoch": "3"})
    opened = open_weights(str(tmp_path / "a.safetensors"))
    assert opened.metadata == {"epoch": "3"} and opened.ignored == {}
    assert {f"module.{name}" for name in opened.tensors} == set(expected)
    for name, tensor in opened.tensors.items():
        values = tensor.read()
        assert values.dtype == expected[f"module.{name}"].dtype and values.shape == expected[f"module.{name}"].shape
        assert values.tobytes() == expected[f"module.{name}"].tobytes()


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """A header of 0x180 bytes: the first byte of its length is that of a pickle."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(0x180)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes())
    assert path.read_bytes()[:1] == b"\x80"
    found = open_weights(path)
    assert found.format == "safetensors"
    np.testing.assert_array_equal(found.tensors["a"].read(), np.float32([1, 2]))


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", None])
def test_where_the_model_may_lie(tmp_path, key):
    state = made.items(
        ("a", made.tensor()),
        ("module.b", made.tensor(shape=(2,), strides=(2,), offset=1)),
        ("version", made.number(2)),
        ("extra", made.EMPTY_DICT),
    )
    root = made.EMPTY_DICT + (
        state if key is None else made.items((key, made.ORDERED_DICT + state), ("other", b"]" + made.tensor() + b"a"))
    )
    opened = open_weights(write(tmp_path / "a.pt", made.torch_zip(b"\x80\x02" + root + b".")))
    prefix = "" if key is None else f"{key}."
    assert list(opened.tensors) == ["a", "module.b"]
    np.testing.assert_array_equal(opened.tensors["a"].read(), np.float32([1, 2, 3, 4]), strict=True)
    np.testing.assert_array_equal(opened.tensors["module.b"].read(), np.float32([2, 4]), strict=True)
    assert opened.metadata == {f"{prefix}version": 2}
    assert opened.ignored == {f"{prefix}extra": 0} | ({} if key is None else {"other": 16})


def test_any_byte_but_zero_is_true(tmp_path):
    stored = made.storage(kind=("torch", "BoolStorage"))
    path = write(tmp_path / "a.pt", made.torch_zip(made.weight(made.tensor(stored)), stored=b"\0\1\2\xff"))
    values = open_weights(path).tensors["weight"].read()
    assert values.dtype == np.bool_ and values.tobytes() == b"\0\1\1\1"


def test_each_ignored_tensor_counts_once(tmp_path):
    """Sixty lists that each hold the one before twice: 2^60 ways to one tensor of 16 bytes."""
    doubled = made.tensor() + b"q\x05" + b"](h\x05h\x05eq\x05" * 60
    opened = open_weights(write(tmp_path / "a.pt", made.torch_zip(made.checkpoint(("lists", b"](" + doubled + b"e")))))
    assert opened.ignored == {"lists": 16}


def test_sizes_of_64_bits_in_the_zip_directory(tmp_path, monkeypatch):
    """Python's writer uses the 64-bit fields from its limit on, here for all but the smallest entries."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 64)
    with zipfile.ZipFile(TORCH / "types_zip.pt") as source, zipfile.ZipFile(tmp_path / "a.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert any(entry.extra.startswith(b"\1\0") for entry in zipfile.ZipFile(tmp_path / "a.pt").infolist())
    check_values(open_weights(tmp_path / "a.pt").tensors, np.load(TORCH / "types.npz"))


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    path = shutil.copy(TORCH / "types_legacy.pt", tmp_path / "a.pt")
    tensors = open_weights(path).tensors
    by_offset = sorted((tensor for tensor in tensors.values() if tensor.size), key=lambda tensor: tensor.storage.offset)
    changed = os.stat(path).st_mtime_ns
    os.truncate(path, by_offset[-1].storage.offset)
    os.utime(path, ns=(changed, changed))
    assert by_offset[0].read().size == by_offset[0].size
    with pytest.raises(UserError, match=rf"a.pt: tensor '{by_offset[-1].name}' cannot be read, though it was there"):
        by_offset[-1].read()
    os.remove(path)
    with pytest.raises(UserError, match="No such file"):
        by_offset[0].read()


def test_memory_is_that_of_the_model_alone(tmp_path):
    """A file of 4 GB (with a hole) of which the optimizer takes all but 16 bytes."""
    count = 10**9
    optimizer = made.tensor(made.storage(key="1", count=count), shape=(count // 2,), strides=(2,))
    head = made.legacy(made.checkpoint(("optimizer", b"]" + optimizer + b"a")), keys=("0", "1"))
    (tmp_path / "files").mkdir()
    path = write(tmp_path / "files" / "a.pt", head + struct.pack("<q", count))
    os.truncate(path, path.stat().st_size + 4 * count)
    assert open_weights(path).ignored == {"optimizer": 2 * count}
    files, peak_mb = weight_file_process.measure(tmp_path / "files", tmp_path)
    assert files["a.pt"]["error"] is None and peak_mb < 100


@pytest.mark.parametrize(
    "name, cause",
    [
        ("missing.pt", "No such file or directory"),
        ("folder.pt", "not a file, but a folder or a device"),
        ("pipe.pt", "not a file, but a folder or a device"),
        ("empty.pt", "begins with b''"),
        ("text.pt", "begins with b'version '"),
    ],
)
def test_files_of_no_known_format(tmp_path, name, cause):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    write(tmp_path / "empty.pt", b"")
    write(tmp_path / "text.pt", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=f"cannot read weights from .*/{name}: .*{cause}"):
        open_weights(tmp_path / name)


def read_pickle(data: bytes, load_persistent=lambda request: request):
    return PickleReader(data, "pickle", load_persistent).load()


def plain_value(generator: random.Random, depth: int, kinds: int):
    """Random plain data; `kinds` leaves out what the oldest protocol writes as calls."""
    small = [
        None,
        True,
        False,
        generator.randrange(-300, 70000),
        generator.getrandbits(100) - 2**99,
        generator.random(),
        "täxt " * generator.randrange(60),
        "",
    ]
    containers = [
        lambda: [plain_value(generator, depth - 1, kinds) for _ in range(generator.randrange(4))],
        lambda: tuple(plain_value(generator, depth - 1, kinds) for _ in range(generator.randrange(5))),
        lambda: {key: plain_value(generator, depth - 1, kinds) for key in ("a", 7, 2.5, None)},
        lambda: b"bytes" * generator.randrange(60),
        lambda: {1, "two"},
    ]
    return generator.choice(small) if depth == 0 else generator.choice(containers[:kinds])()


@pytest.mark.parametrize("protocol, kinds", [(2, 3), (3, 4), (4, 5), (5, 5)])
def test_plain_data_as_python_pickles_it(protocol, kinds):
    generator = random.Random(protocol)
    for _ in range(50):
        value = plain_value(generator, 4, kinds)
        shared = [value, {"again": value}]
        assert read_pickle(pickle.dumps(shared, protocol)) == shared


def test_shared_objects_stay_shared_and_may_hold_themselves():
    value = {"items": [1]}
    value["self"], value["again"] = value, value["items"]
    read = read_pickle(pickle.dumps(value, 2))
    assert read["self"] is read and read["again"] is read["items"] == [1]


def test_settings_become_inert_records():
    path = pathlib.PurePosixPath("a/b")
    record = read_pickle(pickle.dumps({"path": path, "kind": np.linalg.LinAlgError, "scalar": np.float32(2)}, 2))
    assert isinstance(record["path"], Record) and record["path"].name == "pathlib.PurePosixPath"
    assert record["path"].arguments == ("a", "b")
    assert record["kind"] == Symbol("numpy.linalg.LinAlgError") and not callable(record["kind"])
    assert record["scalar"].name.endswith(".scalar")
