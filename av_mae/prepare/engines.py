"""What writes the shards of a set on this machine: decoding processes, each in a thread, and how failures are counted.

clusters.py writes the same shards on many machines.
"""

import collections
import concurrent.futures
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from av_mae.console import Progress
from av_mae.errors import ClipFailure, StoreError, UserError
from av_mae.media.bounded import Worker
from av_mae.prepare import shards
from av_mae.prepare.clips import File, Job, Limits, Outcome, RecordOptions, make_record
from av_mae.prepare.readers.catalogue import Catalogue, SourceClip
from av_mae.storage import Folder

AHEAD = 6  # clips per worker that are under way or wait for a slower one before them

WriteShards = Callable[[Job, Sequence[shards.Shard], Catalogue], None]


class FailureLimit:
    """Stops a preparation whose clips fail too often."""

    def __init__(self, job: Job):
        self._job, self._failures = job, 0
        self._counted: set[str] = set()  # summaries
        self._most = 0 if job.on_error == "fail" else job.max_failures

    def count_finished(self, plan: Sequence[shards.Shard]) -> list[shards.Shard]:
        """Counts the failures of shards finished since the last call; returns the shards that are not finished."""
        unfinished = shards.unfinished(self._job.output, plan)
        seen = self._counted | {shard.summary for shard in unfinished}
        fresh = [shard for shard in plan if shard.summary not in seen]
        self._counted |= {shard.summary for shard in fresh}
        for _, summary in shards.Summaries(self._job.output, fresh):
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
        """Never raises for what is wrong with the clip; StoreError where the source is away."""
        try:
            files = {name: self._file(name) for name in clip.files()}
            return self._worker.call(make_record, clip, files, self._options, time_limit=self._limits.seconds)
        except ClipFailure as failure:
            self._check_source()
            return Outcome(None, [("undecodable", failure.stage, failure.cause)], {})
        except OSError as error:
            if isinstance(error, StoreError) and not isinstance(error.__cause__, PermissionError):
                raise  # the clip may be fine
            self._check_source()
            return Outcome(None, [("undecodable", "read", f"{error.strerror or error}")], {})

    def _check_source(self) -> None:
        """Raises StoreError where the source's folder is gone, or its mount: a clip that cannot be read may be fine."""
        if self._source.is_local:
            try:
                with os.scandir(self._source.url):
                    pass
            except OSError as error:
                raise StoreError(
                    f"--source={self._source} can no longer be read ({error.strerror}): see to its disk or mount; the "
                    "same command goes on at the finished shards"
                ) from error

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
