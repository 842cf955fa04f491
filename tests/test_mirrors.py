"""Work directories on a store where things go wrong: away at the end, odd names and objects, files that vanish."""

import argparse
import errno
import json
import os
import pathlib
import re
import threading

import jax
import numpy as np
import pytest

from av_mae import lock, model_card, storage, workdir
from av_mae.convert.store import whole_or_nothing
from av_mae.data import copies
from av_mae.errors import StoreError, UserError
from av_mae.export import __main__ as export
from av_mae.export import tables
from av_mae.storage import Folder
from av_mae.train import hosts, local_checkpoint
from av_mae.workdir import collected


@pytest.fixture
def url(request):
    """A folder of its own in a store that all of this process share."""
    return f"memory://{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())}/run"


@pytest.fixture
def away(monkeypatch):
    """Puts fail while the list holds something."""
    monkeypatch.setattr(workdir, "PAUSE", 0.01)
    away, put = [], storage.Folder.put

    def put_when_there(self, *arguments, **options):
        if away:
            raise away[0]
        return put(self, *arguments, **options)

    monkeypatch.setattr(storage.Folder, "put", put_when_there)
    return away


@pytest.mark.parametrize("kind", [UserError, SystemExit, KeyboardInterrupt])
def test_the_end_of_a_run_is_not_hidden_by_a_store_that_is_away(url, away, kind, capsys):
    with pytest.raises(kind, match="^the real end$"), collected(url) as folder:
        (folder / "a.txt").write_text("1")
        away.append(StoreError("does not answer"))
        raise kind("the real end")
    assert f"they are in {folder}, copy them" in capsys.readouterr().err and (folder / "a.txt").exists()


def test_an_interruption_at_the_end_says_where_the_files_are(url, away, capsys):
    with pytest.raises(KeyboardInterrupt), collected(url) as folder:
        (folder / "a.txt").write_text("1")
        away.append(KeyboardInterrupt())
    assert f"they are in {folder}, copy them" in capsys.readouterr().err and (folder / "a.txt").exists()


def test_a_file_that_vanishes_while_others_are_put(url, monkeypatch, capsys):
    with collected(url) as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(name)
        stamps = workdir.Mirror._stamps

        def stamped(self):
            found = stamps(self)
            (folder / "b").unlink(missing_ok=True)
            return found

        monkeypatch.setattr(workdir.Mirror, "_stamps", stamped)
        workdir.push()
        assert Folder(url).files() == ["a", "c"]
    assert not capsys.readouterr().err


def test_a_file_that_grows_while_it_is_put(url, monkeypatch):
    """Of 50 MB and more the driver reads parts: those would not fit the size that it has told the store."""
    put, sizes = storage.Folder.put, []

    def growing(self, file, name, keep=False):
        sizes.append(os.stat(file).st_size)
        with open(folder / "metrics.jsonl", "a") as metrics:
            metrics.write("2")
        sizes.append(os.stat(file).st_size)
        put(self, file, name, keep)

    with collected(url) as folder:
        (folder / "metrics.jsonl").write_text("1")
        with monkeypatch.context() as patch:
            patch.setattr(storage.Folder, "put", growing)
            workdir.push()
        assert sizes == [1, 1] and Folder(url).read("metrics.jsonl") == b"1"
    assert Folder(url).read("metrics.jsonl") == b"12"
    assert Folder(url).files() == ["metrics.jsonl"]


def test_a_bucket_that_is_gone_for_a_while_ends_no_thread(url, away, capsys, monkeypatch):
    monkeypatch.setattr(workdir, "EVERY", 0.02)
    with collected(url) as folder:
        away.append(UserError("there is no such bucket"))
        (folder / "a").write_text("1")
        threading.Event().wait(0.3)
        assert any(thread.name == "mirror" for thread in threading.enumerate())
        away.clear()
    assert "answers again" in capsys.readouterr().err and Folder(url).files() == ["a"]


def with_objects(monkeypatch, *names):
    """Stores list further objects, without content, of these names in the folder."""
    system = Folder("memory://x")._system
    find = type(system).find

    def found(self, path, detail=False, **options):
        marks = {f"{path}/{name}": {"name": f"{path}/{name}", "size": 0, "type": "file"} for name in names}
        known = find(self, path, detail=True, **options) | marks
        return known if detail else list(known)

    monkeypatch.setattr(type(system), "find", found)


def test_marks_of_folders_are_no_files(url, tmp_path, monkeypatch):
    """Consoles and mounts of stores make an empty object 'folder/' for each folder."""
    Folder(url).write("sub/a.json", b"1")
    with_objects(monkeypatch, "", "sub/")
    assert Folder(url).files() == list(Folder(url).details()) == ["sub/a.json"]
    with collected(url) as folder:
        assert (folder / "sub" / "a.json").read_text() == "1"
    Folder(url).write("dataset_info.json", b"")
    copies.copy_sets([url], str(tmp_path))
    assert (copies.folder_of(url) / "sub" / "a.json").read_text() == "1"


def test_an_object_beside_a_folder_of_its_name(url, monkeypatch):
    Folder(url).write("a", b"1")
    with_objects(monkeypatch, "a/b")
    with pytest.raises(UserError, match="object 'a/b' can be no file here"), collected(url):
        pass


def test_an_object_that_is_removed_while_others_are_fetched(url, monkeypatch):
    Folder(url).write("a", b"1")
    with_objects(monkeypatch, "gone.json")
    with collected(url) as folder:
        assert [path.name for path in folder.iterdir()] == ["a"]
    assert Folder(url).read("a") == b"1"


