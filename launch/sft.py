"""What `accelerate launch` runs: one cold start trainer process.

accelerate launch --config_file accelerate_configs/single_gpu.yaml launch/sft.py --config recipes/X.yaml
"""

import sys
from pathlib import Path

from r1zero.training.main import main

if __name__ == "__main__":
    sys.exit(main("sft", Path(__file__).resolve().parent.parent))
