"""Several processes as one run: how they find each other, what must be alike, when a run counts as hung."""

import argparse
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from tiny_training import recipe

from av_mae.errors import UserError
from av_mae.train import agreement, hosts
from av_mae.train.goodput import FIRST, Watchdog


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    hosts.add_process_arguments(parser)
    return parser.parse_args(options)


@pytest.mark.parametrize(
    "options, environment, expected",
    [
        ([], {}, None),
        (["--coordinator=a:1", "--process_id=0", "--process_count=2"], {}, ("a:1", 0, 2)),
        (["--coordinator=auto"], {}, ("auto", None, None)),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, ("a:1", 2, 3)),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "1"}, ("a:1", 1, 3)),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1"}, None),  # a variable that something else reads too
        ([], {"SLURM_STEP_NUM_TASKS": "4"}, ("auto", None, None)),
        ([], {"SLURM_NTASKS": "4"}, None),  # the batch script itself, outside srun
        ([], {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, ("auto", None, None)),
        ([], {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ([], {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, ("auto", None, None)),
        (["--coordinator=b:2", "--process_id=1", "--process_count=2"], {"SLURM_STEP_NUM_TASKS": "4"}, ("b:2", 1, 2)),
    ],
)
def test_how_a_process_joins(options, environment, expected):
    join = hosts.find_processes(parse(*options), environment)
    assert (join and (join.coordinator, join.process_id, join.process_count)) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        (["--process_id=0", "--process_count=2"], "process_id=0 and process_count=2 need a coordinator"),
        (["--coordinator=localhost:1", "--process_count=2"], "needs 0 <= process_id < process_count"),
        (["--coordinator=localhost:1", "--process_id=2", "--process_count=2"], "process_id=2, process_count=2"),
        (["--coordinator=localhost", "--process_id=0", "--process_count=2"], "must read HOST:PORT"),
        (["--host_timeout=0"], "--host_timeout=0 must be at least 1"),
        (["--stopped_status=256"], "--stopped_status=256 must be at most 255"),
        (["--coordinator=localhost:99999999999", "--process_id=0", "--process_count=2"], "must read HOST:PORT"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        hosts.find_processes(parse(*options), {})


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "MEGASCALE_NUM_SLICES"])
@pytest.mark.parametrize("value", ["two", "-1", "9" * 5000, ""])
def test_environments_that_no_launcher_makes(name, value):
    environment = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"} if name.startswith("JAX") else {}
    if name.startswith("JAX") and not value:
        return  # as if it were not set
    with pytest.raises(UserError, match=f"^the environment's {name}="):
        hosts.find_processes(parse(), environment | {name: value})


def test_port_that_another_run_uses():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert hosts.answers(f"localhost:{port}")
        join = hosts.Join(f"localhost:{port}", 0, 2, 300, 100, 0)
        with pytest.raises(UserError, match=f"cannot listen on port {port} .*choose another port"):
            hosts.check_port(join)
        hosts.check_port(hosts.Join(f"localhost:{port}", 1, 2, 300, 100, 0))  # only process 0 listens
    assert not hosts.answers(f"localhost:{port}")
    hosts.check_port(join)


def test_who_did_not_meet_is_said():
    join = hosts.Join("localhost:1", 1, 2, 7, 100, 0)
    assert "no coordinator answers at localhost:1 within --start_timeout=7 s" in hosts.not_met(join)
    join = hosts.Join("localhost:1", 0, 2, 7, 100, 0)
    assert "the 2 processes did not all meet at coordinator localhost:1 within --start_timeout=7" in hosts.not_met(join)


# Joins as process 1 of two, without JAX, in one forked process for each way to end; prints the statuses as JSON.
ENDS = """
import json, os, signal, sys, time
from av_mae.train import hosts
hosts.initialize = lambda join: None
hosts.LAST_WORDS = 0.0
arguments = hosts.argparse.Namespace(coordinator="localhost:1", process_id=1, process_count=2, start_timeout=1,
                                     host_timeout=1, stopped_status=9)
statuses = []
for number, end in enumerate(json.loads(sys.argv[2])):
    process = os.fork()
    if process == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY), 2)
        with hosts.joined(arguments):
            exec(end)
        sys.exit()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(statuses))
"""
WAYS = [
    ("pass", 0, ""),
    ("raise hosts.UserError('a rule')", 2, "error: a rule\n"),
    ("raise hosts.Stopped", 9, ""),
    ("raise ValueError('a bug')", 75, "ValueError: a bug"),
    ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
    ("os.abort()", 75, "error: another process of the run is gone"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 75, "was killed by SIGKILL"),
    ("os._exit(75)", 75, ""),
    ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 9, ""),  # before there is anything to save
    # a parent that is killed takes its child along: nothing is written later
    ("os.kill(os.getppid(), signal.SIGKILL); time.sleep(1); print('still here', file=sys.stderr)", -9, ""),
]


