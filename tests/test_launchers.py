"""Launchers of several processes: what they would run, what they refuse, what they make of exit statuses."""

import functools
import os
import shlex
import subprocess

import dry_launch
import pytest
from dry_launch import TRAIN, train_words, words


@pytest.fixture
def dry(tmp_path):
    return functools.partial(dry_launch.dry, tmp_path)


def test_ssh(dry):
    status, out, message = dry("ssh.sh", "--hosts=gpu1,me@gpu2", "--extra=cuda", "--port=99")
    assert (status, message) == (0, "")
    lines = words(out)
    assert [line[0] for line in lines] == ["ssh", "ssh", "ssh", "ssh", "mkdir", "ssh", "ssh"]
    assert [line[-2:] for line in lines[:2]] == [[h, "getent ahosts gpu1 > /dev/null"] for h in ("gpu1", "me@gpu2")]
    for host, line in zip(["gpu1", "me@gpu2"], lines[2:4]):
        assert line[:4] == ["ssh", "-o", "BatchMode=yes", host] and line[5] == "<"
        assert line[4].startswith("mkdir -p av_mae && cd av_mae && ") and " tar -xzf - && " in line[4]
    for number, (host, line) in enumerate(zip(["gpu1", "me@gpu2"], lines[5:])):
        assert line[-2] == host and line[-1].startswith("cd av_mae && ") and "AV_MAE_EXTRA=cuda" in line[-1]
        assert train_words(line[-1]) == [
            "--coordinator=gpu1:99",
            f"--process_id={number}",
            "--process_count=2",
            "--stopped_status=75",
            *TRAIN,
        ]


@pytest.mark.parametrize(
    "options, coordinator",
    [
        (["--hosts=alias"], "10.0.0.7:8476"),
        (["--hosts=me@alias,gpu2", "--address=inside.example"], "inside.example:8476"),
        (["--hosts=six"], "[fd00::7]:8476"),
        (["--hosts=fd00::8"], "[fd00::8]:8476"),
        (["--hosts=ssh://me@gpu1:2222"], "gpu1:8476"),
        (["--hosts=here,::1"], "localhost:8476"),
    ],
)
def test_ssh_tells_the_hosts_an_address_they_know(dry, tmp_path, options, coordinator):
    (tmp_path / "config").write_text(
        "Host alias\n HostName 10.0.0.7\nHost six\n HostName fd00::7\nHost here\n HostName localhost\n"
    )
    status, out, message = dry("ssh.sh", f"--ssh_config={tmp_path}/config", *options)
    assert (status, message) == (0, "")
    assert f"--coordinator={coordinator}" in train_words(words(out)[-1][-1])
    assert all(f"ssh -o BatchMode=yes -F {tmp_path}/config " in line for line in out.splitlines() if "ssh" in line)


