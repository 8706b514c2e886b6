"""New weights for the policy server out of safetensors files in shared memory: no NCCL, no second GPU, no pickle.

Works with vLLM 0.26 to 0.31. Every worker of a tensor parallel server maps the same files and copies out what is its
own. vLLM's layerwise reload puts the values into the tensors that its kernels and CUDA graphs already hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from r1zero.serving.published import safetensors_file


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What /update_weights carries as update_info.

    Attributes:
        files: safetensors files, relative to the publish folder, with weights under their names in a checkpoint.
    """

    files: list[str]

    def __post_init__(self) -> None:
        if not (isinstance(self.files, list) and self.files and all(isinstance(name, str) for name in self.files)):
            raise ValueError(f"update_info files must be names of safetensors files, got {self.files!r}")


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):  # type: ignore[misc]
    """Loads a checkpoint's weights from files that the trainer has laid down."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """There is nothing to connect."""

    def start_weight_update(self) -> None:
        """The layers are made ready to take weights as they are in a checkpoint."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """What was not yet processed is."""
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # On a CPU vLLM multiplies by a packed copy. A head that is tied to the embedding is in no checkpoint, so
            # vLLM reloads the weights that it shares, and would go on with its copy of the old ones.
            for layer in self.model.modules():
                if isinstance(layer, VocabParallelEmbedding):
                    layer.quant_method.process_weights_after_loading(layer)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load what `update_info` names. vLLM's own waits for an accelerator, also where there is none.

        Raises:
            ValueError: when `update_info` is not as `SharedMemoryUpdate` says.
            PermissionError: when a file is not inside the publish folder.
        """
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load each file's tensors.

        Raises:
            PermissionError: when a file is not inside the publish folder.
        """
        try:
            files = [safetensors_file(name) for name in update_info.files]
            for file in files:
                self.model.load_weights(_tensors(file))
        except BaseException:
            # A layer that keeps half of its weights waiting would mix them with those of the next update.
            self.finish_weight_update()
            raise

    def shutdown(self) -> None:
        """Nothing is held open."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.26 asks every engine for this; our trainer writes files instead."""
        raise NotImplementedError("the trainer lays weights down as safetensors files, vLLM sends nothing")


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            yield name, weights.get_tensor(name)
