"""What all clusters share, with functions of this process in their place: records, failures, lost ground, addresses."""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import random
import socket
import sys
import threading
import time

import clip_trees
import pytest

from av_mae.errors import StoreError, UserError
from av_mae.prepare import __main__ as prepare
from av_mae.prepare import clusters, engines, run
from av_mae.prepare.clips import Job
from av_mae.prepare.readers.catalogue import SourceClip
from av_mae.storage import Folder, put_tree


def _source(folder: pathlib.Path, damaged: bool = True) -> pathlib.Path:
    clips = {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number) for number in range(5)}
    return clip_trees.put(folder, clips | ({"b/bad.mp4": b"x"} if damaged else {}))


def in_any_order(write, parts):
    """A cluster that is none."""
    assert parts and all(not shard.clips for shard in parts)
    yield from map(write, random.sample(parts, len(parts)))


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
    assert clusters.read_clip(json.loads(json.dumps(dataclasses.asdict(clip)))) == clip


def test_shards_written_by_workers_are_those_of_a_local_run(tmp_path, monkeypatch):
    """Relative folders too: workers run elsewhere."""
    _source(tmp_path / "in")
    clip_trees.prepare("folder", tmp_path / "in", tmp_path / "here", shard_clips=2)
    monkeypatch.chdir(tmp_path)

    def elsewhere(write, parts):
        with contextlib.chdir("/"):
            yield from in_any_order(write, parts)

    made = []
    monkeypatch.setitem(clusters.CLUSTERS, "dask", lambda *asked: made.append(asked) or elsewhere)
    options = ["--dataset=folder", "--source=in", "--output=there", "--shard_clips=2", "--workers=3"]
    prepare.main([*options, "--engine=dask", "--address=tcp://scheduler:8786"])
    assert made == [("tcp://scheduler:8786", 3)]
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "there")


def test_workers_stop_soon_after_too_many_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "POLL", 0.02)
    source, output = clip_trees.put(_source(tmp_path / "in"), {"a/bad.mp4": b"y"}), tmp_path / "out"
    job = Job("folder", Folder(source), Folder(output), shard_clips=1, max_failures=1)
    written = []

    def slowly(write, parts):
        bad = [shard for shard in parts if b"bad" in (output / clusters._clips_file(shard)).read_bytes()]
        yield from map(write, bad)
        until = time.monotonic() + 20
        while not (output / clusters.STOP).exists() and time.monotonic() < until:
            time.sleep(0.01)
        yield from (write(shard) for shard in parts if shard not in bad)
        written.extend(output.glob("*.array_record*"))

    with pytest.raises(UserError, match="--max_failures=1: clip ..bad: open: Invalid data"):
        run.prepare(job, clusters.cluster_writer(slowly))
    assert len(written) == 2
    more = dataclasses.replace(job, max_failures=2)
    run.prepare(more, clusters.cluster_writer(in_any_order))
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=1)
    clip_trees.assert_same_files(tmp_path / "here", output)


def test_a_shard_with_a_failure_waits_for_its_repair(tmp_path):
    source = _source(tmp_path / "in")
    job = Job("folder", Folder(source), Folder(tmp_path / "out"), shard_clips=2, on_error="fail")
    with pytest.raises(UserError, match="--on_error=fail: clip b-bad: open: Invalid data"):
        run.prepare(job, clusters.cluster_writer(in_any_order))
    (source / "b" / "bad.mp4").write_bytes(clip_trees.clip(9))
    run.prepare(job, clusters.cluster_writer(in_any_order))
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "out")


def test_a_worker_without_the_folders_says_so(tmp_path):
    """Else every clip of its shards would count as one that cannot be decoded."""
    source = _source(tmp_path / "in", damaged=False)
    job = Job("folder", Folder(source), Folder(tmp_path / "out"), shard_clips=2)

    def on_another_host(write, parts):
        source.rename(tmp_path / "away")
        yield from in_any_order(write, parts)

    message = rf"--source={source} is not there on the worker \S+: name a folder that all workers share"
    with pytest.raises(UserError, match=message):
        run.prepare(job, clusters.cluster_writer(on_another_host))


