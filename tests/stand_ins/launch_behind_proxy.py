"""launch/run.py whose policy server, a real one, has a proxy before it: launcher, rehearsal, watch and trainer all
come through it. It listens where the plan wants the server, and the server on a port that nobody else knows.

R1ZERO_NOTES names a folder. While there is a `fault.json` in it the proxy spoils what that names (fault, path). The
fault is the server's: one that starts anew, whose /health is asked for, is well. R1ZERO_MEMORY_FOLDER stands in for
/dev/shm where it is set.
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.stand_ins import faulty_proxy
from tests.stand_ins.faulty_proxy import Proxy

from r1zero import launcher, owned_servers, plan
from r1zero.hardware import free_ports
from r1zero.run_folder import read_json

PROJECT = Path(__file__).resolve().parents[2]
HEALTH = "/health"


def main() -> int:
    fault = Path(os.environ["R1ZERO_NOTES"]) / "fault.json"
    make = plan.make
    if memory := os.environ.get("R1ZERO_MEMORY_FOLDER"):
        owned_servers.MEMORY_FOLDER, owned_servers.LEAST_MEMORY_BYTES = Path(memory), 0
    with ExitStack() as stack:

        def make_with_proxy(*arguments: Any, **keys: Any) -> plan.Plan:
            made = make(*arguments, **keys)
            (server,) = made.servers
            argv = list(server.argv)
            at = argv.index("--port") + 1
            (behind,) = free_ports(1)
            proxy = stack.enter_context(faulty_proxy.before(behind, int(argv[at])))
            _obey(proxy, fault)
            argv[at] = str(behind)
            return replace(made, servers=(replace(server, argv=tuple(argv)),))

        plan.make = make_with_proxy
        return launcher.main(PROJECT)


def _obey(proxy: Proxy, file: Path) -> None:
    take = proxy.take

    def taken(method: str, path: str) -> str | None:
        fault = read_json(file)
        if fault is not None and path == HEALTH and fault["path"] != HEALTH:
            file.unlink(missing_ok=True)
            fault = None
        if fault is None:
            proxy.heal()
        else:
            proxy.spoil(fault["fault"], fault["path"])
        return take(method, path)

    proxy.take = taken  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
