"""The README of a prepared set: what it holds, under which licence, and how it was made."""

from typing import TYPE_CHECKING, Any

from av_mae.datasets import Reader
from av_mae.datasets.catalogue import CAUSES, Catalogue

if TYPE_CHECKING:
    from av_mae.preparation.run import Job

FILE = "README.md"


def text(job: "Job", reader: Reader, catalogue: Catalogue, made: dict[str, Any]) -> str:
    """The card as Markdown."""
    record = job.record
    frames = f"{record.frames} frames, evenly spaced" if record.frames else f"a frame every {1 / record.frame_rate:.3g} s"
    rows = [f"| {name} | {split['clips']} | {split['stored']} | {split['seconds'] / 3600:.2f} | "
            f"{split['bytes'] / 1e6:.1f} |" for name, split in made["splits"].items()]
    found = [f"- {count} × {cause}: {CAUSES[cause]}" for cause, count in made["causes"].items() if count]
    left_out = f" Clips with {', '.join(record.skip)} were left out." if record.skip else ""
    return "\n".join([
        f"# {job.dataset}", "", reader.description, "",
        "| split | clips found | stored | hours | MB |", "|---|---|---|---|---|", *rows, "",
        f"{len(catalogue.classes)} classes.", "", "## Licence", "", reader.licence, "",
        "## How it was made", "",
        f"By `python -m av_mae.prepare --dataset={job.dataset}`, seed {job.seed}, {job.shard_clips} clips a shard, in "
        "the order of hashes of seed and id.",
        f"A record holds {frames} (JPEG, quality {record.quality}, shorter side at most {record.size} pixels, turned "
        f"and with square pixels), the whole sound (FLAC, mono, {record.rate} Hz), labels, id, duration, source and "
        f"the time in it, and what is annotated.{left_out}", "",
        "```python", "import tensorflow_datasets as tfds",
        'source = tfds.builder_from_directory("THIS FOLDER").as_data_source(split="'
        f'{next(iter(made["splits"]))}")', "```", "",
        "## What was found", "", *(found or ["Nothing odd."]), "",
        "`report.html` and `report.json` name each clip.", ""])
