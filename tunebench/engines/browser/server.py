"""Serves the page in `tunebench/browser` and a plan's folder to browsers of this machine, with range requests."""

from __future__ import annotations

import functools
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from tunebench.errors import TuneBenchError

PAGE = Path(__file__).parent
HOST = "127.0.0.1"  # browsers have WebGPU on this machine's own addresses without https
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wgsl": "text/plain; charset=utf-8",
}
PART_BYTES = 1 << 20


class PageServer:
    """The page at /, the folder at /plan/, until closed."""

    def __init__(self, folder: Path = PAGE, port: int = 0) -> None:
        try:
            self._server = _Server((HOST, port), functools.partial(_Handler, folder))
        except OSError as error:
            raise TuneBenchError(f"cannot serve on port {port} ({error.strerror}).", "Choose another --port.") from None
        self.url = f"http://{HOST}:{self._server.server_port}/"

    def serve(self) -> None:
        """Answer requests until closed, or interrupted."""
        self._server.serve_forever(poll_interval=0.1)

    def __enter__(self) -> PageServer:
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A thread for each connection."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A page that was left is no error; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files below the two folders, whole or one range of it."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *given: object) -> None:
        self._folder = folder
        super().__init__(*given)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *words: object) -> None:
        """Nothing is printed for each request."""

    def _answer(self, with_body: bool) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0]
        path = _find(self.path, self._folder) if name in (HOST, "localhost") else None  # no other site's pages
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size = path.stat().st_size
        asked = self.headers.get("Range")
        span = _range(asked, size) if asked else (0, size)
        if span is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin, end = span
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            with path.open("rb") as file:
                file.seek(begin)
                self._send(file, end - begin)

    def _send(self, file: BinaryIO, left: int) -> None:
        while left > 0 and (part := file.read(min(left, PART_BYTES))):
            self.wfile.write(part)
            left -= len(part)


def _find(address: str, folder: Path) -> Path | None:
    """The file that an address means; None for whatever is none, or lies outside."""
    try:
        name = unquote(urlsplit(address).path).lstrip("/") or "index.html"
        first, _, rest = name.partition("/")
        root, inner = (folder, rest) if first == "plan" and rest else (PAGE, name)
        path = (root / inner).resolve()
        return path if path.is_relative_to(root.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # a name too long, or with a NUL; or no address
        return None


def _range(words: str, size: int) -> tuple[int, int] | None:
    """Begin and end of a range of bytes; None where it is none, or nothing of it is there."""
    match = re.fullmatch(r"bytes=([0-9]{0,30})-([0-9]{0,30})", words.strip())
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    return (begin, end) if begin < end else None
