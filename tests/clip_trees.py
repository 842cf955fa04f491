"""Source folders made for tests: small clips whose frames and sounds are known, and preparing them."""

import dataclasses
import filecmp
import os
import pathlib

import made_media
import numpy as np

from av_mae.data import records
from av_mae.prepare import run
from av_mae.prepare.clips import Job, RecordOptions
from av_mae.storage import Folder

FPS, RATE = 5, 16000


def clip(number: int, seconds: float = 2.0, **options) -> bytes:
    """An mp4 whose frames show number, number + 1, … and whose sound is that of `made_media.hum` from `number` s on."""
    frames = [made_media.numbered_frame(number + position) for position in range(round(seconds * FPS))]
    sound = made_media.hum(number + np.arange(round(seconds * RATE)) / RATE)
    return made_media.encoded(frames, sound, fps=FPS, rate=RATE, **options)


def put(folder: pathlib.Path, files: dict[str, bytes | str]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def prepare(dataset: str, source: pathlib.Path, output: pathlib.Path, workers: int = 1, **options) -> dict:
    """Prepares a set and returns its report; `options` are fields of Job or of RecordOptions."""
    own = {field.name for field in dataclasses.fields(Job)}
    record = RecordOptions(**{name: value for name, value in options.items() if name not in own})
    job = Job(
        dataset,
        Folder(source),
        Folder(output),
        record=record,
        workers=workers,
        **{name: value for name, value in options.items() if name in own},
    )
    return run.prepare(job)


def stored(output: pathlib.Path, split: str = "train") -> dict[str, dict]:
    """The records of a split by id."""
    source = records.open_source(output, split)
    return {source[index]["id"]: source[index] for index in range(len(source))}


def causes(report: dict) -> dict[str, set[str]]:
    """The clips of each finding."""
    found: dict[str, set[str]] = {}
    for finding in report["findings"]:
        found.setdefault(finding["cause"], set()).add(finding["clip"])
    return found


def files_below(folder: pathlib.Path) -> list[str]:
    return sorted(os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    names = files_below(one)
    assert names == files_below(other)
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])
