"""An S3 store on this machine, behind a proxy that fails as a store on a network does."""

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"
SLOW_DOWN, BROKEN = (503, "SlowDown"), (500, "InternalError")
DENIED, CUT = (403, "InvalidAccessKeyId"), "cut"
PER_CONNECTION = {"connection", "transfer-encoding", "keep-alive", "date", "server"}

Fault = tuple[int, str] | str | None
"""A status and S3's code for it; CUT: the connection ends within the body; None: all is well."""
Behaviour = Callable[[int, int], Fault]
"""The fault of a request by its number, from 0, and by how often the same one was made before."""


def always(fault: Fault, after: int = 0) -> Behaviour:
    return lambda number, repeats: fault if number >= after else None


def at_first(*faults: Fault) -> Behaviour:
    """Every request fails when it is first made, in each of these ways in turn."""
    return lambda number, repeats: None if repeats else faults[number % len(faults)]


class Proxy:
    """What becomes of each request: how many there were since `behave`, how many of them failed."""

    def __init__(self, store: tuple[str, int]) -> None:
        self.store, self._lock = store, threading.Lock()
        self.behave()

    def behave(self, behaviour: Behaviour | None = None) -> None:
        with self._lock:
            self.requests = self.failed = 0
            self._behaviour = behaviour or always(None)
            self._made: Counter[str] = Counter()

    def next(self, request: str) -> Fault:
        with self._lock:
            fault = self._behaviour(self.requests, self._made[request])
            self.requests += 1
            self.failed += fault is not None
            self._made[request] += 1
        return fault


def ask(store: tuple[str, int], method: str, path: str, body: bytes = b"", headers=None):
    """Return status, headers and body of a response."""
    connection = HTTPConnection(*store)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    found = response.status, response.getheaders(), response.read()
    connection.close()
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def forward(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # what is left of a body that was cut is asked for as another range with the same end
        end = self.headers.get("Range", "").rpartition("-")[2]
        fault = self.proxy.next(f"{self.command} {self.path} {end}")
        if isinstance(fault, tuple):
            status, headers = fault[0], []
            body = f"<Error><Code>{fault[1]}</Code></Error>".encode()
        else:
            given = self.proxy.store, self.command, self.path, sent, dict(self.headers)
            status, headers, body = ask(*given)
        self.send_response_only(status)
        headers = {k: v for k, v in headers if k.lower() not in PER_CONNECTION}
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == CUT else body)
        if fault == CUT:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = forward

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path, prefix: str) -> Iterator[tuple[str, Proxy]]:
    """An endpoint's URL, and its faults, with a folder's files at a prefix of BUCKET."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    proxy = Proxy(store.get_host_and_port())
    handler = type("ProxyHandler", (Handler,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert ask(proxy.store, "PUT", f"/{BUCKET}")[0] == 200
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                url = f"/{BUCKET}/{prefix}/{path.relative_to(folder)}"
                assert ask(proxy.store, "PUT", url, path.read_bytes())[0] == 200
        yield f"http://127.0.0.1:{server.server_port}", proxy
    finally:
        server.shutdown()
        server.server_close()
        store.stop()
