"""How the policy server is started, and the ways in which it can fail to come up, each told apart in time."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from r1zero.hardware import free_ports
from r1zero.plan import Process
from r1zero.policy_server import ServerNotReady, by_hand, serve_argv, serve_env, wait_until_ready
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


def test_the_command_is_what_trl_needs() -> None:
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
        extra=("--revision", "v2"),
    )
    assert argv[:4] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
    assert " ".join(by_hand(argv)) == (
        "vllm serve Qwen/Qwen2.5-3B --host 127.0.0.1 --port 8000 --tensor-parallel-size 2 --dtype bfloat16 "
        "--gpu-memory-utilization 0.85 --max-model-len 4096 --max-num-seqs 512 --seed 42 --trust-remote-code "
        '--weight-transfer-config {"backend":"nccl"} --logprobs-mode processed_logprobs --max-logprobs -1 '
        "--disable-uvicorn-access-log --revision v2"
    )
    assert dict(serve_env())["VLLM_SERVER_DEV_MODE"] == "1"


def test_what_is_left_open_stays_vllms_own_and_the_address_is_local() -> None:
    argv = serve_argv(model="m", port=8000)
    assert not {"--max-model-len", "--max-num-seqs", "--seed", "--trust-remote-code"} & set(argv)
    assert argv[argv.index("--host") + 1] == "127.0.0.1"


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
