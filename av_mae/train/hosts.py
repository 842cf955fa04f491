"""The processes of a run: how they join, and what stops them."""

import argparse
import contextlib
import ctypes
import dataclasses
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping

import jax

from av_mae.errors import RESTART, StoreError, UserError, WorkerKilled, check_numbers

USER_ERROR = 2
INTERRUPTED = 130
# Seconds for which a process with a user error lives on, so that others with the same error can tell theirs: the end
# of process 0 ends them all.
LAST_WORDS = 3.0
_JOINED, _VERDICT = 0, 1  # places in the memory that child and parent share; the verdict is a status + 1
_SET_DEATH_SIGNAL = 1  # prctl(PR_SET_PDEATHSIG)


class Stopped(SystemExit):
    """The run was asked to stop, and has saved its state, before its end."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclasses.dataclass(frozen=True)
class Join:
    """How this process joins a run. `coordinator` 'auto': JAX finds all three out. Timeouts in seconds.
    `stopped_status`: exit status of a run that was asked to stop."""

    coordinator: str
    process_id: int | None
    process_count: int | None
    start_timeout: int
    host_timeout: int
    stopped_status: int


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what several processes of one run need to find each other, and when they give each other up."""
    group = parser.add_argument_group(
        "several processes",
        "found out by itself under Slurm, on GKE TPU slices, and "
        "from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; auto: from TPU or Slurm")
    group.add_argument("--process_id", type=int, metavar="N", help="number of this process, from 0")
    group.add_argument("--process_count", type=int, metavar="N", help="processes of the run")
    group.add_argument(
        "--start_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the others at the start (default: 300)",
    )
    group.add_argument(
        "--host_timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help=f"a process that was silent for so long is dead; the others end with status {RESTART} (default: 100)",
    )
    group.add_argument(
        "--stopped_status",
        type=int,
        default=0,
        metavar="STATUS",
        help=f"exit status of a run that SIGTERM stopped before its end (default: 0; launchers: {RESTART})",
    )


