"""vLLM's command line, `vllm ...`, with the lengths of the benchmark forced: both sides start their server by it."""

from benchmarks.side_by_side.lengths import force_in_vllm
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    force_in_vllm()
    main()
