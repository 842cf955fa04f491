"""Prepares a set: reads the catalogue, has the shards written, describes what was made."""

import collections
import dataclasses
import json
import os
import sys
from typing import Any

from av_mae.data.records import VERSION
from av_mae.errors import UserError
from av_mae.prepare import report, shards
from av_mae.prepare.clips import Job
from av_mae.prepare.engines import WriteShards, write_locally
from av_mae.prepare.readers import READERS, Reader
from av_mae.prepare.readers.catalogue import Catalogue, checked
from av_mae.storage import Folder
from av_mae.workdir import SKIPPED

SETTINGS_FILE = "prepare.json"
RECIPE = 3  # counts changes of what records are made of


def prepare(job: Job, write_shards: WriteShards = write_locally) -> dict[str, Any]:
    """Prepares a set. A set that is complete is left as it is.

    Args:
        job: what to prepare.
        write_shards: an engine (see engines.py).

    Returns:
        The report (see report.make).

    Raises:
        UserError: where the source cannot be read, the output holds something else, or too many clips fail.
    """
    if job.source.is_local and not os.path.isdir(job.source.url):
        raise UserError(f"--source={job.source} is no folder")
    if job.output.is_local and os.path.isfile(job.output.url):
        raise UserError(f"--output={job.output} is a file; name a folder that is new or empty")
    print(f"reading the annotations and the list of files of {job.source}", file=sys.stderr)
    reader = READERS[job.dataset]
    catalogue = checked(reader.read(job.source, **({"table": job.table} if job.table else {})), job.splits)
    settings = _settings(job, catalogue)
    complete = _check_output(job.output, settings)
    plan = shards.plan(job.dataset, catalogue.clips, job.seed, job.shard_clips)
    if complete:
        shards.clean_up(job.output, plan, everything=True)
        return _read_json(job.output, report.FILE)
    job.output.write(SETTINGS_FILE, _json(settings))
    shards.clean_up(job.output, plan, everything=False)
    write_shards(job, plan, catalogue)
    return _finish(job, reader, catalogue, shards.Summaries(job.output, plan))


def _settings(job: Job, catalogue: Catalogue) -> dict[str, Any]:
    """What the bytes of the set depend on."""
    return {
        "dataset": job.dataset,
        "version": VERSION,
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


def _read_json(output: Folder, name: str) -> dict[str, Any]:
    """A file of an earlier run. Raises UserError where it is damaged."""
    try:
        value = json.loads(output.read(name).decode())
    except (ValueError, FileNotFoundError) as error:
        value = error
    if not isinstance(value, dict):
        raise UserError(f"the set in {output} is damaged ({name}): delete the folder and prepare the set again")
    return value


def _check_output(output: Folder, settings: dict[str, Any]) -> bool:
    """Whether `output` holds the whole set. Raises UserError where it holds anything but this set or a part of it."""
    if not output.exists(SETTINGS_FILE):
        if output.files():
            raise UserError(f"--output={output} holds other files; name a folder that is new or empty")
        return False
    stored = _read_json(output, SETTINGS_FILE)
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
    return output.exists(shards.DESCRIPTION)


def _finish(job: Job, reader: Reader, catalogue: Catalogue, summaries: shards.Summaries) -> dict[str, Any]:
    """Writes report, card and description from the summaries of all shards, the description last."""
    print(f"writing the report and the description of {len(summaries.plan)} shards", file=sys.stderr)
    made = report.make(job, catalogue, summaries)
    lengths: dict[str, list[int]] = collections.defaultdict(list)
    labels: dict[str, list[list[int]]] = collections.defaultdict(list)
    for shard, summary in summaries:
        lengths[shard.split].append(summary["stored"])
        labels[shard.split] += [clip["labels"] for clip in summary["clips"]]
    splits = {
        split: shards.Split(tuple(own), made["splits"][split]["bytes"], tuple(labels[split]))
        for split, own in lengths.items()
    }
    files = {
        report.FILE: _json(made),
        report.PAGE_FILE: report.page(made, report.thumbnails(job.output, summaries, made)),
        SKIPPED: report.skipped(made, job.record.skip),
        report.CARD_FILE: report.card(job, reader, catalogue, made),
        **shards.description_files(job.dataset, reader.description, catalogue.classes, splits),
    }
    for name, content in files.items():
        job.output.write(name, content)
    shards.clean_up(job.output, summaries.plan, everything=True)
    return made
