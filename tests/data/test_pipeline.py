"""Order, resuming, mixing and failures of the input pipeline, on sets made up in memory."""

import collections
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import fake_clips
import numpy as np
import pytest

from av_mae.data import loading, pipeline
from av_mae.errors import ClipFailure, FailureCount, UserError, batch_failures

FIELDS = ("image", "audio", "label", "start", "index", "valid", "id", "stage", "cause")


def sources(*sets: fake_clips.FakeSet) -> list[loading.ClipSource]:
    return [loading.ClipSource(one.name, one) for one in sets]


def training(sets, batch_size=8, rows=None, seed=3, **config) -> pipeline.TrainingData:
    rows = np.arange(batch_size) if rows is None else rows
    return pipeline.TrainingData(
        sources(*sets), fake_clips.small_config(**config), *fake_clips.SMALL, batch_size, rows, seed=seed
    )


def evaluation(sets, batch_size=8, rows=None, **config) -> pipeline.EvaluationData:
    rows = np.arange(batch_size) if rows is None else rows
    return pipeline.EvaluationData(
        sources(*sets), fake_clips.small_config(**config), *fake_clips.SMALL, batch_size, rows
    )


def take(data, position: int, count: int) -> list[dict]:
    with data:
        return list(itertools.islice(data.batches(position), count))


def assert_same(first: list[dict], second: list[dict]):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        for name in FIELDS:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


SETS = (fake_clips.FakeSet("a", 40), fake_clips.FakeSet("b", 24, size=(16, 40), seconds=0.2))


@pytest.fixture(scope="module")
def reference() -> list[dict]:
    """Three epochs of 64 clips in 24 global batches of 8, on one host without workers."""
    return take(training(SETS), 0, 24)


def test_batches_have_the_promised_fields(reference):
    batch = reference[0]
    assert set(batch) == set(FIELDS) and training(SETS).clips == 64
    assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["audio"].shape == (8, 16, 16) and batch["audio"].dtype == np.float32
    assert batch["label"].dtype == np.int32 and batch["start"].dtype == np.float32 and batch["valid"].dtype == bool
    assert batch["valid"].all() and not any(batch["stage"]) and not any(batch["cause"])
    assert all(int(name.split("-")[1]) == label for name, label in zip(batch["id"], batch["label"]))


def test_each_epoch_holds_every_clip_once_in_another_order(reference):
    names = np.concatenate([batch["id"] for batch in reference]).reshape(3, 64)
    everything = {f"a-{i}" for i in range(40)} | {f"b-{i}" for i in range(24)}
    assert all(set(epoch) == everything for epoch in names)
    assert len({tuple(epoch) for epoch in names}) == 3


def test_draws_differ_between_epochs_and_stay_in_the_sound(reference):
    starts = collections.defaultdict(set)
    for batch in reference:
        for name, start in zip(batch["id"], batch["start"]):
            starts[name].add(float(start))
    assert all(len(starts[f"a-{i}"]) >= 2 and max(starts[f"a-{i}"]) <= 0.5 - 0.256 for i in range(40))
    assert all(starts[f"b-{i}"] == {0.0} for i in range(24))  # shorter than the window


def flat(reference: list[dict], first: int, count: int) -> list[dict]:
    """`count` global batches from position `first` on, taken from the reference."""
    joined = {name: np.concatenate([batch[name] for batch in reference]) for name in FIELDS}
    return [{name: joined[name][start : start + 8] for name in FIELDS} for start in range(first, first + 8 * count, 8)]


def assert_rows(reference: list[dict], rows: np.ndarray, workers: int, resumed: bool = True):
    """One epoch and two batches from the beginning, and three batches resumed in the middle of an epoch."""
    with training(SETS, rows=rows, workers=workers) as data:
        for first, count in ((0, 10), (40, 3))[: 1 + resumed]:
            got = list(itertools.islice(data.batches(first), count))
            assert_same(got, [{name: batch[name][rows] for name in FIELDS} for batch in flat(reference, first, count)])


