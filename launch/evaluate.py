"""Models and runs on benchmarks, side by side: scores with the interval that chance allows.

python launch/evaluate.py MODEL_OR_RUN [MORE ...] --benchmarks gsm8k,math500 [--preset simplerl-v1] [--data FOLDER]
"""

import sys
from pathlib import Path

try:
    from r1zero.evaluation.command import main
except ModuleNotFoundError as error:
    if error.name != "r1zero":
        raise
    sys.exit("error: r1zero is not installed in this Python: `make env`, then .venv/bin/python launch/evaluate.py ...")

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
