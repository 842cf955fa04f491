"""The report as one HTML file without scripts or links: contact sheets, histograms, findings by cause."""

import base64
import bisect
import collections
import dataclasses
import html
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from av_mae.prepare.readers.catalogue import CAUSES, NEVER_STORED, SKIPPABLE, Catalogue, Finding
from av_mae.prepare.shards import Shard, Summaries
from av_mae.storage import Folder

if TYPE_CHECKING:
    from av_mae.prepare.run import Job

FILE = "report.json"
# Of what the histograms are, by the name of the clip's fact, and the lower edges of their bins.
HISTOGRAMS = {
    "seconds": (0, 0.5, 1, 2, 3, 4, 5, 7, 9, 11, 15, 30, 60, 300),
    "frames": (0, 1, 2, 3, 5, 7, 9, 11, 16, 31),
    "shorter_side": (0, 1, 64, 128, 192, 256, 257),
    "peak_db": (-100, -60, -50, -40, -30, -20, -10, -5, -1),
}


def make(job: "Job", catalogue: Catalogue, summaries: Summaries) -> dict[str, Any]:
    """The report: `splits` (of each `clips`, `stored`, `bytes`, `seconds`), `classes` (name → stored clips), `causes`
    (of the catalogue's CAUSES → count), `histograms` (name → `edges`, `counts`) and `findings` (`cause`, `clip`,
    `stage`, `message`, `split`), all of it a function of the input."""
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
                    f"the same frames and sound as {twin[0]} ({twin[1]})",
                    shard.split,
                )


def _histograms(clips: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    made = {name: {"edges": list(edges), "counts": [0] * len(edges)} for name, edges in HISTOGRAMS.items()}
    for clip in clips:
        for name, edges in HISTOGRAMS.items():
            value = min(clip["size"]) if name == "shorter_side" else clip[name]
            made[name]["counts"][bisect.bisect(edges, value) - 1] += 1
    return made


PAGE_FILE = "report.html"
SHEET_CLIPS = 32  # per split
MOST_FINDINGS = 200  # per cause; report.json has them all
MOST_PICTURES = 12  # per cause
THUMBNAIL = 128  # pixels
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{display:inline-block;margin:.2rem;width:8.6rem;
vertical-align:top}figcaption{font-size:11px;overflow-wrap:anywhere}img{max-width:100%}h2{margin-top:2rem}
svg text{font-size:10px}code{background:#f4f4f4}"""


class Thumbnail(NamedTuple):
    """A stored clip's middle frame: JPEG bytes, empty where it has none."""

    clip: str
    split: str
    caption: str
    jpeg: bytes


def thumbnails(output: Folder, summaries: Summaries, made: Mapping[str, Any]) -> dict[str, Thumbnail]:
    """Pictures of the first stored clips of each split, and of clips with findings, by 'split/id'."""
    wanted = {}
    for finding in made["findings"]:
        key = (finding["split"], finding["clip"])
        if sum(cause == finding["cause"] for cause in wanted.values()) < MOST_PICTURES:
            wanted[key] = finding["cause"]
    classes = list(made["classes"])
    pictures: dict[str, Thumbnail] = {}
    taken: dict[str, int] = {}
    for shard, summary in summaries:
        places = [
            (place, clip)
            for place, clip in enumerate(summary["clips"])
            if (shard.split, clip["id"]) in wanted or place < SHEET_CLIPS - taken.get(shard.split, 0)
        ]
        taken[shard.split] = taken.get(shard.split, 0) + len(summary["clips"])
        for (_, clip), content in zip(places, _stored_records(output, shard, [place for place, _ in places])):
            labels = ", ".join(classes[label] for label in clip["labels"])
            pictures[f"{shard.split}/{clip['id']}"] = Thumbnail(clip["id"], shard.split, labels, _jpeg(content))
    return pictures


def _stored_records(output: Folder, shard: Shard, places: list[int]) -> list[bytes]:
    """Records of a shard by place."""
    if not places:
        return []
    from array_record.python.array_record_module import ArrayRecordReader

    if output.is_local:
        return ArrayRecordReader(output.path(shard.file), "readahead_buffer_size:0").read(places)
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, shard.file)
        with open(copy, "wb") as file:
            file.write(output.read(shard.file))
        return ArrayRecordReader(copy, "readahead_buffer_size:0").read(places)


def _jpeg(record: bytes) -> bytes:
    frames = tf_example_pb2.Example.FromString(record).features.feature["frames"].bytes_list.value
    if not frames:
        return b""
    picture = Image.open(io.BytesIO(frames[len(frames) // 2]))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=75)
    return file.getvalue()


def page(made: Mapping[str, Any], pictures: Mapping[str, Thumbnail]) -> bytes:
    """The report `made` (see report.make) as HTML."""
    parts = [
        f"<h1>{html.escape(made['dataset'])}</h1>",
        _splits_html(made),
        "<h2>Sizes</h2>",
        *(_histogram(name, **histogram) for name, histogram in made["histograms"].items()),
        "<h2>Findings</h2>",
        *_findings_html(made, pictures),
    ]
    for split in made["splits"]:
        shown = [picture for picture in pictures.values() if picture.split == split][:SHEET_CLIPS]
        parts += [f"<h2>Clips of {html.escape(split)}</h2>", *map(_figure, shown)]
    if made["classes"]:
        parts += ["<h2>Classes</h2>", _table(("class", "stored clips"), made["classes"].items())]
    title = f"{made['dataset']}: report"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    ).encode(errors="backslashreplace")


def _table(header, rows) -> str:
    def cell(value) -> str:
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
    for place, (edge, count) in enumerate(zip(edges, counts)):
        height = round(80 * count / most, 1)
        bars.append(
            f"<rect x='{44 * place}' y='{95 - height}' width='38' height='{height}' fill='#4a7'/>"
            f"<text x='{44 * place}' y='108'>≥{edge:g}</text><text x='{44 * place}' y='{92 - height}'>"
            f"{count or ''}</text>"
        )
    return (
        f"<p><b>{html.escape(name)}</b><br><svg width='{44 * len(edges)}' height='114' role='img' "
        f"aria-label='histogram of {html.escape(name)}'>{''.join(bars)}</svg></p>"
    )


def _figure(picture: Thumbnail) -> str:
    data = base64.b64encode(picture.jpeg).decode()
    shown = f"<img alt='' src='data:image/jpeg;base64,{data}'>" if data else "(no picture)"
    caption = f"{html.escape(picture.clip)}<br>{html.escape(picture.caption)}"
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _findings_html(made: Mapping[str, Any], pictures: Mapping[str, Thumbnail]):
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
        yield "".join(_figure(pictures[key]) for key in keys[:MOST_PICTURES] if key in pictures)
        yield _table(
            ("clip", "split", "stage", "what"),
            [
                (finding["clip"], finding["split"], finding["stage"], finding["message"])
                for finding in own[:MOST_FINDINGS]
            ],
        )
        if len(own) > MOST_FINDINGS:
            yield f"<p>{len(own) - MOST_FINDINGS} more in report.json</p>"
