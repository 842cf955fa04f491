"""Decoding in processes that are stopped when a clip takes too long; results come in the order of the clips."""

import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterable, Iterator

from av_mae.data.bounded import Worker
from av_mae.data.failures import ClipFailure
from av_mae.datasets.catalogue import SourceClip
from av_mae.preparation.decode import File, Outcome, RecordOptions, make_record
from av_mae.storage import Folder

AHEAD = 6  # clips per worker that are under way or wait for a slower one before them


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one clip may take. seconds: of time; memory: bytes."""

    seconds: float = 60.0
    memory: int = 4 << 30


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
            stage, _, cause = str(failure).partition(": ")
            return Outcome(None, [("undecodable", stage, cause or stage)], {})
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
