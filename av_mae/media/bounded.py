"""Calls in a process of their own, with a limit of time and memory.

A damaged file can make a decoder loop for ever or crash, and no thread can stop it. One process serves call after
call, since starting it takes about 0.3 s; one that exceeds its time is killed, and the next call starts another. It is
neither forked (JAX has threads) nor a `multiprocessing` process (which would run the user's main module again).
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

from av_mae.errors import ClipFailure, UserError

MEMORY_LIMIT = 4 << 30  # bytes of address space
START_LIMIT = 120.0  # seconds, for imports from a slow disk
_ORPHAN_GRACE = 2.0  # seconds beyond the limit after which a process whose parent is gone ends by itself
_CODE = "import {module}; from av_mae.media import bounded; bounded.serve({descriptor}, {memory_limit})"


class _Killed(ClipFailure):
    """The process was killed from outside."""


class Worker:
    """A process that runs functions; started by the first call. Not to be shared by threads.

    After a fork the new process finds that this is no child of its own, and starts another.
    """

    def __init__(self, memory_limit: int = MEMORY_LIMIT):
        self._memory_limit = memory_limit
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, time_limit: float) -> Any:
        """`function(*arguments)`; the function is one of a module, and all that travels can be pickled.

        A process that is killed from outside meanwhile is started again, once.

        Raises ClipFailure with what the function raised, or when it takes more than `time_limit` seconds, needs more
        memory than allowed, or takes its process down.
        """
        try:
            return self._call(function, arguments, time_limit)
        except _Killed:
            return self._call(function, arguments, time_limit)

    def _call(self, function: Callable[..., Any], arguments: tuple, time_limit: float) -> Any:
        try:
            if self._process is None or self._process.poll() is not None:
                self._start(function.__module__)
            self._connection.send((function, arguments, time_limit))
            if not self._connection.poll(time_limit):
                raise ClipFailure("", "decode", f"stopped after time_limit={time_limit:g} s")
            result, failure = self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        except BaseException:  # whatever it is, an interrupt too: a late answer must not meet the next call
            self.close()
            raise
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        """Ends the process; a later call starts another."""
        if self._process is not None:
            self._process = None
            self._end()

    def _start(self, module: str) -> None:
        self.close()
        self._connection, theirs = multiprocessing.Pipe()
        code = _CODE.format(module=module, descriptor=theirs.fileno(), memory_limit=self._memory_limit)
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        try:
            if not self._connection.poll(START_LIMIT):
                raise UserError(f"the decoding process has not started within {START_LIMIT:g} s")
            self._connection.recv()
        except EOFError:
            _, said = self._process.communicate()
            death = self._death()
            if isinstance(death, _Killed):
                raise death from None
            lines = said.decode(errors="replace").strip().splitlines()
            raise UserError(f"the decoding process does not start: {lines[-1] if lines else death.cause}") from None
        if self._process.stderr:
            self._process.stderr.close()

    def _death(self) -> ClipFailure:
        status = self._process.wait() if self._process else 0
        cause = f"the decoder crashed ({signal.Signals(-status).name if status < 0 else f'exit status {status}'})"
        return (_Killed if -status in (signal.SIGKILL, signal.SIGTERM) else ClipFailure)("", "decode", cause)


def _end(process: subprocess.Popen[bytes], connection: multiprocessing.connection.Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve(descriptor: int, memory_limit: int) -> None:
    """Runs in the process: answers calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    connection = multiprocessing.connection.Connection(descriptor)
    connection.send("ready")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # decoders chat
    while True:
        try:
            function, arguments, time_limit = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, time_limit + _ORPHAN_GRACE)  # kills, wherever the process is
        answer = _answer(function, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


def _answer(function: Callable[..., Any], arguments: tuple) -> tuple[Any, ClipFailure | None]:
    try:
        return function(*arguments), None
    except ClipFailure as failure:
        return None, failure
    except Exception as error:
        return None, ClipFailure("", "decode", f"{type(error).__name__} {error}".strip())
