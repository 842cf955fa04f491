"""The viewer's server: the loopback interface only, GET and HEAD only, no scripts, nothing from elsewhere."""

import functools
import http.server
import importlib.resources
import io
import re
import threading
import urllib.parse
from http import HTTPStatus

from matplotlib.backends.backend_svg import FigureCanvasSVG

from av_mae import plots as pictures
from av_mae.view import page
from av_mae.view.page import SHOWN_FILES, Refused, Run, Workdir

ADDRESS = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # a page of another host that resolves to this machine is refused
MOST_POINTS = 2000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; media-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_drawing = threading.Lock()  # matplotlib draws in one thread at a time


class Server(http.server.ThreadingHTTPServer):
    """Serves one work directory at http://127.0.0.1:port; port 0 takes a free one. Raises OSError if it is taken."""

    daemon_threads = True

    def __init__(self, workdir: Workdir, port: int):
        super().__init__((ADDRESS, port), functools.partial(Handler, workdir))

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: `/`, `/run/NAME`, `/curves/NAME`, `/file/PATH` and the style sheet."""

    server_version, sys_version = "av_mae", ""
    timeout = 60  # seconds for a client that says nothing

    def __init__(self, workdir: Workdir, *arguments):
        self.workdir = workdir
        super().__init__(*arguments)

    def do_GET(self) -> None:
        try:
            self._check_host()
            self._answer()
        except Refused as error:
            self._send(page.message_page("Not shown", str(error)), "text/html; charset=utf-8", HTTPStatus.NOT_FOUND)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        """Nothing: requests are no news."""

    def _check_host(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name not in NAMES:
            raise Refused("this page is for this machine alone: open it as localhost or 127.0.0.1")

    def _answer(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        kind, _, path = parts.path.removeprefix("/").partition("/")
        path = urllib.parse.unquote(path, errors="surrogateescape")
        if parts.path == "/view.css":
            self._send(importlib.resources.files("av_mae.assets").joinpath("view.css").read_bytes(), "text/css")
        elif kind == "file":
            self._send_file(path)
        elif kind == "curves":
            self._send(curves_svg(self.workdir.read(path)), "image/svg+xml")
        elif kind == "run" or parts.path == "/":
            self._send_run(path, whole=parts.query == "all", first=parts.path == "/")
        else:
            raise Refused("there is no such page")

    def _send_run(self, name: str, whole: bool, first: bool) -> None:
        names = self.workdir.runs()
        if not names:
            raise Refused(f"{self.workdir.root} holds no run any more")
        run = self.workdir.read(names[0] if first else name)
        self._send(page.run_page(run, names, self.workdir.root.name, whole), "text/html; charset=utf-8")

    def _send_file(self, path: str) -> None:
        """A file, or the range of it that a player asks for."""
        real = self.workdir.file(path)
        content = real.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(content, SHOWN_FILES[real.suffix], more={"Accept-Ranges": "bytes"})
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start > end:
            self._send(
                b"",
                SHOWN_FILES[real.suffix],
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                {"Content-Range": f"bytes */{len(content)}"},
            )
            return
        self._send(
            content[start : end + 1],
            SHOWN_FILES[real.suffix],
            HTTPStatus.PARTIAL_CONTENT,
            {"Content-Range": f"bytes {start}-{end}/{len(content)}"},
        )

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, more: dict | None = None) -> None:
        self.send_response(status)
        headers = HEADERS | {"Content-Type": kind, "Content-Length": str(len(content))} | (more or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def curves_svg(run: Run) -> bytes:
    """All curves of a run as SVG, 2,000 points each at most. Raises Refused where it has none."""
    if not run.curves:
        raise Refused(f"the run {run.name!r} has no metrics yet")
    file = io.BytesIO()
    with _drawing:
        figure = pictures.curve_figure(page.spread(run.metrics, MOST_POINTS), run.curves)
        FigureCanvasSVG(figure).print_svg(file)
    return file.getvalue()
