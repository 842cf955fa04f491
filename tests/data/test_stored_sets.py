"""The input pipeline on sets as `prepare` stores them: reading, damaged shards, sets that are not there."""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys

import fake_clips
import numpy as np
import pytest
import tensorflow_datasets as tfds

from av_mae.data import pipeline, records
from av_mae.data.loading import ClipSource
from av_mae.errors import FailureCount, UserError
from av_mae.prepare import shards
from av_mae.prepare.shards import complete, write_set


def stored_record(index: int) -> dict:
    known = fake_clips.record("c", index, size=(96, 96), seconds=3.0)
    return {name: value for name, value in known.items() if name != "label"} | {"labels": [index % 2]}


ANNOTATED = {
    "labels": [1, 0],
    "source": "film.mp4",
    "source_start": 12.5,
    "annotators": 3,
    "boxes": np.array([[0, 0.25, 0.5, 1], [0.125, 0, 1, 0.75]], np.float32),
    "object_labels": [1, -1],
    "sounding": [1, 0],
    "box_annotators": [2, 0],
    "masks": [b"first", b"second", b"third"],
    "mask_frames": [0, 1, 2],
    "sources": [b"clean"],
}


@pytest.fixture
def stored(tmp_path) -> pathlib.Path:
    folder = tmp_path / "set"
    folder.mkdir()
    splits = {
        "train": lambda: (stored_record(i) for i in range(24)),
        "test": lambda: (stored_record(i) for i in range(3)),
    }
    write_set(folder, "made_up", "made up", ["even", "odd"], splits, 24)
    return folder


def data_config(path, **changes):
    return dataclasses.replace(fake_clips.small_config(**changes), path=str(path))


def evaluation(path, **changes):
    return pipeline.open_evaluation_data(data_config(path, **changes), *fake_clips.SMALL, 8, np.arange(8))


@pytest.mark.parametrize("workers", [0, 1])
def test_stored_clips_arrive(stored, workers):
    with evaluation(stored, workers=workers) as data:
        batches = list(data)
    assert data.clips == 24 and len(batches) == 3
    assert [name for batch in batches for name in batch["id"]] == [f"c-{i}" for i in range(24)]
    assert all(batch["valid"].all() and list(batch["label"]) == [0, 1] * 4 for batch in batches)
    assert len(list(evaluation(stored, split="test"))) == 1


def write(folder: pathlib.Path, *contents: dict) -> records.RecordSource:
    folder.mkdir()
    write_set(folder, "made_up", "made up", ["even", "odd"], {"test": lambda: iter(contents)}, len(contents))
    return records.open_source(folder, "test")


