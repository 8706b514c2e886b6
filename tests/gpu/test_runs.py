"""Short runs on real GPUs, by the one command, with vLLM's GPU build: every way in which a policy version travels.

    python -m pytest tests/gpu -m gpu

CUDA_VISIBLE_DEVICES says which GPUs are used; what needs more of them is skipped.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from r1zero import tiny
from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.serving.launched import LORA, RECIPE, SHORT, environment, seconds, words
from tests.training.conftest import rows

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not GPUS, reason="no CUDA GPU is here"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here"),
]
FULL = {"learning_rate": 3e-4}
SHARED = {"server_gpus": 0, "trainer_gpus": 1}
APART = {"server_gpus": 1, "trainer_gpus": 1}
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one GPU, LoRA": (1, "folded", {**LORA, **SHARED}),
    "one GPU, LoRA under a name": (1, "adapter", {**LORA, **SHARED, "publish": "adapter"}),
    "two GPUs, LoRA": (2, "folded", {**LORA, **APART}),
    "one GPU, all weights": (1, "shared_memory", {**FULL, **SHARED}),
    "one GPU, the server sleeps": (1, "folded", {**LORA, **SHARED, "vllm_enable_sleep_mode": "true"}),
    "two GPUs, all weights": (2, "nccl", {**FULL, **APART}),
    "two GPUs, ZeRO-3": (2, "nccl", {**FULL, **APART, "accelerate_config": "zero3"}),
    "three GPUs, two servers": (3, "nccl", {**FULL, "server_gpus": 2, "trainer_gpus": 1}),
    "three GPUs, ZeRO-2": (3, "nccl", {**FULL, "server_gpus": 1, "trainer_gpus": 2, "accelerate_config": "zero2"}),
    "four GPUs, two servers, ZeRO-2": (
        4,
        "nccl",
        {**FULL, "server_gpus": 2, "trainer_gpus": 2, "accelerate_config": "zero2"},
    ),
    "three GPUs, ZeRO-3": (3, "nccl", {**FULL, "server_gpus": 1, "trainer_gpus": 2, "accelerate_config": "zero3"}),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's kind with heads of 64, which every attention kernel knows; not trained."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.make_model(tiny.Pretraining(hidden_size=256, heads=4), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_publishes_every_version_and_leaves_nothing(name: str, tmp_path: Path, model_folder: Path) -> None:
    needed, route, keys = RUNS[name]
    if needed > GPUS:
        pytest.skip(f"needs {needed} GPUs, {GPUS} are visible")
    folder, notes = RunFolder(tmp_path / "run"), tmp_path / "notes"
    notes.mkdir()
    given = {**SHORT, **keys, "model_name_or_path": model_folder, "output_dir": folder.path}
    env = environment(notes)
    env.pop("DS_ACCELERATOR")  # the CPU, in all other tests
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (env["PYTHONPATH"], os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(PROJECT / "launch" / "run.py"), str(RECIPE), *words(given)]
    listening: set[tuple[str, str]] = set()
    seen: set[psutil.Process] = set()
    with (tmp_path / "err").open("wb") as err:
        launcher = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=subprocess.DEVNULL, stderr=err)
        parent = psutil.Process(launcher.pid)
        while launcher.poll() is None:
            with suppress(psutil.NoSuchProcess):
                seen |= set(parent.children(recursive=True))
            for each in seen:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    sockets = each.net_connections("inet")
                    listening |= {(one.laddr.ip, each.name()) for one in sockets if one.status == psutil.CONN_LISTEN}
            time.sleep(0.5)
    assert launcher.returncode == 0, (tmp_path / "err").read_text()[-4000:]
    metrics = list(folder.read_metrics())
    steps = [line for line in metrics if line["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert not [line for line in metrics if line["kind"] == "restart"]
    assert f"publish {route}" in folder.plan.read_text()
    assert len(seconds(steps, "publish/bytes")) == 3
    assert max(seconds(steps, "probe/difference")) < 0.1
    for step in (1, 2, 3):
        assert {row["policy_version"] for row in rows(folder.rollouts(step))} == {step - 1}
    # Up to 0.27 vLLM's engine opens torch's TCPStore, which listens on every interface whatever address it is given.
    # So does torch's launcher of several processes, and NCCL chooses an interface by itself.
    outside = {name for ip, name in listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")}
    assert route == "nccl" or not {name for name in outside if not name.startswith("VLLM::")}
    assert len(listening) > len(outside)
    assert not [each for each in seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
