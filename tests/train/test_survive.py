"""Several real processes (Gloo), killed, stopped, hung, unlike or alone; a restart is of all, as launchers do it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from train_processes import ROOT, Training, assert_same_arrays, free_port

from av_mae.train.hosts import RESTART

STEPS, BATCH = 40, 8
QUICK = ["--config.data.workers=0", f"--config.steps={STEPS}", "--config.checkpoint_every=10"]
pytestmark = pytest.mark.slow


class Hosts(Training):
    """Starts all processes of a run; each records its clips in `<workdir>-clips`."""

    def start_all(
        self,
        workdir: str,
        count: int,
        *options: str,
        devices: int = 1,
        fault: tuple[str, ...] = (),
        own: dict[int, list[str]] | None = None,
    ) -> list[subprocess.Popen]:
        program = (str(ROOT / "tests" / "train_recorded.py"), str(self.folder / f"{workdir}-clips"), *fault)
        join = [f"--coordinator=localhost:{free_port()}", f"--process_count={count}", "--host_timeout=60"]
        return [
            self.start(
                workdir,
                *QUICK,
                *(join if count > 1 else []),
                *options,
                *(own or {}).get(number, []),
                *([f"--process_id={number}"] if count > 1 else []),
                devices=devices,
                program=program,
            )
            for number in range(count)
        ]

    def clips(self, workdir: str) -> dict[tuple[int, str], int]:
        """(place, id) → how many processes took it so far."""
        taken = {}
        for path in sorted((self.folder / f"{workdir}-clips").iterdir()):
            for line in path.read_text().splitlines():
                pair = tuple(json.loads(line))
                taken[pair] = taken.get(pair, 0) + 1
        return taken


def ended(processes: list[subprocess.Popen], within: float = 1200) -> tuple[list[int], list[str]]:
    """Exit statuses and stderr of all."""
    until = time.monotonic() + within
    messages = [process.communicate(timeout=max(1, until - time.monotonic()))[1] for process in processes]
    return [process.returncode for process in processes], messages


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Hosts(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def whole(training):
    """An undisturbed run on two processes: its metrics, arrays and clips."""
    statuses, messages = ended(training.start_all("whole", 2))
    assert statuses == [0, 0], messages
    clips = training.clips("whole")
    assert sorted(position for position, _ in clips) == list(range(STEPS * BATCH)) and set(clips.values()) == {1}
    return training.metrics("whole"), training.arrays("whole"), set(clips)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_all_and_the_restart_is_bit_identical(training, whole, victim):
    workdir = f"killed{victim}"
    processes = training.start_all(workdir, 2)
    training.wait_for_step(workdir, random.randint(21, STEPS - 8), processes[0])
    processes[victim].kill()
    began = time.monotonic()
    statuses, messages = ended(processes, within=300)
    assert statuses == [-signal.SIGKILL if number == victim else RESTART for number in range(2)], messages
    assert time.monotonic() - began < 120
    statuses, messages = ended(training.start_all(workdir, 2))
    assert statuses == [0, 0] and "resuming after step" in messages[0], messages
    assert training.metrics(workdir) == whole[0]
    assert_same_arrays(training.arrays(workdir), whole[1])
    assert set(training.clips(workdir)) == whole[2]


def test_a_process_that_is_silent_counts_as_dead(training):
    """Stopped, not killed: its connections stay open, only heartbeats are missing."""
    processes = training.start_all("silent", 2, "--host_timeout=20")
    training.wait_for_step("silent", 6, processes[0])
    child = int(subprocess.run(["pgrep", "-P", str(processes[1].pid)], capture_output=True, text=True).stdout)
    subprocess.run(["kill", "-STOP", str(child)], check=True)
    began = time.monotonic()
    assert ended(processes[:1], within=300)[0] == [RESTART]
    assert time.monotonic() - began < 120  # --host_timeout=20
    processes[1].kill()
    ended(processes[1:])


def test_sigterm_to_all_saves_the_current_step(training):
    processes = training.start_all("stopped", 2, f"--stopped_status={RESTART}", "--config.checkpoint_every=1000")
    training.wait_for_step("stopped", 7, processes[0])
    for process in processes:
        process.terminate()
    statuses, messages = ended(processes)
    last = training.metrics("stopped")[-1]["step"]
    assert statuses == [RESTART, RESTART] and f"asked to stop: step {last} is saved" in messages[0], messages
    assert 7 <= last < STEPS
    assert [path.name for path in (training.folder / "stopped" / "checkpoints").iterdir()] == [str(last)]


def test_sigterm_while_a_restart_compiles(training):
    """That step is done, and then all stop."""
    arguments = ["early", 2, f"--stopped_status={RESTART}", "--config.checkpoint_every=1000"]

    def stop(processes):
        for process in processes:
            process.terminate()
        statuses, messages = ended(processes, within=300)
        last = training.metrics("early")[-1]["step"]
        assert statuses == [RESTART, RESTART] and f"asked to stop: step {last} is saved" in messages[0], messages
        return last

    processes = training.start_all(*arguments)
    training.wait_for_step("early", 7, processes[0])
    before = stop(processes)
    processes = training.start_all(*arguments)
    while "the first step compiles" not in processes[0].stderr.readline():
        assert processes[0].poll() is None
    assert stop(processes) == before + 1 < STEPS


def test_a_hang_ends_with_stacks_of_all_threads(training):
    processes = training.start_all(
        "hung", 2, "--config.hang_seconds=40", "--config.hang_factor=2", fault=("sleep:1:12",)
    )
    statuses, messages = ended(processes)
    assert statuses == [RESTART, RESTART], messages
    assert "error: no step was done for" in messages[1] and "in __next__" in messages[1]  # where it hangs
    assert 'File "' in messages[1] and messages[1].count("Thread 0x") >= 2


def test_an_error_of_one_process_ends_all(training):
    statuses, messages = ended(training.start_all("bug", 2, fault=("raise:0:8",)))
    assert statuses == [RESTART, RESTART] and "RuntimeError: a programmer's error" in messages[0], messages


def test_unlike_processes_are_named(training):
    statuses, messages = ended(training.start_all("unlike", 2, own={1: ["--config.log_every=7"]}))
    assert statuses == [2, 2], messages
    for message in messages:
        (error,) = [line for line in message.splitlines() if line.startswith("error:")]
        assert "config.log_every is 1 on process 0" in error and "7 on process 1" in error, message


def test_a_folder_that_hosts_do_not_share_is_refused(training, tmp_path):
    """One name, two folders: it goes by way of the process's own current folder."""
    processes = []
    join = [f"--coordinator=localhost:{free_port()}", "--process_count=2", "--workdir=/proc/self/cwd/run"]
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        command = [sys.executable, "-m", "av_mae.train", f"--config={training.config}", *QUICK, *join]
        processes.append(
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                cwd=tmp_path / str(number),
                env=training.environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    statuses, messages = ended(processes, within=200)
    assert statuses == [2, 2], messages
    for message in messages:
        (error,) = [line for line in message.splitlines() if line.startswith("error:")]
        assert "/proc/self/cwd/run is not one folder for all processes: process 1 on " in error, message
    for number in range(2):
        assert not [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()]


def test_a_process_that_is_alone_says_so(training):
    began = time.monotonic()
    process = training.start(
        "alone", "--coordinator=localhost:1", "--process_id=1", "--process_count=2", "--start_timeout=5"
    )
    (status,), (message,) = ended([process])
    assert status == RESTART and time.monotonic() - began < 120
    assert message.splitlines()[-1].startswith(
        "error: no coordinator answers at localhost:1 within --start_timeout=5 s"
    )


def test_saved_on_four_goes_on_on_two_and_on_one(training):
    """The same four devices in four, two and one processes, and one device alone."""
    processes = training.start_all("four", 4)
    training.wait_for_step("four", 12, processes[0])
    for process in processes:
        process.terminate()
    statuses, messages = ended(processes)
    assert statuses == [0] * 4, messages
    stopped = training.metrics("four")[-1]["step"]
    ends = {}
    for name, count, devices in (("on4", 4, 1), ("on2", 2, 2), ("on1", 1, 4), ("on1alone", 1, 1)):
        shutil.copytree(training.folder / "four", training.folder / name)
        statuses, messages = ended(training.start_all(name, count, devices=devices))
        assert statuses == [0] * count and f"resuming after step {stopped}" in messages[0], messages
        clips = training.clips(name)
        assert sorted(position for position, _ in clips) == list(range(stopped * BATCH, STEPS * BATCH)), name
        assert set(clips.values()) == {1}, name
        ends[name] = set(clips), training.metrics(name), training.arrays(name)
    for name, (clips, metrics, arrays) in ends.items():
        assert clips == ends["on4"][0], name
        assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(
            [line["loss"] for line in metrics], [line["loss"] for line in ends["on4"][1]], rtol=1e-4, err_msg=name
        )
        for key, x in ends["on4"][2].items():
            np.testing.assert_allclose(arrays[key], x, rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}")


def ended_or_killed(processes: list[subprocess.Popen], patience: float = 60) -> tuple[list[int], list[str]]:
    """As launchers do: who has not ended some time after a fault is killed (it may wait for one that never came)."""
    until = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.2)
    for process in processes:
        process.kill()
    return ended(processes)


