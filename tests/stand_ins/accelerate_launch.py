"""Stands in for `accelerate launch` of one process: it becomes the script. The real one first imports torch."""

import os
import sys

if __name__ == "__main__":
    at = next(at for at, word in enumerate(sys.argv) if at and word.endswith(".py"))
    os.execv(sys.executable, [sys.executable, *sys.argv[at:]])
