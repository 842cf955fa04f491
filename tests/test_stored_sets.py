"""The input pipeline on sets as `prepare` stores them: reading, damaged shards, sets that are not there."""

import dataclasses
import pathlib

import numpy as np
import pytest

import fake_clips
from av_mae.data import pipeline, records
from av_mae.errors import UserError


def stored_record(index: int) -> dict:
    return fake_clips.record("c", index, size=(96, 96), seconds=3.0) | {
        "label": index % 2, "boxes": np.zeros((1, 4), np.float32), "object_labels": np.zeros(1, np.int64),
        "sounding": np.int64(0), "mask": b"", "sources": []}


@pytest.fixture
def stored(tmp_path) -> pathlib.Path:
    folder = tmp_path / "set"
    folder.mkdir()
    splits = {"train": lambda: (stored_record(i) for i in range(24)),
              "test": lambda: (stored_record(i) for i in range(3))}
    records.write_set(folder, "made_up", "made up", ["even", "odd"], splits, 24)
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


def test_sets_are_read_together(stored):
    data = pipeline.open_training_data(data_config(f"{stored},{stored}"), *fake_clips.SMALL, 0, 16, np.arange(16))
    with data:
        batches = data.batches(0)
        names = [name for _ in range(3) for name in next(batches)["id"]]
    assert data.clips == 48 and sorted(names) == sorted(2 * [f"c-{i}" for i in range(24)])


@pytest.mark.parametrize("share, workers", [(0.0, 0), (0.5, 0), (0.5, 1)])
def test_a_damaged_shard_costs_its_clips_only(stored, share, workers):
    shard, = stored.glob("*train.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[:int(share * len(content))])
    with evaluation(stored, workers=workers) as data:
        batches = list(data)
    assert len(batches) == 3
    for batch in batches:
        assert not batch["valid"].any()
        assert all(error.startswith(f"clip {name}: read: ") for name, error in zip(batch["id"], batch["error"]))
    assert batches[0]["id"][1] == f"{stored}[1]"


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
