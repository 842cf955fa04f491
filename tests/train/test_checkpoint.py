"""Checkpoints: what is kept, other meshes, damage, other models, full disks."""

import dataclasses
import errno
import json
import pathlib
import random
import resource
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_training import CONFIG, abstract, assert_same, shardings, state_of, state_on
from tiny_training import MODEL

from av_mae import checkpoint
from av_mae.errors import UserError
from av_mae.models.config import FusionConfig


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_run(folder, said):
    """Opens the run's checkpoints as a new process would; all are closed at the end."""
    opened = []

    def open_checkpoints(**options):
        opened.append(checkpoint.Checkpoints(folder, say=said.append, **options))
        return opened[-1]

    yield open_checkpoints
    for checkpoints in opened:
        checkpoints.close()


def save(checkpoints: checkpoint.Checkpoints, *steps: int, data: int = 1, fsdp: int = 1) -> None:
    for step in steps:
        checkpoints.save(step, state_on(step, data, fsdp), CONFIG, position=16 * step)
    checkpoints.wait()


def test_nothing_to_restore(open_run):
    assert open_run().restore(abstract(), CONFIG) is None


@pytest.mark.parametrize("saved, restored", [((2, 4), (1, 1)), ((1, 1), (4, 2)), ((1, 8), (2, 2))])
def test_restores_on_any_mesh(open_run, saved, restored):
    save(open_run(), 3, data=saved[0], fsdp=saved[1])
    back = open_run().restore(abstract(*restored), CONFIG)
    assert_same(back, 3)
    assert back.meta["seed"] == CONFIG.seed
    for x, expected in zip(jax.tree.leaves(back.state), jax.tree.leaves(shardings(*restored)), strict=True):
        assert x.sharding.is_equivalent_to(expected, x.ndim)


def test_keeps_the_last_and_every_mth(open_run, folder):
    save(open_run(keep_last=2, keep_every=4), *range(1, 8))
    assert checkpoint.Checkpoints(folder).steps() == [4, 6, 7]
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ["4", "6", "7"]


def test_saving_a_step_twice_does_nothing(open_run, said):
    checkpoints = open_run()
    save(checkpoints, 2, 2)
    assert checkpoints.steps() == [2] and not said


def test_background_save_is_not_disturbed_by_the_next_step(open_run):
    """The state is donated to the next step while its checkpoint is still being written."""
    checkpoints, state = open_run(), state_on(1)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    checkpoints.save(1, state, CONFIG, position=16)
    for _ in range(5):
        state = overwrite(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(abstract(), CONFIG), 1)


@pytest.mark.parametrize("damage", ["meta gone", "data gone", "other values"])
def test_the_first_checkpoint_is_read_back(open_run, folder, damage, monkeypatch):
    """A folder into which each process writes and from which none can read: the first save ends the run."""
    checkpoints = open_run()
    checkpoints.save(1, state_on(1), CONFIG, position=16)
    checkpoints._manager.wait_until_finished()
    if damage == "other values":
        name, array = checkpoints._first
        checkpoints._first = name, array + 1
    else:
        DAMAGES[damage](folder / "1")
    with pytest.raises(UserError, match="checkpoint 1, the first of this run, was written to .* and cannot be read"):
        checkpoints.wait()


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 4)])
def test_only_the_first_checkpoint_is_read_back(open_run, monkeypatch, data, fsdp):
    read = []
    monkeypatch.setattr(checkpoint, "read_back", lambda *arguments: read.append(arguments))
    checkpoints = open_run()
    save(checkpoints, 1, 2, 3, data=data, fsdp=fsdp)
    checkpoints.wait()
    assert [folder.name for folder, *_ in read] == ["1"]
    assert read[0][2].is_fully_replicated == (data * fsdp == 1)


