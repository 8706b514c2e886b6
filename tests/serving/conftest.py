"""A real `vllm serve` on the CPU, behind our doors, with a small model: once for all tests that a worker runs.

R1ZERO_CPU_SERVER_PYTHON names a Python that has vLLM's CPU build; `make cpu-server` makes one. Skipped without it.
"""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from r1zero import tiny
from r1zero.hardware import free_ports
from r1zero.model_facts import PROJECTIONS
from r1zero.policy_server import serve_argv, serve_env, wait_until_ready
from r1zero.serving import PUBLISH_FOLDER, SHARED_MEMORY, TOKEN

READY_S = 400.0  # most of it is importing vLLM three times, on cores that others use too
ANSWER_S = 120.0
PROBE = "What is 12 + 34?<answer>46</answer>"
CANARIES = {"WANDB_API_KEY": "canary-" + "a1" * 16, "HF_TOKEN": "hf_canary" + "b2" * 14}


@dataclass(frozen=True)
class Reply:
    """What a route answered."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def content(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A running server and how to speak with it."""

    process: subprocess.Popen[bytes]
    port: int
    model: Path
    token: str
    folder: Path
    publish: Path
    seconds_to_first_token: float
    held: list[HTTPConnection] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def ask(
        self, method: str, path: str, content: Any = None, token: str | None = "", headers: Mapping[str, str] = {}
    ) -> Reply:
        """One request; `token` None sends none, empty sends the right one."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        sent = {"Content-Type": "application/json", **headers}
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        try:
            connection.request(method, path, None if content is None else json.dumps(content), sent)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.headers), answer.read().decode(errors="replace"))
        finally:
            connection.close()

    def post(self, path: str, content: Any = None, **headers: str) -> Reply:
        return self.ask("POST", path, content, headers={key.replace("_", "-"): value for key, value in headers.items()})

    def publish_weights(self, version: int, *files: str) -> Reply:
        """A whole update; the answer of the first step that failed, else of the last."""
        for path, content in (("/start_weight_update", None), ("/update_weights", {"update_info": {"files": files}})):
            reply = self.post(path, content)
            if reply.status != 200:
                return reply
        return self.post("/finish_weight_update", X_Policy_Version=str(version))

    def logprobs(self, ids: list[int], model: str | None = None) -> torch.Tensor:
        """Of each token after the first, under the served policy.

        Returns:
            Shape (len(ids) - 1,).
        """
        request = {"model": model or str(self.model), "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        # A prefix that was cached is not computed anew, and would give no logprobs.
        reply = self.post("/v1/completions", {**request, "cache_salt": secrets.token_hex(8)})
        assert reply.status == 200, reply.body
        entries = reply.content["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(entries, ids[1:], strict=True)])


@pytest.fixture(scope="session")
def probe() -> list[int]:
    """Tokens on which two policies are compared."""
    ids: list[int] = tiny.make_tokenizer()(PROBE)["input_ids"]
    return ids


def logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """As `Server.logprobs`, by transformers."""
    with torch.no_grad():
        every = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return every.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's shape, not trained."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny.make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.make_model(tiny.Pretraining(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(model_folder: Path) -> PreTrainedModel:
    """The served model as transformers has it, in float32."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server that takes adapters and weights."""
    more = {"weight_transfer": SHARED_MEMORY, "lora_rank": 8, "lora_target_modules": PROJECTIONS}
    with started(model_folder, tmp_path_factory.mktemp("server"), adapters=True, **more) as running:
        yield running


@contextmanager
def started(model_folder: Path, folder: Path, *, adapters: bool, **more: Any) -> Iterator[Server]:
    """A server behind our doors, once it has made a token; `more` is for `serve_argv`."""
    python = os.environ.get("R1ZERO_CPU_SERVER_PYTHON", "")
    if not python:
        pytest.skip("R1ZERO_CPU_SERVER_PYTHON names no Python with vLLM's CPU build; `make cpu-server` makes one")
    publish, home = folder / "publish", folder / "home"
    publish.mkdir()
    home.mkdir()
    (port,) = free_ports(1)
    argv = serve_argv(
        model=str(model_folder),
        port=port,
        max_model_len=256,
        max_num_seqs=64,
        cpu=True,
        **{"dtype": "float32", **more},
    )
    token = secrets.token_urlsafe(32)
    # Everything that it might write goes where the tests can look through it.
    places = {"HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COV")}  # it would be slower
    environment = {**inherited, **places, **CANARIES, **dict(serve_env(adapters=adapters, cpu=True))}
    environment |= {TOKEN: token, PUBLISH_FOLDER: str(publish), "HF_HUB_OFFLINE": "1"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(python).absolute()), *argv[1:]], cwd=folder, env=environment, stdout=log, stderr=log
        )
    tree = psutil.Process(process.pid)
    began = time.monotonic()

    def check() -> None:
        if process.poll() is not None:
            end = (folder / "server.log").read_text(errors="replace")[-4000:]
            raise AssertionError(f"the server ended with {process.returncode}:\n{end}")

    try:
        wait_until_ready(f"http://127.0.0.1:{port}", deadline_s=READY_S, check=check, token=token)
        yield Server(process, port, model_folder, token, folder, publish, time.monotonic() - began)
    finally:
        everyone = [*tree.children(recursive=True), tree] if tree.is_running() else []
        process.terminate()
        for each in psutil.wait_procs(everyone, timeout=20)[1]:
            each.kill()
        process.wait(20)
