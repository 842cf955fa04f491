"""Preparing on Apache Beam: the records of a local run, with a killed worker too; what is refused."""

import contextlib
import importlib.util
import pathlib
import signal
import subprocess
import sys
import sysconfig

import clip_trees
import process_tree
import pytest

BEAM = "apache-beam>=2.70,<3"
pytestmark = pytest.mark.slow
REFUSALS = """
import sys
from av_mae.errors import UserError
from av_mae.prepare import __main__ as prepare
for options in sys.argv[2:]:
    try:
        prepare.main([*sys.argv[1].split(), *options.split()])
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def python_with_beam(tmp_path_factory) -> str:
    """An environment with Beam beside this one's packages: it needs other versions of some than the tests run with."""
    if importlib.util.find_spec("apache_beam") is not None:
        return sys.executable
    folder = tmp_path_factory.mktemp("beam")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", BEAM], check=True
    )
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "this.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
    clips = {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number) for number in range(9)}
    return clip_trees.put(tmp_path / "in", clips | {"b/bad.mp4": b"x"})


def test_two_local_workers_of_beam_write_the_same_set_though_one_is_killed(python_with_beam, source, tmp_path, root):
    """Beam's DirectRunner would wait for the lost worker for ever; the command ends, and the next goes on."""
    command = [python_with_beam, "-m", "av_mae.prepare", "--dataset=folder", f"--source={source}"]
    command += [f"--output={tmp_path / 'there'}", "--shard_clips=2", "--beam_runner=DirectRunner"]
    command += ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    with contextlib.closing((tmp_path / "log").open("w")) as log:
        ignores = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # as what a script starts with `&`
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log, preexec_fn=ignores)
        process_tree.kill_a_worker(process.pid, "sdk_worker_main")
        status = process.wait(timeout=100)
    said = (tmp_path / "log").read_text()
    assert status == 75, said
    assert said.endswith("exited with return code 137; the same command goes on at the finished shards\n"), said
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "9 of 10 clips in train" in done.stdout
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "there")


def test_what_beam_would_pass_over_is_refused(python_with_beam, source, tmp_path, root):
    refused = "127.0.0.1:1: no cluster answers (127.0.0.1:1: Connection refused)"
    options = {
        "--qualty=80": "--qualty=80 is an option neither of this command nor of Apache Beam; did you mean --quality?",
        "--qualty 80": "--qualty is an option neither of this command nor of Apache Beam; did you mean --quality?",
        "--direct_num_wrkers=2": "--direct_num_wrkers=2 is an option neither of this command nor of Apache Beam; "
        "did you mean --direct_num_workers?",
        "-x": "-x is an option neither of this command nor of Apache Beam",
        "word": "word is an option neither of this command nor of Apache Beam",
        "--direct_num_workers x": "Apache Beam: argument --direct_num_workers: invalid int value: 'x'",
        "--job_endpoint=127.0.0.1:1": f"--job_endpoint={refused}",
        "--flink_master 127.0.0.1:1": f"--flink_master={refused}",
    }
    common = f"--dataset=folder --source={source} --output={tmp_path / 'there'} --beam_runner=DirectRunner"
    command = [python_with_beam, "-c", REFUSALS, common, *options, "--beam_runner=DaskRunner"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    *told, runner = done.stdout.splitlines()
    assert told == list(options.values()), done.stderr
    assert runner.startswith("--beam_runner=DaskRunner: Unexpected pipeline runner") and "--engine=dask" in runner
    assert not (tmp_path / "there" / "prepare.json").exists()
