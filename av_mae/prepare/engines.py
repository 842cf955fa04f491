"""What writes the shards of a set: processes of this machine, or Apache Beam on any of its runners. The shards are the
same.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from av_mae.console import Progress
from av_mae.errors import ClipFailure, UserError
from av_mae.media.bounded import Worker
from av_mae.prepare import shards
from av_mae.prepare.clips import File, Job, Limits, Outcome, RecordOptions, make_record
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip
from av_mae.storage import Folder

AHEAD = 6  # clips per worker that are under way or wait for a slower one before them
POLL = 2.0  # seconds between looks at what is finished

WriteShards = Callable[[Job, Sequence[shards.Shard], Catalogue], None]


class FailureLimit:
    """Stops a preparation whose clips fail too often."""

    def __init__(self, job: Job):
        self._job, self._failures = job, 0
        self._most = 0 if job.on_error == "fail" else job.max_failures

    def count_finished(self, plan: Sequence[shards.Shard]) -> list[shards.Shard]:
        """Counts the failures of finished shards; returns the shards that are not finished."""
        unfinished = shards.unfinished(self._job.output, plan)
        left = {shard.summary for shard in unfinished}
        for _, summary in shards.Summaries(self._job.output, [shard for shard in plan if shard.summary not in left]):
            for cause, clip, stage, message, _ in summary["findings"]:
                self.add(clip, [(cause, stage, message)])
        return unfinished

    def add(self, clip: str, causes: Sequence[tuple[str, str, str]]) -> None:
        """Counts the failures among a clip's findings (cause, stage, message). Raises UserError beyond the limit."""
        for cause, stage, message in causes:
            if cause != "undecodable":
                continue
            self._failures += 1
            if self._most is not None and self._failures > self._most:
                limit = "--on_error=fail" if self._job.on_error == "fail" else f"--max_failures={self._most}"
                raise UserError(
                    f"{limit}: clip {clip}: {stage}: {message} ({self._failures} failed). Repair or remove "
                    "what fails and run the command again; it goes on at the finished shards"
                )


class Decoder:
    """One decoding process and what it decodes from. Not to be shared by threads."""

    def __init__(self, source: Folder, options: RecordOptions, limits: Limits):
        self._source, self._options, self._limits = source, options, limits
        self._worker = Worker(limits.memory)

    def __call__(self, clip: SourceClip) -> Outcome:
        """Never raises for what is wrong with the clip."""
        try:
            files = {name: self._file(name) for name in clip.files()}
            return self._worker.call(make_record, clip, files, self._options, time_limit=self._limits.seconds)
        except ClipFailure as failure:
            return Outcome(None, [("undecodable", failure.stage, failure.cause)], {})
        except OSError as error:
            return Outcome(None, [("undecodable", "read", f"{error.strerror or error}")], {})

    def _file(self, name: str) -> File:
        return self._source.path(name) if self._source.is_local else self._source.read(name)

    def close(self) -> None:
        self._worker.close()


class DecoderPool:
    """Several decoders, each in a thread of its own. A context manager."""

    def __init__(self, source: Folder, options: RecordOptions, limits: Limits, workers: int):
        self._arguments, self._workers = (source, options, limits), workers
        self._decoders: list[Decoder] = []
        self._local = threading.local()

    def __enter__(self) -> "DecoderPool":
        self._threads = concurrent.futures.ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:  # a call under way fails with its process
            decoder.close()
        self._threads.shutdown()

    def map(self, clips: Iterable[SourceClip]) -> Iterator[tuple[SourceClip, Outcome]]:
        """Each clip with its outcome, in order."""
        pending: collections.deque = collections.deque()
        for clip in clips:
            pending.append((clip, self._threads.submit(self._decode, clip)))
            if len(pending) >= AHEAD * self._workers:
                yield _first(pending)
        while pending:
            yield _first(pending)

    def _decode(self, clip: SourceClip) -> Outcome:
        if not hasattr(self._local, "decoder"):
            self._local.decoder = Decoder(*self._arguments)
            self._decoders.append(self._local.decoder)
        return self._local.decoder(clip)