def some_moment(training: Hosts, workdir: str, processes: list[subprocess.Popen]) -> None:
    """Waits for a random one: before the processes have met, or in or after a step, at times in a checkpoint."""
    if random.random() < 0.2:
        time.sleep(random.uniform(0.1, 2.5))
        return
    lines = training.metrics(workdir)
    training.wait_for_step(workdir, (lines[-1]["step"] if lines else 0) + random.randint(1, 4), processes[0])
    time.sleep(random.uniform(0, 0.2))


def test_faults_at_random_moments(training):
    """Three; AV_MAE_FAULTS sets another number."""
    options = [
        "--config.steps=80",
        f"--config.checkpoint_local={training.folder / 'disk'}",
        "--config.checkpoint_local_every=3",
    ]
    statuses, messages = ended(training.start_all("undisturbed", 2, *options))
    assert statuses == [0, 0], messages
    workdir, faults = "ten", random.choices(["kill 0", "kill 1", "stop"], k=int(os.environ.get("AV_MAE_FAULTS", "3")))
    for fault in faults:
        processes = training.start_all(workdir, 2, *options)
        some_moment(training, workdir, processes)
        for number, process in enumerate(processes):
            if fault in ("stop", f"kill {number}"):
                process.send_signal(signal.SIGTERM if fault == "stop" else signal.SIGKILL)
        statuses, messages = ended_or_killed(processes)
        allowed = {0, -signal.SIGTERM, -signal.SIGKILL, RESTART} if fault == "stop" else {-signal.SIGKILL, RESTART}
        assert set(statuses) <= allowed, (fault, messages)
    statuses, messages = ended(training.start_all(workdir, 2, *options))
    assert statuses == [0, 0] and "resuming after step" in messages[0], (faults, messages)
    assert training.metrics(workdir) == training.metrics("undisturbed"), faults
    assert_same_arrays(training.arrays(workdir), training.arrays("undisturbed"))
    assert set(training.clips(workdir)) == set(training.clips("undisturbed"))
