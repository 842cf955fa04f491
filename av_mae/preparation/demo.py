"""The demo sets: made from a seed, clips with their truth → mp4 files and ArrayRecord shards."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time

from av_mae.data.demo_clips import VARIANTS
from av_mae.data.demo_sets import MODULES, ClipMaker, load
from av_mae.errors import UserError, check_name
from av_mae.progress import Progress

SETTINGS_FILE = "prepare.json"


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
        check_name("variant", self.variant, VARIANTS)
        for option in ("clips", "test_clips"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option}={getattr(self, option)} must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed} must be 0 or more")


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


def run(settings: Settings, output: pathlib.Path, workers: int) -> str:
    """Makes the set where it is not there yet, and says so in a line."""
    if is_prepared(output, settings):
        return f"{output} already holds this set, nothing to do"
    started = time.monotonic()
    prepare(settings, output, workers)
    seconds, clips = time.monotonic() - started, settings.clips + settings.test_clips
    return (f"{output}: {settings.clips} training and {settings.test_clips} test clips of {settings.dataset} "
            f"({settings.variant}) in {seconds:.1f} s, {clips / seconds:.0f} clips/s")
