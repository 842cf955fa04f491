"""Embeddings as Parquet: equal to `av_mae.encode` whatever the batches, in order, resumed, with failures told."""

import errno
import functools
import json
import os

import duckdb
import jax
import numpy as np
import pytest
from flax import nnx
from tiny_export import STREAMS, expected, export, read, write_checkpoint, write_set

import av_mae
from av_mae import preprocess
from av_mae.config import DataConfig
from av_mae.data.pipeline import open_evaluation_data
from av_mae.errors import UserError
from av_mae.export import __main__ as command
from av_mae.export import embeddings as embedder
from av_mae.export import tables
from av_mae.prepare import __main__ as prepare
from av_mae.train import __main__ as train

CLIPS = 15


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """What is compiled for one device is compiled sooner."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.local_devices()[:1]
        patch.setattr(embedder.jax, "local_devices", lambda: devices)
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data") / "set", CLIPS, broken=(7,))


@pytest.fixture(scope="module")
def exported(checkpoint, clips, tmp_path_factory):
    """An undisturbed export and its result."""
    output = tmp_path_factory.mktemp("exported") / "out"
    return output, export(checkpoint, f"{clips}:test", output)


def test_embeddings_are_those_of_encode(checkpoint, clips, exported):
    output, result = exported
    found, wanted = read(output), expected(checkpoint, clips)
    for stream in STREAMS:
        assert found[stream].dtype == np.float32 and found[stream].shape == (CLIPS - 1, 32)
        np.testing.assert_allclose(found[stream], wanted[stream], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["id"], wanted["id"])
    np.testing.assert_array_equal(found["place"], [position for position in range(CLIPS) if position != 7])
    np.testing.assert_allclose(found["start"], wanted["start"], rtol=1e-6)
    assert [-1 if label is None else label for label in found["label"]] == wanted["label"].tolist()
    assert set(found["path"]) == {str(clips)}
    assert (result["clips"], result["windows"], result["failed"]) == (CLIPS - 1, CLIPS - 1, 1)


@pytest.mark.parametrize("options", [{"batch_size": 1, "shard_clips": 4}, {"batch_size": 9, "shard_clips": 100}])
def test_batches_and_shards_change_nothing(checkpoint, clips, exported, tmp_path, options):
    export(checkpoint, f"{clips}:test", tmp_path / "out", **options)
    found, wanted = read(tmp_path / "out"), read(exported[0])
    assert len(list((tmp_path / "out" / tables.FOLDER).iterdir())) == -(-CLIPS // options["shard_clips"])
    for name, x in wanted.items():
        if name in STREAMS:
            np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[name], x)


def test_duckdb_reads_it_as_it_is(exported):
    """Order, types, arithmetic on the lists, and the failures beside."""
    output, _ = exported
    rows = duckdb.sql(
        f"select place, label, list_dot_product(image, image) from '{output}/embeddings/*.parquet' order by place"
    ).fetchall()
    found = read(output)
    assert [row[0] for row in rows] == found["place"].tolist()
    assert [row[1] for row in rows] == [None if position % 3 == 0 else position % 3 - 1 for position in found["place"]]
    np.testing.assert_allclose([row[2] for row in rows], np.square(found["image"]).sum(1), rtol=1e-5)
    assert duckdb.sql(f"select place, id, error from '{output}/failures.parquet'").fetchall() == [
        (7, "c-7", "sound: Format not recognised.")
    ]


def test_metadata_say_what_it_is(checkpoint, clips, exported):
    """In each file's schema, and in export.json; the model is told by its encoder's weights."""
    output, result = exported
    record = json.loads((output / "export.json").read_text())
    for path in (output / tables.FOLDER).iterdir():
        assert json.loads(tables.parquet.read_schema(path).metadata[b"av_mae"]) == record["settings"]
    settings = record["settings"]
    assert settings["classes"] == ["even", "odd"] and settings["preprocessing"] == preprocess.VERSION
    assert record["source"] == {"checkpoint": str(checkpoint), "data": f"{clips}:test"}
    assert record["result"] == result
    model = av_mae.load(checkpoint)
    assert settings["model"] == embedder.model_identity(model) and len(settings["model"]) == 64
    before = embedder.model_identity(model)
    model.image_decoder = None
    assert embedder.model_identity(model) == before
    model.encoder.fusion_tokens[...] += 1e-3
    assert embedder.model_identity(model) != before


def test_layers_tokens_and_float16(checkpoint, clips, tmp_path):
    options = {"layers": (0,), "tokens": True, "dtype": "float16"}
    export(checkpoint, f"{clips}:test", tmp_path / "out", **options)
    found, model = read(tmp_path / "out"), av_mae.load(checkpoint)
    batch = stored_clip(clips, model, 3)
    forward = nnx.jit(functools.partial(av_mae.loading.forward, return_layers=True))
    tokens, _ = forward(model.encoder, batch["image"], batch["audio"])
    assert found["image"].dtype == np.float16
    for stream in STREAMS:
        np.testing.assert_allclose(found[f"{stream}_tokens"][3], getattr(tokens, stream)[0], atol=2e-3)
        layer = getattr(tokens.layers[0], stream)[0].mean(0)
        np.testing.assert_allclose(found[f"{stream}_layer0"][3], layer, atol=2e-3)
        np.testing.assert_allclose(found[f"{stream}_tokens"][3].astype(np.float32).mean(0), found[stream][3], atol=2e-3)
    with pytest.raises(UserError, match="--layers=1: the encoder has layers 0 to 0"):
        export(checkpoint, f"{clips}:test", tmp_path / "wrong", layers=(1,))


def stored_clip(clips, model, position):
    """One stored clip as evaluation reads it."""
    data = DataConfig(path=str(clips), split="test", sound=model.sound)
    with open_evaluation_data(data, model.config.image.size, model.config.audio.size, 1, np.arange(1)) as opened:
        return list(opened)[position]


def test_windows_of_stored_clips(checkpoint, clips, tmp_path):
    """1.3 s hold windows of 0.5 s at 0, 0.3 and 0.6 s; batches of 4 cut through clips."""
    result = export(checkpoint, f"{clips}:test", tmp_path / "out", stride=0.3)
    assert result["causes"] == {"sound: Format not recognised.": 1}
    found = read(tmp_path / "out")
    np.testing.assert_allclose(found["start"], np.tile([0, 0.3, 0.6], CLIPS - 1), atol=1e-4)
    np.testing.assert_array_equal(found["place"], np.repeat([p for p in range(CLIPS) if p != 7], 3))
    middle = expected(checkpoint, clips)
    assert not np.allclose(found["audio"][::3], middle["audio"], atol=1e-3)
    assert np.abs(np.diff(found["audio"], axis=0)).max(1).min() > 1e-4


class Killed(BaseException):
    """Stands for the end of the process."""


def test_stopped_twice_it_goes_on(checkpoint, clips, exported, tmp_path, monkeypatch):
    """In a batch of the second shard, then while the third is written: finished shards are not computed again, and the
    files are those of an undisturbed export, byte by byte."""
    add, replace, added = tables.ShardWriter.add, os.replace, []

    def stopping_add(self, rows, columns):
        added.append(rows[0].position)
        if len(added) == 4:
            raise Killed
        add(self, rows, columns)

    monkeypatch.setattr(tables.ShardWriter, "add", stopping_add)
    with pytest.raises(Killed):
        export(checkpoint, f"{clips}:test", tmp_path / "out")
    folder = tmp_path / "out" / tables.FOLDER
    assert [path.name for path in sorted(folder.glob("*.parquet"))] == ["00000-of-00003.parquet"]

    def stopping_replace(source, target):
        if "00002-of" in str(target):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(tables.os, "replace", stopping_replace)
    with pytest.raises(Killed):
        export(checkpoint, f"{clips}:test", tmp_path / "out")
    assert added[4:] == [6, 10, 12]
    monkeypatch.undo()
    assert export(checkpoint, f"{clips}:test", tmp_path / "out")["failed"] == 1
    for path in [*(exported[0] / tables.FOLDER).iterdir(), exported[0] / "failures.parquet"]:
        assert (tmp_path / "out" / path.relative_to(exported[0])).read_bytes() == path.read_bytes()


def test_a_full_disk_and_a_damaged_shard(checkpoint, clips, exported, tmp_path, monkeypatch):
    """The message says what to do; the same command goes on, and writes a damaged shard again."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [
        f"--checkpoint={checkpoint}",
        f"--data={clips}:test",
        f"--output={tmp_path / 'out'}",
        "--workers=0",
        "--batch_size=4",
        "--shard_clips=6",
    ]
    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write --output=.*: No space left on device.* make room"):
        command.main(arguments)
    monkeypatch.undo()
    command.main(arguments)
    shard = tables.shard_path(tmp_path / "out", 1, 3)
    shard.write_bytes(shard.read_bytes()[:-100])
    command.main(arguments)
    for path in (exported[0] / tables.FOLDER).iterdir():
        assert (tmp_path / "out" / tables.FOLDER / path.name).read_bytes() == path.read_bytes()


