"""What a preparation found: counts, histograms and a table of findings, as JSON and as a page."""

import bisect
import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from av_mae.datasets.catalogue import CAUSES, Catalogue, Finding
from av_mae.preparation.shards import Summaries

if TYPE_CHECKING:
    from av_mae.preparation.run import Job

FILE = "report.json"
# Of what the histograms are, by the name of the clip's fact, and the lower edges of their bins.
HISTOGRAMS = {"seconds": (0, 0.5, 1, 2, 3, 4, 5, 7, 9, 11, 15, 30, 60, 300),
              "frames": (0, 1, 2, 3, 5, 7, 9, 11, 16, 31),
              "shorter_side": (0, 1, 64, 128, 192, 256, 257),
              "peak_db": (-100, -60, -50, -40, -30, -20, -10, -5, -1)}


def make(job: "Job", catalogue: Catalogue, summaries: Summaries) -> dict[str, Any]:
    """The report: `splits` (of each `clips`, `stored`, `bytes`, `seconds`), `classes` (name → stored clips), `causes`
    (of the catalogue's CAUSES → count), `histograms` (name → `edges`, `counts`) and `findings` (`cause`, `clip`,
    `stage`, `message`, `split`), all of it a function of the input."""
    findings = sorted(_findings(catalogue, summaries), key=lambda finding: (
        list(CAUSES).index(finding.cause), finding.split, finding.clip, finding.message))
    causes = collections.Counter(finding.cause for finding in findings)
    return {"dataset": job.dataset, "splits": _splits(summaries), "classes": _classes(catalogue, summaries),
            "causes": {cause: causes[cause] for cause in CAUSES},
            "histograms": _histograms(_stored(summaries)),
            "findings": [dataclasses.asdict(finding) for finding in findings]}


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
                yield Finding("duplicate_content", clip["id"], "content",
                              f"the same frames and sound as {twin[0]} ({twin[1]})", shard.split)


def _histograms(clips: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    made = {name: {"edges": list(edges), "counts": [0] * len(edges)} for name, edges in HISTOGRAMS.items()}
    for clip in clips:
        for name, edges in HISTOGRAMS.items():
            value = min(clip["size"]) if name == "shorter_side" else clip[name]
            made[name]["counts"][bisect.bisect(edges, value) - 1] += 1
    return made
