"""Stands in for `accelerate launch` of one process a node: it becomes the script. The real one first imports torch."""

import os
import sys

if __name__ == "__main__":
    at = next(at for at, word in enumerate(sys.argv) if at and word.endswith(".py"))
    if "--machine_rank" in sys.argv[:at]:
        os.environ["R1ZERO_STAND_IN_MACHINE_RANK"] = sys.argv[sys.argv.index("--machine_rank") + 1]
    os.execv(sys.executable, [sys.executable, *sys.argv[at:]])
