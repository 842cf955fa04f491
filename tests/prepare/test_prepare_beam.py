"""Preparing on Apache Beam: the records of a local run."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import sysconfig

import clip_trees
import pytest

from av_mae.errors import UserError
from av_mae.prepare import __main__ as prepare
from av_mae.prepare import engines as beam
from av_mae.prepare import run
from av_mae.prepare.clips import Job
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.storage import Folder

BEAM = "apache-beam>=2.70,<3"


def _source(folder: pathlib.Path) -> pathlib.Path:
    clips = {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number) for number in range(5)}
    return clip_trees.put(folder, clips | {"b/bad.mp4": b"x"})


def test_a_clip_travels_as_json():
    clip = SourceClip(
        "a",
        "test",
        "a.wav",
        images=("0.jpg",),
        image_times=(0.5,),
        end=3.0,
        labels=(1, 2),
        boxes=((0.1, 0.2, 0.3, 0.4),),
        box_annotators=(0,),
        annotators=1,
        mixed_with=SourceClip("b", "test", "b.wav", labels=(3,)),
    )
    assert beam.read_clip(json.loads(json.dumps(dataclasses.asdict(clip)))) == clip


def test_a_shard_by_a_worker_of_beam_is_that_of_a_local_run(tmp_path, monkeypatch):
    """All but the pipeline itself, which the slow test below runs."""
    source = _source(tmp_path / "in")
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)

    def run_pipeline(runner, options, job, unfinished, classes):
        assert (runner, options) == ("SomeRunner", ["--its_option=3"]) and all(not shard.clips for shard in unfinished)
        for shard in unfinished[::-1]:
            beam._write_shard(shard, job, classes)

    monkeypatch.setattr(beam, "_run_pipeline", run_pipeline)
    prepare.main(
        [
            "--dataset=folder",
            f"--source={source}",
            f"--output={tmp_path / 'there'}",
            "--shard_clips=2",
            "--beam_runner=SomeRunner",
            "--its_option=3",
        ]
    )
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "there")


def test_failures_stop_a_beam_run_too(tmp_path, monkeypatch):
    job = Job("folder", Folder(_source(tmp_path / "in")), Folder(tmp_path / "out"), on_error="fail")
    monkeypatch.setattr(
        beam,
        "_run_pipeline",
        lambda runner, options, job, unfinished, classes: [
            beam._write_shard(shard, job, classes) for shard in unfinished
        ],
    )
    with pytest.raises(UserError, match="--on_error=fail: clip b-bad: open: Invalid data"):
        run.prepare(job, beam.beam_writer("DirectRunner", []))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_without_beam_the_command_says_what_to_install(tmp_path):
    with pytest.raises(UserError, match=r"--beam_runner needs Apache Beam: pip install 'av_mae\[prepare\]'"):
        prepare.main(
            [
                "--dataset=folder",
                f"--source={_source(tmp_path / 'in')}",
                f"--output={tmp_path / 'set'}",
                "--beam_runner=DirectRunner",
            ]
        )


def test_further_options_need_beam(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--dataset=folder", f"--source={tmp_path}", f"--output={tmp_path / 'set'}", "--its_option=3"])
    assert "unrecognized arguments: --its_option=3" in capsys.readouterr().err


@pytest.fixture(scope="module")
def python_with_beam(tmp_path_factory) -> str:
    """An environment with Beam beside this one's packages: it needs other versions of some than the tests run with."""
    if importlib.util.find_spec("apache_beam") is not None:
        return sys.executable
    folder = tmp_path_factory.mktemp("beam")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", BEAM], check=True
    )
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "this.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)


@pytest.mark.slow
def test_two_local_workers_of_beam_write_the_same_set(python_with_beam, tmp_path, root):
    source = _source(tmp_path / "in")
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)
    command = [
        python_with_beam,
        "-m",
        "av_mae.prepare",
        "--dataset=folder",
        f"--source={source}",
        f"--output={tmp_path / 'there'}",
        "--shard_clips=2",
        "--beam_runner=DirectRunner",
        "--direct_num_workers=2",
        "--direct_running_mode=multi_processing",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "there")
    assert "5 of 6 clips in train" in done.stdout
