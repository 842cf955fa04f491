"""Amazon's protocol as it is spoken: moto's server on the loopback interface, s3fs as the client.

Work directories are refused there (tests/test_workdir.py); sources, prepared sets and exports are not.
"""

import io
import pathlib
import shutil
import subprocess
import time

import clip_trees
import fsspec
import pytest
from pyarrow import parquet
from tiny_export import write_checkpoint
from train_processes import Training, assert_same_arrays, free_port

from av_mae import storage
from av_mae.errors import StoreError, UserError
from av_mae.export.__main__ import main as export
from av_mae.inspect import main as inspect
from av_mae.storage import Folder

pytestmark = pytest.mark.slow
S3 = "s3://bucket"
QUICK = ["--config.data.workers=0", "--config.steps=20"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with an empty bucket, which s3fs finds by the variables that Amazon's own tools read."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.fail(
            "moto_server is not in PATH: pip install 'moto[server]' in an environment of its own, as .ci/run does"
        )
    port, folder = free_port(), tmp_path_factory.mktemp("s3")
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        process = subprocess.Popen([program, "-H", "127.0.0.1", "-p", f"{port}"], stdout=log, stderr=log)
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
            ("AWS_ACCESS_KEY_ID", "any"),
            ("AWS_SECRET_ACCESS_KEY", "any"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        try:
            _make_bucket(folder / "log", process)
            yield process
        finally:
            process.kill()
            process.wait()


def _make_bucket(log: pathlib.Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while True:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            return fsspec.filesystem("s3").mkdir("bucket")
        except Exception:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("runs"))


def test_a_set_prepared_from_and_to_the_store(server, tmp_path):
    clips = {f"{'ab'[number % 2]}/clip{number}.mp4": clip_trees.clip(number) for number in range(4)}
    source = clip_trees.put(tmp_path / "in", clips | {"b/bad.mp4": b"x"})
    storage.put_tree(source, f"{S3}/in")
    clip_trees.prepare("folder", source, tmp_path / "here", shard_clips=2)
    clip_trees.prepare("folder", f"{S3}/in", f"{S3}/set", shard_clips=2)
    names = Folder(f"{S3}/set").files()
    for name in names:
        here = tmp_path / "here" / name
        if name not in ("prepare.json", "report.json", "report.html"):  # which name source and times
            assert Folder(f"{S3}/set").read(name) == here.read_bytes(), name
    assert {"dataset_info.json", "skipped.jsonl"} <= set(names)


def test_training_exports_and_inspect(server, training, tmp_path, capsys):
    """From a set on the store: the run of a local one; tables written there are those written here."""
    toy = training.folder / "toy"
    storage.put_tree(toy, f"{S3}/toy")
    there = [f"--config.data.path={S3}/toy", f"--config.data.local={tmp_path / 'copies'}"]
    for name, options in (("local", []), ("from-store", there)):
        status, said = training.run(name, *QUICK, *options)
        assert status == 0, said
    assert "copying s3://bucket/toy" in said
    assert training.metrics("local") == training.metrics("from-store")
    assert_same_arrays(training.arrays("local"), training.arrays("from-store"))
    checkpoint = write_checkpoint(tmp_path / "run")
    local = [f"--local={tmp_path / 'copies'}"]
    for data, output in ((f"{S3}/toy", f"{S3}/tables"), (str(toy), str(tmp_path / "tables"))):
        export([f"--checkpoint={checkpoint}", f"--data={data}:test", f"--output={output}", "--workers=0", *local])
    name = "embeddings/00000-of-00001.parquet"
    there, here = (
        parquet.read_table(io.BytesIO(Folder(folder).read(name))).drop_columns("path")
        for folder in (f"{S3}/tables", str(tmp_path / "tables"))
    )
    assert there.num_rows == 4 and there.equals(here)
    inspect([f"{S3}/toy", "--sample=4", *local])
    assert "train: 20 clips" in capsys.readouterr().out and Folder(f"{S3}/toy").exists("contact_sheet.png")


def test_what_is_not_there_is_named(server, training, tmp_path, monkeypatch):
    for url in ("s3://nowhere/set", "s3://"):
        with pytest.raises(UserError, match="no such bucket|names no bucket"):
            Folder(url).files()
    options = [f"--config.data.path={S3}/nothing", f"--config.data.local={tmp_path}", *QUICK]
    status, said = training.run("nothing", *options)
    assert status == 2 and said.count("\n") == 1 and "s3://bucket/nothing is no folder" in said, said
    status, said = training.run(f"{S3}/run", *QUICK)
    assert status == 2 and said.count("\n") == 1 and "s3:// is not read or written here" in said, said
    assert not pathlib.Path("s3:").exists()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    status, said = training.run("dead", f"--config.data.path={S3}/toy", f"--config.data.local={tmp_path}", *QUICK)
    assert status == 75 and said.count("\n") == 1 and "cannot be reached" in said and "endpoint" in said.lower(), said
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    status, said = training.run("keyless", f"--config.data.path={S3}/toy", f"--config.data.local={tmp_path}", *QUICK)
    assert status == 75 and said.count("\n") == 1 and "credentials" in said, said
    with pytest.raises(StoreError, match="cannot be reached or used"):
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        Folder(f"{S3}/toy").files()
