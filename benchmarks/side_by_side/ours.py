"""launch/run.py, which starts the policy server by `serve` of this folder instead of by vLLM's own command.

Nothing else differs from `python launch/run.py`, and where lengths are not forced the benchmark starts that.
"""

import sys
from pathlib import Path

from r1zero import launcher, policy_server

if __name__ == "__main__":
    policy_server.VLLM = (sys.executable, "-m", "benchmarks.side_by_side.serve")
    sys.exit(launcher.main(Path(__file__).resolve().parents[2]))
