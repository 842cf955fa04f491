"""av_mae.prepare: reproducible sets that TFDS reads, real mp4 files, clear refusals."""

import errno
import filecmp
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
import simplejpeg
import soundfile
import tensorflow_datasets as tfds
from PIL import Image

from av_mae.data import records
from av_mae.errors import UserError
from av_mae.prepare import __main__ as prepare
from av_mae.prepare import shards
from av_mae.prepare.demo import spoken_digits, toy_band

CLIPS = ["--clips=18", "--test_clips=5", "--seed=3"]


def run(output: pathlib.Path, *options: str) -> None:
    prepare.main([f"--output={output}", *options])


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("sets") / "toy"
    run(output, "--dataset=toy_band", "--variant=scene", "--workers=1", *CLIPS)
    return output


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("sets") / "deeper" / "digits"
    run(output, "--dataset=spoken_digits", "--variant=mixture", "--workers=1", "--clips=4", "--test_clips=3")
    return output


def files_below(folder: pathlib.Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_worker_processes_write_the_same_files(toy, tmp_path, root):
    command = [sys.executable, "-m", "av_mae.prepare", "--dataset=toy_band", "--variant=scene", "--workers=2", *CLIPS]
    done = subprocess.run([*command, f"--output={tmp_path / 'again'}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "18 training and 5 test clips of toy_band (scene)" in done.stdout and "23/23 clips" in done.stderr
    names = files_below(toy)
    assert names == files_below(tmp_path / "again") and len(names) == 23 + 8
    assert filecmp.cmpfiles(toy, tmp_path / "again", names, shallow=False) == (names, [], [])
    assert not (tmp_path / "again.unfinished").exists()


def test_another_seed_gives_other_clips(toy, tmp_path):
    run(
        tmp_path / "other",
        "--dataset=toy_band",
        "--variant=scene",
        "--workers=1",
        "--clips=2",
        "--test_clips=1",
        "--seed=4",
    )
    first, other = records.open_source(toy, "train")[0], records.open_source(tmp_path / "other", "train")[0]
    assert first["id"] == other["id"] and first["sound"] != other["sound"]


def test_tfds_reads_the_set_without_tensorflow(toy):
    builder = tfds.builder_from_directory(os.fspath(toy))
    assert builder.name == "toy_band" and builder.info.features["label"].names == list(toy_band.CLASSES)
    sources = builder.as_data_source()
    assert (len(sources["train"]), len(sources["test"])) == (18, 5)
    ours = records.open_source(toy, "train")
    for number, theirs in enumerate(sources["train"]):
        record = ours[number]
        assert record.keys() == theirs.keys() and record["id"] == theirs["id"].decode()
        assert record["source"] == theirs["source"].decode()
        for name in record.keys() - {"id", "source"}:
            np.testing.assert_array_equal(record[name], theirs[name])
    assert "tensorflow" not in sys.modules


def test_source_has_types_and_order_and_can_be_sent_to_workers(toy):
    source = pickle.loads(pickle.dumps(records.open_source(toy, "test", ("id", "label", "boxes"))))
    assert [source[index]["id"] for index in range(len(source))] == [
        f"toy_band_scene_test_{index:06d}" for index in range(5)
    ]
    record = source[4]
    assert set(record) == {"id", "label", "boxes"} and record["label"].dtype == np.int64
    assert record["boxes"].dtype == np.float32 and record["boxes"].shape[1] == 4
    assert records.class_names(toy) == list(toy_band.CLASSES)


@pytest.mark.parametrize("name", ["toy", "digits"])
def test_records_hold_the_composed_clip(name, request):
    module, variant, seed = (toy_band, "scene", 3) if name == "toy" else (spoken_digits, "mixture", 0)
    source = records.open_source(request.getfixturevalue(name), "train")
    for index in range(4):
        record, clip = source[index], module.compose(seed, "train", index, variant)
        assert record["label"] == clip.label and record["duration"] == 2 and record["source"] == clip.id
        np.testing.assert_array_equal(record["labels"], [clip.label])
        assert record["sounding"][clip.sounding] == 1 == record["sounding"].sum() and record["annotators"] == 1
        np.testing.assert_array_equal(record["frame_times"], np.arange(8) / 4)
        np.testing.assert_array_equal(record["boxes"], clip.boxes)
        np.testing.assert_array_equal(record["object_labels"], clip.object_labels)
        (mask,) = record["masks"]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(mask))), 255 * clip.mask)
        np.testing.assert_array_equal(record["mask_frames"], [4])
        for number in (0, 4, 7):
            shown = simplejpeg.decode_jpeg(record["frames"][number]).astype(float)
            assert np.abs(shown - clip.frames[number]).mean() < 8
            inside = np.median(shown[clip.mask], 0) - np.median(clip.frames[4][clip.mask], 0)
            assert number != 4 or np.abs(inside).max() < 30  # the object keeps its colour
        sound, rate = soundfile.read(io.BytesIO(record["sound"]))
        assert rate == 8000 and sound.shape == (16000,)
        assert np.mean((sound - clip.sound) ** 2) < 1e-2 * np.mean(clip.sound**2)  # 20 dB, and no delay
        for stored, clean in zip(record["sources"], clip.sources, strict=True):
            np.testing.assert_allclose(soundfile.read(io.BytesIO(stored))[0], clean, atol=4e-5)


