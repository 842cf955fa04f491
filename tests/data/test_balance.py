"""Class-balanced sampling, sets with different classes, and records kept in memory."""

import collections
import itertools
import pickle

import fake_clips
import grain
import numpy as np
import pytest

from av_mae.data import pipeline, records
from av_mae.data.cache import Cached
from av_mae.data.loading import ClipSource
from av_mae.data.pipeline import StratifiedSampling, clip_weights
from av_mae.data.records import Labels, labels_file
from av_mae.errors import UserError
from av_mae.prepare.shards import write_set


def some_labels(clips: int, seed: int = 0) -> list[list[int]]:
    """None to three classes of each clip, low numbers much more often than high ones."""
    generator = np.random.default_rng(seed)
    return [sorted({int(c) for c in generator.geometric(0.4, generator.integers(4))}) for _ in range(clips)]


def test_weights_are_inverse_class_frequencies():
    clips = some_labels(101)
    weights = clip_weights(Labels.of(clips))
    counts = collections.Counter(itertools.chain.from_iterable(clips))
    expected = np.array([sum(1 / counts[c] for c in classes) for classes in clips])
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-12)
    with pytest.raises(ValueError, match="no clip has a class"):
        clip_weights(Labels.of([[], []]))


def draws(weights: np.ndarray, seed: int, epochs: int) -> np.ndarray:
    """Clip numbers [epochs, clips]."""
    clips = len(weights)
    drawn = StratifiedSampling(grain.MapDataset.range(clips), weights, seed)
    return np.array([drawn[p] for p in range(epochs * clips)]).reshape(epochs, clips)


def test_clips_come_in_proportion_to_their_weight():
    weights = clip_weights(Labels.of(some_labels(101)))
    drawn = draws(weights, 5, 40)
    for epoch in drawn:
        assert np.all(np.abs(np.bincount(epoch, minlength=101) - 101 * weights) < 1)
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=101), 40 * 101 * weights, atol=2)
    assert not np.bincount(drawn.ravel(), minlength=101)[weights == 0].any() and (weights == 0).any()
    assert len({tuple(epoch) for epoch in drawn}) == 40
    assert list(draws(weights, 6, 1)[0]) != list(drawn[0])
    assert np.abs(np.diff(drawn[0])).mean() > 20  # shuffled, not sorted


def test_classes_come_equally_often():
    """90 clips of class 0, 9 of class 1 and 1 of class 2."""
    classes = np.repeat([0, 1, 2], [90, 9, 1])
    drawn = classes[draws(clip_weights(Labels.of([[c] for c in classes])), 1, 10)]
    assert all(33 <= np.sum(epoch == c) <= 34 for epoch in drawn for c in range(3))


SETS = (fake_clips.FakeSet("a", 40), fake_clips.FakeSet("b", 24, size=(16, 40), seconds=0.2))
LABELS = [Labels.of([[0]] * 36 + [[1]] * 4), Labels.of([[2]] * 20 + [[]] * 4)]


def training(rows=range(8), seed=3, **config) -> pipeline.TrainingData:
    return pipeline.TrainingData(
        [ClipSource(one.name, one) for one in SETS],
        fake_clips.small_config(**config),
        *fake_clips.SMALL,
        8,
        rows,
        seed=seed,
        labels=LABELS,
    )


def names(data: pipeline.TrainingData, position: int, count: int) -> list[str]:
    with data:
        return [str(name) for batch in itertools.islice(data.batches(position), count) for name in batch["id"]]


def test_training_on_balanced_clips():
    """64 draws an epoch, 21 or 22 of each class; the same on any hosts and wherever training begins."""
    whole = names(training(), 0, 16)
    kinds = ["b" if name[0] == "b" else f"a{int(name[2:]) // 36}" for name in whole]
    for epoch in (kinds[:64], kinds[64:]):
        assert all(21 <= epoch.count(kind) <= 22 for kind in ("a0", "a1", "b"))
    assert not {f"b-{i}" for i in range(20, 24)} & set(whole)
    halves = [names(training(rows), 0, 4) for rows in (np.arange(4), np.arange(4, 8))]
    assert [
        name for pair in zip(*(np.reshape(half, (4, 4)) for half in halves)) for name in np.concatenate(pair)
    ] == whole[:32]
    assert names(training(), 44, 3) == whole[44:68]


