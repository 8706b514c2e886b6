"""Stands in for ``vllm serve`` where a test needs a fault that a real server cannot be made to have. No vLLM.

python tests/stand_in_server.py --port 8000 --mode slow --after 1
"""

import argparse
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from r1zero.serving import POLICY_ROUTE, TOKEN, VERSION_HEADER

# How the whole server fails, and how its answers to POST do.
MODES = ("ok", "slow", "dies", "refuses", "ignores-sigterm", "no-token")
FAULTS = (
    "hang-after-health",  # takes the request, never answers
    "error",  # 500, each time
    "hiccup",  # 503, once
    "updating",  # 409
    "resets",  # the connection breaks before the answer
    "half",  # ... and within it
    "torn",  # ends in the middle, as if that were all
    "loris",  # one byte every 0.2 s
    "endless",  # a body without end
    "garbage",  # not HTTP
)
LAST_WORDS = ("loading the model", "torch.OutOfMemoryError: CUDA out of memory.", "engine core failed to start")
ANSWER_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as a client opens."""

    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """The doors that a client needs."""

    mode = "ok"
    ready_at = 0.0
    token: str | None = None  # without which every request is refused
    version: str | None = None  # the policy version that answers carry
    answering_model: str | None = None  # the name of the model in the answers; None for the one asked for
    completions = (("2", "stop"), ("<answer>2</answer>", "stop"))  # texts and why they ended, over and over
    seen: list[tuple[str, str, Any]]  # method, path and body of each request, where a test keeps them
    lock = threading.Lock()

    def log_message(self, *words: Any) -> None:
        """As vLLM under --disable-uvicorn-access-log: not a line a completion."""
        if self.command == "GET":
            super().log_message(*words)

    def do_GET(self) -> None:
        self._note(None)
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self._answer(401, {"error": "no token"})
        elif self.path == "/health":
            self._answer(200 if time.monotonic() >= self.ready_at else 503)
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "stand-in"}]})
        elif self.path == POLICY_ROUTE:
            version = None if self.version is None else int(self.version)
            self._answer(200, {"version": version, "updating": False, "in_flight": 0})
        else:
            self._answer(404)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"] or 0)
        request: Any = json.loads(self.rfile.read(length)) if length else None
        before = self._note(request)
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self._answer(401, {"error": "no token", "got": self.headers["Authorization"]})
        elif self.mode in FAULTS and not (self.mode == "hiccup" and before):
            self._fail()
        elif self.path != "/v1/completions":
            self._answer(200, {"path": self.path, "body": request})
        elif request.get("max_tokens", 16) >= 1 and (request.get("model") or "stand-in") != "unknown":
            self._complete(request)
        else:
            self._answer(400, {"error": "not what was asked for"})

    def _note(self, request: Any) -> int:
        """Keep the request; how many POSTs came before."""
        kind = type(self)
        with self.lock:
            if "seen" not in vars(kind):
                kind.seen = []
            kind.seen.append((self.command, self.path, request))
            return sum(method == "POST" for method, _, _ in kind.seen) - 1

    def _complete(self, request: dict[str, Any]) -> None:
        choices = [self._choice(number) for number in range(request.get("n", 1))]
        if "prompt_logprobs" in request:
            told = [{str(token): {"logprob": -float(token)}} for token in request["prompt"][1:]]
            choices[0]["prompt_logprobs"] = [None, *told]
        model = self.answering_model or request.get("model") or "stand-in"
        tokens = 0 if self.mode == "no-token" else 1
        self._answer(200, {"model": model, "choices": choices, "usage": {"completion_tokens": tokens}})

    def _choice(self, number: int) -> dict[str, Any]:
        text, finish_reason = self.completions[number % len(self.completions)]
        ids = list(range(len(text.split())))
        logprobs = {"tokens": [f"token_id:{each}" for each in ids], "token_logprobs": [-0.5 * each for each in ids]}
        return {
            **{"index": number, "text": text, "token_ids": ids},
            **{"logprobs": logprobs, "finish_reason": finish_reason},
        }

    def _fail(self) -> None:
        if self.mode == "hang-after-health":
            threading.Event().wait()
        elif self.mode in ("error", "hiccup", "updating"):
            status = {"error": 500, "hiccup": 503, "updating": 409}[self.mode]
            self._answer(status, {"error": "engine is dead" if status == 500 else self.mode})
        elif self.mode == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif self.mode == "half":
            self.wfile.write(ANSWER_HEAD + b'Content-Length: 1000\r\n\r\n{"choices": [')
        elif self.mode == "torn":
            self.wfile.write(ANSWER_HEAD + b'Connection: close\r\n\r\n{"choices": [')
        elif self.mode == "loris":
            self.wfile.write(ANSWER_HEAD + b"Content-Length: 1000\r\n\r\n")
            while True:
                self.wfile.write(b" ")
                time.sleep(0.2)
        elif self.mode == "endless":
            self.wfile.write(ANSWER_HEAD + b"Connection: close\r\n\r\n")
            while True:
                self.wfile.write(b" " * 2**20)
        elif self.mode == "garbage":
            self.wfile.write(b"\x00\xff\x17 this is no HTTP\r\n\r\n")

    def _answer(self, status: int, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if body is not None:
            self.send_header("Content-Type", "application/json")
        if self.version is not None:
            self.send_header(VERSION_HEADER, self.version)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(**traits: Any) -> Iterator[tuple[str, type[Handler]]]:
    """A stand-in in this process whose `Handler` has these traits: its address, and the handler for what it saw."""
    quiet = {"seen": [], "log_message": lambda *unused: None}
    handler = type("Scripted", (Handler,), quiet | traits)
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=MODES + FAULTS, default="ok")
    parser.add_argument("--after", type=float, default=1.0, help="mode slow: seconds until it is ready")
    arguments = parser.parse_args()
    if arguments.mode == "dies":
        time.sleep(0.5)
        sys.exit(_die())
    if arguments.mode == "refuses":
        threading.Event().wait()
    if arguments.mode == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Handler.mode = arguments.mode
    Handler.token = os.environ.get(TOKEN) or None
    Handler.ready_at = time.monotonic() + (arguments.after if arguments.mode == "slow" else 0)
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


def _die() -> int:
    for line in LAST_WORDS:
        print(line, file=sys.stderr, flush=True)
    return 3


if __name__ == "__main__":
    main()