def test_the_parent_tells_how_the_child_ended(root, tmp_path):
    ends = json.dumps([end for end, *_ in WAYS])
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path), ends], cwd=root, capture_output=True, text=True, timeout=300
    )
    time.sleep(2)
    assert json.loads(done.stdout) == [status for _, status, _ in WAYS], done.stderr
    for number, (end, _, message) in enumerate(WAYS):
        said = (tmp_path / str(number)).read_text()
        assert message in said if message else not said, (end, said)


def identities(tmp_path):
    config = recipe()
    return [agreement.identity(config, tmp_path) for _ in range(3)]


def test_processes_alike(tmp_path):
    agreement.check_alike(["a", "b", "c"], identities(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"code": "0123"}, r"code is '[0-9a-f]{12}' on process 0 \(a\) and '0123' on process 2 \(c\)"),
        ({"workdir": "/else"}, r"workdir is .* and '/else' on process 2 \(c\)"),
        ({"versions": {"jax": "0.1"}}, r"versions.jax is .* and '0.1' on process 2"),
        (
            {"config": {"seed": 7}},
            r"config.seed is 0 on process 0 \(a\) and 7 on process 2 \(c\): start all with the same",
        ),
    ],
)
def test_processes_unlike_are_named(tmp_path, change, message):
    seen = identities(tmp_path)
    for name, value in change.items():
        seen[2][name] = {**seen[2][name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        agreement.check_alike(["a", "b", "c"], seen)


def test_code_hash_follows_the_code(monkeypatch, tmp_path):
    path = tmp_path / "package" / "training" / "agreement.py"
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(path))
    compute = agreement.code_hash.__wrapped__
    first = compute()
    path.write_text("x = 2\n")
    second = compute()
    path.write_text("x = 1\n")
    assert compute() == first != second


def test_clocks():
    assert agreement.clock_warning(["a", "b", "c"], [100.0, 101.5, 100.2]) == ""
    warning = agreement.clock_warning(["a", "b", "c"], [100.0, 103.5, 99.5])
    assert re.search(r"clock of process 1 \(b\) is 4.0 s ahead of that of process 2 \(c\)", warning)


def watch(floor: float, factor: float, pauses: list[float], wait: float = 60) -> list[float]:
    """Steps with pauses between them, then silence; returns after how many seconds of it the watchdog barked."""
    barked, done = [], threading.Event()
    dog = Watchdog(floor, factor, lambda seconds: (barked.append(seconds), done.set()))
    for step, pause in enumerate(pauses):
        time.sleep(pause)
        dog.after_metrics(step, {}, {})
    done.wait(wait)
    dog.close()
    return barked


def test_a_hang_is_noticed_after_a_factor_of_the_median():
    (barked,) = watch(0.2, 20, [0.9, *[0.03] * 9])  # the first one, which compiles, does not count
    assert barked > 0.55


def test_the_floor_counts_where_steps_are_fast():
    (barked,) = watch(0.6, 1, [0.0] * 9)
    assert 0.6 < barked < FIRST * 0.6


def test_long_before_the_first_step_is_no_hang():
    (barked,) = watch(0.2, 2, [])
    assert barked > FIRST * 0.2


def test_no_watch_without_a_floor():
    assert watch(0.0, 20, [0.01] * 3, wait=0.3) == []
