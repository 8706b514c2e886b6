"""A proxy before a real policy server, which spoils the answers that a test names. The server itself does its work."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "error",  # 500, and the server never hears of it
    "loris",  # the server's answer, a byte every 0.2 s
    "cut",  # half of the server's answer, then a reset
    "hang",  # accepted, never answered
)


@dataclass
class Proxy:
    """What it does and what it saw.

    Attributes:
        url: where it listens.
        fault: one of `FAULTS`; None passes everything on.
        path: of the requests that it spoils.
        times: how many of them; then all is well.
        seen: method and path of each request.
    """

    url: str
    fault: str | None = None
    path: str = ""
    times: int = 10**9
    seen: list[tuple[str, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spoil(self, fault: str, path: str, times: int = 10**9) -> None:
        self.fault, self.path, self.times = fault, path, times

    def heal(self) -> None:
        self.fault = None

    def sent(self, path: str) -> int:
        """How often `path` was asked for."""
        return [path for _, path in self.seen].count(path)

    def take(self, method: str, path: str) -> str | None:
        """Note a request; the fault that it meets."""
        with self.lock:
            self.seen.append((method, path))
            if self.fault is None or path != self.path or not self.times:
                return None
            self.times -= 1
            return self.fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is what the tests are about."""


@contextmanager
def before(port: int, at: int = 0) -> Iterator[Proxy]:
    """A proxy before the server at `port` of this machine, listening `at` another; 0: of the system's choice."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def do_GET(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            content = self.rfile.read(length)
            fault = proxy.take(self.command, self.path)
            if fault == "hang":
                proxy.over.wait()
                return
            if fault == "error":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                connection.request(self.command, self.path, content or None, dict(self.headers))
                answer = connection.getresponse()
                body = answer.read()
            finally:
                connection.close()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() != "transfer-encoding"]
            head = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in kept)]
            if "content-length" not in {name.lower() for name, _ in kept}:
                head.append(f"Content-Length: {len(body)}")
            whole = "\r\n".join([*head, "Connection: close", "", ""]).encode() + body
            if fault == "loris":
                for at in range(len(whole)):
                    if proxy.over.wait(0.2):
                        break
                    self.wfile.write(whole[at : at + 1])
            elif fault == "cut":
                self.wfile.write(whole[: len(whole) - len(body) // 2 - 1])
                self.wfile.flush()
                time.sleep(0.05)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.wfile.write(whole)

        do_POST = do_GET

    server = _Server(("127.0.0.1", at), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        server.shutdown()
        server.server_close()
