"""Shows what a prepared set holds (counts, sizes, classes and histograms in the terminal, clips on a contact sheet),
and which clips any command skipped and why: of a prepared set, a work directory or an export."""

import argparse
import collections
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from av_mae.config import SoundConfig
from av_mae.console import Progress
from av_mae.data import audio, frames, records
from av_mae.data.copies import LOCAL, copy_set, folder_of
from av_mae.data.loading import ClipSource
from av_mae.errors import LASTING_STORES, ClipFailure, UserError, check_numbers, one_line, run_command, stage
from av_mae.workdir import SKIPPED, collected, named, read_skipped

SHEET, REPORT = "contact_sheet.png", "report.json"
EXAMPLE = "example: python -m av_mae.inspect runs/toy_band --clips=8 --sheet=toy_band.png"
# Lower edges of the bins of each histogram.
EDGES = {
    "seconds": (0, 0.5, 1, 2, 3, 4, 5, 7, 9, 11, 15, 30, 60, 300),
    "frames": (0, 1, 2, 3, 5, 7, 9, 11, 16, 31),
    "labels": (0, 1, 2, 3, 4, 6, 8, 11),
    "shorter side (pixels)": (0, 1, 64, 128, 192, 256, 257, 512),
    "kB": (0, 10, 30, 100, 200, 300, 500, 1000, 3000),
}
URLS = {"argument": LASTING_STORES}  # options that take those of stores
BAR = 40  # characters of the longest bar
CLASSES = 12  # named with their counts: the most and the least frequent
SOUND, LONGEST = SoundConfig(mels=96), 10.0  # of spectrograms, and their seconds at most
SHEET_FRAMES, SHEET_SIZE = 3, (144, 192)
CAUSES, EXAMPLES = 30, 2  # of skipped clips: causes in the table, and clips named for each
OUTPUTS = (SKIPPED, "config.json", "metrics.jsonl", "results.json", "export.json", "index.json")  # of other commands


def facts(record: Mapping[str, Any]) -> dict[str, float]:
    """What the histograms are of, for one record. Raises ClipFailure where its frames are none."""
    with stage("frame"):
        sides = [min(frames.frame_size(frame)) for frame in record["frames"][:1]]
    images = sum(map(len, (*record["frames"], *record["masks"])))
    return {
        "seconds": float(record["duration"]),
        "frames": len(record["frames"]),
        "labels": len(record["labels"]),
        "shorter side (pixels)": sides[0] if sides else 0,
        "kB": (images + len(record["sound"]) + sum(map(len, record["sources"]))) / 1000,
    }


