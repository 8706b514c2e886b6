"""Stands in for `python -m r1zero.preflight`, which imports a tokenizer's libraries: it looks at nothing.

R1ZERO_STAND_IN_LOOKS names what takes for ever: preflight or rehearsal.
"""

import os
import time

from r1zero.serving import PUBLISH_FOLDER, TOKEN

if __name__ == "__main__":
    known = [name for name in (TOKEN, PUBLISH_FOLDER) if name in os.environ]
    print("stand-in preflight, told of", known, flush=True)
    if os.environ.get("R1ZERO_STAND_IN_LOOKS") == ("rehearsal" if known else "preflight"):
        time.sleep(600)
