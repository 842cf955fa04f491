"""Clusters that write the shards of a set: Ray, Dask and Spark; beam.py has Apache Beam.

All of them are a `Run`, which maps one function over shards; what is to be written, how far it is, what failed and when
to stop is the same for each (`cluster_writer`). A worker that is lost costs nothing but time: the cluster calls the
function again, and a shard is there whole or not at all. The shards are those that engines.write_locally writes.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from av_mae.console import Progress
from av_mae.errors import StoreError, UserError, WorkerKilled
from av_mae.prepare import shards
from av_mae.prepare.clips import Job, Outcome
from av_mae.prepare.engines import Decoder, FailureLimit, WriteShards
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip
from av_mae.storage import Folder

POLL = 2.0  # seconds between looks at what is finished
PROBE = 10.0  # seconds for an address to accept a connection
PATIENCE = 45.0  # seconds for a cluster to answer and to have a worker
STOP = f"{shards.UNFINISHED}/stop"  # once it is there, workers begin no other shard

AWAY = "store: "  # before what is not the user's to mend

Write = Callable[[shards.Shard], str]  # what a worker runs; it returns what the user must mend, '' where nothing
Run = Callable[[Write, list[shards.Shard]], Generator[str, None, None]]  # what `Write` returned, or nothing


def cluster_writer(run: Run) -> WriteShards:
    """An engine that writes shards on a cluster."""

    def write(job: Job, plan: Sequence[shards.Shard], catalogue: Catalogue) -> None:
        limit = FailureLimit(job)
        unfinished = limit.count_finished(plan)
        for shard in unfinished:  # a task's description must stay small; its worker reads what is in a shard
            clips = [dataclasses.asdict(clip) for clip in shard.clips]
            job.output.write(_clips_file(shard), json.dumps(clips).encode())
        there = dataclasses.replace(job, source=_absolute(job.source), output=_absolute(job.output))
        parts = [dataclasses.replace(shard, clips=()) for shard in unfinished]
        work = functools.partial(_write_shard, job=there, classes=catalogue.classes)
        with _watched(job, plan, unfinished, limit), _importable():
            if parts:
                with contextlib.closing(run(work, parts)) as results:
                    for wrong in filter(None, results):
                        raise failure(wrong)

    return write


def failure(wrong: str) -> Exception:
    """What the text of a worker is raised as."""
    return StoreError(wrong.removeprefix(AWAY)) if wrong.startswith(AWAY) else UserError(wrong)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """What engines raise where a worker has no av_mae is the user's to mend."""
    try:
        yield
    except Exception as error:
        if re.search("No module named 'av_mae|different environments", str(error)):
            raise UserError(
                "the workers cannot import av_mae: install it there, in the version that is here"
            ) from error
        raise


def _absolute(folder: Folder) -> Folder:
    """A folder of this machine by its whole path: workers run elsewhere."""
    return Folder(os.path.abspath(folder.url)) if folder.is_local else folder


def _write_shard(shard: shards.Shard, job: Job, classes: tuple[str, ...]) -> str:
    """Runs on a worker: decodes the clips of a shard, one after the other. Returns what the user must mend, or ''."""
    host = socket.gethostname()
    try:
        for name in ("source", "output"):
            folder = getattr(job, name)
            if folder.is_local and not os.path.isdir(folder.url):
                return f"--{name}={folder} is not there on the worker {host}: name a folder that all workers share"
        if job.output.exists(STOP):
            return ""
        clips = [read_clip(values) for values in json.loads(job.output.read(_clips_file(shard)))]
        with contextlib.closing(Decoder(job.source, job.record, job.limits)) as decode:
            shards.write_shard(job.output, shard, _outcomes(clips, decode, job), shards.encoder(classes))
    except (UserError, OSError) as error:
        return f"{AWAY if isinstance(error, StoreError) else ''}worker {host}: {shard.file}: {error}"
    return ""


