"""The launcher for hosts that ssh reaches, on a real sshd: restarts, stops, hosts and names that are not there."""

import os
import re
import signal
import subprocess
import sys

import pytest
import ssh_hosts
from train_processes import PYTHON, ROOT, Training, assert_same_arrays, free_port

from av_mae.train.hosts import RESTART

STEPS = 40
QUICK = ["--config.data.workers=0", f"--config.steps={STEPS}", "--config.checkpoint_every=10", "--host_timeout=60"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def hosts(training, tmp_path_factory):
    missing = ssh_hosts.missing()
    if missing:
        pytest.fail(f"{', '.join(missing)} are not here: install OpenSSH (Debian: apt install openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    (folder / "python").write_text(PYTHON.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    variables = {
        name: x for name, x in training.environment().items() if name.startswith(("JAX_", "XLA_", "OPENBLAS_"))
    }
    variables |= {"AV_MAE_PYTHON": str(folder / "python"), "AV_MAE_VENV": str(folder / "venv")}
    started = ssh_hosts.Hosts(folder, variables)
    yield started
    started.stop()


@pytest.fixture
def launch(training, hosts, tmp_path):
    """launch(names, workdir): starts the launcher; it stages the code to tmp_path / 'code' of every host."""

    def start(names: str, workdir: str, *options: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "launch" / "ssh.sh"), f"--hosts={names}", f"--ssh_config={hosts.config}"]
        command += [f"--folder={tmp_path / 'code'}", f"--port={free_port()}", f"--logs={tmp_path / 'logs'}"]
        command += ["--pause=1", "--patience=60", *options, "--", f"--config={training.config}"]
        command += [f"--workdir={training.folder / workdir}", *QUICK]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="module")
def whole(training):
    """An undisturbed run of two processes."""
    join = [f"--coordinator=localhost:{free_port()}", "--process_count=2"]
    processes = [training.start("whole", *QUICK, *join, f"--process_id={number}") for number in range(2)]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    return training.metrics("whole"), training.arrays("whole")


def test_a_killed_process_starts_all_again(training, whole, launch, tmp_path):
    """Staged to two hosts, one of them behind a jump host; the trainer of one is killed."""
    process = launch("first,far", "run")
    training.wait_for_step("run", 22, process)
    os.kill(int((tmp_path / "code" / ".pid-1").read_text()), signal.SIGKILL)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "attempt 0 ended with statuses 75 255" in message, message  # ssh's
    assert "resuming after step" in (tmp_path / "logs" / "attempt-1" / "0.log").read_text()
    assert training.metrics("run") == whole[0]
    assert_same_arrays(training.arrays("run"), whole[1])
    for name in ("av_mae/train/__main__.py", "launch/requirements.lock"):
        assert (tmp_path / "code" / name).read_bytes() == (ROOT / name).read_bytes()


def test_sigterm_is_handed_on(training, launch):
    process = launch("first,second", "stopped", "--address=localhost")
    training.wait_for_step("stopped", 7, process)
    process.terminate()
    message = process.communicate(timeout=300)[1]
    assert process.returncode == RESTART and "asked to stop: every process saves its state" in message, message
    last = training.metrics("stopped")[-1]["step"]
    saved = {path.name for path in (training.folder / "stopped" / "checkpoints").iterdir()}
    assert last < STEPS and str(last) in saved


@pytest.mark.parametrize(
    "names, options, message",
    [
        ("first,nowhere.invalid", [], r"ssh does not reach nowhere\.invalid: .*Could not resolve hostname.*"),
        ("first,other@second", [], r"ssh does not reach other@second: .*Permission denied.*"),
        (
            "nameless,first",
            [],
            r"nameless does not know nameless\.invalid, the name of nameless: give --address=NAME.*",
        ),
        ("first,second", ["--address=a.invalid"], r"first does not know a\.invalid, the name of first: give .*"),
        ("first,nowhere.invalid", ["--address=localhost"], r"ssh does not reach nowhere\.invalid: .*"),
    ],
)
def test_nothing_starts_where_a_host_or_the_coordinator_is_unknown(launch, tmp_path, names, options, message):
    process = launch(names, "unknown", *options)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 2 and re.fullmatch(f"error: {message}\n", said), said
    assert list(tmp_path.iterdir()) == []
