"""Preparing on real Ray, Dask and Spark with two workers, of which one is killed: the bytes of a local run."""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import clip_trees
import process_tree
import pytest
import slurm_cluster

pytestmark = pytest.mark.slow
NEEDED = {"ray": "ray", "dask": "distributed", "spark": "pyspark"}
CLIPS = 9
# Loopback only, and no network: Ray and Spark would look for another address, Ray would report its use.
ENVIRONMENT = {"SPARK_LOCAL_IP": "127.0.0.1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def _needs(engine: str) -> None:
    if importlib.util.find_spec(NEEDED[engine]) is None:
        pytest.fail(f"{NEEDED[engine]} is not here: pip install -e '.[{engine}]', as .ci/run does")
    if engine == "spark" and not shutil.which("java"):
        pytest.fail("Java is not here: install it (Debian: apt install default-jre-headless)")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    clips = {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number) for number in range(CLIPS)}
    return clip_trees.put(tmp_path_factory.mktemp("engines") / "in", clips | {"b/bad.mp4": b"x"})


@pytest.fixture(scope="module")
def expected(source) -> pathlib.Path:
    """The set by local processes."""
    clip_trees.prepare("folder", source, source.parent / "here", shard_clips=2)
    return source.parent / "here"


@pytest.fixture(scope="module")
def start(tmp_path_factory, root):
    """start(name, command): a process that ends, with all below it, after the tests of this module."""
    with contextlib.ExitStack() as stack:

        def begin(name: str, *command: str, until: str = "") -> subprocess.Popen:
            log = tmp_path_factory.mktemp(name) / "log"
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, cwd=root, env=os.environ | ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
                )
            stack.callback(_end, process)
            give_up = time.monotonic() + 90
            while until not in log.read_text():
                assert process.poll() is None and time.monotonic() < give_up, log.read_text()
                time.sleep(0.1)
            return process

        yield begin


def _end(process: subprocess.Popen) -> None:
    pids = process_tree.below(process.pid) | {process.pid}
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def ray(start) -> tuple[str, int]:
    """Address and first process of a cluster with two workers."""
    _needs("ray")
    (port,) = slurm_cluster.free_ports(1)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=2", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    process = start("ray", *command, "--object-store-memory=100000000", until="runtime started")
    return f"127.0.0.1:{port}", process.pid


@pytest.fixture(scope="module")
def dask(start) -> tuple[str, int]:
    """Address of a scheduler and the process of the first of its two workers."""
    _needs("dask")
    (port,) = slurm_cluster.free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    module = [sys.executable, "-m", "distributed.cli"]
    module[-1] += ".dask_scheduler"
    start("scheduler", *module, "--host=127.0.0.1", f"--port={port}", "--no-dashboard", until="Scheduler at")
    module[-1] = "distributed.cli.dask_worker"
    first, _ = (start("worker", *module, address, "--nthreads=1", "--no-dashboard") for _ in range(2))
    return address, first.pid


def _command(source: pathlib.Path, output: pathlib.Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "av_mae.prepare", "--dataset=folder", f"--source={source}", f"--output={output}"]
    return [*command, "--shard_clips=2", *options]


def _finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture
def begin(source, root, tmp_path):
    """begin(options): the command, preparing tmp_path / 'there'."""
    started = []

    def run(*options: str) -> subprocess.Popen:
        command = _command(source, tmp_path / "there", *options)
        started.append(
            subprocess.Popen(
                command,
                cwd=root,
                env=os.environ | ENVIRONMENT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        _end(process)


@pytest.mark.parametrize("engine", ["ray", "dask"])
def test_a_cluster_of_two_workers_of_which_one_is_killed(engine, begin, expected, tmp_path, request):
    address, first = request.getfixturevalue(engine)
    process = begin(f"--engine={engine}", f"--address={address}")
    process_tree.kill_a_worker(first, "")
    assert f"{CLIPS} of {CLIPS + 1} clips in train" in _finish(process)
    clip_trees.assert_same_files(expected, tmp_path / "there")


def test_spark_with_two_executors_of_which_one_is_killed(begin, expected, tmp_path):
    _needs("spark")
    process = begin("--engine=spark", "--address=local-cluster[2,1,1024]")
    process_tree.kill_a_worker(process.pid, "CoarseGrainedExecutorBackend")
    assert f"{CLIPS} of {CLIPS + 1} clips in train" in _finish(process)
    clip_trees.assert_same_files(expected, tmp_path / "there")


@pytest.mark.parametrize("engine", list(NEEDED))
def test_a_cluster_of_this_machine_of_which_a_worker_is_killed(engine, begin, expected, tmp_path):
    _needs(engine)
    process = begin(f"--engine={engine}", "--workers=2")
    process_tree.kill_a_worker(process.pid, "")
    assert f"{CLIPS} of {CLIPS + 1} clips in train" in _finish(process)
    clip_trees.assert_same_files(expected, tmp_path / "there")


def test_local_processes_of_which_one_is_killed(begin, expected, tmp_path):
    process = begin("--workers=2")
    process_tree.kill_a_worker(process.pid, "bounded.serve")
    _finish(process)
    clip_trees.assert_same_files(expected, tmp_path / "there")


@pytest.mark.parametrize(
    "engine, address",
    [("ray", "127.0.0.1:1"), ("dask", "tcp://nowhere.invalid:8786"), ("spark", "spark://127.0.0.1:1")],
)
def test_a_cluster_that_is_not_there(engine, address, begin):
    _needs(engine)
    process = begin(f"--engine={engine}", f"--address={address}")
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 2 and "Traceback" not in said
    assert said.startswith(f"error: --address={address}: no cluster answers") and said.count("\n") == 1
