"""The README of a prepared set: what it holds, under which licence, and how it was made."""

import collections
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from av_mae.console import Progress
from av_mae.errors import UserError
from av_mae.prepare import readers as datasets
from av_mae.prepare import report, shards
from av_mae.prepare.clips import RecordOptions
from av_mae.prepare.engines import DecoderPool, Limits
from av_mae.prepare.readers import Reader
from av_mae.prepare.readers.catalogue import CAUSES, Catalogue, checked
from av_mae.storage import Folder

SETTINGS_FILE = "prepare.json"
RECIPE = 1  # counts changes of what records are made of


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a preparation is asked for. table: of labels, for `folder`. splits: only these (none: all).

    on_error 'fail' stops at the first clip that cannot be decoded; max_failures is how many there may be (None: any).
    """

    dataset: str
    source: Folder
    output: Folder
    table: str | None = None
    splits: tuple[str, ...] = ()
    seed: int = 0
    shard_clips: int = 1000
    record: RecordOptions = RecordOptions()
    limits: Limits = Limits()
    workers: int = 1
    on_error: str = "skip"
    max_failures: int | None = None


WriteShards = Callable[[Job, Sequence[shards.Shard], Catalogue], None]


def prepare(job: Job, write_shards: WriteShards | None = None) -> dict[str, Any]:
    """Prepares a set and returns its report (see report.py). A set that is complete is left as it is.

    `write_shards` writes shards, on this machine's processes (None) or elsewhere (see beam.py). Raises UserError.
    """
    if job.source.is_local and not os.path.isdir(job.source.url):
        raise UserError(f"--source={job.source} is no folder")
    if job.output.is_local and os.path.isfile(job.output.url):
        raise UserError(f"--output={job.output} is a file; name a folder that is new or empty")
    print(f"reading the annotations and the list of files of {job.source}", file=sys.stderr)
    options = {"table": job.table} if job.table else {}
    reader = datasets.reader(job.dataset, **options)
    catalogue = checked(reader.read(job.source), job.splits)
    settings = _settings(job, catalogue)
    complete = _check_output(job.output, settings)
    plan = shards.plan(job.dataset, catalogue.clips, job.seed, job.shard_clips)
    if complete:
        shards.clean_up(job.output, plan, everything=True)
        return json.loads(job.output.read(report.FILE))
    job.output.write(SETTINGS_FILE, _json(settings))
    shards.clean_up(job.output, plan, everything=False)
    (write_shards or _write_locally)(job, plan, catalogue)
    return _finish(job, reader, catalogue, plan)


def _settings(job: Job, catalogue: Catalogue) -> dict[str, Any]:
    """What the bytes of the set depend on."""
    from av_mae.data import records  # takes a second to import

    return {
        "dataset": job.dataset,
        "version": records.VERSION,
        "splits": sorted(job.splits),
        "seed": job.seed,
        "shard_clips": job.shard_clips,
        "recipe": RECIPE,
        **dataclasses.asdict(job.record),
        "skip": sorted(job.record.skip),
        "clips": len(catalogue.clips),
        "catalogue": shards.digest(catalogue.classes, catalogue.clips),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_output(output: Folder, settings: dict[str, Any]) -> bool:
    """Whether `output` holds the whole set. Raises UserError where it holds anything but this set or a part of it."""
    from av_mae.prepare.tfds_files import DESCRIPTION

    if not output.exists(SETTINGS_FILE):
        if output.files():
            raise UserError(f"--output={output} holds other files; name a folder that is new or empty")
        return False
    stored = json.loads(output.read(SETTINGS_FILE))
    settings = json.loads(_json(settings))
    different = [name for name in settings if stored.get(name) != settings[name]]
    if different == ["catalogue"]:
        raise UserError(
            f"--output={output} was begun when the files or annotations of --source were others; delete "
            "it, or name another folder"
        )
    if different:
        asked = ", ".join(
            f"{name}={stored.get(name)} (asked: {settings[name]})" for name in different if name != "catalogue"
        )
        raise UserError(f"--output={output} holds a set with {asked}; name another folder or delete this one")
    return output.exists(DESCRIPTION)


class FailureLimit:
    """Stops a preparation whose clips fail too often."""

    def __init__(self, job: Job):
        self._job, self._failures = job, 0
        self._most = 0 if job.on_error == "fail" else job.max_failures

    def count_finished(self, plan: Sequence[shards.Shard]) -> list[shards.Shard]:
        """Counts what finished shards tell, and returns those that are not finished."""
        unfinished = shards.unfinished(self._job.output, plan)
        left = {shard.summary for shard in unfinished}
        for _, summary in shards.Summaries(self._job.output, [shard for shard in plan if shard.summary not in left]):
            for cause, clip, stage, message, _ in summary["findings"]:
                self.add(clip, [(cause, stage, message)])
        return unfinished

    def add(self, clip: str, causes: Sequence[tuple[str, str, str]]) -> None:
        """Counts what went wrong with a clip. Raises UserError beyond the limit."""
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


def _write_locally(job: Job, plan: Sequence[shards.Shard], catalogue: Catalogue) -> None:
    from av_mae.prepare import tfds_files  # takes a second to import

    encode, limit = tfds_files.encoder(catalogue.classes), FailureLimit(job)
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


def _finish(job: Job, reader: datasets.Reader, catalogue: Catalogue, plan: Sequence[shards.Shard]) -> dict[str, Any]:
    """Writes report, card and description from the summaries of all shards, the description last."""
    from av_mae.prepare import report as report_page
    from av_mae.prepare import tfds_files

    print(f"writing the report and the description of {len(plan)} shards", file=sys.stderr)
    summaries = shards.Summaries(job.output, plan)
    made = report.make(job, catalogue, summaries)
    lengths, labels = collections.defaultdict(list), collections.defaultdict(list)
    for shard, summary in summaries:
        lengths[shard.split].append(summary["stored"])
        labels[shard.split] += [clip["labels"] for clip in summary["clips"]]
    splits = {
        split: tfds_files.Split(tuple(own), made["splits"][split]["bytes"], tuple(labels[split]))
        for split, own in lengths.items()
    }
    pictures = report_page.thumbnails(job.output, summaries, made)
    files = {
        report.FILE: _json(made),
        report_page.PAGE_FILE: report_page.page(made, pictures),
        FILE: text(job, reader, catalogue, made).encode(errors="backslashreplace"),
        **tfds_files.description_files(job.dataset, reader.description, catalogue.classes, splits),
    }
    tfds_files.write_description(job.output, files)
    shards.clean_up(job.output, plan, everything=True)
    return made


if TYPE_CHECKING:
    pass

FILE = "README.md"


def text(job: "Job", reader: Reader, catalogue: Catalogue, made: dict[str, Any]) -> str:
    """The card as Markdown."""
    record = job.record
    frames = (
        f"{record.frames} frames, evenly spaced" if record.frames else f"a frame every {1 / record.frame_rate:.3g} s"
    )
    rows = [
        f"| {name} | {split['clips']} | {split['stored']} | {split['seconds'] / 3600:.2f} | "
        f"{split['bytes'] / 1e6:.1f} |"
        for name, split in made["splits"].items()
    ]
    found = [f"- {count} × {cause}: {CAUSES[cause]}" for cause, count in made["causes"].items() if count]
    left_out = f" Clips with {', '.join(record.skip)} were left out." if record.skip else ""
    return "\n".join(
        [
            f"# {job.dataset}",
            "",
            reader.description,
            "",
            "| split | clips found | stored | hours | MB |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{len(catalogue.classes)} classes.",
            "",
            "## Licence",
            "",
            reader.licence,
            "",
            "## How it was made",
            "",
            f"By `python -m av_mae.prepare --dataset={job.dataset}`, seed {job.seed}, {job.shard_clips} clips a shard, in "
            "the order of hashes of seed and id.",
            f"A record holds {frames} (JPEG, quality {record.quality}, shorter side at most {record.size} pixels, turned "
            f"and with square pixels), the whole sound (FLAC, mono, {record.rate} Hz), labels, id, duration, source and "
            f"the time in it, and what is annotated.{left_out}",
            "",
            "```python",
            "import tensorflow_datasets as tfds",
            f'source = tfds.builder_from_directory("THIS FOLDER").as_data_source(split="{next(iter(made["splits"]))}")',
            "```",
            "",
            "## What was found",
            "",
            *(found or ["Nothing odd."]),
            "",
            "`report.html` and `report.json` name each clip.",
            "",
        ]
    )
