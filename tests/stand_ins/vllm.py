"""Stands in for the command `vllm`: `serve MODEL --host .. --port ..`, whose other flags it takes and ignores.

Like vLLM's API server behind our doors it needs the run's token on every route, and has an engine process whose
environment cannot be read from outside, and which does not end by itself when the server is gone.
R1ZERO_STAND_IN_SERVER names what goes wrong. While there is a file `silent` in the working folder it generates nothing,
while there is one `updating` it says, besides, that its weights are being updated.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from r1zero.serving import POLICY_ROUTE, PUBLISH_FOLDER, TOKEN

MODES = ("ok", "dies", "refuses", "hang-after-health", "slow", "ignores-sigterm", "port-taken")
LAST_WORDS = ("loading the model", "torch.OutOfMemoryError: CUDA out of memory.", "engine core failed to start")
ENGINE = "import time\ntime.sleep(600)  # the stand-in's engine"
MODE = os.environ.get("R1ZERO_STAND_IN_SERVER", "ok")


class Server(ThreadingHTTPServer):
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    """The doors that a launcher and a watch need."""

    def do_GET(self) -> None:
        if self._locked():
            return
        if self.path == "/health":
            print("asked for /health", flush=True)
            self._answer(503 if MODE == "slow" else 200)
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "stand-in"}]})
        elif self.path == POLICY_ROUTE:
            self._answer(200, {"version": None, "updating": Path("updating").exists(), "in_flight": 0})
        else:
            self._answer(404)

    def do_POST(self) -> None:
        if self._locked():
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        if MODE == "hang-after-health":
            threading.Event().wait()
        while Path("silent").exists() or Path("updating").exists():
            time.sleep(0.1)
        self._answer(200, {"choices": [{"text": "2", "token_ids": [2]}], "usage": {"completion_tokens": 1}})

    def log_message(self, *words: Any) -> None:
        """As vLLM under --disable-uvicorn-access-log."""

    def _locked(self) -> bool:
        locked = self.headers["Authorization"] != f"Bearer {os.environ[TOKEN]}"
        if locked:
            self._answer(401)
        return locked

    def _answer(self, status: int, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    print(f"stand-in server: {arguments.model} on {arguments.host}:{arguments.port}", flush=True)
    Path(os.environ[PUBLISH_FOLDER], "of-the-server").touch()
    subprocess.Popen([sys.executable, "-c", ENGINE], env={})
    if MODE == "dies":
        time.sleep(0.5)
        sys.stderr.write("\n".join(LAST_WORDS) + "\n")
        return 3
    if MODE == "refuses":
        threading.Event().wait()
    if MODE == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "port-taken":
        sys.stderr.flush()
        taker = socket.create_server((arguments.host, arguments.port))
        assert taker.fileno()
    Server((arguments.host, arguments.port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