def test_clips_are_real_mp4_files(digits):
    paths = sorted((digits / "clips").rglob("*.mp4"))
    assert [path.parent.name for path in paths] == ["test"] * 3 + ["train"] * 4
    for path in paths:
        with av.open(os.fspath(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, video.average_rate, audio.rate) == (96, 96, 4, 8000)
            assert float(video.duration * video.time_base) == pytest.approx(2.0)
            assert float(audio.duration * audio.time_base) == pytest.approx(2.0, abs=0.07)
            assert sum(1 for _ in container.decode(video=0)) == 8


def test_a_second_call_does_nothing_and_other_settings_are_refused(toy, capsys):
    before = {name: (toy / name).stat().st_mtime_ns for name in files_below(toy)}
    run(toy, "--dataset=toy_band", "--variant=scene", *CLIPS)
    assert "already holds this set" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a set with clips=18 \(asked: 19\), seed=3 \(asked: 0\); name another"):
        run(toy, "--dataset=toy_band", "--variant=scene", "--clips=19", "--test_clips=5")
    assert before == {name: (toy / name).stat().st_mtime_ns for name in files_below(toy)}


def test_leftovers_of_an_interrupted_run_are_replaced(tmp_path, monkeypatch):
    compose, calls = toy_band.compose, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compose(*arguments)

    options = ("--dataset=toy_band", "--workers=1", "--clips=4", "--test_clips=1")
    with monkeypatch.context() as patch:
        patch.setattr(toy_band, "compose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "set", *options)
    assert not (tmp_path / "set").exists() and (tmp_path / "set.unfinished").exists()
    run(tmp_path / "set", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert len(records.open_source(tmp_path / "set", "train")) == 4


def test_many_clips_are_spread_over_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CLIPS", 2)
    run(tmp_path / "set", "--dataset=toy_band", "--workers=1", "--clips=5", "--test_clips=3")
    assert len(list((tmp_path / "set").glob("*train.array_record*-of-00003"))) == 3
    source = records.open_source(tmp_path / "set", "train")
    assert [source[index]["id"][-1] for index in range(5)] == list("01234")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--dataset=toy_bant"],
            f"unknown dataset 'toy_bant', known are {', '.join(prepare.NAMES)}; did you mean toy_band?",
        ),
        (["--dataset=xyz"], f"unknown dataset 'xyz', known are {', '.join(prepare.NAMES)}"),
        (
            ["--dataset=toy_band", "--variant=scenes"],
            "unknown variant 'scenes', known are single, scene, mixture; did you mean scene?",
        ),
        (["--dataset=toy_band", "--clips=0"], "--clips=0 must be at least 1"),
        (["--dataset=toy_band", "--test_clips=-1"], "--test_clips=-1 must be at least 1"),
        (["--dataset=toy_band", "--seed=-1"], "--seed=-1 must be at least 0"),
        (["--dataset=toy_band", "--workers=0"], "--workers=0 must be at least 1"),
        (["--dataset=toy_band", "--workers=1000000"], "--workers=1000000 must be at most 4_096"),
        (["--dataset=toy_band", "--clips=1000000000000"], "--clips=1000000000000 must be at most 1_000_000_000"),
        (["--dataset=folder", "--source=.", "--size=1000000000"], "--size=1000000000 must be at most 65_535"),
        (["--dataset=folder", "--source=.", "--frames=1000000000"], "--frames=1000000000 must be at most 1_000_000"),
        (["--dataset=folder", "--source=.", "--frame_rate=1e12"], "--frame_rate=1000000000000.0 must be at most 1_000"),
        (["--dataset=folder", "--source=.", "--memory_limit=inf"], "--memory_limit=inf must be at most 1_000_000"),
        (["--dataset=folder", "--source=.", "--time_limit=nan"], "--time_limit=nan must be at least 0.001"),
        (["--dataset=folder", "--source=.", "--max_failures=-1"], "--max_failures=-1 must be at least 0"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "set", *options)
    assert str(caught.value) == message
    assert not any(tmp_path.iterdir())


def test_outputs_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--output=.*file is a file; name a folder that is new or empty"):
        run(tmp_path / "file", "--dataset=toy_band")
    with pytest.raises(UserError, match=r"cannot write --output=.*below: Not a directory"):
        run(tmp_path / "file" / "below", "--dataset=toy_band")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"--output=.*used holds other files"):
        run(tmp_path / "used", "--dataset=toy_band")
    (tmp_path / "new.unfinished").mkdir()
    with pytest.raises(UserError, match=r"new.unfinished, needed while preparing, exists"):
        run(tmp_path / "new", "--dataset=toy_band")


@pytest.mark.parametrize(
    "error, message",
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/set"),
            "no permission for /data/set; choose another",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write --output=.*: No space left on device"),
    ],
)
def test_a_folder_that_refuses_is_named(error, message, tmp_path, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "set", "--dataset=toy_band", "--workers=1", "--clips=1", "--test_clips=1")
    assert not (tmp_path / "set").exists()


