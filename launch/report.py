"""One page of a run, or of several side by side: curves, completions, facts. It works without a network.

python launch/report.py RUN [RUN ...] [--output FILE]
"""

import sys

try:
    from r1zero.reporting.report import main
except ModuleNotFoundError as error:
    if error.name != "r1zero":
        raise
    sys.exit("error: r1zero is not installed in this Python: `make env`, then .venv/bin/python launch/report.py ...")

if __name__ == "__main__":
    sys.exit(main())
