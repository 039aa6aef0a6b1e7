"""A web server on this machine whose manners a test decides."""

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Served:
    """A file and how it is served; lists are used up from the front, one entry a request.

    Attributes:
        content: The bytes.
        tag: Its ETag, or None.
        date: Its Last-Modified, or None.
        cuts: After how many bytes the connection drops; None for not at all.
        status: Status codes in place of the file; None for the file.
        ranges: Whether parts are served.
        conditional: Whether If-Range is heeded.
        length: What Content-Length claims in place of the truth; "" for no such header.
        pause: Event to wait for after half of the file.
    """

    content: bytes
    tag: str | None = '"one"'
    date: str | None = None
    cuts: list[int | None] = field(default_factory=list)
    status: list[int | None] = field(default_factory=list)
    ranges: bool = True
    conditional: bool = True
    length: str | None = None
    pause: threading.Event | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        served = self.server.find(self)
        status = served.status.pop(0) if served and served.status else None
        if served is None or status:
            self._refuse(status or 404, served.headers if served else {})
            return
        start = self._start(served)
        body = served.content[start:]
        if start and not body:
            self._refuse(416, {})
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}"
            )
        headers = {"ETag": served.tag, "Last-Modified": served.date, **served.headers}
        headers["Content-Length"] = str(len(body)) if served.length is None else served.length
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.server.sent.append(self.path)
            self._send(served, body)

    def _refuse(self, status, headers):
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _start(self, served):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        stale = served.conditional and condition not in (None, served.tag, served.date)
        return int(asked[1]) if asked and served.ranges and not stale else 0

    def _send(self, served, body):
        cut = served.cuts.pop(0) if served.cuts else None
        if served.pause:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            served.pause.wait(20)
            body = body[len(body) // 2 :]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` (path -> :class:`Served`).

    ``requests`` lists paths and headers asked for, ``sent`` the paths whose content was sent.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def find(self, handler) -> Served | None:
        return self.files.get(handler.path)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
