"""The one command: a recipe becomes a plan, the plan becomes processes, the processes learn.

python launch/run.py recipes/tiny/arithmetic_grpo.yaml [--dry-run] [--key value ...]
"""

import sys
from pathlib import Path

from r1zero.launcher import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
