"""The viewer: what it shows of a run, that it escapes and refuses what it must, and that only this machine sees it."""

import contextlib
import html.parser
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse

import numpy as np
import pytest
import soundfile

from av_mae import plots as pictures
from av_mae.errors import UserError
from av_mae.view import __main__ as view
from av_mae.view import page
from av_mae.view.page import Refused, Workdir
from av_mae.view.server import Server

HOSTILE = "<script>alert('x')</script>&\"$\\frac{"


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def sources(self, tag):
        return [attributes["src"] for name, attributes in self.tags if name == tag]


def write_run(folder, steps=3):
    """A run with metrics, reconstructions, a heat map, separated sounds and results, some of them hostile."""
    (folder / "images" / "separation").mkdir(parents=True)
    lines = [json.dumps({"step": 10 * n, "loss": 1 / (n + 1), HOSTILE: n, "seen": True}) for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "[1, 2]", '{"step": 40, "lo']))
    (folder / "config.json").write_text(json.dumps({"steps": 30, "data": {"path": HOSTILE}}))
    for n in range(1, steps + 1):
        pictures.save_png(folder / "images" / f"step_{10 * n:08d}.png", np.full((4, 6, 3), n, np.uint8))
    pictures.save_png(folder / "images" / "localization.png", np.zeros((5, 5, 3), np.uint8))
    for kind in ("mixture", "estimate", "truth"):
        soundfile.write(folder / "images" / "separation" / f"clip 1#_{kind}.wav", np.zeros(800), 8000)
    figures = {
        "sdr": {"value": 7.1663, "low": 6.3041, "high": 8.0312, "left_out": {"silent": 2}},
        "swapped/sdr": {"value": None, "low": None, "high": None, "left_out": {"nothing left": 9}},
        HOSTILE: {"value": 1, "low": 0, "high": 2},
    }
    (folder / "results.json").write_text(json.dumps(figures | {"clips": 20, "skipped": 1, "skipped_clips": [HOSTILE]}))
    return folder


