"""Stands in for `python -m r1zero.preflight`, which imports a tokenizer's libraries: it looks at nothing."""

import os

from r1zero.serving import PUBLISH_FOLDER, TOKEN

if __name__ == "__main__":
    print("stand-in preflight, told of", [name for name in (TOKEN, PUBLISH_FOLDER) if name in os.environ])
