"""The launcher for Slurm on a real Slurm of two nodes: restarts, requeues, stops, wrong input."""

import contextlib
import datetime
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import slurm_cluster
from train_processes import PYTHON, Training, assert_same_arrays, free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow
STEPS = 40
QUICK = ["--config.data.workers=0", f"--config.steps={STEPS}", "--config.checkpoint_every=10"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = slurm_cluster.missing()
    if missing:
        pytest.fail(f"{', '.join(missing)} are not here: install Slurm (Debian: apt install slurm-wlm munge)")
    started = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def whole(training):
    """An undisturbed run of two processes."""
    join = [f"--coordinator=localhost:{free_port()}", "--process_count=2", "--host_timeout=60"]
    processes = [training.start("whole", *QUICK, *join, f"--process_id={number}") for number in range(2)]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    return training.metrics("whole"), training.arrays("whole")


@pytest.fixture
def submit(training, cluster, tmp_path):
    """submit(workdir, *arguments of train, minutes=…): the number of a job of two nodes."""
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)

    def start(workdir: str, *arguments: str, minutes: int = 10) -> str:
        environment = training.environment() | cluster.environment
        environment |= {"AV_MAE_PYTHON": str(tmp_path / "python"), "AV_MAE_VENV": str(tmp_path / "venv")}
        command = ["bash", str(ROOT / "launch" / "slurm.sh"), "--nodes=2", "--pause=1", "--patience=90"]
        command += [f"--logs={tmp_path / 'logs'}", f"--sbatch=--time={minutes}", "--", f"--config={training.config}"]
        command += [f"--workdir={training.folder / workdir}", "--host_timeout=60", *QUICK, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return re.search(r"Submitted batch job (\d+)", done.stdout)[1]

    return start


def wait_for_step(training, cluster, job, workdir, step, within=240):
    until = time.monotonic() + within
    while not (lines := training.metrics(workdir)) or lines[-1]["step"] < step:
        assert time.monotonic() < until, cluster.job(job)
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), cluster.job(job)
        time.sleep(0.05)


def trainers(workdir: pathlib.Path) -> list[int]:
    """Processes that train in a work directory: those that JAX runs in, each a child of the one that waits for it."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0") if folder.name.isdecimal() else []
        except OSError:
            continue
        if f"--workdir={workdir}".encode() in command and b"av_mae.train" in command:
            found.append(int(folder.name))
    return sorted(found)


@contextlib.contextmanager
def standing_still(workdir: pathlib.Path, log: pathlib.Path):
    """All trainers stop, so that the machine's speed does not matter, until the batch script was asked to end."""
    held = trainers(workdir)
    for process in held:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
        until = time.monotonic() + 180
        while "asked to stop" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
    finally:
        for process in held:
            os.kill(process, signal.SIGCONT)


def test_killed_then_out_of_time_then_finished(training, whole, cluster, submit, tmp_path):
    """A task is killed: all start again within the job. Time is up: saved, queued again, and ended bit by bit alike."""
    job = submit("run")
    wait_for_step(training, cluster, job, "run", 12)
    os.kill(trainers(training.folder / "run")[-1], signal.SIGKILL)
    logs = tmp_path / "logs"
    until = time.monotonic() + 200
    while not (logs / "start-0" / "attempt-1").exists():
        assert time.monotonic() < until, (logs / f"job-{job}.log").read_text()
        time.sleep(0.1)
    wait_for_step(training, cluster, job, "run", 23)
    with standing_still(training.folder / "run", logs / f"job-{job}.log"):
        cluster.tell("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends
    cluster.hurry(job)
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, within=400)
    said = (logs / f"job-{job}.log").read_text()
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", said
    assert said.count("ended with statuses 75") == 2 and "asked to stop: every process saves its state" in said
    for place in ("start-0/attempt-0", "start-0/attempt-1", "start-1/attempt-0"):
        assert (logs / place / "task-0.log").exists() and (logs / place / "task-1.log").exists()
    assert "resuming after step" in (logs / "start-1" / "attempt-0" / "task-0.log").read_text()
    assert training.metrics("run") == whole[0]
    assert_same_arrays(training.arrays("run"), whole[1])


def test_time_limit(training, whole, cluster, submit, tmp_path):
    """A real one, of Slurm. Two minutes before it the job is saved and queued again, and ends bit by bit alike.

    All stand still from some step until then, so that the machine's speed does not matter.
    """
    job = submit("limit", "--host_timeout=200", minutes=4)
    wait_for_step(training, cluster, job, "limit", 12, within=110)
    log = tmp_path / "logs" / f"job-{job}.log"
    with standing_still(training.folder / "limit", log):
        pass
    left = datetime.datetime.fromisoformat(cluster.job(job)["EndTime"]) - datetime.datetime.now()
    cluster.hurry(job)
    step = training.metrics("limit")[-1]["step"]
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, within=150)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", log.read_text()
    assert 100 < left.total_seconds() < 190  # Slurm may tell up to a minute earlier
    assert f"resuming after step {step}\n" in (tmp_path / "logs/start-1/attempt-0/task-0.log").read_text()
    assert 12 <= step < STEPS and training.metrics("limit") == whole[0]
    assert_same_arrays(training.arrays("limit"), whole[1])


def test_cancelled_is_saved_and_not_queued_again(training, cluster, submit, tmp_path):
    job = submit("cancelled", "--config.checkpoint_every=1000", "--config.steps=4000")
    wait_for_step(training, cluster, job, "cancelled", 7)
    cluster.tell("scancel", job)
    ended = cluster.wait_for(job, {"CANCELLED", "COMPLETED", "FAILED"}, within=120)
    until = time.monotonic() + 60
    while trainers(training.folder / "cancelled") and time.monotonic() < until:
        time.sleep(0.2)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    last = training.metrics("cancelled")[-1]["step"]
    saved = [path.name for path in (training.folder / "cancelled" / "checkpoints").iterdir()]
    said = (tmp_path / "logs" / "start-0" / "attempt-0" / "task-0.log").read_text()
    assert saved == [str(last)] and last < 4000, said
    time.sleep(5)
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_queued_again_by_the_administrator(training, whole, cluster, submit, tmp_path):
    job = submit("requeued")
    wait_for_step(training, cluster, job, "requeued", 12)
    cluster.tell("scontrol", "requeue", job)
    cluster.hurry(job)
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, within=400)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1"
    assert all((tmp_path / "logs" / f"start-{n}" / "attempt-0" / "task-1.log").exists() for n in (0, 1))
    assert training.metrics("requeued") == whole[0]
    assert_same_arrays(training.arrays("requeued"), whole[1])


def test_wrong_input_is_not_tried_again(training, cluster, submit, tmp_path):
    job = submit("wrong", "--config.stepz=3")
    ended = cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, within=120)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert not (tmp_path / "logs" / "start-0" / "attempt-1").exists()
    assert "unknown config key 'stepz'" in (tmp_path / "logs" / "start-0" / "attempt-0" / "task-0.log").read_text()
