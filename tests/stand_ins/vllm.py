"""Stands in for the command `vllm`: `serve MODEL --host .. --port ..`, whose other flags it takes and ignores.

Like vLLM's API server it has an engine process whose environment cannot be read from outside, and which does not end
by itself when the server is gone.
R1ZERO_STAND_IN_SERVER names what goes wrong: a mode of `stand_in_server.py`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stand_in_server

ENGINE = "import time\ntime.sleep(600)  # the stand-in's engine"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True)
    arguments, _ = parser.parse_known_args()
    print(f"stand-in server: {arguments.model} on {arguments.host}:{arguments.port}", flush=True)
    subprocess.Popen([sys.executable, "-c", ENGINE], env={})
    mode = os.environ.get("R1ZERO_STAND_IN_SERVER", "ok")
    sys.argv = [sys.argv[0], "--port", arguments.port, "--mode", mode, "--after", "600"]
    stand_in_server.main()


if __name__ == "__main__":
    main()
