"""Runs in processes of their own: killed, asked to stop, poisoned, spread over two processes."""

import json
import os
import pathlib
import random
import shutil
import signal

import numpy as np
import orbax.checkpoint as ocp
import pytest
from train_processes import Training, assert_same_arrays, free_port

from av_mae import checkpoint


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def whole(training):
    """An uninterrupted run: its metrics and last arrays."""
    status, message = training.run("whole")
    assert status == 0, message
    metrics = training.metrics("whole")
    assert [line["step"] for line in metrics] == list(range(1, 121))
    return metrics, training.arrays("whole")


MORE_FAULTS = range(1, int(os.environ.get("AV_MAE_FAULTS", "2")))


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_FAULTS)])
def test_killed_and_asked_to_stop_is_bit_identical(training, whole, number):
    """kill -9 at a random step, started again, SIGTERM at a later one, started again, and run to the end.

    Twice; AV_MAE_FAULTS sets another number.
    """
    workdir, step = f"killed{number}", random.randint(5, 45)
    process = training.start(workdir)
    training.wait_for_step(workdir, step, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"meant to kill it at step {step}"

    process = training.start(workdir)
    training.wait_for_step(workdir, step + 20, process)
    process.terminate()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "asked to stop: step" in message, message
    last = training.metrics(workdir)[-1]["step"]
    assert str(last) in {path.name for path in (training.folder / workdir / "checkpoints").iterdir()}

    status, message = training.run(workdir)
    assert status == 0 and f"resuming after step {last}" in message, message
    assert training.metrics(workdir) == whole[0], f"killed at step {step}, stopped at {last}"
    assert_same_arrays(training.arrays(workdir), whole[1])


def test_non_finite_loss_stops_with_one_line(training, whole):
    """Weights that are no numbers, from another run's checkpoint."""
    folder = checkpoint.find_checkpoint(str(training.folder / "whole"))
    target = training.folder / "poisoned" / "1"
    (target / "meta").mkdir(parents=True)
    params = {name.removeprefix("model/"): x for name, x in whole[1].items() if name.startswith("model/")}
    params["encoder.image.patch_embed.kernel"] = np.full_like(params["encoder.image.patch_embed.kernel"], np.nan)
    with ocp.StandardCheckpointer() as writer:
        writer.save(target / "model", params)
    meta = checkpoint.read_meta(folder)
    meta |= {"step": 1, "checksums": {"model": int(checkpoint.checksum(params))}}
    del meta["digests"], meta["sha256"]  # as earlier versions saved it
    (target / "meta" / "metadata").write_text(json.dumps(meta))
    status, message = training.run("nan", f"--config.init={target}")
    assert status == 2 and "Traceback" not in message
    (error,) = [line for line in message.splitlines() if line.startswith("error:")]
    assert "error: step 1: loss=nan" in error and "Clips of the batch: " in error and "toy_band" in error
    assert not list((training.folder / "nan" / "checkpoints").iterdir())


def test_a_killed_worker_saves_the_run(training, whole):
    """What the step before had is saved, and one line names memory; the same command goes on to the same end."""
    process = training.start("starved")
    training.wait_for_step("starved", random.randint(12, 60), process)
    readers = [
        pid for pid in children(process.pid) if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(readers) == 1, readers
    os.kill(readers[0], signal.SIGKILL)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "Traceback" not in message, message
    (error,) = [line for line in message.splitlines() if line.startswith("error:")]
    assert "memory" in error and "the same command goes on" in error
    last = training.metrics("starved")[-1]["step"]
    assert str(last) in {path.name for path in (training.folder / "starved" / "checkpoints").iterdir()}
    status, message = training.run("starved")
    assert status == 0 and f"resuming after step {last}" in message, message
    assert training.metrics("starved") == whole[0]
    assert_same_arrays(training.arrays("starved"), whole[1])


def children(parent: int) -> list[int]:
    """Processes that a process has started, from any of its threads."""
    listed = pathlib.Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for path in listed for pid in path.read_text().split()]


def test_a_second_run_in_the_same_workdir_leaves(training, whole):
    first = training.start("held")
    training.wait_for_step("held", 1, first)
    first.send_signal(signal.SIGSTOP)  # or it could be finished before the second has looked
    for _ in range(2):
        status, message = training.run("held")
        assert status == 2 and "Traceback" not in message, message
        (error,) = [line for line in message.splitlines() if line.startswith("error:")]
        assert f"is held by process {first.pid} on " in error
    first.send_signal(signal.SIGCONT)
    message = first.communicate(timeout=120)[1]
    assert first.returncode == 0, message
    assert training.metrics("held") == whole[0]
    assert_same_arrays(training.arrays("held"), whole[1])


def steps_and_measured(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """The lines of steps, and those of the hooks that measure held-out clips."""
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def test_two_processes_are_one(training):
    """The same run on one process with four devices and on two with two each; one goes on where two were."""
    options = [
        "--config.mesh.fsdp=2",
        "--config.steps=8",
        "--config.checkpoint_every=5",
        "--config.neighbours_every=4",
        "--config.neighbours_clips=4",
        "--config.validate_every=4",
        "--config.keep_best=loss",
        "--config.images_every=4",
    ]
    status, message = training.run("one", *options, devices=4)
    assert status == 0, message
    coordinator = f"--coordinator=localhost:{free_port()}"
    pair = [
        training.start("two", *options, coordinator, f"--process_id={number}", "--process_count=2", devices=2)
        for number in range(2)
    ]
    messages = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], messages
    for repeat in range(2):
        one, two = (steps_and_measured(training.metrics(name)) for name in ("one", "two"))
        assert [[line["step"] for line in lines] for lines in two] == [list(range(1, 9)), [4, 4, 8, 8]]
        for ours, expected in zip(sum(two, []), sum(one, []), strict=True):
            assert ours.keys() == expected.keys()
            np.testing.assert_allclose([*ours.values()], [*expected.values()], rtol=1e-5)
        one, two = training.arrays("one"), training.arrays("two")
        kept = [[path.name for path in (training.folder / name / "best").iterdir()] for name in ("one", "two")]
        assert kept[0] == kept[1] and len(kept[0]) == 1
        for name, x in one.items():
            np.testing.assert_allclose(two[name], x, rtol=1e-3, atol=1e-4, err_msg=name)
        if repeat == 0:
            shutil.rmtree(training.folder / "two" / "checkpoints" / "8")
            status, message = training.run("two", *options, devices=4)
            assert status == 0 and "resuming after step 5" in message, message
