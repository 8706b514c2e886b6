"""What every process of vLLM calls when it starts: the entry point `vllm.general_plugins` in pyproject.toml."""

import contextlib

from r1zero.serving import SHARED_MEMORY


def register() -> None:
    """Make our weight transfer engine known by its name. vLLM may call this more than once in a process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # "already registered"
        WeightTransferEngineFactory.register_engine(
            SHARED_MEMORY, "r1zero.serving.shared_memory_engine", "SharedMemoryEngine"
        )