def bars(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Lines with a bar for each count."""
    width, longest = max(map(len, names), default=0), max(counts, default=0)
    return [
        f"    {name:>{width}} {count:>9,} {'█' * -(-BAR * count // max(1, longest))}".rstrip()
        for name, count in zip(names, counts, strict=True)
    ]


def histogram(values: Iterable[float], edges: Sequence[float]) -> list[str]:
    """Lines with a bar for each bin from the first to the last that holds something."""
    counts = np.bincount(np.searchsorted(edges, list(values), side="right") - 1, minlength=len(edges))
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    bins = range(filled[0], filled[-1] + 1)
    names = [f"{edges[b]:g} …" if b + 1 == len(edges) else f"{edges[b]:g} … {edges[b + 1]:g}" for b in bins]
    return bars(names, counts[bins.start : bins.stop].tolist())


def class_lines(classes: Sequence[str], labels: records.Labels) -> list[str]:
    """How often the classes occur."""
    counts = np.bincount(labels.values, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    shown = order if len(order) <= CLASSES else np.concatenate([order[: CLASSES // 2], order[-(CLASSES // 2) :]])
    lines = bars([classes[number] for number in shown], counts[shown].tolist())
    if len(order) > len(shown):
        lines.insert(CLASSES // 2, f"    … {len(order) - len(shown)} more classes …")
    empty, unknown = int(np.sum(counts == 0)), int(np.sum(labels.counts == 0))
    return [f"  classes: {len(classes)}, of which {empty} have no clip; {unknown} clips have no class", *lines]


def split_lines(path: str, split: str, clips: int, seed: int) -> list[str]:
    """What one split holds; histograms are of a random sample of `clips` of its clips."""
    known = records.describe(path)
    size = known.splits[split]
    shards = f"{len(size.shards):,} shard{'s' * (len(size.shards) != 1)}"
    lines = ["", f"{split}: {size.clips:,} clips in {shards}, {size.bytes / 1e9:.3f} GB"]
    if not size.clips:
        return lines
    source = ClipSource(path, records.open_source(path, split))
    numbers = sample(len(source), clips, seed)
    found: dict[str, list[float]] = collections.defaultdict(list)
    failures: list[ClipFailure] = []
    labels: dict[int, tuple[str, list[int]]] = {}
    with Progress(len(numbers), f"reading {split}") as progress:
        for number in numbers:
            record = source[number]
            _add_facts(record, found, failures)
            if "failure" not in record:
                labels[number] = (record["id"], list(record["labels"]))
            progress.update()
    stored = records.read_labels(path, split)
    lines += class_lines(known.classes, stored) + mixed_lines(labels, stored)
    whole = "" if len(numbers) == len(source) else f", of {len(numbers):,} random clips"
    for name, edges in EDGES.items():
        lines += [f"  {name}{whole}:", *histogram(found[name], edges)]
    if failures:
        lines += [
            f"  {len(failures)} of {len(numbers)} clips cannot be read:",
            *(f"    {one_line(str(failure))}" for failure in failures[:5]),
        ]
    return lines


def mixed_lines(clips: Mapping[int, tuple[str, list[int]]], stored: records.Labels) -> list[str]:
    """A line where a split's files are not of one set: an id is there twice, or labels are not those of their file.

    Args:
        clips: id and labels of records by their number.
        stored: what the file of labels says.
    """
    ends = np.cumsum(stored.counts)
    twice = len(clips) - len({name for name, _ in clips.values()})
    other = sum(
        labels != stored.values[ends[number] - stored.counts[number] : ends[number]].tolist()
        for number, (_, labels) in clips.items()
    )
    if not twice and not other:
        return []
    return [
        f"  {twice} clips have the id of another, {other} not the labels that their file says: shards of other sets "
        "are among those of this one, prepare it again"
    ]


def _add_facts(record: Mapping[str, Any], found: dict[str, list[float]], failures: list[ClipFailure]) -> None:
    try:
        if "failure" in record:
            raise record["failure"]
        for name, value in facts(record).items():
            found[name].append(value)
    except ClipFailure as failure:
        failures.append(failure.named(record["id"]))


def sample(count: int, most: int, seed: int) -> list[int]:
    """Up to `most` of the numbers 0 … count - 1, rising."""
    return sorted(np.random.default_rng(seed).choice(count, min(count, most), replace=False).tolist())


def report_lines(folder: pathlib.Path) -> list[str]:
    """What av_mae.prepare reported, where it did."""
    try:
        causes = json.loads((folder / REPORT).read_text())["causes"]
    except (OSError, ValueError, KeyError):
        return []
    named = {cause: count for cause, count in causes.items() if count}
    if not named:
        return ["", "preparation: nothing was wrong"]
    return [
        "",
        f"preparation found ({folder / 'report.html'} names the clips):",
        *bars(list(named), list(named.values())),
    ]


class Skipped(NamedTuple):
    """Clips that were skipped for one cause: what was done with them, the cause without numbers and names, and all."""

    stage: str
    cause: str
    failures: list[ClipFailure]


def skipped_causes(failures: Iterable[ClipFailure]) -> list[Skipped]:
    """Skipped clips by stage and cause, the most frequent first. Causes that differ in numbers or in what is quoted, or
    in the clip's name, are one."""
    groups: dict[tuple[str, str], list[ClipFailure]] = collections.defaultdict(list)
    for failure in failures:
        own = rf"(?<!\w){re.escape(failure.clip)}(?!\w)|" if failure.clip else ""
        groups[failure.stage, re.sub(rf"{own}'[^']*'|\b\d+(\.\d+)?\b", "…", failure.cause)].append(failure)
    made = [Skipped(where, cause, own) for (where, cause), own in groups.items()]
    return sorted(made, key=lambda group: (-len(group.failures), group.stage, group.cause))


def skipped_lines(folder: pathlib.Path) -> list[str]:
    """A table of what `skipped.jsonl` in a folder holds: clips, stage and cause, with examples below."""
    failures = read_skipped(folder)
    groups = skipped_causes(failures)
    lines = ["", f"skipped clips ({named(folder / SKIPPED)} has them all): {len(failures)}"]
    if groups:
        width = max(5, *(len(group.stage) for group in groups))
        lines.append(f"    {'clips':>7}  {'stage':<{width}}  cause")
    for group in groups[:CAUSES]:
        lines.append(f"    {len(group.failures):>7,}  {one_line(group.stage):<{width}}  {one_line(group.cause)}")
        lines += [
            f"    {'':>7}  {'':<{width}}    {one_line(f'{one.clip}: {one.cause}')}" for one in group.failures[:EXAMPLES]
        ]
    if len(groups) > CAUSES:
        lines.append(f"    … {len(groups) - CAUSES} more causes …")
    return lines


def contact_sheet(path: str, split: str, clips: int, seed: int) -> np.ndarray:
    """Random clips, a row each: frames over the clip, and the spectrogram of its audio: uint8 [height, width, 3].

    Raises UserError where none of the clips drawn can be shown.
    """
    from av_mae import plots

    source = ClipSource(path, records.open_source(path, split))
    classes, rows, titles, failure = records.class_names(path), [], [], None
    for number in sample(len(source), clips, seed):
        record = source[number]
        try:
            if "failure" in record:
                raise record["failure"]
            rows.append(_panels(record))
            labels = ", ".join(classes[label] for label in record["labels"]) or "no label"
            titles.append(f"{record['id']}: {labels} ({record['duration']:.1f} s)")
        except ClipFailure as error:
            failure = error.named(record["id"])
    if not rows:
        raise UserError(f"none of {clips} clips of {path} (split {split!r}) can be shown; the last: {failure}")
    return plots.gallery(rows, ("first frame", "middle", "last frame", "audio"), titles)


def _panels(record: Mapping[str, Any]) -> list[np.ndarray]:
    """Frames [H, W, 3] at the beginning, middle and end, and the log-mel [mels, frames]; black where a stream lacks."""
    shown = [np.zeros((*SHEET_SIZE, 3), np.uint8)] * SHEET_FRAMES
    with stage("frame"):
        if len(record["frames"]):
            numbers = np.linspace(0, len(record["frames"]) - 1, SHEET_FRAMES).astype(int)
            shown = [_small(record["frames"][number]) for number in numbers]
    spectrogram = np.zeros((SOUND.mels, 2), np.float32)
    with stage("sound"):
        if record["sound"]:
            seconds = min(LONGEST, max(0.1, float(record["duration"])))
            waveform, _, _ = audio.read_window(record["sound"], SOUND.rate, int(seconds * SOUND.rate), 0.0)
            parts = np.array_split(audio.log_mel(waveform, SOUND), SHEET_SIZE[0], axis=1)  # as wide as frames are high
            spectrogram = np.stack([part.mean(axis=1) for part in parts if part.size], axis=1)
    return [*shown, spectrogram]


def _small(encoded: bytes) -> np.ndarray:
    """A whole frame, as high as the sheet's rows: uint8 [H, W, 3]."""
    height, width = frames.frame_size(encoded)
    size = SHEET_SIZE[0], max(1, round(SHEET_SIZE[0] * width / height))
    return frames.resize_box(*frames.decode(encoded, (0, 0, width, height), size), size)


def inspect(path: str, splits: Sequence[str], clips: int, sampled: int, seed: int, sheet: pathlib.Path) -> str:
    """Looks at a prepared set.

    Args:
        path: folder of the set.
        splits: which ones; empty: all.
        clips: how many are on the contact sheet, from the first of the splits that has any.
        sampled: how many clips of a split are read for the histograms.
        seed: of the clips drawn.
        sheet: takes the contact sheet.

    Returns:
        What there is to tell.

    Raises:
        UserError: where the set cannot be opened, has no such split, or the sheet cannot be written.
    """
    from av_mae import plots

    known = records.describe(path)
    unknown = [split for split in splits if split not in known.splits]
    if unknown:
        raise UserError(f"{path} has no split {unknown[0]!r}; it has {', '.join(sorted(known.splits))}")
    splits = splits or list(known.splits)
    lines = [f"{path}: {known.name}, records of version {records.VERSION}", f"  {known.text}"]
    for split in splits:
        lines += split_lines(path, split, sampled, seed)
    folder = folder_of(path)
    lines += report_lines(folder)
    if (folder / SKIPPED).is_file():
        lines += skipped_lines(folder)
    shown = next((split for split in splits if known.splits[split].clips), None)
    if shown is None:
        raise UserError(f"{path} holds no clips")
    try:
        plots.save_png(sheet, contact_sheet(path, shown, clips, seed))
    except OSError as error:
        raise UserError(f"cannot write {sheet}: {error.strerror or error}; name another file with --sheet") from error
    return "\n".join([*lines, "", f"{named(sheet)}: clips of {shown}"])


def _is_shown(name: str) -> bool:
    """Which files of a folder on a store are fetched: those at its top but for shards and tables."""
    return "/" not in name and not name.endswith((".parquet", ".png")) and ".array_record" not in name


def main(argv: list[str]) -> None:
    """Prints what the folder holds."""
    parser = argparse.ArgumentParser("python -m av_mae.inspect", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("data", metavar="DIR", help="a prepared set, a work directory, or an export")
    parser.add_argument("--splits", default="", help="only these, separated by commas (default: all)")
    parser.add_argument("--clips", type=int, default=12, help="clips on the contact sheet (%(default)s)")
    parser.add_argument("--sample", type=int, default=2000, help="clips read for the histograms (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips drawn (%(default)s)")
    parser.add_argument("--local", metavar="DIR", help=LOCAL)
    parser.add_argument("--sheet", type=pathlib.Path, help=f"the contact sheet (default: {SHEET} in DIR)")
    options = parser.parse_args(argv)
    check_numbers(options, {"clips": 1, "sample": 1, "seed": 0}, {"clips": 10_000, "seed": 2**63 - 1})
    with collected(options.data, _is_shown) as folder:
        is_set = any((folder / name).is_file() for name in ("dataset_info.json", "prepare.json"))
        if not is_set and any(found for name in OUTPUTS for found in folder.glob(name)):
            said = [f"{options.data}: no prepared set, but the output of another command", *skipped_lines(folder)]
            print("\n".join(said))
            return
        copy_set(options.data, options.local)
        splits = [split.strip() for split in options.splits.split(",") if split.strip()]
        sheet = options.sheet or folder / SHEET
        print(inspect(options.data, splits, options.clips, options.sample, options.seed, sheet))


if __name__ == "__main__":
    run_command(main, URLS)
