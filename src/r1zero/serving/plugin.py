"""What every process of vLLM calls when it starts: the entry point `vllm.general_plugins` in pyproject.toml."""

import contextlib

from r1zero.serving import FOLDED, SHARED_MEMORY

ENGINES = {
    SHARED_MEMORY: ("r1zero.serving.shared_memory_engine", "SharedMemoryEngine"),
    FOLDED: ("r1zero.serving.folded_engine", "FoldedEngine"),
}


def register() -> None:
    """Make our weight transfer engines known by their names. vLLM may call this more than once in a process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name, (module, engine) in ENGINES.items():
        with contextlib.suppress(ValueError):  # "already registered"
            WeightTransferEngineFactory.register_engine(name, module, engine)
