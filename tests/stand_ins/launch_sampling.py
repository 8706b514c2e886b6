"""launch/run.py whose policy server is `sampling_server.py`, with its log in R1ZERO_NOTES, and without a rehearsal."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1zero import launcher, plan, policy_server

HERE = Path(__file__).resolve().parent  # whose vllm.py is what a look for the package finds


def main() -> int:
    log = str(Path(os.environ["R1ZERO_NOTES"]) / "calls.jsonl")
    policy_server.cpu_server_available = lambda: True
    policy_server.VLLM = (sys.executable, str(HERE / "sampling_server.py"), "--log", log)
    make = plan.make

    def make_without_rehearsal(*arguments: Any, **keys: Any) -> plan.Plan:
        return replace(make(*arguments, **keys), rehearsal=None)

    plan.make = make_without_rehearsal
    return launcher.main(HERE.parents[1])


if __name__ == "__main__":
    sys.exit(main())
