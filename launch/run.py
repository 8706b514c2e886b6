"""The one command: a recipe becomes a plan, the plan becomes processes, the processes learn.

python launch/run.py recipes/tiny/arithmetic_grpo.yaml [--dry-run] [--key value ...]
"""

import sys
from pathlib import Path

try:
    from r1zero.launcher import main
except ModuleNotFoundError as error:
    if error.name != "r1zero":
        raise
    sys.exit("error: r1zero is not installed in this Python: `make env`, then .venv/bin/python launch/run.py ...")

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
