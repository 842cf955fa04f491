"""Host batches on their way to the devices: row order, background preparation, errors, end."""

import itertools
import threading
import time

import fake_clips
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from av_mae.data import loading, pipeline
from av_mae.train import loop


def sharding(*shape: int) -> NamedSharding:
    devices = np.array(jax.devices()[:4]).reshape(shape)
    return NamedSharding(
        Mesh(devices, ("data", "fsdp", "tensor")[: len(shape)]), PartitionSpec(("data", "fsdp")[: len(shape)])
    )


def host_batches(count: int, rows: int = 8):
    for step in range(count):
        first = step * rows
        yield {
            "image": np.full((rows, 4, 4, 3), 7, np.uint8),
            "label": np.arange(first, first + rows, dtype=np.int32),
            "audio": np.arange(first, first + rows, dtype=np.float32)[:, None, None] + np.zeros((1, 2, 3), "f4"),
            "start": np.zeros(rows, np.float32),
            "valid": np.arange(rows) != 3,
            "id": np.array([f"clip{i}" for i in range(first, first + rows)], object),
            "stage": np.array([""] * rows, object),
            "cause": np.array([""] * rows, object),
        }


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4), (2, 1, 2)])
def test_rows_keep_their_order_in_the_global_arrays(shape):
    target = sharding(*shape)
    with loop.Prefetch(host_batches(3), target) as batches:
        for step, (host, batch) in enumerate(batches):
            assert set(host) == {"id", "stage", "cause"} and host["id"][0] == f"clip{8 * step}"
            assert set(batch) == {"image", "audio", "label", "start", "valid"}
            np.testing.assert_array_equal(batch["label"], np.arange(8 * step, 8 * step + 8))
            np.testing.assert_array_equal(np.asarray(batch["audio"])[:, 1, 2], np.arange(8 * step, 8 * step + 8))
            assert list(np.asarray(batch["valid"])) == [True] * 3 + [False] + [True] * 4
            assert batch["image"].dtype == np.uint8
            assert all(array.sharding.is_equivalent_to(target, array.ndim) for array in batch.values())
            # the mesh's row shards hold consecutive rows
            for shard in batch["label"].addressable_shards:
                expected = np.arange(8 * step, 8 * step + 8)[shard.index]
                np.testing.assert_array_equal(shard.data, expected)
        assert step == 2


def test_transfers_are_explicit():
    with jax.transfer_guard("disallow"):  # of this thread, so without Prefetch's
        batch = loop.to_global(next(host_batches(1)), sharding(4))
    assert batch["image"].shape == (8, 4, 4, 3)


def test_waiting_is_counted_and_hidden_by_the_prefetch():
    def slow():
        for batch in host_batches(3):
            time.sleep(0.1)
            yield batch

    with loop.Prefetch(slow(), sharding(4), prefetch=2) as batches:
        next(batches)
        waited = batches.wait_seconds
        assert waited > 0.05
        while batches._ready.qsize() < 2:
            time.sleep(0.01)
        next(batches), next(batches)
        assert batches.wait_seconds - waited < 0.05


def test_errors_reach_the_caller_and_the_end_is_an_end():
    def failing():
        yield from host_batches(1)
        raise OSError("the disk is gone")

    batches = loop.Prefetch(failing(), sharding(4))
    next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_close_stops_the_thread_and_the_batches():
    class Endless:
        closed = False

        def __iter__(self):
            return (batch for _ in itertools.count() for batch in host_batches(1))

        def close(self):
            self.closed = True

    source = Endless()
    batches = loop.Prefetch(source, sharding(4), prefetch=1)
    next(batches)
    batches.close()
    batches.close()
    assert source.closed and not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(batches)


def test_batches_of_a_worker_survive_on_the_devices():
    """Arrays may alias a worker's shared memory: they must stay whole after the host batch is gone."""
    config = fake_clips.small_config(workers=1)
    source = loading.ClipSource("a", fake_clips.FakeSet("a", 40))
    data = pipeline.EvaluationData([source], config, *fake_clips.SMALL, 8, np.arange(8))
    plain = pipeline.EvaluationData([source], fake_clips.small_config(), *fake_clips.SMALL, 8, np.arange(8))
    with loop.Prefetch(data, sharding(4)) as batches:
        kept = [batch for _, batch in batches]
    assert len(kept) == 5
    for one, expected in zip(kept, plain):
        assert set(expected) - set(one) == {"id", "stage", "cause"}
        for name in one:
            np.testing.assert_array_equal(one[name], expected[name])