def _first(pending: collections.deque) -> tuple[SourceClip, Outcome]:
    clip, outcome = pending.popleft()
    return clip, outcome.result()


def write_locally(job: Job, plan: Sequence[shards.Shard], catalogue: Catalogue) -> None:
    """Writes shards by `job.workers` decoding processes of this machine.

    Args:
        job: what to prepare.
        plan: all shards; those that are finished are not written again.
        catalogue: of the clips.

    Raises:
        UserError: where more clips fail than the job allows.
    """
    encode, limit = shards.encoder(catalogue.classes), FailureLimit(job)
    unfinished = limit.count_finished(plan)
    total, left = len(catalogue.clips), sum(len(shard.clips) for shard in unfinished)
    with (
        DecoderPool(job.source, job.record, job.limits, job.workers) as pool,
        Progress(total, f"prepare {job.dataset}", initial=total - left) as progress,
    ):
        outcomes = pool.map(clip for shard in unfinished for clip in shard.clips)

        def counted() -> Iterator:
            for clip, outcome in outcomes:
                limit.add(clip.id, outcome.findings)
                progress.update()
                yield clip, outcome

        stream = counted()
        for shard in unfinished:
            shards.write_shard(job.output, shard, itertools.islice(stream, len(shard.clips)), encode)


def beam_writer(runner: str, options: Sequence[str]) -> WriteShards:
    """An engine that writes shards on a Beam runner; `options` are Beam's own (--direct_num_workers=2, …)."""

    def write(job: Job, plan: Sequence[shards.Shard], catalogue: Catalogue) -> None:
        unfinished = FailureLimit(job).count_finished(plan)
        for shard in unfinished:  # a job's description must stay small; its workers read what is in a shard
            clips = [dataclasses.asdict(clip) for clip in shard.clips]
            job.output.write(_clips_file(shard), json.dumps(clips).encode())
        with _progress(job, plan, unfinished):
            _run_pipeline(
                runner, options, job, [dataclasses.replace(shard, clips=()) for shard in unfinished], catalogue.classes
            )
        FailureLimit(job).count_finished(plan)

    return write


def _run_pipeline(
    runner: str, options: Sequence[str], job: Job, unfinished: list[shards.Shard], classes: tuple[str, ...]
) -> None:
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam_runner needs Apache Beam: pip install 'av_mae[prepare]'") from error
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions([f"--runner={runner}", *options]))
    except ValueError as error:
        raise UserError(f"--beam_runner={runner}: {error}") from error
    with pipeline:
        _ = (
            pipeline
            | apache_beam.Create(unfinished)
            | apache_beam.Reshuffle()
            | apache_beam.Map(_write_shard, job, classes)
        )


def _write_shard(shard: shards.Shard, job: Job, classes: tuple[str, ...]) -> str:
    """Runs on a worker: decodes the clips of a shard, one after the other."""
    clips = [read_clip(values) for values in json.loads(job.output.read(_clips_file(shard)))]
    with contextlib.closing(Decoder(job.source, job.record, job.limits)) as decode:
        shards.write_shard(job.output, shard, ((clip, decode(clip)) for clip in clips), shards.encoder(classes))
    return shard.file


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
def _progress(job: Job, plan: Sequence[shards.Shard], unfinished: Sequence[shards.Shard]) -> Iterator[None]:
    """Shows how many shards are finished, wherever they are written."""
    ended, before = threading.Event(), len(plan) - len(unfinished)
    with Progress(len(plan), f"prepare {job.dataset}", unit="shards", initial=before) as progress:

        def count() -> None:
            progress.update(len(plan) - len(shards.unfinished(job.output, plan)) - progress.done)

        def look() -> None:
            while not ended.wait(POLL):
                count()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            count()