@pytest.mark.parametrize("write", [engines.write_locally, clusters.cluster_writer(in_any_order)])
@pytest.mark.parametrize("store", [True, False])
def test_a_source_that_goes_away_makes_no_clip_undecodable(tmp_path, monkeypatch, write, store):
    """The command ends with status 75, and goes on later."""
    folder = _source(tmp_path / "in", damaged=False)
    source = Folder("memory://away/in") if store else Folder(folder)
    if store:
        put_tree(folder, source.url)
    job, away, read = Job("folder", source, Folder(tmp_path / "out"), shard_clips=1, workers=1), [], Folder.read

    def away_at_some_time(self, name):
        if name.endswith("3.mp4") and not away:
            away.append(name)
            raise StoreError("does not answer")
        return read(self, name)

    def file(self, name):
        if name.endswith("3.mp4") and folder.exists():
            folder.rename(tmp_path / "moved")
        return self._source.path(name)

    monkeypatch.setattr(*((Folder, "read", away_at_some_time) if store else (engines.Decoder, "_file", file)))
    with pytest.raises(StoreError, match="answer" if store else "in can no longer be read"):
        run.prepare(job, write)
    if not store:
        (tmp_path / "moved").rename(folder)
        monkeypatch.undo()
    run.prepare(job, write)
    clip_trees.prepare("folder", folder, tmp_path / "here", shard_clips=1)
    clip_trees.assert_same_files(tmp_path / "here", tmp_path / "out")


def test_a_worker_without_av_mae_is_told(tmp_path):
    def without(write, parts):
        yield from map(importlib.import_module, ["av_mae.that_is_not_there"])

    job = Job("folder", Folder(_source(tmp_path / "in", damaged=False)), Folder(tmp_path / "out"))
    with pytest.raises(UserError, match="the workers cannot import av_mae: install it there"):
        run.prepare(job, clusters.cluster_writer(without))


def test_what_the_file_system_refuses_is_told(tmp_path):
    job = Job("folder", Folder(_source(tmp_path / "in")), Folder(tmp_path / "out"), shard_clips=2)

    def without_space(write, parts):
        for path in (tmp_path / "out" / "unfinished").glob("*.clips.json"):
            path.unlink()
        yield from in_any_order(write, parts)

    with pytest.raises(UserError, match=r"worker \S+: folder-train.array_record-\S+: .*No such file"):
        run.prepare(job, clusters.cluster_writer(without_space))


@pytest.mark.parametrize(
    "module, options, extra",
    [
        ("ray", ["--engine=ray"], "ray"),
        ("distributed", ["--engine=dask"], "dask"),
        ("pyspark", ["--engine=spark"], "spark"),
        ("apache_beam", ["--beam_runner=DirectRunner"], "prepare"),
    ],
)
def test_a_missing_package_is_told(module, options, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "apache_beam.runners", raising=False)
    options += ["--dataset=folder", f"--source={_source(tmp_path / 'in')}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=rf"needs {module}: pip install 'av_mae\[{extra}\]'"):
        prepare.main(options)
    assert not (tmp_path / "out" / "prepare.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--engine=dusk"], "unknown engine 'dusk', known are ray, dask, spark; did you mean dask"),
        (["--address=auto"], "--address=auto is an option of --engine"),
        (["--engine=ray", "--beam_runner=DirectRunner"], "--engine=ray and --beam_runner=DirectRunner: name one"),
    ],
)
def test_engines_that_contradict_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare.main(["--dataset=folder", f"--source={tmp_path}", f"--output={tmp_path / 'set'}", *options])


def test_further_options_need_beam(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--dataset=folder", f"--source={tmp_path}", f"--output={tmp_path / 'set'}", "--its_option=3"])
    assert "unrecognized arguments: --its_option=3" in capsys.readouterr().err


@pytest.fixture
def listener():
    """A port that accepts connections; what is in `says` is said to each."""
    server, says = socket.create_server(("127.0.0.1", 0)), []
    opened = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                opened.append(server.accept()[0])
                for word in says:
                    opened[-1].sendall(word)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1], says
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    for connection in opened:
        connection.close()


@pytest.mark.parametrize("address", ["{}", "tcp://{}", "spark://127.0.0.1:1,{}", "k8s://https://{}/path", "user@{}"])
def test_an_address_that_answers_is_taken(address, listener):
    port, says = listener
    clusters.reach("--address", address.format(f"127.0.0.1:{port}"))
    says.append(b"hello")
    clusters.reach("--address", address.format(f"127.0.0.1:{port}"), speaks=True)


@pytest.mark.parametrize("address", ["auto", "yarn", "local-cluster[2,1,1024]", ""])
def test_an_address_without_a_port_passes(address):
    clusters.reach("--address", address)


def test_an_address_where_nothing_answers_is_refused(listener, monkeypatch):
    monkeypatch.setattr(clusters, "PROBE", 0.3)
    with pytest.raises(UserError, match="^--address=tcp://127.0.0.1:1: no cluster answers .*Connection refused"):
        clusters.reach("--address", "tcp://127.0.0.1:1")
    with pytest.raises(UserError, match=r"silent for 0.3 s"):
        clusters.reach("--address", f"ray://127.0.0.1:{listener[0]}", speaks=True)
    with pytest.raises(UserError, match=r"127.0.0.1:1: .*; 127.0.0.1:2: "):
        clusters.reach("--spark_master_url", "spark://127.0.0.1:1,127.0.0.1:2")