def files(folder: pathlib.Path, item: str) -> list[pathlib.Path]:
    return sorted(path for path in (folder / item).rglob("*") if path.is_file())


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def scribble(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


DAMAGES = {
    "empty folder": lambda folder: [path.unlink() for path in files(folder, ".")],
    "data cut": lambda folder: cut(max(files(folder, "model"), key=lambda path: path.stat().st_size)),
    "bits flipped": lambda folder: [scribble(path) for path in files(folder, "optimizer") if path.parent.name == "d"],
    "optimizer gone": lambda folder: [path.unlink() for path in files(folder, "optimizer")],
    "data gone": lambda folder: [path.unlink() for path in files(folder, "model") if path.parent.name == "d"],
    "meta gone": lambda folder: (folder / "meta" / "metadata").unlink(),
    "meta cut": lambda folder: cut(folder / "meta" / "metadata"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_falls_back_and_training_goes_on(open_run, folder, said, damage):
    save(open_run(), 1, 2)
    DAMAGES[damage](folder / "2")
    checkpoints = open_run()
    back = checkpoints.restore(abstract(), CONFIG)
    assert_same(back, 1)
    assert any(message.startswith("warning: checkpoint 2 is damaged or half-written") for message in said)
    checkpoints.set_aside(1)
    assert checkpoints.steps() == [1] and (folder.parent / "checkpoints-damaged" / "2").is_dir()
    save(checkpoints, 2)
    assert_same(open_run().restore(abstract(), CONFIG), 2)


def test_silent_change_of_a_value_is_noticed(open_run, folder, said):
    """Bytes that decode but are not those that were saved."""
    save(open_run(), 1, 2)
    other = state_on(5)
    with checkpoint.ocp.StandardCheckpointer() as writer:
        writer.save(folder / "2" / "model", other.params, force=True)
    assert_same(open_run().restore(abstract(), CONFIG), 1)
    assert "checksum of model" in said[-1]


def rewrite(path: pathlib.Path, change) -> None:
    """JSON with some entries replaced."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_swapped_values_are_noticed(open_run, folder, said):
    """Values that change places: a plain sum stays the same."""
    save(open_run(), 1, 2)
    params = dict(state_on(2).params)
    params["encoder.kernel"] = params["encoder.kernel"][::-1]
    with checkpoint.ocp.StandardCheckpointer() as writer:
        writer.save(folder / "2" / "model", params, force=True)
    assert checkpoint.checksum(params) == checkpoint.checksum(state_on(2).params)
    assert_same(open_run().restore(abstract(), CONFIG), 1)
    assert "the order of its values" in said[-1]
    one, other = jnp.arange(16.0), jnp.ones(16)
    assert checkpoint.digest({"a": one, "b": other}) != checkpoint.digest({"a": other, "b": one})


def test_the_digest_is_the_same_on_every_mesh():
    digests = {checkpoint.digest(state_on(3, data, fsdp).params) for data, fsdp in ((1, 1), (2, 4), (8, 1))}
    assert len(digests) == 1 and len(digests.pop()) == 16
    params = {name: np.asarray(x) for name, x in state_on(3).params.items()}
    flipped = params["token"].copy()
    flipped.view(np.uint32)[0, 0, 0] ^= 1
    assert checkpoint.digest(params) != checkpoint.digest(params | {"token": flipped})


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta | {"position": meta["position"] + 16},
        lambda meta: meta | {"step": 3},
        lambda meta: meta | {"seed": 1},
        lambda meta: meta | {"sha256": "0" * 64},
        lambda meta: {("shb256" if name == "sha256" else name): value for name, value in meta.items()},
    ],
)
def test_changed_meta_is_noticed(open_run, folder, said, change):
    save(open_run(), 1, 2)
    rewrite(folder / "2" / "meta" / "metadata", change)
    assert_same(open_run().restore(abstract(), CONFIG), 1)
    assert said[-1].startswith("warning: checkpoint 2 is damaged or half-written")


def test_a_folder_of_another_step_is_refused(open_run, folder, said):
    save(open_run(), 1, 2)
    (folder / "2").rename(folder / "7")
    assert_same(open_run().restore(abstract(), CONFIG), 1)
    assert "its meta is of step 2" in said[-1]


def test_checkpoints_of_earlier_versions_open(open_run, folder):
    save(open_run(), 1)
    rewrite(
        folder / "1" / "meta" / "metadata",
        lambda meta: {name: value for name, value in meta.items() if name not in ("digests", "sha256")},
    )
    assert_same(open_run().restore(abstract(), CONFIG), 1)


def test_all_damaged_is_an_error_and_not_a_fresh_start(open_run, folder):
    save(open_run(), 1, 2)
    for step in (1, 2):
        DAMAGES["meta gone"](folder / str(step))
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 1\] in .* can be read"):
        open_run().restore(abstract(), CONFIG)


def test_half_written_checkpoint_is_dropped_and_said(open_run, folder, said):
    save(open_run(), 1)
    half = folder / "2.orbax-checkpoint-tmp-17"
    (half / "model").mkdir(parents=True)
    checkpoints = open_run()
    assert said == ["checkpoint 2 was not finished when its run ended; it is dropped"]
    assert_same(checkpoints.restore(abstract(), CONFIG), 1)
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2] and not half.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model": dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, depth=2))},
            "of another model: model.image.depth is 1 in it and 2 in the recipe",
        ),
        (
            {"model": dataclasses.replace(MODEL, fusion=FusionConfig(kind="dense", tokens=(2, 1, 1), heads=2))},
            "model.fusion.kind is factorized in it and dense in the recipe",
        ),
        ({"seed": 7}, "seed is 0 in it and 7 now"),
    ],
)
def test_other_recipe_is_refused(open_run, change, message):
    save(open_run(), 1)
    with pytest.raises(UserError, match=message):
        open_run().restore(abstract(), dataclasses.replace(CONFIG, **change))


def test_another_implementation_of_the_same_model_goes_on(open_run):
    save(open_run(), 1)
    fusion = dataclasses.replace(MODEL.fusion, pair_attention="chunked")
    config = dataclasses.replace(CONFIG, steps=40, model=dataclasses.replace(MODEL, fusion=fusion))
    assert_same(open_run().restore(abstract(), config), 1)


def test_other_shapes_are_refused_by_name(open_run, folder):
    save(open_run(), 1)
    other = abstract()
    other.params["encoder.bias"] = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=other.step.sharding)
    with pytest.raises(UserError, match=r"parameter encoder.bias is \(16,\) in it and \(32,\) in the recipe's model"):
        open_run().restore(other, CONFIG)
    with pytest.raises(UserError, match=r"parameter encoder.bias is \(16,\) in it"):
        checkpoint.load_params(str(folder), other.params)
    del other.params["encoder.bias"]
    with pytest.raises(UserError, match=r"parameter encoder.bias is \(16,\) in it and none"):
        checkpoint.load_params(str(folder), other.params)


@pytest.mark.parametrize("tail", ["", "checkpoints", "checkpoints/2"])
def test_weights_of_another_run(open_run, folder, tail):
    save(open_run(), 1, 2)
    params = checkpoint.load_params(str(folder.parent / tail), abstract(2, 2).params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(state_of(2).params))
    assert checkpoint.open_checkpoint(str(folder.parent / tail)).config == CONFIG


def test_weights_that_are_not_there(tmp_path, open_run, folder):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        checkpoint.load_params(str(tmp_path / "nothing"), abstract().params)
    save(open_run(), 1)
    DAMAGES["data gone"](folder / "1")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_params(str(folder), abstract().params)
    DAMAGES["meta cut"](folder / "1")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.open_checkpoint(str(folder))


def assert_failed(checkpoints: checkpoint.Checkpoints, said: list[str], step: int) -> None:
    assert checkpoints.failed == step
    assert f"warning: checkpoint {step} could not be saved" in said[-1]
    assert "training goes on, the last checkpoint is 1" in said[-1]
    assert_same(checkpoints.restore(abstract(), CONFIG), 1)


def test_failed_save_is_a_warning(open_run, said, monkeypatch):
    checkpoints = open_run(keep_last=1)
    save(checkpoints, 1)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
        save(checkpoints, 2)
    assert "(no space left on device)" in said[-1]
    assert_failed(checkpoints, said, 2)
    save(checkpoints, 3)  # room again
    assert checkpoints.failed is None
    assert_same(open_run().restore(abstract(), CONFIG), 3)


def test_files_that_may_not_grow(open_run, said):
    """The operating system refuses the data itself; the writer is C++."""
    checkpoints = open_run()
    save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        save(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert_failed(checkpoints, said, 2)
    save(checkpoints, 2)
    assert_same(checkpoints.restore(abstract(), CONFIG), 2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(small_disk, said):
    checkpoints = checkpoint.Checkpoints(small_disk / "checkpoints", say=said.append)
    save(checkpoints, 1)
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    save(checkpoints, 2)
    assert_failed(checkpoints, said, 2)
    assert "(no space left on device)" in said[-1]
    filler.unlink()
    save(checkpoints, 3)
    assert_same(checkpoints.restore(abstract(), CONFIG), 3)
    checkpoints.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of reads that end after the failure
def test_any_flipped_bit_is_noticed_or_means_nothing(open_run, folder, said):
    """A bit of each file of a checkpoint in turn, three times; what is read is what was saved, or the one before."""
    save(open_run(), 1, 2)
    for path in 3 * files(folder, "2"):
        whole = path.read_bytes()
        if whole:
            flipped = bytearray(whole)
            flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
            path.write_bytes(flipped)
            del said[:]
            assert_same(open_run().restore(abstract(), CONFIG), 1 if said else 2)
            path.write_bytes(whole)
