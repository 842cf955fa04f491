"""Prepares a data set: clips with their truth → mp4 files and ArrayRecord shards (a TFDS data set)."""

import argparse
import concurrent.futures.process
import contextlib
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import shutil
import time

from av_mae.data.demo_clips import VARIANTS
from av_mae.data.demo_sets import MODULES, ClipMaker, load
from av_mae.errors import UserError, run_command
from av_mae.progress import Progress

SETTINGS_FILE = "prepare.json"
EXAMPLE = "example: python -m av_mae.prepare --dataset=toy_band --output=data/toy_band --clips=2000 --seed=0"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a prepared demo set depends on; stored with it. `recipe` counts changes of its clips and its records."""

    dataset: str
    variant: str
    clips: int
    test_clips: int
    seed: int
    recipe: int = 2

    def __post_init__(self):
        _check_name("dataset", self.dataset, tuple(MODULES))
        _check_name("variant", self.variant, VARIANTS)
        for option in ("clips", "test_clips"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option}={getattr(self, option)} must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed} must be 0 or more")


def _check_name(option: str, name: str, known: tuple[str, ...]) -> None:
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"unknown {option} {name!r}, known are {', '.join(known)}{hint}")


def is_prepared(output: pathlib.Path, settings: Settings) -> bool:
    """Whether `output` holds just this set already. Raises UserError where it holds anything else."""
    if not output.exists():
        return False
    if not output.is_dir():
        raise UserError(f"--output={output} is a file; name a folder that is new or empty")
    if not any(output.iterdir()):
        return False
    stored = _read_settings(output)
    if stored is None:
        raise UserError(f"--output={output} holds other files; name a folder that is new or empty")
    wanted = dataclasses.asdict(settings)
    different = [f"{name}={stored.get(name)} (asked: {value})" for name, value in wanted.items()
                 if stored.get(name) != value]
    if different:
        raise UserError(f"--output={output} holds a set with {', '.join(different)}; name another folder "
                        "or delete this one")
    return True


def _read_settings(folder: pathlib.Path) -> dict | None:
    try:
        stored = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


@contextlib.contextmanager
def _write_errors(output: pathlib.Path):
    """Turns what the file system refuses into a UserError."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"no permission for {error.filename or output}; choose another --output") from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a worker process died, perhaps for lack of memory; try fewer --workers") from error
    except OSError as error:
        raise UserError(f"cannot write --output={output}: {error.strerror or error}") from error


def prepare(settings: Settings, output: pathlib.Path, workers: int) -> None:
    """Makes the set in a folder beside `output` and renames it at the end."""
    from av_mae.data import records  # TFDS takes a second to import, and workers import this module too

    unfinished = output.with_name(f"{output.name}.unfinished")
    _start_folder(unfinished, settings)
    dataset = load(settings.dataset)
    clips = {"train": settings.clips, "test": settings.test_clips}
    with ClipMaker(settings.dataset, settings.variant, settings.seed, workers) as maker, \
            Progress(sum(clips.values()), f"prepare {settings.dataset}") as progress:

        def split_records(split):
            folder = unfinished / "clips" / split
            folder.mkdir(parents=True)
            for record in maker.records(split, clips[split], os.fspath(folder)):
                yield record
                progress.update()

        records.write_set(unfinished, settings.dataset, dataset.DESCRIPTION, dataset.CLASSES,
                          {split: functools.partial(split_records, split) for split in clips}, max(clips.values()))
    os.rename(unfinished, output)


def _start_folder(folder: pathlib.Path, settings: Settings) -> None:
    """Makes an empty folder with the settings, in place of what an interrupted run left there."""
    if folder.exists():
        if _read_settings(folder) is None:
            raise UserError(f"{folder}, needed while preparing, exists and is not of av_mae.prepare; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m av_mae.prepare", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(MODULES)}")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the prepared set: new or empty")
    parser.add_argument("--clips", type=int, default=2000, help="training clips (%(default)s)")
    parser.add_argument("--test_clips", type=int, default=400, help="test clips (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same set (%(default)s)")
    parser.add_argument("--variant", default="single",
                        help="single: one object; scene: several, of which one sounds; mixture: two sounds, the image "
                             "shows the first (%(default)s)")
    parser.add_argument("--workers", type=int, default=_cores(),
                        help="processes; they change nothing but the time (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    settings = Settings(options.dataset, options.variant, options.clips, options.test_clips, options.seed)
    if options.workers < 1:
        raise UserError(f"--workers={options.workers} must be at least 1")
    started = time.monotonic()
    with _write_errors(options.output):
        if is_prepared(options.output, settings):
            print(f"{options.output} already holds this set, nothing to do")
            return
        prepare(settings, options.output, options.workers)
    seconds, clips = time.monotonic() - started, settings.clips + settings.test_clips
    print(f"{options.output}: {settings.clips} training and {settings.test_clips} test clips of {settings.dataset} "
          f"({settings.variant}) in {seconds:.1f} s, {clips / seconds:.0f} clips/s")


if __name__ == "__main__":
    run_command(main)
