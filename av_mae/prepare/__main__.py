"""Prepares a data set: clips and annotations as downloaded, or a demo set made from a seed → ArrayRecord shards that
TFDS reads, a report and a card."""

import argparse
import concurrent.futures.process
import contextlib
import os
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from av_mae.errors import StoreError, UserError, check_name, check_numbers, run_command
from av_mae.lock import held
from av_mae.prepare.demo import MODULES
from av_mae.prepare.readers import READERS
from av_mae.prepare.readers.catalogue import CAUSES, SKIPPABLE
from av_mae.storage import Folder

if TYPE_CHECKING:
    from av_mae.prepare.engines import WriteShards

EXAMPLE = """example: python -m av_mae.prepare --dataset=toy_band --output=data/toy_band --clips=2000 --seed=0
         python -m av_mae.prepare --dataset=folder --source=videos --output=data/videos
Further options (--NAME=VALUE) go on to Apache Beam where --beam_runner is given."""
# Defaults of the options that only demo sets have, and of those that only other sets have.
DEMO_OPTIONS: dict[str, Any] = {"clips": 2000, "test_clips": 400, "variant": "single"}
SET_OPTIONS: dict[str, Any] = {
    "source": None,
    "table": None,
    "splits": "",
    "frames": 0,
    "frame_rate": 1.0,
    "size": 256,
    "quality": 90,
    "shortest": 1.0,
    "skip": "",
    "shard_clips": 1000,
    "time_limit": 60.0,
    "memory_limit": 4.0,
    "on_error": "skip",
    "max_failures": None,
    "engine": None,
    "address": None,
    "beam_runner": None,
}
# What no machine can do, or no set can hold, is refused before anything is made.
LEAST: dict[str, float] = {
    "clips": 1,
    "test_clips": 1,
    "workers": 1,
    "seed": 0,
    "size": 1,
    "shard_clips": 1,
    "quality": 1,
    "frames": 0,
}
LEAST |= {"frame_rate": 1e-6, "time_limit": 1e-3, "memory_limit": 1e-3, "shortest": 0, "max_failures": 0}
MOST: dict[str, float] = {"workers": 4096, "seed": 2**63 - 1, "size": 65535, "quality": 100}
MOST |= {"frames": 10**6, "frame_rate": 1000, "shortest": 10**6, "time_limit": 10**6, "memory_limit": 10**6}
NAMES = (*MODULES, *READERS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        "python -m av_mae.prepare",
        description=__doc__,
        epilog=EXAMPLE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--dataset", required=True, help=f"one of {', '.join(NAMES)}")
    made.add_argument(
        "--output",
        required=True,
        help="folder of the prepared set: new, empty, or of the same command; a path or a URL (gs://, s3://)",
    )
    made.add_argument("--seed", type=int, default=0, help="the same seed gives the same set (%(default)s)")
    made.add_argument(
        "--workers", type=int, default=_cores(), help="processes; they change nothing but the time (%(default)s)"
    )
    demo = made.add_argument_group("demo sets: " + ", ".join(MODULES))
    _add(demo, "clips", int, "training clips")
    _add(demo, "test_clips", int, "test clips")
    _add(
        demo,
        "variant",
        str,
        "single: one object; scene: several, of which one sounds; mixture: two sounds, the image shows the first",
    )
    sets = made.add_argument_group("other sets: " + ", ".join(READERS))
    _add(sets, "source", str, "folder of the data set as downloaded; a path or a URL")
    _add(
        sets,
        "table",
        str,
        "of --dataset=folder: csv or Parquet file with the columns path and, where known, id, "
        "label (several: a;b), split, start, end",
    )
    _add(sets, "splits", str, "only these, with commas between; all without")
    _add(sets, "frames", int, "frames per clip, evenly spaced; 0: by --frame_rate")
    _add(sets, "frame_rate", float, "frames a second")
    _add(sets, "size", int, "pixels of the frames' shorter side; smaller frames stay")
    _add(sets, "quality", int, "of the JPEG frames, 1 to 100")
    _add(sets, "shortest", float, "seconds; shorter clips are reported")
    _add(sets, "skip", str, f"leave out clips with {', '.join(SKIPPABLE)}; with commas between")
    _add(sets, "shard_clips", int, "clips per shard")
    _add(sets, "time_limit", float, "seconds of decoding per clip, then it counts as failed")
    _add(sets, "memory_limit", float, "GB of a decoding process")
    _add(sets, "on_error", str, "skip: leave out clips that cannot be decoded; fail: stop at the first")
    _add(sets, "max_failures", int, "stop when more clips than this cannot be decoded")
    _add(sets, "engine", str, "ray, dask or spark: prepare on its cluster at --address, or on one of this machine")
    _add(
        sets,
        "address",
        str,
        "of --engine: HOST:PORT or auto for ray, tcp://HOST:PORT for dask, spark://HOST:PORT or yarn",
    )
    _add(sets, "beam_runner", str, "DirectRunner, DataflowRunner, …: prepare on Apache Beam")
    return made


def _add(group: argparse._ArgumentGroup, name: str, kind: type, text: str) -> None:
    default = (DEMO_OPTIONS | SET_OPTIONS)[name]
    group.add_argument(f"--{name}", type=kind, help=f"{text} ({default})" if default not in (None, "") else text)


def _chosen(options: argparse.Namespace, own: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The options of one kind of set. Raises UserError for one of the other kind."""
    for name in others:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is not an option of --dataset={options.dataset}")
    return {
        name: default if getattr(options, name) is None else getattr(options, name) for name, default in own.items()
    }


@contextlib.contextmanager
def _write_errors(output: str) -> Iterator[None]:
    """Turns what the file system refuses into a UserError."""
    try:
        yield
    except StoreError as error:
        raise UserError(str(error)) from error
    except PermissionError as error:
        raise UserError(f"no permission for {error.filename or output}; choose another --output") from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror or error}") from error


def _prepare_demo(options: argparse.Namespace) -> str:
    from av_mae.prepare import demo

    chosen = _chosen(options, DEMO_OPTIONS, SET_OPTIONS)
    if "://" in options.output:
        raise UserError(f"--output={options.output}: a demo set is written to a folder of this machine")
    settings = demo.Settings(options.dataset, seed=options.seed, **chosen)
    return demo.run(settings, pathlib.Path(options.output), options.workers)


def _prepare_set(options: argparse.Namespace, beam_options: list[str]) -> str:
    from av_mae.prepare import run
    from av_mae.prepare.clips import Job, Limits, RecordOptions

    chosen = _chosen(options, SET_OPTIONS, DEMO_OPTIONS)
    _check(chosen, options.dataset)
    names = ("frames", "frame_rate", "size", "quality", "shortest")
    record = RecordOptions(**{name: chosen[name] for name in names}, skip=_names(chosen["skip"]))
    job = Job(
        options.dataset,
        source=Folder(chosen["source"]),
        output=Folder(options.output),
        splits=_names(chosen["splits"]),
        seed=options.seed,
        record=record,
        limits=Limits(chosen["time_limit"], int(chosen["memory_limit"] * 2**30)),
        workers=options.workers,
        **{name: chosen[name] for name in ("table", "shard_clips", "on_error", "max_failures")},
    )
    report = run.prepare(job, _engine(chosen, options.workers, beam_options))
    if not any(split["stored"] for split in report["splits"].values()):
        clips = sum(split["clips"] for split in report["splits"].values())
        causes = ", ".join(f"{CAUSES[cause]} ({count} ×)" for cause, count in report["causes"].items() if count)
        raise UserError(f"none of the {clips} clips could be stored: {causes}; {options.output}/report.html names each")
    return _summary(options.output, report, record.skip)


def _engine(chosen: dict[str, Any], workers: int, beam_options: list[str]) -> "WriteShards":
    """What writes the shards."""
    from av_mae.prepare import beam, clusters, engines

    engine, address, runner = (chosen[name] for name in ("engine", "address", "beam_runner"))
    if runner and engine:
        raise UserError(f"--engine={engine} and --beam_runner={runner}: name one of them")
    if address and not engine:
        raise UserError(f"--address={address} is an option of --engine; runners of Beam have options of their own")
    if runner:
        return clusters.cluster_writer(beam.beam_cluster(runner, beam_options, parser()._option_string_actions))
    if not engine:
        return engines.write_locally
    check_name("engine", engine, tuple(clusters.CLUSTERS))
    return clusters.cluster_writer(clusters.CLUSTERS[engine](address, workers))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check(chosen: dict[str, Any], dataset: str) -> None:
    if not chosen["source"]:
        raise UserError(f"--dataset={dataset} needs --source=DIR, the folder of the data set")
    if chosen["table"] and dataset != "folder":
        raise UserError(f"--table is an option of --dataset=folder; {dataset} has its own annotations")
    check_name("value of --on_error", chosen["on_error"], ("skip", "fail"))
    for name in _names(chosen["skip"]):
        check_name("cause in --skip", name, SKIPPABLE)


def _summary(output: str, report: dict[str, Any], skipped: tuple[str, ...]) -> str:
    """What was prepared, in a few lines."""
    splits = ", ".join(
        f"{split['stored']} of {split['clips']} clips in {name}" for name, split in report["splits"].items()
    )
    found = "".join(f"\n  {count} × {cause}: {CAUSES[cause]}" for cause, count in report["causes"].items() if count)
    incomplete = any(report["causes"][cause] for cause in {"no_sound", "no_picture"} - set(skipped))
    hint = "\n  --skip=no_sound,no_picture leaves out what has only one of both" if incomplete else ""
    classes = f", {len(report['classes'])} classes" if report["classes"] else ""
    where = "each is named in" if found else "the report is in"
    return f"{output}: {splits}{classes}{found}{hint}\n  {where} {output}/report.html"


def main(argv: list[str]) -> None:
    """Prepares the set that the options ask for, and prints what it holds."""
    options, further = parser().parse_known_args(argv)
    if further and not options.beam_runner:
        parser().error(f"unrecognized arguments: {' '.join(further)}")
    check_name("dataset", options.dataset, NAMES)
    check_numbers(options, LEAST, MOST)
    started = time.monotonic()
    with _write_errors(options.output), held(options.output, beside=options.dataset in MODULES):
        told = _prepare_demo(options) if options.dataset in MODULES else _prepare_set(options, further)
    print(told if options.dataset in MODULES else f"{told}\n  {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    run_command(main, stores=None)
