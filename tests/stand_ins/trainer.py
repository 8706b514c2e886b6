"""Stands in for launch/grpo.py under accelerate: records steps as a trainer does, with no model behind them.

It listens on its group port, as the NCCL group does. R1ZERO_STAND_IN_TRAINER says what it does: "trains" until it is
stopped, "needs-server" as well, but asks the server each step, "finishes" after three steps, "fails" after two.
"""

import argparse
import os
import socket
import sys
import time
import urllib.request
from itertools import count
from pathlib import Path

from r1zero.run_folder import RunFolder, write_json
from r1zero.training.recorder import Recorder


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_folder", type=Path, required=True)
    parser.add_argument("--vllm_server_base_url", required=True)
    parser.add_argument("--vllm_group_port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    mode = os.environ.get("R1ZERO_STAND_IN_TRAINER", "trains")
    recorder = Recorder(RunFolder(arguments.run_folder), active=True)
    recorder.phase("loading model and data")
    steps = 3 if mode == "finishes" else 1000
    with socket.create_server(("127.0.0.1", arguments.vllm_group_port)):
        for step in count(1) if steps == 1000 else range(1, steps + 1):
            if mode == "needs-server":
                urllib.request.urlopen(f"{arguments.vllm_server_base_url}/health", timeout=60)
            recorder.step({"step": step, "steps": steps, "reward": 0.5, "seconds_left": 0.1 * (steps - step)})
            if mode == "fails" and step == 2:
                raise ValueError("the stand-in's loss is nan")
            time.sleep(0.1)
    write_json(recorder.folder.summary, {"outcome": "finished", "steps": steps, "seconds": 1.0})
    recorder.phase("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
