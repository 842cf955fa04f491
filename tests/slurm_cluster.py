"""A real Slurm on this machine, for tests: munged, slurmctld and two slurmd on the loopback interface."""

import os
import pathlib
import shutil
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONF = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=60
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName={host}2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes={host},{host}2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that are not installed (Debian: slurm-wlm and munge)."""
    places = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if not shutil.which(name, path=places)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Two nodes of two CPUs each; `stop()` ends all that was started."""

    def __init__(self, folder: pathlib.Path):
        self.folder, host = folder, socket.gethostname().partition(".")[0]
        for name in ("state", f"spool.{host}", f"spool.{host}2", "munge"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller, first, second = free_ports(3)
        self.user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            CONF.format(host=host, folder=folder, controller=controller, first=first, second=second, user=self.user)
        )
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = {"SLURM_CONF": str(self.conf), "PATH": path}
        munged = ["munged", "--foreground", "--force", "--num-threads=2"]
        munged += [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        daemons = [
            [*munged, f"--socket={folder}/munge/socket"],
            ["slurmctld", "-D", "-c", "-f", str(self.conf)],
            ["slurmd", "-D", "-f", str(self.conf), "-N", host],
            ["slurmd", "-D", "-f", str(self.conf), "-N", f"{host}2"],
        ]
        self._daemons = []
        for number, command in enumerate(daemons):
            with (folder / f"daemon-{number}.log").open("w") as log:
                self._daemons.append(
                    subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=log, stderr=log)
                )
            if number == 0:
                self._wait(lambda: (folder / "munge" / "socket").exists())
        self._wait(lambda: self.tell("sinfo", "--noheader", "--format=%T %D").strip() == "idle 2")

    def _wait(self, ready, within: float = 60) -> None:
        until = time.monotonic() + within
        while not ready():
            if time.monotonic() > until:
                said = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"Slurm does not start: {said}")
            time.sleep(0.2)

    def tell(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, Reason."""
        words = self.tell("scontrol", "show", "job", number).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def wait_for(self, number: str, states: set[str], within: float = 300) -> dict[str, str]:
        """The job once it is in one of these states."""
        until = time.monotonic() + within
        while (job := self.job(number)).get("JobState") not in states:
            if time.monotonic() > until:
                raise AssertionError(f"job {number} is still {job.get('JobState')}: {job}")
            time.sleep(0.3)
        return job

    def hurry(self, number: str) -> None:
        """Lets a job that was queued again start soon: Slurm would wait for two minutes."""
        self.wait_for(number, {"PENDING"}, within=120)
        time.sleep(2.5)  # nodes know by the second whether a start is older than the end before it, and refuse it
        self.tell("scontrol", "update", f"JobId={number}", "StartTime=now")

    def stop(self) -> None:
        self.tell("scancel", "--user", self.user, "--signal=KILL", "--full")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
