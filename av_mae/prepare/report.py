"""What a preparation tells of a set: report.json, the same as one HTML file without scripts or links (contact sheets,
histograms, findings by cause), and the README of the set.
"""

import base64
import bisect
import collections
import dataclasses
import html
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.errors import ClipFailure
from av_mae.prepare.clips import Job
from av_mae.prepare.readers import Reader
from av_mae.prepare.readers.catalogue import CAUSES, NEVER_STORED, SKIPPABLE, Catalogue, Finding
from av_mae.prepare.shards import Shard, Summaries
from av_mae.storage import Folder

FILE, PAGE_FILE, CARD_FILE = "report.json", "report.html", "README.md"
# Of what the histograms are, by the name of the clip's fact, and the lower edges of their bins.
HISTOGRAMS = {
    "seconds": (0, 0.5, 1, 2, 3, 4, 5, 7, 9, 11, 15, 30, 60, 300),
    "frames": (0, 1, 2, 3, 5, 7, 9, 11, 16, 31),
    "shorter_side": (0, 1, 64, 128, 192, 256, 257),
    "peak_db": (-100, -60, -50, -40, -30, -20, -10, -5, -1),
}


SHEET_CLIPS = 32  # per split
MOST_FINDINGS = 200  # per cause; report.json has them all
MOST_THUMBNAILS = 12  # per cause
THUMBNAIL = 128  # pixels
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{display:inline-block;margin:.2rem;width:8.6rem;
vertical-align:top}figcaption{font-size:11px;overflow-wrap:anywhere}img{max-width:100%}h2{margin-top:2rem}
svg text{font-size:10px}code{background:#f4f4f4}"""


def make(job: Job, catalogue: Catalogue, summaries: Summaries) -> dict[str, Any]:
    """The report, all of it a function of the input.

    Args:
        job: what was prepared.
        catalogue: of the clips.
        summaries: of all shards.

    Returns:
        `splits` (of each `clips`, `stored`, `bytes`, `seconds`), `classes` (name → stored clips), `causes` (of the
        catalogue's CAUSES → count), `histograms` (name → `edges`, `counts`) and `findings` (`cause`, `clip`, `stage`,
        `message`, `split`).
    """
    findings = sorted(
        _findings(catalogue, summaries),
        key=lambda finding: (list(CAUSES).index(finding.cause), finding.split, finding.clip, finding.message),
    )
    causes = collections.Counter(finding.cause for finding in findings)
    return {
        "dataset": job.dataset,
        "splits": _splits(summaries),
        "classes": _classes(catalogue, summaries),
        "causes": {cause: causes[cause] for cause in CAUSES},
        "histograms": _histograms(_stored(summaries)),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def skipped(made: Mapping[str, Any], skip: Sequence[str]) -> bytes:
    """The content of skipped.jsonl: a line for each clip or row that is not stored.

    Args:
        made: the report (see `make`).
        skip: causes that leave a clip out (see RecordOptions).
    """
    left_out = {*NEVER_STORED, *skip}
    failures = [
        ClipFailure(finding["clip"], finding["stage"], finding["message"])
        for finding in made["findings"]
        if finding["cause"] in left_out
    ]
    return "".join(f"{json.dumps(failure.to_json())}\n" for failure in failures).encode()


def _stored(summaries: Summaries) -> Iterator[Mapping[str, Any]]:
    for _, summary in summaries:
        yield from summary["clips"]


def _splits(summaries: Summaries) -> dict[str, dict[str, Any]]:
    splits: dict[str, dict[str, Any]] = {}
    for shard, summary in summaries:
        split = splits.setdefault(shard.split, {"clips": 0, "stored": 0, "bytes": 0, "seconds": 0.0})
        split["clips"] += len(shard.clips)
        split["stored"] += summary["stored"]
        split["bytes"] += summary["bytes"]
        split["seconds"] = round(split["seconds"] + sum(clip["seconds"] for clip in summary["clips"]), 3)
    return splits


def _classes(catalogue: Catalogue, summaries: Summaries) -> dict[str, int]:
    counts = collections.Counter(label for clip in _stored(summaries) for label in clip["labels"])
    return {name: counts[number] for number, name in enumerate(catalogue.classes)}


def _findings(catalogue: Catalogue, summaries: Summaries) -> Iterator[Finding]:
    yield from catalogue.findings
    first: dict[str, tuple[str, str]] = {}
    for shard, summary in summaries:
        for values in summary["findings"]:
            yield Finding(*values)
        for clip in summary["clips"]:
            if catalogue.classes and not clip["labels"]:
                yield Finding("no_label", clip["id"], "annotations", "the clip has no label", shard.split)
            twin = first.setdefault(clip["digest"], (clip["id"], shard.split))
            if twin[0] != clip["id"]:
                yield Finding(
                    "duplicate_content",
                    clip["id"],
                    "content",
                    f"the same frames and audio as {twin[0]} ({twin[1]})",
                    shard.split,
                )


def _histograms(clips: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    counts = {name: [0] * len(edges) for name, edges in HISTOGRAMS.items()}
    for clip in clips:
        for name, edges in HISTOGRAMS.items():
            value = min(clip["size"]) if name == "shorter_side" else clip[name]
            counts[name][bisect.bisect(edges, value) - 1] += 1
    return {name: {"edges": list(edges), "counts": counts[name]} for name, edges in HISTOGRAMS.items()}


class Thumbnail(NamedTuple):
    """A stored clip's middle frame: JPEG bytes, empty where it has none."""

    clip: str
    split: str
    caption: str
    jpeg: bytes


def thumbnails(output: Folder, summaries: Summaries, made: Mapping[str, Any]) -> dict[str, Thumbnail]:
    """Thumbnails of the first stored clips of each split, and of clips with findings, by 'split/id'."""
    wanted: dict[tuple[str, str], str] = {}
    for finding in made["findings"]:
        key = (finding["split"], finding["clip"])
        if sum(cause == finding["cause"] for cause in wanted.values()) < MOST_THUMBNAILS:
            wanted[key] = finding["cause"]
    classes = list(made["classes"])
    found: dict[str, Thumbnail] = {}
    taken: dict[str, int] = {}
    for shard, summary in summaries:
        chosen = [
            (index, clip)
            for index, clip in enumerate(summary["clips"])
            if (shard.split, clip["id"]) in wanted or index < SHEET_CLIPS - taken.get(shard.split, 0)
        ]
        taken[shard.split] = taken.get(shard.split, 0) + len(summary["clips"])
        for (_, clip), content in zip(chosen, _records(output, shard, [index for index, _ in chosen])):
            labels = ", ".join(classes[label] for label in clip["labels"])
            found[f"{shard.split}/{clip['id']}"] = Thumbnail(clip["id"], shard.split, labels, _jpeg(content))
    return found


def _records(output: Folder, shard: Shard, indices: list[int]) -> list[bytes]:
    """The records of a shard with these indices."""
    if not indices:
        return []
    if output.is_local:
        return ArrayRecordReader(output.path(shard.file), "readahead_buffer_size:0").read(indices)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, shard.file)
        with open(copy, "wb") as file:
            file.write(output.read(shard.file))
        return ArrayRecordReader(copy, "readahead_buffer_size:0").read(indices)


def _jpeg(record: bytes) -> bytes:
    frames = tf_example_pb2.Example.FromString(record).features.feature["frames"].bytes_list.value
    if not frames:
        return b""
    image = Image.open(io.BytesIO(frames[len(frames) // 2]))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return file.getvalue()


def page(made: Mapping[str, Any], shown: Mapping[str, Thumbnail]) -> bytes:
    """The report `made` (see `make`) as HTML, with thumbnails by 'split/id'."""
    parts = [
        f"<h1>{html.escape(made['dataset'])}</h1>",
        _splits_html(made),
        "<h2>Sizes</h2>",
        *(_histogram(name, **histogram) for name, histogram in made["histograms"].items()),
        "<h2>Findings</h2>",
        *_findings_html(made, shown),
    ]
    for split in made["splits"]:
        own = [thumbnail for thumbnail in shown.values() if thumbnail.split == split][:SHEET_CLIPS]
        parts += [f"<h2>Clips of {html.escape(split)}</h2>", *map(_figure, own)]
    if made["classes"]:
        parts += ["<h2>Classes</h2>", _table(("class", "stored clips"), made["classes"].items())]
    title = f"{made['dataset']}: report"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    ).encode(errors="backslashreplace")


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, (int, float))
        return f"<td{' class=n' if number else ''}>{value if number else html.escape(str(value))}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>{''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)}</table>"


def _splits_html(made: Mapping[str, Any]) -> str:
    return _table(
        ("split", "clips found", "stored", "hours", "MB"),
        [
            (name, split["clips"], split["stored"], round(split["seconds"] / 3600, 3), round(split["bytes"] / 1e6, 1))
            for name, split in made["splits"].items()
        ],
    )


def _histogram(name: str, edges: list[float], counts: list[int]) -> str:
    """Bars of the counts with the lower edge of each bin below."""
    most, bars = max(1, *counts), []
    for number, (edge, count) in enumerate(zip(edges, counts)):
        left, height = 44 * number, round(80 * count / most, 1)
        bars.append(
            f"<rect x='{left}' y='{95 - height}' width='38' height='{height}' fill='#4a7'/>"
            f"<text x='{left}' y='108'>≥{edge:g}</text><text x='{left}' y='{92 - height}'>"
            f"{count or ''}</text>"
        )
    return (
        f"<p><b>{html.escape(name)}</b><br><svg width='{44 * len(edges)}' height='114' role='img' "
        f"aria-label='histogram of {html.escape(name)}'>{''.join(bars)}</svg></p>"
    )


def _figure(thumbnail: Thumbnail) -> str:
    data = base64.b64encode(thumbnail.jpeg).decode()
    shown = f"<img alt='' src='data:image/jpeg;base64,{data}'>" if data else "(no frame)"
    caption = f"{html.escape(thumbnail.clip)}<br>{html.escape(thumbnail.caption)}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _findings_html(made: Mapping[str, Any], shown: Mapping[str, Thumbnail]) -> Iterator[str]:
    yield _table(
        ("cause", "clips", "meaning", "stored"),
        [
            (
                cause,
                made["causes"][cause],
                meaning,
                "no" if cause in NEVER_STORED else "yes, unless --skip names it" if cause in SKIPPABLE else "yes",
            )
            for cause, meaning in CAUSES.items()
        ],
    )
    for cause in CAUSES:
        own = [finding for finding in made["findings"] if finding["cause"] == cause]
        if not own:
            continue
        yield f"<h3>{cause} ({len(own)})</h3>"
        keys = [f"{finding['split']}/{finding['clip']}" for finding in own]
        yield "".join(_figure(shown[key]) for key in keys[:MOST_THUMBNAILS] if key in shown)
        yield _table(
            ("clip", "split", "stage", "what"),
            [
                (finding["clip"], finding["split"], finding["stage"], finding["message"])
                for finding in own[:MOST_FINDINGS]
            ],
        )
        if len(own) > MOST_FINDINGS:
            yield f"<p>{len(own) - MOST_FINDINGS} more in report.json</p>"


def card(job: Job, reader: Reader, catalogue: Catalogue, made: dict[str, Any]) -> bytes:
    """The README of a set in Markdown: what the set holds, under which licence, and how it was made."""
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
    lines = [
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
        f"and with square pixels), the whole audio (FLAC, mono, {record.rate} Hz), labels, id, duration, source and "
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
        "`report.html` and `report.json` name each clip, `skipped.jsonl` those that are not stored.",
        "",
    ]
    return "\n".join(lines).encode(errors="backslashreplace")
