"""The same shards by Apache Beam: a pipeline whose elements are shards, on any of its runners."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from av_mae.datasets.catalogue import Catalogue, SourceClip
from av_mae.errors import UserError
from av_mae.preparation import shards
from av_mae.preparation.workers import Decoder
from av_mae.progress import Progress

if TYPE_CHECKING:
    from av_mae.preparation.run import Job, WriteShards

POLL = 2.0  # seconds between looks at what is finished


def writer(runner: str, options: Sequence[str]) -> "WriteShards":
    """A function that writes shards on a Beam runner; `options` are Beam's own (--direct_num_workers=2, …)."""
    def write(job: "Job", plan: Sequence[shards.Shard], catalogue: Catalogue) -> None:
        from av_mae.preparation.run import FailureLimit

        unfinished = FailureLimit(job).count_finished(plan)
        for shard in unfinished:  # a job's description must stay small; its workers read what is in a shard
            clips = [dataclasses.asdict(clip) for clip in shard.clips]
            job.output.write(_clips_file(shard), json.dumps(clips).encode())
        with _progress(job, plan, unfinished):
            _run_pipeline(runner, options, job, [dataclasses.replace(shard, clips=()) for shard in unfinished],
                          catalogue.classes)
        FailureLimit(job).count_finished(plan)

    return write


def _run_pipeline(runner: str, options: Sequence[str], job: "Job", unfinished: list[shards.Shard],
                  classes: tuple[str, ...]) -> None:
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
        _ = (pipeline | apache_beam.Create(unfinished) | apache_beam.Reshuffle()
             | apache_beam.Map(_write_shard, job, classes))


def _write_shard(shard: shards.Shard, job: "Job", classes: tuple[str, ...]) -> str:
    """Runs on a worker: decodes the clips of a shard, one after the other."""
    from av_mae.preparation import tfds_files

    clips = [read_clip(values) for values in json.loads(job.output.read(_clips_file(shard)))]
    with contextlib.closing(Decoder(job.source, job.record, job.limits)) as decode:
        shards.write_shard(job.output, shard, ((clip, decode(clip)) for clip in clips), tfds_files.encoder(classes))
    return shard.file


def _clips_file(shard: shards.Shard) -> str:
    return shard.summary.replace(".json", ".clips.json")


def read_clip(values: dict[str, Any]) -> SourceClip:
    """A clip from what dataclasses.asdict made of it and JSON kept."""
    other = values["mixed_with"]
    return SourceClip(**{name: _tuples(value) for name, value in values.items() if name != "mixed_with"},
                      mixed_with=None if other is None else read_clip(other))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def _progress(job: "Job", plan: Sequence[shards.Shard], unfinished: Sequence[shards.Shard]) -> Iterator[None]:
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
