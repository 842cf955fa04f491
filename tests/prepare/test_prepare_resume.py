"""A preparation that is killed in any moment: the same set in the end, nothing left. Corrupted clips; stores."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import clip_trees
import fsspec
import numpy as np
import process_tree
import pytest

from av_mae.data import records
from av_mae.errors import UserError
from av_mae.prepare import __main__ as prepare
from av_mae.prepare import shards
from av_mae.prepare.clips import Limits
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.storage import Folder

CLIPS = 120


def _source(folder: pathlib.Path, clips: int) -> pathlib.Path:
    for number in range(clips):
        clip_trees.put(folder, {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number)})
    return folder


def _command(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "av_mae.prepare",
        "--dataset=folder",
        f"--source={source}",
        f"--output={output}",
        "--shard_clips=2",
        "--workers=2",
    ]


def _is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for_end(pids: set[int]) -> set[int]:
    deadline = time.monotonic() + 60
    while (alive := {pid for pid in pids if _is_alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _signal_all(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(group, number)


def _killed(source: pathlib.Path, output: pathlib.Path, root: pathlib.Path, moment: float) -> bool:
    """Kills the command at a moment (a share of its shards); whether a part of the set was there then."""
    process = subprocess.Popen(
        _command(source, output), cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and len(list(output.glob("*array_record*"))) < moment * CLIPS / 2:
        time.sleep(0.01)
    time.sleep(random.Random(moment).uniform(0, 0.05))
    _signal_all(process.pid, signal.SIGSTOP)  # or it would be done before its children are found
    children = process_tree.below(process.pid)
    process.kill()
    process.wait()
    _signal_all(process.pid, signal.SIGCONT)
    assert not _wait_for_end(children)
    if not (output / "dataset_info.json").exists():
        with pytest.raises(UserError, match="is not complete; run the command that prepares it again"):
            records.open_source(output, "train")
    return 0 < len(list(output.glob("unfinished/*-?????.json"))) < CLIPS / 2


def _killed_at(moments: list[float], source: pathlib.Path, output: pathlib.Path, root: pathlib.Path) -> int:
    """Kills at each moment and counts how often a part of the set was there. Where a kill came too late, because
    other processes took the processor from this one, the set is made anew."""
    parts = 0
    for moment in moments:
        for _ in range(5):
            parts += _killed(source, output, root, moment)
            if not (output / "dataset_info.json").exists():
                break
            shutil.rmtree(output)
            output.mkdir()
    return parts


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_preparation_goes_on(kills, tmp_path, root):
    source, output = _source(tmp_path / "in", CLIPS), tmp_path / "out" / "set"
    output.mkdir(parents=True)
    generator = random.Random(kills)
    moments = [0.7 * (number + generator.uniform(0, 1)) / kills for number in range(kills)]
    assert _killed_at(moments, source, output, root) >= kills / 2
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("unfinished/*-?????.json")}
    shard_times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.array_record-*")}
    subprocess.run(_command(source, output), cwd=root, check=True, capture_output=True)
    for name in finished:  # what was finished was not made again
        shard = next(shard for shard in shard_times if name[-10:-5] in shard.split("-of-")[0][-5:])
        assert (output / shard).stat().st_mtime_ns == shard_times[shard]
    clip_trees.prepare("folder", source, tmp_path / "whole", shard_clips=2)
    clip_trees.assert_same_files(tmp_path / "whole", output)
    assert not any(name.endswith(".part") or "unfinished" in name for name in clip_trees.files_below(output))
    assert len(clip_trees.stored(output)) == CLIPS


def _interrupted_at_the_end(*_, everything: bool) -> None:
    if everything:
        raise KeyboardInterrupt


def test_a_kill_between_description_and_cleaning_leaves_nothing(tmp_path, monkeypatch):
    source = _source(tmp_path / "in", 3)
    clip_trees.prepare("folder", source, tmp_path / "whole", shard_clips=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "clean_up", _interrupted_at_the_end)
        clip_trees.prepare("folder", source, tmp_path / "set", shard_clips=2)
    assert (tmp_path / "set" / "unfinished").exists()
    clip_trees.prepare("folder", source, tmp_path / "set", shard_clips=2)
    clip_trees.assert_same_files(tmp_path / "whole", tmp_path / "set")
    assert not (tmp_path / "set" / "unfinished").exists()


def test_another_source_or_other_options_are_refused(tmp_path):
    source = _source(tmp_path / "in", 2)
    clip_trees.prepare("folder", source, tmp_path / "set")
    with pytest.raises(UserError, match=r"holds a set with size=256 \(asked: 128\); name another folder"):
        clip_trees.prepare("folder", source, tmp_path / "set", size=128)
    os.rename(source / "a" / "clip0.mp4", source / "a" / "other.mp4")
    with pytest.raises(UserError, match="was begun when the files or annotations of --source were others"):
        clip_trees.prepare("folder", source, tmp_path / "set")
    clip_trees.put(tmp_path / "used", {"thesis.txt": "x"})
    with pytest.raises(UserError, match="holds other files; name a folder that is new or empty"):
        clip_trees.prepare("folder", source, tmp_path / "used")
    with pytest.raises(UserError, match="is a file; name a folder"):
        clip_trees.prepare("folder", source, tmp_path / "used" / "thesis.txt")


def test_shards_depend_on_seed_and_ids_alone():
    clips = [SourceClip(f"c{number}", "train", "x") for number in range(50)]
    plan = shards.plan("name", clips, 3, 20)
    assert [len(shard.clips) for shard in plan] == [20, 20, 10]
    assert [shard.file for shard in plan][1] == "name-train.array_record-00001-of-00003"
    assert plan == shards.plan("name", clips[::-1], 3, 20) != shards.plan("name", clips, 4, 20)
    positions = [int(clip.id[1:]) for shard in plan for clip in shard.clips]
    assert sorted(positions) == list(range(50)) and abs(np.corrcoef(positions, range(50))[0, 1]) < 0.5


def _corrupted(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with bytes flipped, cut off, or with a part overwritten."""
    damaged, kind = bytearray(content), rng.integers(3)
    if kind == 0:
        for position in rng.integers(len(damaged), size=int(rng.integers(1, 200))):
            damaged[position] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del damaged[int(rng.integers(len(damaged))) :]
    else:
        start = int(rng.integers(len(damaged)))
        damaged[start : start + 2000] = rng.bytes(min(2000, len(damaged) - start))
    return bytes(damaged)


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_corrupted_clips_cost_themselves(count, shared, tmp_path):
    """Small real clips, so that most of the time is not spent on decoding what is whole."""
    paths = sorted(path for path in (shared / "media" / "robust").iterdir() if path.stat().st_size < 130_000)
    rng = np.random.default_rng(count)
    for number in range(count):
        path = paths[number % len(paths)]
        clip_trees.put(tmp_path / "in", {f"{number:03d}{path.suffix}": _corrupted(path.read_bytes(), rng)})
    clip_trees.put(tmp_path / "in", {"whole.mp4": clip_trees.clip(1)})
    before = process_tree.below(os.getpid())
    report = clip_trees.prepare("folder", tmp_path / "in", tmp_path / "set", workers=2, limits=Limits(seconds=60.0))
    assert not _wait_for_end(process_tree.below(os.getpid()) - before)
    failed = clip_trees.causes(report).get("undecodable", set())
    stored = clip_trees.stored(tmp_path / "set")
    assert "whole" in stored and len(stored) + len(failed) == count + 1 and not failed & set(stored)
    assert count / 10 < len(failed) < count


