"""How ``vllm serve`` is started, and known to be alive.

Alive means that one token was generated. ``/health`` alone is not asked: it can answer 200 while generation hangs
(CVE-2026-114051, fixed in vLLM 0.31).
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

# As a module, because where vLLM comes from PYTHONPATH there is no `vllm` command. The same path in 0.26 to 0.31.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
SHORT_S = 5.0
FIRST_TOKEN_S = 60.0


class ServerNotReady(Exception):
    """The server generated no token before the deadline; the message says how far it came."""


def serve_argv(
    *,
    model: str,
    port: int,
    host: str = "127.0.0.1",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    seed: int | None = None,
    extra: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The command of a server that TRL 1.16 can generate with and send weights to.

    Args:
        model: id on the hub, or a folder.
        port: TCP port to listen on.
        host: address to listen on. vLLM's own default is every interface, and most of its doors have no lock.
        tensor_parallel_size: GPUs that share one copy of the model.
        gpu_memory_utilization: share of each GPU's memory that the server may take.
        max_model_len: tokens of prompt and completion together; None leaves it the model's own.
        max_num_seqs: completions generated at once; None leaves it vLLM's own.
        dtype: of the weights; must be the trainer's compute type, or the two are different policies.
        trust_remote_code: run code that comes with the model.
        seed: of the sampling; None leaves it vLLM's own.
        extra: further flags, put last, so that they win.
    """
    optional: list[str] = []
    for flag, value in (("--max-model-len", max_model_len), ("--max-num-seqs", max_num_seqs), ("--seed", seed)):
        if value is not None:
            optional += [flag, str(value)]
    if trust_remote_code:
        optional.append("--trust-remote-code")
    return (
        *(*VLLM, "serve", model, "--host", host, "--port", str(port)),
        *("--tensor-parallel-size", str(tensor_parallel_size), "--dtype", dtype),
        *("--gpu-memory-utilization", f"{gpu_memory_utilization:g}"),
        *optional,
        # What TRL needs: weights over NCCL, and the logprobs of the distribution that was sampled from.
        *("--weight-transfer-config", '{"backend":"nccl"}'),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        # One line a request would push the error out of the log's last lines.
        "--disable-uvicorn-access-log",
        *extra,
    )


def serve_env() -> tuple[tuple[str, str], ...]:
    """What the server needs in its environment."""
    return (
        ("VLLM_SERVER_DEV_MODE", "1"),  # the doors through which TRL sends weights
        ("VLLM_NO_USAGE_STATS", "1"),
        # FlashInfer's sampler cannot give processed logprobs, so it would only be imported, and its absence fatal.
        ("VLLM_USE_FLASHINFER_SAMPLER", "0"),
    )


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
) -> float:
    """Wait until the server has generated one token.

    Args:
        base_url: such as http://127.0.0.1:8000.
        deadline_s: how long to wait in all.
        check: called each round, also while a request hangs; raises when the server's process is dead.
        on_tick: called each round with the seconds waited.
        poll_s: how often.

    Returns:
        Seconds waited.

    Raises:
        ServerNotReady: at the deadline.
    """
    began = time.monotonic()
    attempt = _Attempt(base_url, deadline_s)
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
            attempt = _Attempt(base_url, deadline_s - waited)


class _Attempt(threading.Thread):
    """One try at a first token, in a thread, so that the death of the server is seen while a request hangs.

    Attributes:
        token: a token was generated.
        state: how far it came, in plain words.
    """

    def __init__(self, base_url: str, seconds_left: float) -> None:
        super().__init__(daemon=True)
        self.token, self.state = False, "it has not answered yet"
        self._base_url, self._seconds_left = base_url, max(0.1, seconds_left)
        self.start()

    def run(self) -> None:
        try:
            self.state = "it has not answered /health yet"
            status, body = _ask(self._base_url, "GET", "/health", min(SHORT_S, self._seconds_left))
            if status != 200:
                self.state = f"/health answered {status} {body[:200]}".rstrip()
                return
            self.state = "/health answered 200, /v1/models has not answered"
            status, body = _ask(self._base_url, "GET", "/v1/models", min(SHORT_S, self._seconds_left))
            if status != 200:
                self.state = f"/health answered 200, but /v1/models {status} {body[:200]}".rstrip()
                return
            model = json.loads(body)["data"][0]["id"]
            self.state = "/health answered 200, but no token was generated"
            request = {"model": model, "prompt": "1", "max_tokens": 1}
            status, body = _ask(
                self._base_url, "POST", "/v1/completions", min(FIRST_TOKEN_S, self._seconds_left), request
            )
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


@dataclass(frozen=True)
class Completion:
    """One completion as the server gave it.

    Attributes:
        text: decoded, with the stop string that ended it.
        token_ids: as sampled, the end token included.
        clipped: whether it was cut off at the limit of tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    clipped: bool


def served_model(base_url: str) -> str:
    """The name under which the server knows its model.

    Raises:
        ServerNotReady: as `complete`.
    """
    return str(_answer(base_url, "GET", "/v1/models", SHORT_S)["data"][0]["id"])


def complete(
    base_url: str, model: str, prompt_ids: Sequence[int], sampling: Mapping[str, Any], timeout_s: float
) -> list[Completion]:
    """The completions of one prompt.

    Args:
        base_url: of a server that is ready.
        model: as `served_model` says.
        prompt_ids: the prompt's tokens.
        sampling: vLLM's sampling parameters, `n` among them.
        timeout_s: for the whole answer.

    Raises:
        ServerNotReady: when the server refuses, is gone, is too slow, or is not vLLM.
    """
    request = {"model": model, "prompt": list(prompt_ids), "return_token_ids": True, **sampling}
    choices = _answer(base_url, "POST", "/v1/completions", timeout_s, request)["choices"]
    return [Completion(c["text"], tuple(c["token_ids"]), c["finish_reason"] == "length") for c in choices]


def _answer(base_url: str, method: str, path: str, timeout_s: float, request: Any = None) -> Any:
    try:
        status, body = _ask(base_url, method, path, timeout_s, request)
        content = json.loads(body) if status == 200 else None
    except (OSError, HTTPException) as error:
        why = f"gave no answer to {path} within {timeout_s:g} s ({type(error).__name__}: {error})"
        raise ServerNotReady(f"policy server at {base_url} {why}") from error
    except ValueError as error:
        raise ServerNotReady(f"policy server at {base_url}: its answer to {path} is not vLLM's ({error})") from error
    if status != 200:
        raise ServerNotReady(f"policy server at {base_url} answered {path} with {status}: {body[:500]}")
    if not isinstance(content, dict):
        raise ServerNotReady(f"policy server at {base_url}: its answer to {path} is not vLLM's: {body[:500]}")
    return content


def _ask(base_url: str, method: str, path: str, timeout_s: float, body: Any = None) -> tuple[int, str]:
    """One request, without the proxies that urllib takes from the environment: the server is on this machine."""
    url = urlsplit(base_url)
    connection = HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=timeout_s)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, url.path.rstrip("/") + path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
