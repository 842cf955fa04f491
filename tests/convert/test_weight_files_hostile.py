"""Hostile and damaged weight files: refused in one line, in bounded time and memory, and nothing of them runs."""

import hashlib
import json
import pathlib
import random

import hostile_files
import numpy as np
import pytest
import weight_file_bytes
import weight_file_process
from safetensors.numpy import save_file

from av_mae.convert.tensors import RECORDS

DATA = pathlib.Path(__file__).parents[1] / "data"
MOST_SECONDS, MOST_MB = 5, 500


def check_refusals(files, peak_mb, working_directory):
    """Whatever was refused was refused in one printable line that names the file, and nothing ran."""
    for name, entry in files.items():
        assert entry["seconds"] < MOST_SECONDS, name
        if entry["error"] is not None:
            assert entry["error"].isprintable() and f"/{name}: " in entry["error"], entry["error"]
            assert len(entry["error"]) < 1000
    assert peak_mb < MOST_MB
    assert not (working_directory / hostile_files.CANARY).exists()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    hostile_files.write_files(hostile_files.hostile_files(), folder / "files")
    files, peak_mb = weight_file_process.measure(folder / "files", folder)
    check_refusals(files, peak_mb, folder)
    return files


def test_every_hostile_file_is_refused(hostile):
    assert len(hostile) >= 60
    assert [name for name, entry in hostile.items() if entry["error"] is None] == []


def test_the_good_files_behind_them_are_read(tmp_path):
    hostile_files.write_files(weight_file_bytes.good_files(), tmp_path / "files")
    files, _ = weight_file_process.measure(tmp_path / "files", tmp_path)
    assert [entry["error"] for entry in files.values()] == [None, None, None]


@pytest.mark.parametrize(
    "name, where, cause",
    [
        ("payload_os_system.pt", "data.pkl, byte 202 (GLOBAL, after 'payload')", "os.system"),
        ("payload_builtins_eval_legacy.pt", "pickle, byte 250 (GLOBAL, after 'payload')", "builtins.eval"),
        ("payload_reduce_of_own_class.pt", "(REDUCE, after 'payload')", "calls 'my_training.Model'"),
        ("payload_build_on_name.pt", "(BUILD)", "an object of type Symbol the attributes an object of type dict"),
        ("payload_persistent_module.pt", "(BINPERSID, after 'payload')", "a persistent id"),
        ("payload_ext1.pt", "(EXT1, after 'payload')", "not an opcode that torch.save writes"),
        ("bomb_binunicode8.pt", "(BINUNICODE8, after 'payload')", "needs 4611686018427387904 bytes where 3 are left"),
        ("bomb_nested_tuples_as_key.pt", "(SETITEM)", "an object of type tuple as a key"),
        ("bomb_equal_hashes.pt", "(SETITEMS)", "2305843009213693951 as a key"),
        ("bomb_many_tensors.pt", "data.pkl, byte", "more than 500000 steps"),
        ("tensor_storage_too_long.pt", "(BINPERSID)", "storage '0' of 4000 bytes, but its zip entry has 16"),
        ("tensor_rebuild_sparse.pt", "(REDUCE, after 'weight')", "torch._utils._rebuild_sparse_tensor"),
        ("tensor_shape_negative.pt", "(REDUCE, after 'weight')", "one is -4"),
        ("tensor_name_of_two_lines.pt", "the name 'a\\nb'", "printable"),
        ("name_of_escapes.safetensors", "the name '\\x1b[2J'", "printable"),
        ("tensor_names_are_numbers.pt", "the name 1", "printable"),
        ("tensor_expanded.pt", "", "4398046511104 bytes in memory"),
        ("tensor_storage_two_types.pt", "(BINPERSID)", "storage '0' as float16, but before as float32"),
        ("zip_name_dots.pt", "zip entry 'archive/../../x'", "without '..'"),
        ("zip_name_twice.pt", "the zip directory", "'archive/data/0' twice"),
        ("zip_compressed_bomb.pt", "zip entry 'archive/data.pkl'", "16310 bytes for 16777216"),
        ("zip_size_local_differs.pt", "zip entry 'archive/data/0' at byte", "disagrees with the zip directory"),
        ("zip_entries_overlap.pt", "'archive/data/0'", "overlap"),
        ("legacy_count_differs.pt", "storage '0'", "header says 5"),
        ("legacy_storage_view.pt", "(BINPERSID)", "a persistent id"),
        ("legacy_tar.pt", "", "tar format"),
        ("shape_differs.safetensors", "tensor 'a'", "reaches element 4 of a storage that has 4"),
        ("offsets_overlap.safetensors", "tensor 'b'", "starts at byte 4 of the data, where 8 was due"),
        ("cut_4_good.pt", "the zip end record", "truncated"),
        ("cut_7_good.safetensors", "the tensors take 16 bytes", "the file has 4"),
    ],
)
def test_refusals_name_place_and_cause(hostile, name, where, cause):
    assert where in hostile[name]["error"] and cause in hostile[name]["error"]