def test_sets_mixed_by_weight_are_balanced_each_by_itself():
    drawn = names(training(weights=(1.0, 1.0), path="a,b"), 0, 20)
    rare = [name for name in drawn if name in {f"a-{i}" for i in range(36, 40)}]
    assert sum(name[0] == "a" for name in drawn) == 80 and 38 <= len(rare) <= 42


def stored_set(folder, classes: list[str], labels: list[list[int]]):
    folder.mkdir()

    def made():
        for index, own in enumerate(labels):
            record = fake_clips.record(folder.name, index, size=(16, 16))
            yield {name: value for name, value in record.items() if name != "label"} | {"labels": own}

    write_set(folder, "made_up", "made up", classes, {"train": made}, len(labels))
    return str(folder)


def open_training(paths: str, **changes) -> pipeline.TrainingData:
    return pipeline.open_training_data(
        fake_clips.small_config(path=paths, **changes), *fake_clips.SMALL, 0, 8, np.arange(8)
    )


def test_stored_labels(tmp_path):
    """From the file beside the shards or from the records, they are the same."""
    clips = [[1], [], [0, 2], [2]]
    path = stored_set(tmp_path / "set", ["x", "y", "z"], clips)
    file = tmp_path / "set" / labels_file("train")
    for damage in (lambda: None, lambda: file.write_bytes(file.read_bytes()[:40]), file.unlink):
        damage()
        labels = records.read_labels(path, "train")
        assert [list(part) for part in np.split(labels.values, np.cumsum(labels.counts)[:-1])] == clips


def test_sets_with_different_classes(tmp_path):
    first = stored_set(tmp_path / "first", ["dog", "cat"], [[0], [0], [1]])
    second = stored_set(tmp_path / "second", ["dog", "cow", "cat"], [[2], [1], [0]])
    third = stored_set(tmp_path / "third", ["dog", "cat"], [[0], [], []])
    message = r"first \(2 classes\) and .*second \(3\) have different class lists: class 1 is 'cat' and 'cow'"
    with pytest.raises(UserError, match=message):
        open_training(f"{first},{second}", balanced=True)
    drawn = names(open_training(f"{first},{third}", balanced=True), 0, 3)  # four clips have a class
    assert set(drawn) == {"first-0", "first-1", "first-2", "third-0"}
    assert drawn.count("first-2") == 12  # half of 24: the only cat
    assert len(set(names(open_training(f"{first},{second}", balanced=True, weights=(1.0, 1.0)), 0, 2))) == 6
    assert len(set(names(open_training(f"{first},{second}"), 0, 2))) == 6  # labels are not used
    with pytest.raises(UserError, match="class 2 is missing and 'cat'"):
        pipeline.check_classes({"a": ["dog", "cow"], "b": ["dog", "cow", "cat"]})
    none = stored_set(tmp_path / "none", ["dog"], [[], []])
    with pytest.raises(UserError, match=r"no clip of .*none \(split 'train'\) has one"):
        open_training(none, balanced=True)


class Counting(fake_clips.FakeSet):
    """A set that counts how often its records are read."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.reads = collections.Counter()

    def __getitem__(self, index: int) -> dict:
        self.reads[index] += 1
        return super().__getitem__(index)


def evaluated(source, **config) -> dict[str, np.ndarray]:
    data = pipeline.EvaluationData(
        [ClipSource("c", source)], fake_clips.small_config(**config), *fake_clips.SMALL, 8, np.arange(8)
    )
    batches = list(data)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_kept_records_give_the_same_clips():
    plain = evaluated(fake_clips.FakeSet("c", 20, broken={0: "read", 7: "sound", 8: "frame"}))
    stored = Counting("c", 20, broken={0: "read", 7: "sound", 8: "frame"})
    cached = Cached(stored, 1e9)
    for _ in range(3):
        again = evaluated(cached)
        for name, values in plain.items():
            np.testing.assert_array_equal(again[name], values, err_msg=name)
    assert stored.reads == {index: 3 if index == 0 else 1 for index in range(20)}  # what fails is tried again
    assert cached[1]["sound"][:4] == b"RIFF" and not pickle.loads(pickle.dumps(cached))._kept


def test_the_cache_is_bounded():
    stored = Counting("c", 20)
    sizes = [
        len(record["sound"]) + sum(map(len, record["frames"]))
        for record in map(Cached(stored, 1e9).__getitem__, range(20))
    ]
    cached = Cached(stored, sum(sizes[:5]))
    stored.reads.clear()
    for index in list(range(20)) * 2:
        assert cached[index]["id"] == f"c-{index}"
    assert stored.reads == {index: 1 if index < 5 else 2 for index in range(20)}
