"""Stands in for launch/grpo.py under accelerate: records steps as a trainer does, with no model behind them.

It listens on its group port, as the NCCL group does, and stops when it is asked to, with a checkpoint.
R1ZERO_STAND_IN_TRAINER says what it does:

- trains: until it is stopped.
- needs-server: as well, but asks the server each step, and fails when it does not answer.
- finishes: after three steps.
- resumes: trains, with a checkpoint every fifth step; started from one, it finishes three steps later.
- goes-on: trains, and finishes three steps after it was started from a checkpoint.
- never-stops: trains, with a checkpoint every fifth step, and does not look whether it is asked to stop.
- fails-stopping: trains, and fails when it is asked to stop.
- fails-on-node-1: there, after two steps of the main process, which then has lost its peer.
- fails: at step 2, each time.
- fails-later: at the second step of each attempt, with a checkpoint every step.
- refuses, misconfigured: ends with exit code 3 or 2 at step 2.
"""

import argparse
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from r1zero import checkpoints
from r1zero.run_folder import RunFolder, read_json, write_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.training.main import wait_for_servers
from r1zero.training.recorder import Recorder

MACHINE_RANK = "R1ZERO_STAND_IN_MACHINE_RANK"
CODES = {"refuses": 3, "misconfigured": 2}
EVERY = {"resumes": 5, "fails-later": 1, "never-stops": 5}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_folder", type=Path, required=True)
    parser.add_argument("--vllm_server_base_url", required=True)
    parser.add_argument("--vllm_group_port", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    arguments, _ = parser.parse_known_args()
    mode = os.environ.get("R1ZERO_STAND_IN_TRAINER", "trains")
    if os.environ.get(MACHINE_RANK, "0") != "0":
        return on_another_node(RunFolder(arguments.run_folder), mode)
    wait_for_servers()
    recorder = Recorder(RunFolder(arguments.run_folder), active=True)
    recorder.phase("loading model and data")
    Path(os.environ[PUBLISH_FOLDER], "of-the-trainer").touch()
    first = 1 if arguments.resume is None else int(arguments.resume.name.partition("-")[2]) + 1
    last = first + 2 if mode == "finishes" or (mode in ("resumes", "goes-on") and arguments.resume) else 1000
    with socket.create_server(("127.0.0.1", arguments.vllm_group_port)):
        for step in range(first, last + 1):
            if mode == "needs-server":
                ask(arguments.vllm_server_base_url)
            recorder.step({"step": step, "steps": last, "reward": 0.5, "seconds_left": 0.1 * (last - step)})
            if step % EVERY.get(mode, 2000) == 0:
                save(recorder.folder.checkpoints / f"checkpoint-{step}", step)
            if (mode == "fails" and step == 2) or (mode == "fails-later" and step == first + 1):
                raise ValueError(f"the stand-in's loss is nan at {hex(id(recorder))}")
            if Path(arguments.run_folder, "peer-is-gone").exists():
                raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:5")
            if mode in CODES and step == 2:
                return CODES[mode]
            if mode != "never-stops" and (request := read_json(recorder.folder.stop)):
                return stop(recorder, step, request, mode)
            time.sleep(0.1)
    write_json(recorder.folder.summary, {"outcome": "finished", "steps": last, "seconds": 1.0})
    recorder.phase("done")
    return 0


def on_another_node(folder: RunFolder, mode: str) -> int:
    """It has no part in what is recorded, and ends with the main process."""
    while not folder.summary.exists():
        time.sleep(0.1)
        if mode == "fails-on-node-1" and sum(line["kind"] == "step" for line in folder.read_metrics()) > 1:
            (folder.path / "peer-is-gone").touch()
            time.sleep(1.5)
            raise ValueError("the reward of node 1 is broken")
    return 0


def stop(recorder: Recorder, step: int, request: dict[str, Any], mode: str) -> int:
    if mode == "fails-stopping":
        raise ValueError("the stand-in cannot stop")
    assert time.time() < request["deadline"]
    checkpoint = recorder.folder.checkpoints / f"checkpoint-{step}"
    save(checkpoint, step)
    where = str(checkpoint.relative_to(recorder.folder.path))
    ending = {"outcome": "stopped", "step": step, "checkpoint": where, "why": request["why"]}
    write_json(recorder.folder.summary, ending)
    return 0


def ask(url: str) -> None:
    headers = {"Authorization": f"Bearer {os.environ[TOKEN]}"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers=headers), timeout=60)


def save(checkpoint: Path, step: int) -> None:
    """A checkpoint as short as it can be."""
    place = checkpoints.begin(checkpoint, 0)
    (place / "model.safetensors").write_text(f"weights of step {step}")
    files = checkpoints.entries(place, ["model.safetensors"], sync=False)
    checkpoints.write_manifest(place, step, True, {}, files)
    checkpoints.put_in_place(checkpoint)


if __name__ == "__main__":
    sys.exit(main())
