"""A folder is held by one run at a time: refusal, takeover of what the dead left, races."""

import errno
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from av_mae import lock
from av_mae.errors import RESTART, UserError
from av_mae.lock import LOCK, held

HOLD = """
import sys, time
from av_mae.errors import UserError
from av_mae.lock import held

try:
    with held(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except UserError as error:
    print(error, flush=True)
"""


def hold(folder: pathlib.Path, seconds: float) -> subprocess.Popen:
    """A process that holds the folder so long, or says why not."""
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_the_second_says_who_holds_the_folder(tmp_path):
    first = hold(tmp_path, 60)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError) as refused, held(tmp_path):
        pass
    message = (
        rf"^{re.escape(str(tmp_path))} is held by process {first.pid} on {re.escape(os.uname().nodename)} since 20"
    )
    assert re.search(message, str(refused.value)) and "\n" not in str(refused.value)
    first.kill()
    first.wait()
    with held(tmp_path):  # what a killed process left counts no more
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"held by process {os.getpid()} "), held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_holds_it(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(lock._describe() | {"pid": 2**22 + 1}))  # stale, for all of them
    processes = [hold(tmp_path, 8) for _ in range(6)]
    said = [process.stdout.readline() for process in processes]
    assert said.count("held\n") == 1
    assert sum("is held by process" in line for line in said) == 5
    for process in processes:
        process.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, silent",
    [
        ({"system": "another boot", "host": "other"}, lock.STALE + 5),
        ({"system": "another boot", "host": "other"}, -1e5),  # a time to come
        ({"started": "1"}, 0),  # the number of the process came again
        ({"pid": "?"}, 0),
    ],
)
def test_who_holds_nothing_any_more(tmp_path, change, silent):
    path = tmp_path / LOCK
    path.write_text(json.dumps(lock._describe() | change))
    os.utime(path, (time.time() - silent,) * 2)
    with held(tmp_path):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_of_another_machine_shows_whether_it_lives(tmp_path, lives, monkeypatch, capsys):
    """Its last sign of life is seconds old, as after a kill -9 and a restart elsewhere: another one comes, or none."""
    path = tmp_path / LOCK
    path.write_text(json.dumps(lock._describe() | {"system": "another boot", "host": "other"}))
    os.utime(path, (time.time() - lock.STALE + 3,) * 2)
    asleep = time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (lives and os.utime(path), asleep(seconds)))
    if lives:
        with pytest.raises(UserError, match="on other since"), held(tmp_path):
            pass
    else:
        with held(tmp_path):
            assert json.loads(path.read_text())["host"] != "other"
    assert "waiting up to 90 s to see" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, b"\xff\xfe{", '{"pid": ' + "9" * 5000 + "}"],
    ids=lambda content: repr(content[:9]),
)
def test_a_damaged_lock_holds_nobody(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content if isinstance(content, bytes) else content.encode())
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field, value",
    [("since", value) for value in ("x", 1e300, float("nan"), [1], None)]
    + [("pid", value) for value in (10**30, -1, 0, "1; x", float("inf"))],
)
def test_what_no_run_writes_holds_nobody(tmp_path, field, value):
    (tmp_path / LOCK).write_text(json.dumps(lock._describe() | {"system": "elsewhere", field: value}))
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_in_place_of_the_lock_is_not_written_to(tmp_path, capsys):
    """A folder from elsewhere may hold one that leads to any file."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(precious)
    with held(tmp_path / "run"):
        pass
    assert precious.read_text() == "kept" and "nothing keeps others out of this folder" in capsys.readouterr().err


def test_a_process_that_nobody_waited_for_has_ended(tmp_path):
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    other = lock._describe() | {"pid": process.pid, "started": lock._started(os.getpid())}
    (tmp_path / LOCK).write_text(json.dumps(other))
    assert lock._started(process.pid) == "ended"
    with held(tmp_path):
        pass
    process.wait()


def test_signs_of_life_and_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    ended = []
    monkeypatch.setattr(lock.os, "_exit", lambda status: ended.append(status))
    with held(tmp_path / "new"):
        path = tmp_path / "new" / LOCK
        os.utime(path, (1, 1))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 5 and not ended
        path.write_text(json.dumps(lock._describe() | {"host": "other"}))
        time.sleep(0.3)
    assert set(ended) == {RESTART} and path.exists()  # the other's lock stays


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare", "export"])
def test_every_command_that_writes_leaves_a_held_folder(tmp_path, command, root, monkeypatch):
    monkeypatch.chdir(root)
    arguments = {
        "train": ["--config=configs/demo.py", f"--config.data.path={tmp_path},{tmp_path}", f"--workdir={tmp_path}"],
        "evaluate": ["--config=configs/reconstruction.py", f"--config.init={tmp_path}", f"--workdir={tmp_path}"],
        "prepare": ["--dataset=toy_band", f"--output={tmp_path}", "--clips=2", "--test_clips=2"],
        "export": [f"--checkpoint={tmp_path}", f"--data={tmp_path}", f"--output={tmp_path}"],
    }
    main = importlib.import_module(f"av_mae.{command}.__main__").main
    beside = command == "prepare"  # a demo set takes its folder's place as a whole
    with held(tmp_path, beside):
        with pytest.raises(UserError, match=rf"^{tmp_path} is held by process {os.getpid()} on "):
            main(arguments[command])
        assert [path.name for path in tmp_path.iterdir()] == ([] if beside else [LOCK])


def test_what_cannot_be_written_is_held_with_a_warning(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.FileLock, "take", full)
    with held(tmp_path):
        pass
    assert "cannot be written (No space left on device): nothing keeps others out" in capsys.readouterr().err


def test_an_empty_folder_does_not_stay(tmp_path):
    with pytest.raises(ValueError, match="^$"), held(tmp_path / "new"):
        raise ValueError
    assert not list(tmp_path.iterdir())
