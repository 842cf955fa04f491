"""Prepared sets on a store (a real GCS server), copied to this machine: whole, once, and anew where they change."""

import os
import shutil
import threading

import pytest
import store_servers

from av_mae import storage
from av_mae.data import copies, records
from av_mae.errors import StoreError, UserError
from av_mae.prepare import __main__ as prepare
from av_mae.storage import Folder

URL = f"gs://{store_servers.BUCKET}/sets/toy"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "toy"
    prepare.main(["--dataset=toy_band", f"--output={folder}", "--clips=6", "--test_clips=2", "--workers=1"])
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, prepared):
    with store_servers.running(tmp_path_factory.mktemp("store")) as server:
        storage.put_tree(prepared, URL)
        yield server


def forget():
    """What a process that has ended holds no more."""
    copies._copies.clear()
    for lock in copies._locks:
        lock.close()
    copies._locks.clear()


@pytest.fixture(autouse=True)
def as_a_new_process():
    yield
    forget()


def copied(local):
    """The copy that a new process has."""
    forget()
    copies.copy_sets([URL], str(local))
    return copies.folder_of(URL)


def test_records_come_in_the_order_of_a_local_set(server, prepared, tmp_path):
    copied(tmp_path)
    for split in ("train", "test"):
        ours, theirs = records.open_source(URL, split), records.open_source(prepared, split)
        assert [record["id"] for record in ours] == [record["id"] for record in theirs]
        assert ours.path != URL  # what a process that reads is given
    assert records.read_labels(URL, "train").values.tolist() == records.read_labels(prepared, "train").values.tolist()


def test_a_second_run_copies_nothing(server, tmp_path, monkeypatch, capsys):
    folder = copied(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".")}
    monkeypatch.setattr(storage.Folder, "fetch", lambda *_: pytest.fail("a file was copied again"))
    assert copied(tmp_path) == folder
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".")}
    assert capsys.readouterr().err.count("files of") == 1


def test_what_has_changed_here_is_copied_again(server, tmp_path, capsys):
    folder = copied(tmp_path)
    shard = next(folder.glob("*train.array_record*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    assert copied(tmp_path) == folder and shard.read_bytes() == content
    assert "has changed: it is copied again" in capsys.readouterr().err
    shard.unlink()
    assert copied(tmp_path) == folder and shard.read_bytes() == content
    assert f"lacks {shard}" in capsys.readouterr().err


def test_a_shard_that_changes_on_the_store_is_noticed(server, prepared, tmp_path, capsys):
    folder = copied(tmp_path)
    name = next(prepared.glob("*train.array_record*")).name
    content = (prepared / name).read_bytes()
    try:
        Folder(URL).write(name, content[:-1] + b"?")
        other = copied(tmp_path)
        assert other != folder and (other / name).read_bytes() == content[:-1] + b"?"
        assert (folder / name).read_bytes() == content  # in use, perhaps
        said = capsys.readouterr().err
        assert "has changed since it was copied" in said and f"1 files of {URL} copied" in said
        assert os.path.samefile(folder / "dataset_info.json", other / "dataset_info.json")
    finally:
        Folder(URL).write(name, content)


def test_several_processes_of_a_host_share_a_copy(server, tmp_path):
    fetched, fetch = [], storage.Folder.fetch

    def counted(self, name, file):
        fetched.append(name)
        fetch(self, name, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Folder, "fetch", counted)
        found = []
        copy = lambda: found.append(copies._copy(Folder(URL), tmp_path))
        threads = [threading.Thread(target=copy) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert sorted(fetched) == sorted(Folder(URL).files())


def test_other_bytes_than_listed_and_no_room(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage.Folder, "fetch", lambda self, name, file: open(file, "wb").close())
        with pytest.raises(StoreError, match="has come with other bytes than the store lists"):
            copied(tmp_path / "cut")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"has 0.0 GB left, gs://bucket/sets/toy needs 0.0 GB"):
        copied(tmp_path / "full")


def test_old_copies_that_nobody_uses_are_removed(server, tmp_path, capsys):
    old, used = tmp_path / "old-1", tmp_path / "used-2"
    for folder in (old, used):
        folder.mkdir()
        (folder / copies.MANIFEST).write_text("{}")
        os.utime(folder / copies.MANIFEST, (1, 1))
    with open(used / copies.LOCK, "a") as lock:
        copies.fcntl.flock(lock, copies.fcntl.LOCK_SH)
        copied(tmp_path)
    assert not old.exists() and used.exists()
    assert f"{old} was not used for 30 days: removed" in capsys.readouterr().err


@pytest.mark.parametrize("url", [URL, "s3://bucket/toy"])
def test_without_a_folder_to_copy_to(url):
    with pytest.raises(UserError, match=r"is on a store: name a folder of each host with data.local=DIR"):
        records.describe(url)
    with pytest.raises(UserError, match="ftp:// is not read or written here"):
        records.describe("ftp://a/b")
