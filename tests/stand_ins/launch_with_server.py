"""launch/run.py on a machine that, as far as it can tell, has two GPUs and vLLM.

Only the outside is replaced: what `nvidia-smi` would say, vLLM (`vllm.py` from here, which is also what a look for the
package finds), and the project folder, whose launch/grpo.py is `trainer.py` from here. The launcher, the supervisor,
the warden and accelerate are the real ones.
"""

import os
import sys
from pathlib import Path

from r1zero import hardware, launcher, policy_server

PROJECT = "R1ZERO_STAND_IN_PROJECT"


def main() -> int:
    two_gpus = hardware.assumed("1x2")
    hardware.detect = lambda: two_gpus
    policy_server.VLLM = (sys.executable, str(Path(__file__).with_name("vllm.py")))
    return launcher.main(Path(os.environ[PROJECT]))


if __name__ == "__main__":
    sys.exit(main())