def test_verdicts_of_pytorch_are_about_these_very_files():
    recorded = json.loads((DATA / "torch_verdicts.json").read_text())["files"]
    made = hostile_files.hostile_files() | weight_file_bytes.good_files()
    made = {name: data for name, data in made.items() if name.endswith(".pt")}
    made |= {path.name: path.read_bytes() for path in (DATA / "torch_files").glob("*.pt")}
    assert {name: entry["sha256"] for name, entry in recorded.items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in made.items()
    }
    assert all(recorded[name]["verdict"] == "accepted" for name in ("good.pt", "good_legacy.pt"))


def test_nothing_is_accepted_that_pytorch_refuses_as_unsafe(hostile, tmp_path):
    """But for what its restricted reader does not know: training settings as inert records, and protocol 4."""
    verdicts = json.loads((DATA / "torch_verdicts.json").read_text())["files"]
    unsafe = {name: entry["verdict"] for name, entry in verdicts.items() if entry["verdict"].startswith("unsafe")}
    assert len(unsafe) > 60
    files, _ = weight_file_process.measure(DATA / "torch_files", tmp_path)
    errors = {name: entry["error"] for name, entry in (hostile | files).items()}
    accepted = {name: unsafe[name] for name in unsafe if errors[name] is None}
    assert set(accepted) == {"checkpoint_zip.pt", "checkpoint_legacy.pt", "types_protocol_4.pt"}
    assert "Unsupported operand 149" in accepted.pop("types_protocol_4.pt")
    for verdict in accepted.values():
        assert verdict.split("GLOBAL ")[1].split()[0] in RECORDS


def damaged(data: bytes, generator: random.Random) -> bytes:
    """A good file cut short, or with one to eight bytes replaced."""
    if generator.random() < 0.3:
        return data[: generator.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(generator.randint(1, 8)):
        changed[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(changed)


def fuzz(folder: pathlib.Path, cases: int) -> tuple[int, int]:
    """Opens that many damaged files; (how many were refused, how many were read)."""
    expected = np.load(DATA / "torch_files" / "types.npz")
    save_file(
        {name: expected[name] for name in expected.files if not name.startswith("dtype/")},
        folder / "types.safetensors",
        {"epoch": "3"},
    )
    sources = [(folder / "types.safetensors")] * 3 + sorted((DATA / "torch_files").glob("*.pt"))
    generator = random.Random(0)
    files = {
        f"{case:04d}_{sources[case % len(sources)].name}": damaged(sources[case % len(sources)].read_bytes(), generator)
        for case in range(cases)
    }
    hostile_files.write_files(files, folder / "files")
    verdicts, peak_mb = weight_file_process.measure(folder / "files", folder)
    check_refusals(verdicts, peak_mb, folder)
    refused = sum(entry["error"] is not None for entry in verdicts.values())
    print(
        f"{refused} of {cases} refused, slowest {max(entry['seconds'] for entry in verdicts.values()):.3f} s, "
        f"peak {peak_mb:.0f} MB"
    )
    return refused, cases - refused


def test_damaged_files_are_read_or_refused(tmp_path):
    refused, read = fuzz(tmp_path, 1000)
    assert refused > 500 and read > 20


def test_truncation_at_any_byte_is_refused(tmp_path):
    """Every length of a small file of each format, but for the whole one."""
    for name, data in weight_file_bytes.good_files().items():
        files = {f"{length:04d}_{name}": data[:length] for length in range(len(data))}
        hostile_files.write_files(files, tmp_path / name / "files")
        verdicts, peak_mb = weight_file_process.measure(tmp_path / name / "files", tmp_path)
        check_refusals(verdicts, peak_mb, tmp_path)
        assert all(entry["error"] is not None for entry in verdicts.values())