def find_processes(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Join | None:
    """How this process joins others: by the options, else by the environment; None where it is alone.

    Raises:
      UserError: a coordinator without the two numbers, numbers without a coordinator, or a number out of bounds.
    """
    rest = arguments.start_timeout, arguments.host_timeout, arguments.stopped_status
    least = {"start_timeout": 1, "host_timeout": 1, "stopped_status": 0}
    check_numbers(arguments, least, {"start_timeout": 10**6, "host_timeout": 10**6, "stopped_status": 255})
    address, number, count = arguments.coordinator, arguments.process_id, arguments.process_count
    if (address, number, count) == (None, None, None):
        address, number, count = _from_environment(environment)
    if address == "auto":
        return Join(address, None, None, *rest)
    if address is None:
        if (number, count) != (None, None):
            raise UserError(
                f"process_id={number} and process_count={count} need a coordinator: give "
                "--coordinator=HOST:PORT of process 0"
            )
        return None
    if None in (number, count) or not 0 <= number < count:
        raise UserError(
            f"coordinator={address} needs 0 <= process_id < process_count, got process_id={number}, "
            f"process_count={count}: give both on every process"
        )
    port = address.rpartition(":")[2]
    if not (port.isdecimal() and port.isascii() and 0 < int(port[:6]) < 2**16):
        raise UserError(f"coordinator={address} must read HOST:PORT, e.g. 10.0.0.1:8476")
    return Join(address, number, count, *rest)


def _from_environment(environment: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    """Coordinator, process and number of processes as the environment tells them."""

    def whole(name: str, default: str = "") -> int:
        text = environment.get(name, default)
        if not (text.isdecimal() and text.isascii() and len(text) < 10):
            raise UserError(f"the environment's {name}={text} must be a whole number; unset it, or set it as it is due")
        return int(text)

    if environment.get("JAX_COORDINATOR_ADDRESS") and environment.get("JAX_NUM_PROCESSES"):
        number = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX", ""))
        return (
            environment["JAX_COORDINATOR_ADDRESS"],
            int(number) if number.isdecimal() else None,
            whole("JAX_NUM_PROCESSES"),
        )
    tasks = whole("SLURM_STEP_NUM_TASKS", "1")  # of an srun step, not of the batch script around it
    several = tasks > 1 or whole("MEGASCALE_NUM_SLICES", "1") > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return ("auto" if several else None), None, None


@contextlib.contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins this process with the others of the run, where there are any; what is inside happens in a child of it.

    Must come before anything touches a device.

    Raises:
      UserError: see `find_processes`; or the coordinator's port is taken.
    """
    join = find_processes(arguments)
    try:
        if join is None:
            yield
            return
        check_port(join)
        shared = mmap.mmap(-1, 2)
        _fork(join, shared)
        with _told(shared, join):
            initialize(join)
            shared[_JOINED] = 1
            yield
    except Stopped:
        raise SystemExit(arguments.stopped_status) from None


def check_port(join: Join) -> None:
    """Raises UserError where process 0 cannot listen: gRPC would share a port with another run without a word."""
    if join.process_id != 0:
        return
    port = int(join.coordinator.rpartition(":")[2])
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of coordinator={join.coordinator}: "
                f"{error.strerror}; choose another port, or end the run that uses it"
            ) from error


def initialize(join: Join) -> None:
    """Makes the processes one run for JAX. Where they do not meet in time JAX aborts this process."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known: tuple[str | None, int | None, int | None] = (None, None, None)
    if join.coordinator != "auto":
        known = join.coordinator, join.process_count, join.process_id
    jax.distributed.initialize(
        *known, initialization_timeout=join.start_timeout, heartbeat_timeout_seconds=join.host_timeout
    )


@contextlib.contextmanager
def _told(shared: mmap.mmap, join: Join) -> Iterator[None]:
    """Tells the parent how the child ends: JAX may abort it on its last metres, when another process ends."""
    try:
        yield
    except UserError as error:
        shared[_VERDICT] = USER_ERROR + 1
        print(f"error: {error}", file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS)
        os._exit(USER_ERROR)
    except KeyboardInterrupt:
        shared[_VERDICT] = INTERRUPTED + 1
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    except (WorkerKilled, StoreError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(RESTART)
    except Stopped:
        shared[_VERDICT] = join.stopped_status + 1
        raise
    except BaseException:  # another process died in the middle of a collective, most likely; all begin anew
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(RESTART)
    shared[_VERDICT] = 0 + 1


def _fork(join: Join, shared: mmap.mmap) -> None:
    """Returns in a child; the parent stays in here and ends with the child's status."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until the parent can hand it on
    parent, child = os.getpid(), os.fork()
    if child:
        _wait(child, join, shared)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # minutes, if written
    if sys.platform == "linux":  # a parent that is killed takes the child along
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(RESTART)


def _wait(child: int, join: Join, shared: mmap.mmap) -> None:
    """Hands SIGTERM on to the child, waits for its end, says what it could not say itself, and exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if shared[_VERDICT]:
        os._exit(shared[_VERDICT] - 1)
    if status == -signal.SIGTERM:  # asked to stop before there was anything to save
        os._exit(join.stopped_status)
    if status < 0:
        message = lost(status) if shared[_JOINED] else not_met(join)
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(RESTART if status < 0 else status)


def lost(status: int) -> str:
    """What to say of a child that a signal has ended, by its negative number."""
    if status == -signal.SIGABRT:
        return (
            f"another process of the run is gone (see above, and its log); this one ends with status {RESTART}, "
            "the same command on all goes on from the last checkpoint"
        )
    return (
        f"this process was killed by {signal.Signals(-status).name} (memory, most likely, where nobody asked for "
        f"it); status {RESTART}, the same command on all goes on from the last checkpoint"
    )


def not_met(join: Join) -> str:
    """What to say where the processes did not meet in time."""
    if join.coordinator == "auto":
        return (
            f"the processes did not all meet within --start_timeout={join.start_timeout} s at the coordinator "
            "that the environment names: see that all of them run, and see each one's log"
        )
    if join.process_id != 0 and not answers(join.coordinator):
        return (
            f"no coordinator answers at {join.coordinator} within --start_timeout={join.start_timeout} s: see "
            "that process 0 runs there, and that its port can be reached from here"
        )
    return (
        f"the {join.process_count} processes did not all meet at coordinator {join.coordinator} within "
        f"--start_timeout={join.start_timeout} s: see that all of them run with the same address and count"
    )


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3):
            return True
    except OSError:
        return False