def test_a_folder_of_a_store_is_the_same_as_one_of_this_machine(tmp_path):
    source = _source(tmp_path / "in", 4)
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)
    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/source/", recursive=True)
    for _ in range(2):
        clip_trees.prepare("folder", "memory://source", "memory://prepared/set", shard_clips=2)
    assert Folder("memory://prepared/set").files() == clip_trees.files_below(tmp_path / "here")
    for name in clip_trees.files_below(tmp_path / "here"):
        assert memory.cat_file(f"/prepared/set/{name}") == (tmp_path / "here" / name).read_bytes()
    clip_trees.prepare("folder", f"file://{source}", f"file://{tmp_path}/there", shard_clips=2)
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "there")


@pytest.mark.parametrize(
    "url, error, message",
    [
        (
            "gs://bucket/x",
            ImportError("Please install gcsfs"),
            "gs://bucket/x: Please install gcsfs; pip install gcsfs",
        ),
        (
            "none://x",
            None,
            "none://x: none:// is no store that is known; known are gs, gcs, s3, hdfs, az, abfs, memory",
        ),
        ("hdfs://x", OSError("no libjvm\nat all"), "hdfs://x: no libjvm; install what fsspec needs for hdfs://"),
    ],
)
def test_a_store_that_cannot_be_reached_says_what_it_needs(url, error, message, monkeypatch):
    if error:
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=f"^{message}$"):
        Folder(url).files()


def test_a_store_that_does_not_answer_is_named_with_its_cause(tmp_path, monkeypatch):
    """Whatever its driver raises, and not as a fault of --output."""

    class Unreachable:
        def __getattr__(self, name):
            return lambda *_, **__: name if name == "_strip_protocol" else fail()

    def fail():
        raise RuntimeError("connection refused\nby nobody")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: (Unreachable(), ""))
    for source, output in (("s3://bucket/in", tmp_path / "out"), (_source(tmp_path / "in", 1), "s3://bucket/in")):
        with pytest.raises(UserError, match="^s3://bucket/in cannot be reached or used: connection refused; check the"):
            prepare.main(["--dataset=folder", f"--source={source}", f"--output={output}"])