def test_a_disk_that_is_full_when_shards_are_written_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Failed to finalize writing: write() failed: No space left on device")

    monkeypatch.setattr(tfds.core.ExampleWriter, "write", refuse)
    with pytest.raises(UserError, match="cannot write --output=.*: Failed to .*No space left on device"):
        run(tmp_path / "set", "--dataset=toy_band", "--workers=1", "--clips=1", "--test_clips=1")


def test_sources_that_are_not_there_are_named(toy, tmp_path):
    with pytest.raises(UserError, match="absent does not exist; make a set with: python -m av_mae.prepare"):
        records.open_source(tmp_path / "absent", "train")
    with pytest.raises(UserError, match="holds no prepared set"):
        records.open_source(tmp_path, "train")
    with pytest.raises(UserError, match="has no split 'validation'; it has test, train"):
        records.open_source(toy, "validation")


def test_a_missing_shard_is_named(tmp_path):
    run(tmp_path / "set", "--dataset=toy_band", "--workers=1", "--clips=1", "--test_clips=1")
    shard = next((tmp_path / "set").glob("*test.array_record*"))
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks the shard .*{shard.name} of split 'test'; prepare the set again"):
        records.open_source(tmp_path / "set", "test")


def test_command_fails_in_one_line_and_helps(tmp_path, root):
    command = [sys.executable, "-m", "av_mae.prepare"]
    failed = subprocess.run(
        [*command, "--dataset=toy", f"--output={tmp_path / 'x'}"], cwd=root, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: unknown dataset 'toy'")
    assert len(failed.stderr.splitlines()) == 1
    helped = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True)
    assert helped.returncode == 0 and "example: python -m av_mae.prepare --dataset=toy_band" in helped.stdout


def test_settings_are_stored_with_the_set(toy):
    assert json.loads((toy / "prepare.json").read_text()) == {
        "dataset": "toy_band",
        "variant": "scene",
        "clips": 18,
        "test_clips": 5,
        "seed": 3,
        "recipe": 2,
    }