@pytest.mark.parametrize("hosts, workers", [(1, 0), (2, 0), (8, 0), (1, 2)])
def test_hosts_and_workers_do_not_change_the_global_batches(reference, hosts, workers):
    """So that the union over hosts is that of the reference: every clip once per epoch."""
    for rows in np.arange(8).reshape(hosts, -1):
        assert_rows(reference, rows, workers)


@pytest.mark.slow
@pytest.mark.parametrize("hosts, workers", [(1, 4), (2, 2), (8, 1)])
def test_every_host_with_workers(reference, hosts, workers):
    for number, rows in enumerate(np.arange(8).reshape(hosts, -1)):
        assert_rows(reference, rows, workers, resumed=number == hosts - 1)


@pytest.mark.parametrize("position", [3, 61, 128])
def test_resuming_gives_the_same_batches(reference, position):
    assert_same(take(training(SETS), position, 4), flat(reference, position, 4))


def test_another_seed_gives_another_order(reference):
    assert list(take(training(SETS, seed=4), 0, 1)[0]["id"]) != list(reference[0]["id"])


def test_augmentation_can_be_switched_off():
    plain = {"jitter": False, "flip": False, "volume_db": 0.0, "crop_scale": (1.0, 1.0)}
    sets = (fake_clips.FakeSet("a", 8, size=(18, 24)),)
    first, second = take(training(sets, **plain), 0, 2)
    position = {name: i for i, name in enumerate(second["id"])}
    order = [position[name] for name in first["id"]]
    np.testing.assert_array_equal(first["audio"], second["audio"][order])
    for change in ({"jitter": True}, {"volume_db": 6.0}):
        changed = take(training(sets, **(plain | change)), 0, 1)[0]
        assert np.all(np.abs(changed["audio"] - first["audio"]).max(axis=(1, 2)) > 1e-3)


def test_sets_are_mixed_by_weight_and_each_seen_whole():
    names = np.concatenate([batch["id"] for batch in take(training(SETS, weights=(3.0, 1.0), path="a,b"), 0, 40)])
    kinds = [name[0] for name in names]
    assert abs(kinds.count("a") - 240) <= 2
    assert all(abs(kinds[i : i + 40].count("a") - 30) <= 1 for i in range(0, 320, 40))
    from_a = [name for name in names if name[0] == "a"]
    assert len(set(from_a[:40])) == 40 and len(set(from_a[40:80])) == 40


def test_the_frame_is_the_one_nearest_the_middle_of_the_window():
    config = fake_clips.small_config(flip=False, crop_scale=(1.0, 1.0))
    loader = loading.ClipLoader(config, (16, 16), (16, 16), augment=False)
    clip = fake_clips.record("a", 0, size=(16, 16), seconds=1.0)
    clip["frames"] = [fake_clips.record("a", i, size=(16, 16))["frames"][0] for i in range(4)]
    clip["frame_times"] = np.array([0.1, 0.45, 0.6, 0.9], np.float32)
    loaded = loader.random_map(clip, np.random.default_rng(0))
    alone = loader.random_map(
        clip | {"frames": clip["frames"][1:2], "frame_times": clip["frame_times"][1:2]}, np.random.default_rng(0)
    )
    assert loaded["start"] == pytest.approx((1 - 0.256) / 2)
    np.testing.assert_array_equal(loaded["image"], alone["image"])


