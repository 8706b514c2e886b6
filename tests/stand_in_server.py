"""Stands in for ``vllm serve`` where a test needs a fault that a real server cannot be made to have. No dependencies.

python tests/stand_in_server.py --port 8000 --mode slow --after 1
"""

import argparse
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = ("ok", "slow", "dies", "hang-after-health", "refuses", "ignores-sigterm", "no-token", "error")
LAST_WORDS = ("loading the model", "torch.OutOfMemoryError: CUDA out of memory.", "engine core failed to start")


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as a rehearsal opens."""

    request_queue_size = 128
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    """The three doors that a client needs."""

    mode = "ok"
    ready_at = 0.0
    completions = (("2", "stop"), ("<answer>2</answer>", "stop"))  # texts and why they ended, over and over

    def log_message(self, *words: Any) -> None:
        """As vLLM under --disable-uvicorn-access-log: not a line a completion."""
        if self.command == "GET":
            super().log_message(*words)

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200 if time.monotonic() >= self.ready_at else 503)
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "stand-in"}]})
        else:
            self._answer(404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.mode == "hang-after-health":
            threading.Event().wait()
        elif self.mode == "error":
            self._answer(500, {"error": "engine is dead"})
        elif self.path == "/v1/completions" and request["model"] == "stand-in" and request["max_tokens"] >= 1:
            tokens = 0 if self.mode == "no-token" else 1
            choices = [self._choice(number) for number in range(request.get("n", 1))]
            self._answer(200, {"choices": choices, "usage": {"completion_tokens": tokens}})
        else:
            self._answer(400, {"error": "not what was asked for"})

    def _choice(self, number: int) -> dict[str, Any]:
        text, finish_reason = self.completions[number % len(self.completions)]
        return {"text": text, "token_ids": list(range(len(text.split()))), "finish_reason": finish_reason}

    def _answer(self, status: int, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, default="ok")
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
    Handler.ready_at = time.monotonic() + (arguments.after if arguments.mode == "slow" else 0)
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


def _die() -> int:
    for line in LAST_WORDS:
        print(line, file=sys.stderr)
    return 3


if __name__ == "__main__":
    main()