@contextlib.contextmanager
def serving(folder):
    with Server(Workdir(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, target, method="GET", **headers):
    """status, headers and body of one request, its target sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest(method, target, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("view") / "run")
    write_run(folder / "tasks" / "second run")
    (folder.parent / "secret.png").write_bytes(b"secret")
    (folder / "images" / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "localization.png")
    (folder / "images" / "folder").symlink_to(folder.parent)
    os.mkfifo(folder / "images" / "pipe.png")
    with serving(folder) as server:
        yield server


def test_page_shows_curves_pictures_sounds_and_figures(server):
    status, headers, body = ask(server, "/")
    shown = Elements(body.decode())
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    images = shown.sources("img")
    assert images[0] == "/curves/"
    names = [urllib.parse.unquote(path).removeprefix("/file/images/") for path in images[1:]]
    assert names == [*(f"step_{10 * n:08d}.png" for n in (1, 2, 3)), "in.png", "localization.png"]
    assert [text for text in shown.texts if text.startswith("step ")] == ["step 10", "step 20", "step 30"]
    sounds = shown.sources("audio")
    assert sounds == [f"/file/images/separation/clip%201%23_{kind}.wav" for kind in ("mixture", "estimate", "truth")]
    for path in images + sounds:
        status, headers, body = ask(server, path)
        kind = {".png": "image/png", ".wav": "audio/wav"}.get(path[-4:], "image/svg+xml")
        assert (status, headers["Content-Type"]) == (200, kind) and body
    texts = " ".join(shown.texts)
    assert "Step 30 of 30" in texts and "20 clips measured, 1 skipped" in texts
    assert "7.166 [6.304, 8.031] (without 2 silent)" in texts and "– (9 nothing left)" in texts
    assert "metrics.jsonl: 2 lines are no metrics of a step" in texts


def test_other_runs_have_their_own_pages(server):
    links = [attributes["href"] for tag, attributes in Elements(ask(server, "/")[2].decode()).tags if tag == "a"]
    assert links == ["/run/", "/run/tasks/second%20run"]
    shown = Elements(ask(server, links[1])[2].decode())
    assert all(
        path.startswith(("/file/tasks/second%20run/", "/curves/tasks/second%20run"))
        for path in shown.sources("img") + shown.sources("audio")
    )
    assert ask(server, shown.sources("img")[0])[0] == 200


def test_every_text_is_escaped_and_no_script_is_there(server):
    shown = Elements(ask(server, "/")[2].decode())
    assert {tag for tag, _ in shown.tags} == {
        "html",
        "head",
        "meta",
        "title",
        "link",
        "body",
        "nav",
        "ul",
        "li",
        "a",
        "main",
        "h1",
        "h2",
        "p",
        "section",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
        "figure",
        "figcaption",
        "audio",
        "details",
        "summary",
        "pre",
    }
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert shown.texts.count(HOSTILE) == 3  # last value, figure, skipped clip
    assert HOSTILE in shown.tags[[tag for tag, _ in shown.tags].index("img")][1]["alt"]
    curves = ask(server, "/curves/")[2].decode()
    assert "<script" not in curves and "<path" in curves


@pytest.mark.parametrize(
    "target",
    [
        "/file/../secret.png",
        "/file/images/../../secret.png",
        "/file/%2e%2e/secret.png",
        "/file/images%2f..%2f..%2fsecret.png",
        "/file/..%5csecret.png",
        "/file//etc/hostname",
        "/file/%2fetc/hostname.png",
        "/file/images/out.png",
        "/file/images/folder/secret.png",
        "/file/images/pipe.png",
        "/file/images/step_00000010.png%00.png",
        "/file/images",
        "/file/config.json",
        "/file/images/none.png",
        "/file/",
        "/run/..",
        "/curves/../run",
        "/run/images",
        "/etc/passwd",
        "//secret.png",
        "/file/" + "a" * 5000 + ".png",
    ],
)
def test_nothing_else_is_served(server, target):
    started = time.monotonic()
    status, _, body = ask(server, target)
    assert status == 404 and b"secret" != body and b"root:" not in body
    assert time.monotonic() - started < 5


def test_read_only(server):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(server, "/", method)[0] == 501
    status, headers, body = ask(server, "/", "HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 500 and not body


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(server, "/", Host=name)[0] == 404
    for name in ("localhost", f"localhost:{server.server_port}", f"127.0.0.1:{server.server_port}"):
        assert ask(server, "/", Host=name)[0] == 200
    policy = ask(server, "/")[1]["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "script" not in policy and "http" not in policy


def test_players_get_the_range_that_they_ask_for(server):
    target = "/file/images/separation/clip%201%23_truth.wav"
    whole = ask(server, target)[2]
    for asked, status, expected in (
        ("bytes=0-9", 206, whole[:10]),
        ("bytes=100-", 206, whole[100:]),
        ("bytes=1600-999999", 206, whole[1600:]),
        ("bytes=999999-", 416, b""),
        ("bytes=5-2", 416, b""),
        ("lines=1-2", 200, whole),
    ):
        found = ask(server, target, Range=asked)
        assert (found[0], found[2]) == (status, expected)
    assert ask(server, target, Range="bytes=3-4")[1]["Content-Range"] == f"bytes 3-4/{len(whole)}"


def test_many_pictures_are_spread_and_all_can_be_had(tmp_path):
    write_run(tmp_path, steps=40)
    workdir = Workdir(tmp_path)
    run = workdir.read("")
    some, every = (Elements(page.run_page(run, [""], "run", whole).decode()) for whole in (False, True))
    steps = [path for path in some.sources("img") if "step_" in path]
    assert len(steps) == 12 and steps[0].endswith("00000010.png") and steps[-1].endswith("00000400.png")
    assert len([path for path in every.sources("img") if "step_" in path]) == 40
    assert "12 of 40, evenly spread; " in some.texts


def test_spread_keeps_the_ends_and_the_order():
    for count in (13, 50, 997):
        chosen = page.spread(list(range(count)), 12)
        assert len(set(chosen)) == 12 and chosen == sorted(chosen) and (chosen[0], chosen[-1]) == (0, count - 1)
    assert page.spread([1, 2], 12) == [1, 2]


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("results.json", "{", "results.json is no JSON"),
        ("results.json", "[" * 100_000, "results.json is no JSON"),
        ("config.json", "[]", "config.json must hold an object, it holds list"),
        ("metrics.jsonl", "\udc80".encode("utf-8", "surrogateescape"), "metrics.jsonl cannot be read"),
        (
            "metrics.jsonl",
            '{"step": NaN}\n{"step": 1e999, "loss": 1}\n{"step": 1, "loss": 1' + "0" * 400 + "}",
            "2 lines are no metrics",
        ),
    ],
)
def test_broken_files_are_named_and_the_rest_is_shown(tmp_path, name, text, problem):
    write_run(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with serving(tmp_path) as server:
        status, _, body = ask(server, "/")
        shown = Elements(body.decode())
        assert status == 200 and any(problem in line for line in shown.texts) and len(shown.sources("audio")) == 3


def test_files_of_a_run_that_are_links_out_of_the_folder_are_not_read(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(tmp_path / "secret.json")
    read = Workdir(run).read("")
    assert read.config == {} and read.problems[0].startswith("config.json cannot be read: the path leads out")


def test_runs_are_found_but_not_in_checkpoints_or_data(tmp_path):
    for place in ("b", "a/c", "checkpoints/1", "data/d", ".hidden", "a/c/e/too_deep"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "metrics.jsonl").touch()
    assert Workdir(tmp_path).runs() == ["a/c", "b"]
    with pytest.raises(Refused, match="there is no run 'data/d'"):
        Workdir(tmp_path).read("data/d")


def test_bad_options_are_refused(tmp_path):
    for folder, message in ((tmp_path / "none", "must be a folder"), (tmp_path, "holds no run: neither it nor")):
        with pytest.raises(UserError, match=message):
            view.main([f"--workdir={folder}"])
    workdir = Workdir(write_run(tmp_path / "run"))
    with pytest.raises(UserError, match="between 0 .* and 65535"):
        view.open_server(workdir, 65536)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="name another, or 0"):
            view.open_server(workdir, taken.getsockname()[1])


def test_a_folder_whose_runs_went_away_says_so(tmp_path):
    write_run(tmp_path / "run")
    with serving(tmp_path) as server:
        for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        status, _, body = ask(server, "/")
        assert status == 404 and b"holds no run any more" in body
