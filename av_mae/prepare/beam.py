"""Shards of a set by Apache Beam, on any of its runners."""

import argparse
import contextlib
import difflib
import re
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from av_mae.errors import UserError, WorkerKilled
from av_mae.prepare import clusters, shards


def beam_cluster(runner: str, options: Sequence[str], own: Iterable[str] = ()) -> clusters.Run:
    """A runner of Apache Beam.

    Args:
        runner: its name.
        options: Beam's own (--direct_num_workers=2, …).
        own: names of the options of the command, of which a misspelt one may be meant.
    """
    beam = clusters.package("apache_beam", "prepare", "--beam_runner")
    try:
        beam.runners.create_runner(runner)  # imports the module that holds its options, too
    except (ValueError, ImportError, AttributeError) as error:
        hint = "; Dask, Ray and Spark are --engine=dask, ray, spark" if "." not in runner else ""
        raise UserError(f"--beam_runner={runner}: {error}{hint}") from error
    _check_beam_options(beam.options.pipeline_options.PipelineOptions, options, own)

    def run(write: clusters.Write, parts: list[shards.Shard]) -> Generator[str, None, None]:
        made = beam.options.pipeline_options.PipelineOptions([f"--runner={runner}", *options])
        try:
            with _no_waiting_for_lost_workers(runner), beam.Pipeline(options=made) as pipeline:
                _ = pipeline | beam.Create(parts) | beam.Reshuffle() | beam.Map(_or_raise, write)
        except Exception as error:
            told = re.search(r"UserError: (.*?)(?: \[while running.*)?$", str(error), re.M)
            if told:
                raise clusters.failure(told[1]) from error
            if type(error).__name__ == "FutureTimeoutError":  # of gRPC
                raise UserError(f"--beam_runner={runner}: its endpoint does not answer") from error
            raise
        yield from ()

    return run


@contextlib.contextmanager
def _no_waiting_for_lost_workers(runner: str) -> Iterator[None]:
    """Ends Beam's waiting where a process of DirectRunner is killed: a thread dies of it, and the others wait for ever.

    Raises:
        WorkerKilled: in place of waiting.
    """
    lost, left, usual = list[str](), threading.Event(), threading.excepthook

    def hook(dead: Any) -> None:
        if "Worker subprocess exited" not in str(dead.exc_value):
            usual(dead)
            return
        lost.append(str(dead.exc_value))
        while not left.is_set():  # several places wait, one after the other
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            left.wait(2)

    threading.excepthook = hook
    # A script that starts the command in the background (`&`, nohup) has it ignore SIGINT.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BaseException:
        if not lost:
            raise
    finally:
        left.set()
        signal.signal(signal.SIGINT, interrupt)
        threading.excepthook = usual
    if lost:
        raise WorkerKilled(f"--beam_runner={runner}: {lost[0]}; the same command goes on at the finished shards")


def _or_raise(shard: shards.Shard, write: clusters.Write) -> None:
    wrong = write(shard)
    if wrong:
        raise UserError(f"UserError: {wrong}")


def _check_beam_options(kind: Any, options: Sequence[str], own: Iterable[str]) -> None:
    """Raises UserError for options that no runner of Beam knows, which Beam would pass over, and dead endpoints."""
    parsers: list[argparse.ArgumentParser] = []
    kind([]).get_all_options(add_extra_args_fn=parsers.append)
    parsers[0].exit_on_error = False
    try:
        known, unknown = parsers[0].parse_known_args(list(options))
    except argparse.ArgumentError as error:
        raise UserError(f"Apache Beam: {error}") from error
    if unknown:
        names = [*own, *parsers[0]._option_string_actions]
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        nearest = difflib.get_close_matches(wrong.partition("=")[0], names, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{wrong} is an option neither of this command nor of Apache Beam{hint}")
    for name, value in vars(known).items():
        if isinstance(value, str) and re.search("endpoint|master|address", name):
            clusters.reach(f"--{name}", value, speaks="endpoint" in name)  # those of gRPC