BROKEN = fake_clips.FakeSet("c", 20, broken={0: "read", 7: "sound", 8: "frame", 19: "frame"})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_clip_keeps_its_slot(workers):
    with evaluation((BROKEN,), workers=workers) as data:
        assert (len(data), data.clips) == (3, 20)
        batches = list(data)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in FIELDS}
    assert list(np.flatnonzero(~joined["valid"])) == [0, 7, 8, 19, 20, 21, 22, 23]
    failures = batch_failures(joined)
    assert failures[0] == ClipFailure("c[0]", "read", "the shard breaks off")
    assert [(failure.clip, failure.stage) for failure in failures[1:3]] == [("c-7", "sound"), ("c-8", "frame")]
    assert all(failure.cause for failure in failures) and joined["id"][7] == "c-7" and joined["label"][8] == 0
    assert not joined["image"][~joined["valid"]].any() and not joined["audio"][~joined["valid"]].any()
    assert (
        list(joined["id"][20:]) == [""] * 4 and list(joined["stage"][20:]) == list(joined["cause"][20:]) == [""] * 4
    )  # padding
    assert list(joined["label"][joined["valid"]]) == [number for number in range(20) if number not in (0, 7, 8, 19)]


def test_evaluation_is_in_stored_order_and_repeatable_over_hosts():
    whole = list(evaluation(SETS, batch_size=10))
    assert [str(name) for batch in whole for name in batch["id"]][:65] == [f"a-{i}" for i in range(40)] + [
        f"b-{i}" for i in range(24)
    ] + [""]
    assert all(batch["start"][0] == pytest.approx(0.122, abs=1e-6) for batch in whole[:4])
    for rows in (np.arange(5), np.arange(5, 10)):
        data = evaluation(SETS, batch_size=10, rows=rows)
        for _ in range(2):
            assert_same(list(data), [{name: batch[name][rows] for name in FIELDS} for batch in whole])


def batch_of(failed: list[tuple[str, str]], fine: int = 0) -> dict:
    """A batch whose first clips failed with (stage, cause); the ids of the others follow."""
    rows = [(f"x{i}", *causes) for i, causes in enumerate([*failed, *[("", "")] * fine])]
    return {name: np.array(column, object) for name, column in zip(("id", "stage", "cause"), zip(*rows))}


def test_failures_are_counted_named_and_stop_the_run():
    count = FailureCount(max_failure_share=0.1)
    broken = count.add(batch_of([("frame", "broken: torn")] * 9, fine=41))
    assert broken == [ClipFailure(f"x{i}", "frame", "broken: torn") for i in range(9)]
    count.add({name: np.array(["", ""], object) for name in ("id", "stage", "cause")})  # padding
    assert (count.clips, count.failures) == (50, 9)
    count.add(batch_of([("sound", "none")], fine=49))  # 10 of 100 is the share itself
    assert count.causes == {("frame", "broken: torn"): 9, ("sound", "none"): 1}
    with pytest.raises(
        UserError,
        match=r"11 of 101 clips failed \(9 × frame: broken: torn; 2 × sound: none\).*"
        r"clip x0: sound: none.*max_failure_share=0.1",
    ):
        count.add(batch_of([("sound", "none")]))


SCRIPT = """
import multiprocessing, sys
import numpy as np
import fake_clips
from av_mae.data import loading, pipeline

if __name__ == "__main__":
    source = loading.ClipSource("a", fake_clips.FakeSet("a", 5000))
    config = fake_clips.small_config(workers=1)
    data = pipeline.TrainingData([source], config, *fake_clips.SMALL, 8, np.arange(8), seed=0)
    for batch in data.batches(0):
        print(multiprocessing.active_children()[0].pid, batch["valid"].sum(), flush=True)
        sys.stdin.readline()
"""


def test_workers_outlive_sigterm_but_not_their_parent(root, tmp_path):
    """A job's SIGTERM must leave the trainer its workers while it saves; a killed trainer must leave none behind."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(root), str(root / "tests")])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    worker, valid = map(int, process.stdout.readline().split())
    os.kill(worker, signal.SIGTERM)
    for _ in range(20):  # more than the worker can have had ready
        process.stdin.write("next\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == [str(worker), "8"]
    process.kill()
    process.communicate()
    assert valid == 8
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} lives on")


def is_running(pid: int) -> bool:
    """False also for a process that has ended and that nobody has asked about yet."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_rows_outside_the_batch_are_refused():
    with pytest.raises(UserError, match="batch_size=8"):
        training(SETS, rows=np.array([8]))
