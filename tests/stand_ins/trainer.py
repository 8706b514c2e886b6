"""Stands in for launch/grpo.py under accelerate: records steps as a trainer does, with no model behind them.

It listens on its group port, as the NCCL group does. R1ZERO_STAND_IN_TRAINER says what it does:

- trains: until it is stopped.
- needs-server: as well, but asks the server each step, and fails when it does not answer.
- finishes: after three steps.
- resumes: trains, with a checkpoint every fifth step; started from one, it finishes three steps later.
- fails: at step 2, each time.
- fails-later: at the second step of each attempt, with a checkpoint every step.
- refuses, misconfigured: ends with exit code 3 or 2 at step 2.
"""

import argparse
import json
import os
import socket
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

from r1zero.run_folder import RunFolder, write_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.training.recorder import Recorder

CODES = {"refuses": 3, "misconfigured": 2}
EVERY = {"resumes": 5, "fails-later": 1}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_folder", type=Path, required=True)
    parser.add_argument("--vllm_server_base_url", required=True)
    parser.add_argument("--vllm_group_port", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    arguments, _ = parser.parse_known_args()
    mode = os.environ.get("R1ZERO_STAND_IN_TRAINER", "trains")
    recorder = Recorder(RunFolder(arguments.run_folder), active=True)
    recorder.phase("loading model and data")
    Path(os.environ[PUBLISH_FOLDER], "of-the-trainer").touch()
    first = 1 if arguments.resume is None else int(arguments.resume.name.partition("-")[2]) + 1
    last = first + 2 if mode == "finishes" or (mode == "resumes" and arguments.resume) else 1000
    with socket.create_server(("127.0.0.1", arguments.vllm_group_port)):
        for step in range(first, last + 1):
            if mode == "needs-server":
                ask(arguments.vllm_server_base_url)
            recorder.step({"step": step, "steps": last, "reward": 0.5, "seconds_left": 0.1 * (last - step)})
            if step % EVERY.get(mode, 2000) == 0:
                save(recorder.folder.checkpoints / f"checkpoint-{step}", step)
            if (mode == "fails" and step == 2) or (mode == "fails-later" and step == first + 1):
                raise ValueError(f"the stand-in's loss is nan at {hex(id(recorder))}")
            if mode in CODES and step == 2:
                return CODES[mode]
            time.sleep(0.1)
    write_json(recorder.folder.summary, {"outcome": "finished", "steps": last, "seconds": 1.0})
    recorder.phase("done")
    return 0


def ask(url: str) -> None:
    headers = {"Authorization": f"Bearer {os.environ[TOKEN]}"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers=headers), timeout=60)


def save(folder: Path, step: int) -> None:
    """A checkpoint with everything that one has, in files as short as they can be."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("data", "")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


if __name__ == "__main__":
    sys.exit(main())
