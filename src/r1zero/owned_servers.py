"""Policy servers that a supervisor of ours runs, for training and for evaluation alike: where they read what is
published, when all of them are ready, and an eye on them from then on. A failure is the failure of their process.
"""

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from r1zero.policy_server import ServerNotReady, wait_until_ready
from r1zero.reporting.progress import duration
from r1zero.serving import MEMORY_FOLDER, PUBLISH_FOLDER, TOKEN
from r1zero.supervisor import Supervisor
from r1zero.watch import Client, Silent, Watch

SOCKET_FOLDER = "VLLM_RPC_BASE_PATH"
LEAST_MEMORY_BYTES = 2**30  # a container gets 64 MiB by default, which weights do not fit into


def environment(supervisor: Supervisor, otherwise: Path, one_node: bool = True) -> dict[str, str]:
    """What servers and their clients know of each other, for their environment alone: no file and no argv has it.

    A fresh token, and a fresh folder for what is published, in memory where there is room.

    Args:
        supervisor: that starts them, and deletes the folders in the end.
        otherwise: in which the folder is made where there is no room in memory.
        one_node: False where a server is on another node, which must reach the folder too.
    """
    roomy = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free >= LEAST_MEMORY_BYTES
    places = (MEMORY_FOLDER, otherwise) if roomy and one_node else (otherwise,)
    env = {TOKEN: secrets.token_hex(32), PUBLISH_FOLDER: str(supervisor.temporary_folder(places))}
    if one_node:
        # Short, as a socket's path has at most 107 bytes; vLLM leaves its sockets behind where its engine is killed.
        env[SOCKET_FOLDER] = str(supervisor.temporary_folder((Path(tempfile.gettempdir()),)))
    return env


def wait_until_all_ready(
    servers: Mapping[str, str],
    supervisor: Supervisor,
    *,
    token: str,
    deadline_s: float,
    check: Callable[[], None],
    say: Callable[[str], None],
    now: Callable[[str], None],
) -> None:
    """Return once each has generated a token.

    Args:
        servers: the URL of each, by the name of its process.
        supervisor: that started them.
        token: of the run.
        deadline_s: for each.
        check: called meanwhile; may raise.
        say: told of each that is ready.
        now: told how long it has taken so far.

    Raises:
        ProcessFailed: one was not ready in time.
    """
    began = time.monotonic()
    for name, url in servers.items():
        try:
            wait_until_ready(
                url,
                token=token,
                deadline_s=deadline_s,
                check=check,
                on_tick=lambda _: now(f"policy server is starting, {duration(time.monotonic() - began)}"),
            )
        except ServerNotReady as error:
            raise supervisor.failed(name, str(error)) from error
        say(f"policy {name} ready after {duration(time.monotonic() - began)}")


@contextmanager
def watched(
    servers: Mapping[str, str],
    client: Client,
    supervisor: Supervisor,
    silence_timeout_s: float,
    publish_timeout_s: float,
) -> Iterator[Callable[[], None]]:
    """Look at the servers until the block is left; what is given raises ProcessFailed where one has gone silent.

    Args are those of `Watch`.
    """
    with Watch(dict(servers), client, silence_timeout_s, publish_timeout_s) as watch:

        def check() -> None:
            try:
                watch.check()
            except Silent as error:
                raise supervisor.failed(error.name, str(error)) from error

        yield check