def test_other_exports_are_refused(checkpoint, clips, exported, tmp_path):
    output, _ = exported
    other = write_checkpoint(tmp_path / "run", change=0.5)
    with pytest.raises(UserError, match="holds another export, and is not mixed with this one: model is"):
        export(other, f"{clips}:test", output)
    with pytest.raises(UserError, match="data is "):
        export(checkpoint, f"{clips}:train", output)
    with pytest.raises(UserError, match="dtype is float32 there and float16 here"):
        export(checkpoint, f"{clips}:test", output, dtype="float16")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files .thesis.txt.: name a folder that is new or empty"):
        export(checkpoint, f"{clips}:test", tmp_path / "mine")


def test_rates_and_messages_of_the_command(checkpoint, clips, tmp_path, capsys):
    command.main(
        [
            f"--checkpoint={checkpoint}",
            f"--data={clips}:test",
            f"--output={tmp_path / 'out'}",
            "--workers=0",
            "--batch_size=4",
            f"--json={tmp_path / 'figures.json'}",
        ]
    )
    metrics = json.loads((tmp_path / "figures.json").read_text())
    assert metrics["clips_per_second"] > 0 and metrics["encoder_clips_per_second"] > 0
    text = capsys.readouterr()
    assert f"{CLIPS - 1} windows of {CLIPS - 1} clips clips_per_second=" in text.out
    assert f"1 of {CLIPS} clips failed, see {tmp_path / 'out'}/failures.parquet:\n  1 × sound: Format" in text.out
    assert "exporting: 15/15 clips (100 %)" in text.err


