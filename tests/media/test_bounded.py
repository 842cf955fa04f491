"""Calls in a process of their own: what comes back, and that nothing outlives its time."""

import ctypes
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from av_mae.errors import ClipFailure, UserError
from av_mae.media import bounded


@pytest.fixture
def worker():
    worker = bounded.Worker()
    yield worker
    worker.close()


def is_alive(pid: int) -> bool:
    """False also for a process that has ended and that nobody has asked about yet."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_process_serves_call_after_call(worker):
    pid = worker.call(os.getpid, time_limit=5)
    assert pid != os.getpid() and worker.call(os.getpid, time_limit=5) == pid
    picture = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
    np.testing.assert_array_equal(worker.call(np.flip, picture, time_limit=5), picture[::-1, ::-1, ::-1])
    worker.close()
    assert not is_alive(pid)


def test_what_never_ends_is_killed_and_the_next_call_works(worker):
    """The loop is in C and keeps the interpreter's lock: no thread, signal handler or exception can stop it."""
    pid, began = worker.call(os.getpid, time_limit=5), time.monotonic()
    with pytest.raises(ClipFailure, match="^decode: stopped after time_limit=0.5 s$"):
        worker.call(sum, itertools.repeat(0), time_limit=0.5)
    assert time.monotonic() - began < 2 and not is_alive(pid)
    assert worker.call(os.getpid, time_limit=5) != pid


def test_what_decoders_print_goes_nowhere(worker, capfd):
    assert worker.call(os.write, 2, b"[mov] noise\n" * 9999, time_limit=5) == 12 * 9999
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (int, ("x",), "decode: ValueError invalid literal for int"),
        (ctypes.string_at, (0,), "decode: the decoder crashed (SIGSEGV)"),
        (os._exit, (3,), "decode: the decoder crashed (exit status 3)"),
        (bytearray, (8 << 30,), "decode: MemoryError"),
    ],
)
def test_failures_come_back_as_one_line(worker, function, arguments, message):
    with pytest.raises(ClipFailure) as failure:
        worker.call(function, *arguments, time_limit=20)
    assert str(failure.value).startswith(message) and "\n" not in str(failure.value)
    assert worker.call(abs, -3, time_limit=5) == 3


@pytest.mark.parametrize("kills", [1, 2])
def test_a_process_killed_from_outside_is_started_again_once(worker, kills):
    def kill() -> None:
        while not done.wait(0.05):
            process = worker._process  # none between the end of one and the start of the next
            if process and process.pid not in killed and len(killed) < kills:
                time.sleep(0.2)
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    worker.call(abs, 1, time_limit=5)
    killed, done = [], threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        if kills == 1:
            assert worker.call(time.sleep, 3, time_limit=9) is None
        else:
            with pytest.raises(ClipFailure, match=r"^decode: the decoder crashed \(SIGKILL\)$"):
                worker.call(time.sleep, 3, time_limit=9)
    finally:
        done.set()
        thread.join()
    assert len(set(killed)) == kills


def test_a_late_answer_does_not_meet_the_next_call(worker, monkeypatch):
    worker.call(abs, 1, time_limit=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(worker._connection), "poll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        worker.call(abs, -1, time_limit=5)
    assert worker.call(abs, -2, time_limit=5) == 2


def test_a_process_that_cannot_start_says_why(worker, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no libraries here >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match="^the decoding process does not start: no libraries here$"):
        worker.call(abs, 1, time_limit=5)


SCRIPT = """
import itertools, os, sys, threading
from av_mae.media import bounded

idle, busy = bounded.Worker(), bounded.Worker()
print(idle.call(os.getpid, time_limit=5), busy.call(os.getpid, time_limit=5), flush=True)
busy.call(sum, itertools.repeat(0), time_limit=1)
"""


def test_nothing_outlives_a_parent_that_is_killed(root):
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=root, stdout=subprocess.PIPE, text=True)
    idle, busy = map(int, parent.stdout.readline().split())
    time.sleep(0.3)  # busy has its endless call
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while (is_alive(idle) or is_alive(busy)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(idle) and not is_alive(busy)
