"""The input pipeline on sets as `prepare` stores them: reading, damaged shards, sets that are not there."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

import fake_clips
from av_mae.data import pipeline, records
from av_mae.errors import UserError


def stored_record(index: int) -> dict:
    known = fake_clips.record("c", index, size=(96, 96), seconds=3.0)
    return {name: value for name, value in known.items() if name != "label"} | {"labels": [index % 2]}


ANNOTATED = {"labels": [1, 0], "source": "film.mp4", "source_start": 12.5, "annotators": 3,
             "boxes": np.array([[0, 0.25, 0.5, 1], [0.125, 0, 1, 0.75]], np.float32), "object_labels": [1, -1],
             "sounding": [1, 0], "box_annotators": [2, 0], "masks": [b"first", b"second", b"third"],
             "mask_frames": [0, 1, 2], "sources": [b"clean"]}


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


def write(folder: pathlib.Path, *contents: dict) -> records.RecordSource:
    folder.mkdir()
    records.write_set(folder, "made_up", "made up", ["even", "odd"], {"test": lambda: iter(contents)}, len(contents))
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


@pytest.mark.parametrize("wrong, message", [
    ({"mask": b""}, "'c-1': missing or unknown fields mask"), ({"label": 1}, "missing or unknown fields label"),
    ({"boxes": np.zeros((2, 4), np.float32)}, r"boxes, object_labels, .* must be equally long, got \[2, 0, 0, 0\]"),
    ({"masks": [b"1"]}, "masks, mask_frames must be equally long"), ({"frames": []}, "frames, frame_times must be")])
def test_a_record_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        records.complete(stored_record(1) | wrong)


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
