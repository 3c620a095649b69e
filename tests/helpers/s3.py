"""An S3 server in this process (moto), whose answers can be made to fail on their way in the ways that networks do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import s3fs
from moto.backends import get_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
Fault = Callable[[dict[str, Any], Callable[..., Any], Callable[[], bytes]], Iterable[bytes]]
"""Answers a request in the place of the server: gets the WSGI environment, start_response, and what the server says."""

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def reset(environ: dict[str, Any], start: Callable[..., Any], answer: Callable[[], bytes]) -> Iterable[bytes]:
    """The connection is reset in the place of an answer."""
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def busy(environ: dict[str, Any], start: Callable[..., Any], answer: Callable[[], bytes]) -> Iterable[bytes]:
    """503, as S3 says where it is asked too often."""
    start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [_SLOW_DOWN]


def denied(environ: dict[str, Any], start: Callable[..., Any], answer: Callable[[], bytes]) -> Iterable[bytes]:
    """403."""
    start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_DENIED)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [_DENIED]


def cut(environ: dict[str, Any], start: Callable[..., Any], answer: Callable[[], bytes]) -> Iterable[bytes]:
    """The second half of the body never comes, and the connection ends."""
    body = answer()
    start("200 OK", [("Content-Length", str(len(body))), ("Connection", "close")])
    return [body[: len(body) // 2]]


def slow(environ: dict[str, Any], start: Callable[..., Any], answer: Callable[[], bytes]) -> Iterable[bytes]:
    """The answer stalls for longer than a client waits."""
    time.sleep(1.5)
    return busy(environ, start, answer)


class Server:
    """The server, with a bucket.

    Attributes:
        faults: by the end of a path, what happens to the next requests for it.
        always: what happens to every request; ``None``: nothing.
        gets: how often each object was asked for, by its path.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._lock = threading.Lock()
        self.faults: dict[str, deque[Fault]] = {}
        self.always: Fault | None = None
        self.gets: Counter[str] = Counter()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """The server at work, and fsspec set to it."""
        self._thread.start()
        options = {
            "endpoint_url": self.url,
            "key": "key",
            "secret": "secret",
            "config_kwargs": {"read_timeout": 1, "retries": {"total_max_attempts": 1}},
        }
        before = fsspec.config.conf.get("s3")
        fsspec.config.conf["s3"] = options
        try:
            yield self
        finally:
            fsspec.config.conf.pop("s3")
            if before is not None:
                fsspec.config.conf["s3"] = before
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def reset(self) -> s3fs.S3FileSystem:
        """Forget all objects and all faults, and make an empty bucket."""
        self.faults.clear()
        self.gets.clear()
        self.always = None
        get_backend("s3").reset()
        system, _ = fsspec.url_to_fs(f"s3://{BUCKET}")
        system.invalidate_cache()
        system.mkdir(BUCKET)
        return system

    def upload(self, folder: Path, name: str) -> str:
        """Put a folder into the bucket under a name; gives its URL."""
        system, _ = fsspec.url_to_fs(f"s3://{BUCKET}")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                system.pipe_file(f"{BUCKET}/{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        with self._lock:
            if environ["REQUEST_METHOD"] == "GET" and not environ["QUERY_STRING"]:
                self.gets[path] += 1
            waiting = next((faults for name, faults in self.faults.items() if path.endswith(name) and faults), None)
            fault = waiting.popleft() if waiting else self.always
        if fault is None:
            return self._app(environ, start)
        return fault(environ, start, lambda: b"".join(self._app(environ, lambda *args, **kwargs: None)))