def test_a_record_comes_back_as_it_was_written(tmp_path):
    source = write(tmp_path / "set", stored_record(3) | ANNOTATED, stored_record(4) | {"labels": []})
    first, second = source[0], source[1]
    assert first["label"] == 1 and second["label"] == -1 and len(second["labels"]) == 0
    for name, value in ANNOTATED.items():
        np.testing.assert_array_equal(first[name], np.array(value, first[name].dtype if name == "masks" else None))
    assert second["source"] == "" and second["annotators"] == 0 and second["boxes"].shape == (0, 4)
    assert all(len(second[name]) == 0 for name in ("masks", "mask_frames", "sources", "sounding", "box_annotators"))
    parsed = tfds.builder_from_directory(str(tmp_path / "set")).as_data_source("test")
    for theirs, ours in zip(parsed, (first, second), strict=True):
        assert theirs.keys() == ours.keys()
        for name in theirs.keys() - {"id", "source"}:
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mask": b""}, "'c-1': missing or unknown fields mask"),
        ({"label": 1}, "missing or unknown fields label"),
        ({"boxes": np.zeros((2, 4), np.float32)}, r"boxes, object_labels, .* must be equally long, got \[2, 0, 0, 0\]"),
        ({"labels": [2]}, "label 2 is none of 2 classes"),
        (
            {"object_labels": [5], "boxes": np.zeros((1, 4), np.float32), "sounding": [1], "box_annotators": [0]},
            "label 5 is none of 2 classes",
        ),
        ({"masks": [b"1"]}, "masks, mask_frames must be equally long"),
        ({"frames": []}, "frames, frame_times must be"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        complete(stored_record(1) | wrong, 2)


def test_a_set_of_another_version_is_refused(stored):
    description = stored / "dataset_info.json"
    description.write_text(description.read_text().replace('"2.0.0"', '"1.0.0"'))
    for use in (lambda: records.open_source(stored, "train"), lambda: records.class_names(stored)):
        with pytest.raises(UserError, match="of version 1.0.0, this program reads version 2.0.0: delete .* prepare"):
            use()


def test_sets_are_read_together(stored):
    data = pipeline.open_training_data(data_config(f"{stored},{stored}"), *fake_clips.SMALL, 0, 16, np.arange(16))
    with data:
        batches = data.batches(0)
        names = [name for _ in range(3) for name in next(batches)["id"]]
    assert data.clips == 48 and sorted(names) == sorted(2 * [f"c-{i}" for i in range(24)])


@pytest.mark.parametrize("share, workers", [(0.0, 0), (0.5, 0), (0.5, 1)])
def test_a_damaged_shard_costs_its_clips_only(stored, share, workers):
    (shard,) = stored.glob("*train.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(share * len(content))])
    with evaluation(stored, workers=workers) as data:
        batches = list(data)
    assert len(batches) == 3
    for batch in batches:
        assert not batch["valid"].any()
        assert all(batch["id"]) and all(batch["stage"] == "read") and all(batch["cause"])
    assert batches[0]["id"][1] == f"{stored}[1]"


@pytest.fixture
def two_shards(tmp_path, monkeypatch) -> pathlib.Path:
    """32 clips in two shards, the second of which is cut off."""
    monkeypatch.setattr(shards, "SHARD_CLIPS", 16)
    folder = tmp_path / "two"
    folder.mkdir()
    write_set(
        folder, "made_up", "made up", ["even", "odd"], {"train": lambda: (stored_record(i) for i in range(32))}, 32
    )
    shard = folder / "made_up-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return folder


def test_training_goes_on_beside_a_truncated_shard(two_shards):
    """Its clips fail, once per epoch, and are counted; the run ends where the limit is passed."""
    with pipeline.open_training_data(data_config(two_shards), *fake_clips.SMALL, 0, 8, np.arange(8)) as data:
        batches = list(itertools.islice(data.batches(0), 16))
    allowed, strict = FailureCount(0.6), FailureCount(0.4)
    for epoch in range(4):
        own = batches[4 * epoch : 4 * epoch + 4]
        arrived = [name for batch in own for name in batch["id"][batch["valid"]]]
        assert sorted(arrived) == sorted(f"c-{i}" for i in range(16))
        assert sum(name.startswith(str(two_shards)) for batch in own for name in batch["id"]) == 16
    for batch in batches:
        allowed.add(batch)
    assert (allowed.clips, allowed.failures) == (128, 64)
    damaged = r"made_up-train.array_record-00001-of-00002 is damaged or cut off: Corrupted"
    assert len(allowed.causes) == 1
    with pytest.raises(UserError, match=rf"of 104 clips failed \(\d+ × read: {damaged}.*data.max_failure_share=0.4"):
        for batch in batches:
            strict.add(batch)


def test_no_damage_to_a_shard_does_more_than_fail_clips(tmp_path):
    """Flipped, overwritten and missing bytes: every record is as it was written, or fails at reading."""
    folder = tmp_path / "set"
    folder.mkdir()
    clips = [stored_record(i) | {"sound": fake_clips.record("c", i)["sound"]} for i in range(6)]
    write_set(folder, "made_up", "made up", ["even", "odd"], {"train": lambda: iter(clips)}, 6)
    (shard,) = folder.glob("*.array_record*")
    whole, generator = shard.read_bytes(), np.random.default_rng(0)
    outcomes = collections.Counter()
    for number in range(30):
        content = np.frombuffer(whole, np.uint8)[: None if number % 3 else generator.integers(len(whole))].copy()
        if number % 3 == 1 and len(content):
            content[generator.integers(len(content), size=10)] ^= 255
        elif number % 3 == 2:
            start = generator.integers(len(content) - 300)
            content[start : start + 300] = generator.integers(0, 256, 300)
        shard.write_bytes(content.tobytes())
        source = ClipSource("set", records.open_source(folder, "train"))
        for index, expected in enumerate(clips):
            found = source[index]
            outcomes["failure" in found] += 1
            assert "failure" in found or found["sound"] == expected["sound"]
            assert "failure" not in found or found["failure"].stage == "read"
            assert "failure" not in found or found["failure"].cause.startswith(f"{shard.name} is damaged or cut off: ")
    assert outcomes[True] > 50 and outcomes[False] > 20


def test_all_shards_may_be_open(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, hard))
        records.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (700, hard)
        records.allow_open_files(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1512, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(UserError, match="4000 shards needs about 4512 open files, this system allows 4096"):
        records.allow_open_files(4000)


MANY = """
import sys, time
import grain
import numpy as np
import fake_clips
from av_mae.data import pipeline

def memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

config = fake_clips.small_config(path=sys.argv[1])
began = time.perf_counter()
with pipeline.open_training_data(config, *fake_clips.SMALL, 0, 8, np.arange(8)) as data:
    assert next(data.batches(0))["valid"].all()
start = time.perf_counter() - began
source, = pipeline.open_sources(config, fake_clips.SMALL[1])
order, used = grain.MapDataset.source(source).shuffle(seed=0), []
for position in range(len(order)):
    assert "failure" not in order[position]
    if position % 5000 == 4999:
        used.append(memory())
print(data.clips, start, used[1], max(used))
"""


@pytest.mark.slow
def test_many_records_start_soon_and_in_flat_memory(tmp_path, root):
    """100,000 tiny records in 100 shards (links to one); with a million the figures are those of docs/benchmarks.md."""
    tiny = stored_record(0) | {
        name: fake_clips.record("c", 0, (16, 16), 0.1, frames=1)[name] for name in ("frames", "frame_times", "sound")
    }
    folder = tmp_path / "set"
    folder.mkdir()
    write_set(
        folder,
        "made_up",
        "made up",
        ["even", "odd"],
        {"train": lambda: (tiny | {"id": str(i)} for i in range(1000))},
        1000,
    )
    (shard,) = folder.glob("*.array_record*")
    for number in range(100):
        os.link(shard, folder / f"made_up-train.array_record-{number:05d}-of-00100")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1000"] * 100
    (folder / "dataset_info.json").write_text(json.dumps(info))
    paths = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    clips, start, early, most = map(float, done.stdout.split())
    assert clips == 100_000 and start < 10 and most < early + 10  # MB


def test_sets_that_are_not_there_are_named(tmp_path, stored):
    with pytest.raises(UserError, match="nowhere does not exist.*av_mae.prepare"):
        evaluation(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no prepared set.*av_mae.prepare"):
        evaluation(tmp_path / "empty")
    with pytest.raises(UserError, match="no split 'validation'; it has test, train"):
        evaluation(stored, split="validation")
    with pytest.raises(UserError, match="16 rows, data.sound.mels=20"):
        evaluation(stored, sound=dataclasses.replace(fake_clips.SMALL_SOUND, mels=20))
    with pytest.raises(UserError, match="data.path must name at least one prepared set.*av_mae.prepare"):
        evaluation("")