def _outcomes(clips: Iterable[SourceClip], decode: Decoder, job: Job) -> Iterator[tuple[SourceClip, Outcome]]:
    """Each clip with its outcome. Raises UserError where too many fail in this shard alone: it is not written."""
    limit = FailureLimit(job)
    for clip in clips:
        outcome = decode(clip)
        limit.add(clip.id, outcome.findings)
        yield clip, outcome


def _clips_file(shard: shards.Shard) -> str:
    return shard.summary.replace(".json", ".clips.json")


def read_clip(values: dict[str, Any]) -> SourceClip:
    """A clip from what dataclasses.asdict made of it and JSON kept."""
    other = values["mixed_with"]
    return SourceClip(
        **{name: _tuples(value) for name, value in values.items() if name != "mixed_with"},
        mixed_with=None if other is None else read_clip(other),
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _watched(
    job: Job, plan: Sequence[shards.Shard], unfinished: Sequence[shards.Shard], limit: FailureLimit
) -> Iterator[None]:
    """Shows how many shards are finished, wherever they are written, and stops the workers at the failure limit.

    Raises:
        UserError: at the end, where more clips failed than the job allows.
    """
    ended, refused, before = threading.Event(), list[Exception](), len(plan) - len(unfinished)
    with Progress(len(plan), f"prepare {job.dataset}", unit="shards", initial=before) as progress:

        def count() -> None:
            progress.update(len(plan) - len(limit.count_finished(plan)) - progress.done)

        def look() -> None:
            while not refused and not ended.wait(POLL):
                try:
                    count()
                except Exception as error:
                    refused.append(error)
                    job.output.write(STOP, b"")

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if refused:
            raise refused[0]
        count()


def reach(option: str, address: str, speaks: bool = False) -> None:
    """Connects to the HOST:PORT in an address; of several, with commas between, one is enough.

    Args:
        option: that has the address, for the message.
        address: one without HOST:PORT passes.
        speaks: servers of this kind speak first; one that is silent is something else, or hangs.

    Raises:
        UserError: nothing answers there.
    """
    causes = []
    for host, port in re.findall(r"(?:^|[/,@])([\w.-]+|\[[0-9a-fA-F:]+\]):(\d+)(?=$|[/,])", address):
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE) as connection:
                if not speaks or connection.recv(1):
                    return
            causes.append(f"{host}:{port}: connection closed")
        except TimeoutError:
            causes.append(f"{host}:{port}: silent for {PROBE:g} s")
        except (OSError, OverflowError) as error:
            causes.append(f"{host}:{port}: {getattr(error, 'strerror', None) or error}")
    if causes:
        raise UserError(f"{option}={address}: no cluster answers ({'; '.join(causes)})")


def package(name: str, extra: str, option: str) -> Any:
    """A package that few have. Raises UserError, with what to install, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{option} needs {name}: pip install 'av_mae[{extra}]' ({error})") from error


def _join(engine: str, address: str | None, start: Callable[[], Any]) -> Any:
    """What `start` returns: a cluster joined, or started where there is no address.

    Raises:
        UserError: something went wrong, or PATIENCE is over: engines themselves try for minutes or for ever.
    """
    ended: list[Any] = []

    def begin() -> None:
        try:
            ended.append(start())
        except Exception as error:
            ended.append(error)

    if address:
        thread = threading.Thread(target=begin, daemon=True)
        thread.start()
        thread.join(PATIENCE)
    else:  # in this thread: what Ray starts ends with the thread that started it
        begin()
    result = ended[0] if ended else TimeoutError(f"nothing came of it within {PATIENCE:g} s")
    if isinstance(result, Exception):
        said = " ".join(str(result).split()) or type(result).__name__
        where = f" --address={address}" if address else ""
        raise UserError(f"--engine={engine}{where}: no cluster: {said[:500]}") from result
    return result


def _lost(engine: str, error: Exception) -> WorkerKilled:
    said = " ".join(str(error).split())
    return WorkerKilled(
        f"--engine={engine}: the cluster is lost, or workers died over the same shard again and again, mostly for lack "
        f"of memory: {said[:300]}; the same command goes on at the finished shards"
    )


def ray_cluster(address: str | None, workers: int) -> Run:
    """Ray: the cluster at `address` (auto, HOST:PORT, ray://HOST:PORT), or one of this machine."""
    ray = package("ray", "ray", "--engine=ray")
    reach("--address", address or "", speaks=True)

    def run(write: Write, parts: list[shards.Shard]) -> Generator[str, None, None]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that this starts
        own: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 2**27}
        start = functools.partial(ray.init, address or "local", logging_level="ERROR", **({} if address else own))
        _join("ray", address, start)
        try:
            task = ray.remote(lambda shard: write(shard))  # a lost worker's tasks run up to three times more
            left = [task.remote(shard) for shard in parts]
            while left:
                (done,), left = ray.wait(left)
                yield ray.get(done)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise _lost("ray", error) from error
        finally:
            ray.shutdown()

    return run


