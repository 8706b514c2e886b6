"""A policy server for a benchmark: started as a plan does, on the first GPU or by vLLM's CPU build."""

import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1zero.hardware import free_ports
from r1zero.policy_client import PolicyClient
from r1zero.policy_server import serve_argv, serve_env, wait_until_ready
from r1zero.serving import PUBLISH_FOLDER, TOKEN


@dataclass(frozen=True)
class Served:
    """A server that has made a token.

    Attributes:
        client: that speaks to it.
        url: of it.
        pid: of its front.
        publish_folder: where it looks for what is published.
    """

    client: PolicyClient
    url: str
    pid: int
    publish_folder: Path


@contextmanager
def served(
    model: Path, label: str, *, adapters: bool = False, token: str | None = None, share: float = 0.4, **more: Any
) -> Iterator[Served]:
    """Start one and end it.

    Args:
        model: folder.
        label: what it is called.
        adapters: it will be sent adapters.
        token: that it asks for; None makes one.
        share: of the GPU's memory.
        more: for `serve_argv`.
    """
    cpu = not torch.cuda.is_available()
    (port,) = free_ports(1)
    token, url = token or secrets.token_hex(16), f"http://127.0.0.1:{port}"
    argv = serve_argv(model=str(model), port=port, gpu_memory_utilization=share, cpu=cpu, **more)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, tempfile.TemporaryFile() as log:
        env = {**os.environ, **dict(serve_env(adapters=adapters, cpu=cpu)), TOKEN: token, PUBLISH_FOLDER: folder}
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
        try:
            waited = wait_until_ready(url, deadline_s=900, check=lambda: _alive(server, log), token=token)
            print(f"{label}: server ready after {waited:.0f} s", flush=True)
            with PolicyClient([url], token, generation_timeout_s=600) as client:
                yield Served(client, url, server.pid, Path(folder))
        finally:
            server.terminate()
            server.wait(60)


def _alive(server: "subprocess.Popen[bytes]", log: Any) -> None:
    if server.poll() is not None:
        log.seek(0)
        raise SystemExit(
            f"the server ended with exit code {server.returncode}:\n{log.read()[-3000:].decode(errors='replace')}"
        )
