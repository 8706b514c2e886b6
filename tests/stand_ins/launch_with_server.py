"""launch/run.py on a machine that, as far as it can tell, has two GPUs and vLLM.

Only the outside is replaced: what `nvidia-smi` would say, vLLM (`vllm.py` from here, which is also what a look for the
package finds), the project folder, whose launch/grpo.py is `trainer.py` from here, and the looks before training, which
would import torch. The launcher, the supervisor, the warden and the watch are the real ones, and so is accelerate where
R1ZERO_REAL_ACCELERATE is set.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1zero import hardware, launcher, plan, policy_server, watch

HERE = Path(__file__).parent
PROJECT = "R1ZERO_STAND_IN_PROJECT"


def main() -> int:
    two_gpus = hardware.assumed("1x2").nodes[0]
    hardware.this_node = lambda: two_gpus
    hardware.of_nodes = hardware.Hardware
    policy_server.VLLM = (sys.executable, str(HERE / "vllm.py"))
    watch.LOOK_S = 0.3
    if "R1ZERO_REAL_ACCELERATE" not in os.environ:
        plan.ACCELERATE = (sys.executable, str(HERE / "accelerate_launch.py"))
    make = plan.make

    def make_without_looks(*arguments: Any) -> plan.Plan:
        made = make(*arguments)
        looks = (sys.executable, str(HERE / "preflight.py"))
        return replace(
            made,
            preparations=tuple(replace(each, argv=looks) for each in made.preparations),
            rehearsal=made.rehearsal and replace(made.rehearsal, argv=looks),
        )

    plan.make = make_without_looks
    return launcher.main(Path(os.environ[PROJECT]))


if __name__ == "__main__":
    sys.exit(main())