def dask_cluster(address: str | None, workers: int) -> Run:
    """Dask: the scheduler at `address` (tcp://HOST:PORT), or one of this machine with `workers` processes."""
    distributed = package("distributed", "dask", "--engine=dask")
    reach("--address", address or "", speaks=(address or "").startswith("tcp://"))

    def start() -> tuple[Any, Any]:
        own = {"n_workers": workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
        cluster = contextlib.nullcontext(address) if address else distributed.LocalCluster(**own)
        client = distributed.Client(address or cluster, timeout=PATIENCE / 2)
        client.wait_for_workers(1, timeout=PATIENCE / 2)
        return cluster, client

    def run(write: Write, parts: list[shards.Shard]) -> Generator[str, None, None]:
        cluster, client = _join("dask", address, start)
        with cluster, client:
            try:
                for future in distributed.as_completed(client.map(write, parts, pure=False)):
                    yield future.result()
            except (distributed.KilledWorker, distributed.client.FutureCancelledError, OSError) as error:
                raise _lost("dask", error) from error

    return run


def spark_cluster(address: str | None, workers: int) -> Run:
    """Spark: the master at `address` (spark://HOST:PORT, yarn, …), that of spark-submit, or this machine."""
    pyspark = package("pyspark", "spark", "--engine=spark")
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise UserError("--engine=spark needs Java 17 or newer (on Debian: apt install default-jre-headless)")
    if not re.match(r"(spark|k8s)://|yarn$|local|$", address or ""):
        raise UserError(f"--address={address} of --engine=spark must be spark://HOST:PORT, k8s://HOST:PORT or yarn")
    reach("--address", address or "")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    master = address or (None if submitted else f"local[{workers},4]")  # four tries of a task, as on clusters

    def run(write: Write, parts: list[shards.Shard]) -> Generator[str, None, None]:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        settings = {"spark.ui.showConsoleProgress": "false"}
        if master and master.startswith("local"):
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
            settings["spark.ui.enabled"] = "false"
        conf = pyspark.SparkConf().setAppName("av_mae.prepare").setAll(list(settings.items()))
        conf = conf.setMaster(master) if master else conf
        context = _join("spark", address, lambda: pyspark.SparkContext(conf=conf))
        try:
            yield from context.parallelize(parts, len(parts)).map(write).collect()
        except Exception as error:
            if re.search("ExecutorLostFailure|exited unexpectedly|EOFException", str(error)):
                raise _lost("spark", error) from error
            if re.search("SparkContext (has been shutdown|was shut down)|stopped SparkContext", str(error)):
                raise UserError(
                    f"--engine=spark: the cluster at {master or 'the master'} gave up, see above"
                ) from error
            raise
        finally:
            context.stop()

    return run


CLUSTERS: dict[str, Callable[[str | None, int], Run]] = {
    "ray": ray_cluster,
    "dask": dask_cluster,
    "spark": spark_cluster,
}