def test_tpu_vm(dry):
    status, out, message = dry("tpu_vm.sh", "--name=pod", "--zone=us-west4-a", "--workers=2")
    assert (status, message) == (0, "")
    scp, stage, mkdir, *hosts = words(out)
    assert scp[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and scp[-1] == "--worker=all"
    assert stage[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-west4-a", "--worker=all"]
    assert stage[-1].startswith("--command=mkdir -p av_mae && cd ") and " tar -xzf $HOME/av_mae.tar.gz && " in stage[-1]
    for number, line in enumerate(hosts):
        assert line[:8] == [*stage[:7], f"--worker={number}"] and "AV_MAE_EXTRA=tpu" in line[-1]
        assert train_words(line[-1]) == ["--coordinator=auto", "--stopped_status=75", *TRAIN]
    assert len(hosts) == 2


def test_tpu_vm_asks_for_a_slice(dry):
    status, out, _ = dry(
        "tpu_vm.sh",
        "--name=pod",
        "--zone=z",
        "--workers=4",
        "--accelerator=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        "--spot",
    )
    assert status == 0 and len(words(out)) == 8
    assert words(out)[0] == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "pod",
        "--zone=z",
        "--node-id=pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]


def test_slurm(dry, root):
    status, out, message = dry("slurm.sh", "--nodes=2", "--tasks=8", "--sbatch=--gpus-per-node=8")
    assert (status, message) == (0, "")
    _, sbatch, _, srun = words(out)
    assert sbatch[:4] == ["sbatch", "--job-name=av_mae", "--nodes=2", "--ntasks-per-node=8"]
    assert {"--requeue", "--signal=B:USR1@120", "--gpus-per-node=8"} <= set(sbatch)
    inside = shlex.split(sbatch[-1].removeprefix("--wrap=exec "))  # so that signals reach the script
    assert inside[:2] == ["bash", str(root / "launch" / "slurm.sh")] and "--dry-run" not in inside
    assert inside[inside.index("--") + 1 :] == TRAIN
    assert srun[:3] == ["srun", "--nodes=2", "--ntasks-per-node=8"]
    assert train_words(srun[-1]) == ["--stopped_status=75", *TRAIN]


def test_gpu_host(dry, root):
    status, out, _ = dry("gpu_host.sh")
    line = words(out)[-1]
    assert status == 0 and "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true " in line
    assert train_words(line[-1]) == ["--stopped_status=75", *TRAIN]
    status, out, _ = dry("gpu_host.sh", "--processes=2", "--deterministic")
    for number, line in enumerate(words(out)[1:]):
        assert f"CUDA_VISIBLE_DEVICES={number}" in line and any("xla_gpu_deterministic_ops=true" in w for w in line)
        assert train_words(line[-1])[:3] == [
            "--coordinator=localhost:8476",
            f"--process_id={number}",
            "--process_count=2",
        ]


@pytest.mark.parametrize(
    "script, options, message",
    [
        ("ssh.sh", [], "no hosts: give --hosts=HOST,HOST"),
        ("ssh.sh", ["--hosts=a", "--restarts=x"], "--restarts=x must be a whole number"),
        ("ssh.sh", ["--hosts=a", "--steps=3"], "unknown option --steps=3; arguments of av_mae.train come after --"),
        ("ssh.sh", ["--hosts=a,-oProxyCommand=x"], "'-oProxyCommand=x' in --hosts is no name of a host"),
        ("ssh.sh", ["--hosts=a,,b"], "'' in --hosts is no name of a host"),
        ("ssh.sh", ["--hosts=a", "--ssh_config=/none"], "--ssh_config=/none cannot be read: name a file"),
        (
            "ssh.sh",
            ["--hosts=localhost,gpu2"],
            "gpu2 would look for localhost at localhost, which is gpu2 itself: give",
        ),
        ("tpu_vm.sh", ["--zone=z"], "give --name=NAME and --zone=ZONE"),
        ("tpu_vm.sh", ["--zone=z", "--name=n"], "how many hosts has it? give --workers=N"),
        ("tpu_vm.sh", ["--zone=z", "--name=n", "--accelerator=v5p-8"], "needs its software: give --version=VERSION"),
        ("gpu_host.sh", ["--processes=0"], "--processes=0 must be at least 1"),
    ],
)
def test_refused(dry, script, options, message):
    status, _, said = dry(script, *options)
    assert status == 2 and said.startswith("error: ") and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("script", ["ssh.sh", "tpu_vm.sh", "slurm.sh", "gpu_host.sh", "gke.sh"])
def test_help_and_no_arguments(dry, script):
    status, out, _ = dry(script, "--help", train=[])
    assert status == 0 and out.startswith(f"usage: bash launch/{script}") and f"example: bash launch/{script}" in out
    status, _, message = dry(script, train=[])
    assert status == 2 and "no arguments for av_mae.train" in message


def test_docker_file_copies_what_is_there(root):
    lines = (root / "launch" / "Dockerfile").read_text().splitlines()
    copied = [path for line in lines if line.startswith("COPY ") for path in line.split()[1:-1]]
    assert "av_mae" in copied and all((root / path).exists() for path in copied)
    assert "ARG EXTRA=" in lines and 'ENTRYPOINT ["python", "-m", "av_mae.train"]' in lines
    setup = (root / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in ("tpu", "cuda"))


@pytest.mark.parametrize(
    "statuses, verdict",
    [
        ("0 0 0", "done"),
        ("75 75", "again"),
        ("0 75", "again"),
        ("137 75", "again"),
        ("75 137", "again"),
        ("255 75", "again"),
        ("75 2", "2"),
        ("2 137", "2"),
        ("130 75", "130"),
        ("1 0", "1"),
        ("1 75", "again"),
        ("75 1", "again"),
    ],
)
def test_what_statuses_mean(root, statuses, verdict):
    done = subprocess.run(
        ["bash", "-euc", f"source {root}/launch/hosts.sh; _judge {statuses}"], capture_output=True, text=True
    )
    assert done.stdout == verdict + "\n"


def fake_train(folder, statuses):
    """A launcher of two processes that end with the given statuses, attempt by attempt."""
    script = folder / "fake.sh"
    script.write_text(f"""set -eu
source "$LAUNCH/hosts.sh"
_usage() {{ :; }}
_signal() {{ kill -"$1" "${{pids[@]}}" 2>/dev/null || true; }}
statuses_of=({" ".join(statuses)})
_start() {{
  local both=${{statuses_of[attempt]}}
  [ "$1" = 0 ] && both=${{both%,*}} || both=${{both#*,}}
  _background "$1" bash -c "echo started $1; [ $both = forever ] && exec sleep 600; exit $both"
}}
_read_options "$@"
_attempts 2
""")
    return script


@pytest.mark.parametrize(
    "statuses, options, status, message",
    [
        (["0,0"], [], 0, "attempt 0 ended with statuses 0 0"),
        (["75,137", "75,75", "0,0"], [], 0, "attempt 2 ended with statuses 0 0"),
        (["75,75", "2,75"], [], 2, "attempt 1 ended with statuses 2 75"),
        (["1,0"], [], 1, "statuses 1 0"),
        (["75,75"] * 3, ["--restarts=2"], 2, "error: not done after 2 restarts; see "),
        (["forever,75", "0,0"], ["--patience=1"], 0, "attempt 0 ended with statuses 137 75"),
    ],
)
def test_restarts(root, tmp_path, statuses, options, status, message):
    script = fake_train(tmp_path, statuses)
    done = subprocess.run(
        ["bash", str(script), *options, "--pause=0", f"--logs={tmp_path / 'logs'}", "--", "x"],
        env={**os.environ, "LAUNCH": str(root / "launch")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == status and message in done.stderr, done.stderr
    assert (tmp_path / "logs" / "attempt-0" / "1.log").read_text() == "started 1\n"


def test_asked_to_stop_between_two_attempts(root, tmp_path):
    """In the pause before a restart nothing runs that could be told: no further attempt begins."""
    script = f"""source {root}/launch/hosts.sh
_usage() {{ :; }}
_signal() {{ :; }}
_start() {{ _background "$1" bash -c "exit 75"; }}
_read_options --pause=2 --logs={tmp_path}/logs -- x
_attempts 1"""
    process = subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, text=True)
    while "ended with statuses 75" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    message = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "asked to stop" in message
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["attempt-0"]