def test_all_devices_share_the_rows(checkpoint, clips, exported, tmp_path, monkeypatch):
    """Batches are rounded up to the devices."""
    devices = jax.devices()[:4]
    monkeypatch.setattr(embedder.jax, "local_devices", lambda: devices)
    export(checkpoint, f"{clips}:test", tmp_path / "out", batch_size=6, shard_clips=100)
    found, wanted = read(tmp_path / "out"), read(exported[0])
    for stream in STREAMS:
        np.testing.assert_allclose(found[stream], wanted[stream], rtol=0, atol=1e-5)
    assert embedder.Embedder(av_mae.load(checkpoint)).columns() == dict.fromkeys(STREAMS, (32,))


@pytest.mark.slow
def test_a_run_of_the_demo_exports_what_encode_gives(tmp_path):
    """Pretrained by the demo's recipe (a layer of each, three steps); its clips as mp4 files, in two orders and in
    batches of 1 and of 5: each row is what `preprocess.load` and `encode` make of its file alone."""
    data, run = tmp_path / "toy_band", tmp_path / "run"
    prepare.main(["--dataset=toy_band", f"--output={data}", "--clips=16", "--test_clips=12", "--workers=1"])
    train.main(
        [
            "--config=configs/demo.py",
            f"--workdir={run}",
            f"--config.data.path={data}",
            "--config.steps=3",
            "--config.data.weights=None",
            "--config.batch_size=8",
            "--config.optimizer.warmup=1",
            "--config.images_every=0",
            "--config.validate_every=0",
            "--config.model.image.depth=1",
            "--config.model.audio.depth=1",
            "--config.model.decoder.depth=1",
        ]
    )
    model, files = av_mae.load(run), sorted((data / "clips" / "test").glob("*.mp4"))
    wanted = {}
    for path in files:
        batch = preprocess.load(path, duration=1.5, sound=model.sound, image_size=model.config.image.size)
        wanted[path.name] = av_mae.encode(model, batch).features
    assert np.abs(wanted[files[0].name]["fusion"] - wanted[files[1].name]["fusion"]).max() > 1e-3
    for batch_size, order in ((1, files), (5, files[::-1])):
        listed = tmp_path / f"{batch_size}.csv"
        listed.write_text("path\n" + "\n".join(map(str, order)))
        export(run, listed, tmp_path / f"{batch_size}", batch_size=batch_size)
        found = read(tmp_path / f"{batch_size}")
        assert found["path"].tolist() == [str(path) for path in order] and len(order) == 12
        for stream in STREAMS:
            assert found[stream].dtype == np.float32
            np.testing.assert_allclose(
                found[stream], np.concatenate([wanted[path.name][stream] for path in order]), rtol=0, atol=1e-5
            )


def test_skipped_clips_are_named_by_field(exported):
    assert [json.loads(line) for line in (exported[0] / "skipped.jsonl").read_text().splitlines()] == [
        {"clip": "c-7", "stage": "sound", "cause": "Format not recognised."}
    ]