def test_a_file_on_a_store_is_not_written_over(url):
    folder = Folder(url)
    folder.write("model.safetensors", b"1")
    for taken in (f"{url}/model.safetensors", url):
        with pytest.raises(UserError, match="is there already"), whole_or_nothing(taken):
            pass


@pytest.mark.parametrize("name", ["run?", "run*", "run[12]", "runs//a", "runs/./a", "a/../b"])
def test_names_that_stand_for_other_folders(name):
    """`rm` of a driver takes them for patterns: old checkpoints of other runs would go."""
    with pytest.raises(UserError, match="name another folder"):
        workdir.make_workdir(f"gs://bucket/{name}")


def test_no_room_for_what_is_there_already(url, monkeypatch, tmp_path):
    Folder(url).write("a", b"1" * 2000)
    usage = workdir.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(workdir.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match="another TMPDIR"), collected(url):
            pass
    with pytest.raises(UserError, match="No space left on device; make room"), storage.reached(url):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_local_checkpoints_come_after_the_metrics_up_to_them(url, tmp_path):
    """A run that goes on from one has those lines, although it was killed before the next minute."""
    with collected(url) as folder:
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        local_checkpoint.LocalCheckpoints(tmp_path, "run")._write(1, {"x": np.zeros(1)}, {})
        assert Folder(url).read("metrics.jsonl")


def test_evaluations_made_during_a_run_stay_in_its_card(tmp_path, url, monkeypatch):
    """They are written to the store, past the files that the run began with."""
    with collected(url) as folder:
        Folder(url).write("card.json", b'{"evaluations": {"there": {}}}')
        saved = []
        monkeypatch.setattr(workdir, "as_path", lambda url: tmp_path)  # memory:// holds no checkpoints
        (tmp_path / "card.json").write_bytes(Folder(url).read("card.json"))
        monkeypatch.setattr(model_card, "find_checkpoint", lambda _: tmp_path)
        monkeypatch.setattr(model_card.loading, "checksum", lambda _: "")
        monkeypatch.setattr(model_card.recipes, "to_dict", lambda _: {})
        monkeypatch.setattr(model_card, "_save", lambda folder, card: saved.append(card))
        model_card.write_card(folder, None, 1)
    assert saved[0]["evaluations"] == {"there": {}}


def test_messages_name_the_store_and_not_the_folder_here(url):
    Folder(url).write("other", b"1")
    with pytest.raises(UserError, match=f"^--output={url} holds other files"), collected(url) as folder:
        tables.begin_output(folder, {}, {})
    with collected(url) as folder:
        assert workdir.named(folder / "a") == f"{url}/a" and workdir.named(pathlib.Path("a")) == "a"


def test_of_several_processes_the_first_writes_what_an_export_is(url, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with collected(url) as folder:
        tables.begin_output(folder, {}, {})
    assert Folder(url).files() == []


def test_an_export_to_a_store_that_does_not_answer(monkeypatch):
    def unreachable(_):
        raise StoreError("does not answer")

    monkeypatch.setattr(export, "held_by_run", unreachable)
    arguments = export.parse(["--checkpoint=c", "--data=d", "--output=gs://b/o"])
    with pytest.raises(StoreError, match="^does not answer$"):
        export.embed(arguments)


def test_one_of_several_processes_whose_store_does_not_answer(monkeypatch, capsys):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="75"), hosts._told(bytearray(2), argparse.Namespace()):
        raise StoreError("does not answer")
    assert capsys.readouterr().err == "error: does not answer\n"


def test_what_a_lock_names_is_printed_in_its_line():
    text = json.dumps(lock._describe() | {"host": "a\x1b[2J\nerror: b"})
    assert lock._parse(text)["host"] == r"a\x1b[2J\nerror: b"


def test_copies_of_what_vanishes_and_of_what_was_left_half_written(url, tmp_path, monkeypatch):
    Folder(url).write("dataset_info.json", b"1")
    copies.copy_sets([url], str(tmp_path))
    copy = copies.folder_of(url)
    copies._copies.clear()
    copies._locks.pop().close()
    (copy / copies.MANIFEST).unlink()
    (copy / ".a.0123.part").write_text("left")
    with pytest.raises(UserError, match="data.local=gs://b"):
        copies.copy_sets([url], "gs://b")
    copies.copy_sets([url], str(tmp_path))
    assert not list(copy.glob("*.part"))
    with_objects(monkeypatch, "b")
    copies._copies.clear()
    with pytest.raises(StoreError, match="was removed while the set was copied"):
        copies.copy_sets([url], str(tmp_path))


def test_digests_that_are_no_md5_tell_nothing_of_other_stores(tmp_path, monkeypatch):
    """Times of change may be alike in two places."""
    urls = [f"memory://digests-{number}/set" for number in range(2)]
    for number, url in enumerate(urls):
        Folder(url).write("dataset_info.json", b"%d" % number)
    details = {"dataset_info.json": {"size": 1, "digest": "2026-01-01", "md5": ""}}
    monkeypatch.setattr(storage.Folder, "details", lambda _: {name: dict(entry) for name, entry in details.items()})
    copies.copy_sets(urls, str(tmp_path))
    assert [(copies.folder_of(url) / "dataset_info.json").read_text() for url in urls] == ["0", "1"]
