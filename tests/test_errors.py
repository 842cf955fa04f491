"""Failures are data: fields that survive processes, batches and files; one `skipped.jsonl`."""

import json
import pickle
import sys

import numpy as np
import pytest

from av_mae import errors
from av_mae.errors import ClipFailure, stage
from av_mae.workdir import SkippedFile, read_skipped, write_skipped

TORN = ClipFailure("a: b", "frame", "torn: at 3 s")
MUTE = ClipFailure("c", "sound", "none")


def test_a_failure_names_clip_stage_and_cause():
    with pytest.raises(ClipFailure) as caught, stage("frame"):
        raise ValueError("torn:\n at  3 s")
    assert str(caught.value) == "frame: torn: at 3 s" and isinstance(caught.value.__cause__, ValueError)
    assert caught.value.named("a: b") == TORN and str(TORN) == "clip a: b: frame: torn: at 3 s"
    with pytest.raises(ClipFailure, match="^sound: KeyError$"), stage("frame"), stage("sound"):
        raise KeyError
    sent = pickle.loads(pickle.dumps(TORN))
    assert sent == TORN and (sent.clip, sent.stage, sent.cause) == TORN.args and TORN != MUTE


def test_failures_of_a_batch():
    columns = {
        "id": ["a: b", "fine", "c", ""],
        "stage": ["frame", "", "sound", ""],
        "cause": [TORN.cause, "", "none", ""],
    }
    batch = {name: np.array(column, object) for name, column in columns.items()}
    assert errors.batch_failures(batch) == [TORN, MUTE]


def test_each_failure_is_written_once(tmp_path):
    file = SkippedFile(tmp_path)
    file.add([])
    assert not list(tmp_path.iterdir())
    file.add([TORN, TORN])
    file.add([MUTE, TORN])
    SkippedFile(tmp_path).add([TORN, MUTE, ClipFailure("c", "sound", "ends early")])
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == {"clip": "a: b", "stage": "frame", "cause": "torn: at 3 s"} and len(lines) == 3
    write_skipped(tmp_path, [MUTE, MUTE])
    assert read_skipped(tmp_path) == [MUTE]
    write_skipped(tmp_path, [])
    assert (tmp_path / "skipped.jsonl").read_text() == "" and read_skipped(tmp_path / "none") == []


def test_a_line_that_was_cut_off_costs_itself_only(tmp_path):
    write_skipped(tmp_path, [TORN, MUTE])
    path = tmp_path / "skipped.jsonl"
    path.write_bytes(path.read_bytes()[:-5] + b"\xff")
    assert read_skipped(tmp_path) == [TORN]
    SkippedFile(tmp_path).add([MUTE])
    assert read_skipped(tmp_path) == [TORN, MUTE]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is of Linux")
def test_a_full_disk_warns_once_and_goes_on(tmp_path, capsys):
    file = SkippedFile(tmp_path)
    (tmp_path / "skipped.jsonl").symlink_to("/dev/full")
    file.add([TORN])
    file.add([MUTE])
    warning = f"warning: {tmp_path / 'skipped.jsonl'} cannot be written"
    assert capsys.readouterr().err.count(warning) == 1
    said: list[str] = []
    write_skipped(tmp_path / "missing", [TORN], said.append)
    assert len(said) == 1 and "No such file or directory" in said[0]
