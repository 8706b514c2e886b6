"""A policy server that adds each adapter to its own weights: a publish carries adapter bytes, and no LoRA kernel runs.

Works with vLLM 0.26 to 0.31. It is an engine of its own and no second mode of the shared memory engine, because that
one begins an update by emptying all layers and ends it by filling them from a checkpoint; here the weights are changed
where they lie, so CUDA graphs and compiled code see them, and all that both share is how a file is found.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from r1zero.serving import CLEAN_COPY
from r1zero.serving.folding import CannotFold, Folding, listed, locate, maps, within
from r1zero.serving.published import safetensors_file

GPU, HOST = "gpu", "host"


@dataclass
class FoldedInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on beforehand."""


@dataclass
class FoldedUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What /update_weights carries as update_info.

    Attributes:
        file: a safetensors file, relative to the publish folder, with the whole adapter under PEFT's names.
        scaling: of B A, alpha / rank or what the adapter has instead.
    """

    file: str
    scaling: float

    def __post_init__(self) -> None:
        if not (isinstance(self.file, str) and self.file):
            raise ValueError(f"update_info file must be the name of a safetensors file, got {self.file!r}")
        if isinstance(self.scaling, bool) or not isinstance(self.scaling, int | float):
            raise ValueError(f"update_info scaling must be a number, got {self.scaling!r}")


class FoldedEngine(WeightTransferEngine[FoldedInit, FoldedUpdate]):  # type: ignore[misc]
    """Sets the weights to base + scaling * B A, from a clean copy of the base."""

    init_info_cls = FoldedInit
    update_info_cls = FoldedUpdate
    supports_draft_weight_update = False

    @cached_property
    def _folding(self) -> Folding:
        """It makes its clean copy at the first publish, and keeps it for good.

        In a server that outlives its trainer the weights are no longer clean. And not before, so that how vLLM measures
        its memory says nothing of it: it is the plan that leaves room for it.
        """
        return Folding(self._layers, self._packed, self._weight, self._keep)

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return dict(self.model.named_modules())

    @property
    def _packed(self) -> dict[str, Sequence[str]]:
        return dict(getattr(self.model, "packed_modules_mapping", {}))

    @cached_property
    def _unpacked(self) -> dict[str, torch.Tensor]:
        """On a CPU, the weights of the layers that were changed."""
        return {}

    def init_transfer_engine(self, init_info: FoldedInit) -> None:
        """There is nothing to connect."""

    def start_weight_update(self) -> None:
        """The weights stay what they are until the adapter is there."""

    def finish_weight_update(self) -> None:
        """They are what they shall be."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Add what `update_info` names to the clean base.

        Raises:
            ValueError: when `update_info` is not as `FoldedUpdate` says, or the adapter does not fit.
            PermissionError: when the file is not inside the publish folder.
        """
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: FoldedUpdate) -> None:
        """Add the adapter to the clean base.

        Raises:
            PermissionError: when the file is not inside the publish folder.
            CannotFold: when the adapter does not fit; nothing was changed.
            MemoryError: when there is no room for the clean copy.
        """
        adapter = load_file(safetensors_file(update_info.file))
        if self.device.type == "cpu":
            self._unpack(maps(adapter))
        changed = self._folding.fold(adapter, float(update_info.scaling))
        if self.device.type == "cpu":
            self._pack(changed)

    def shutdown(self) -> None:
        """Nothing is held open."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM 0.26 asks every engine for this; our trainer writes files instead."""
        raise NotImplementedError("the trainer lays adapters down as safetensors files, vLLM sends nothing")

    def _weight(self, layer: str) -> torch.Tensor:
        """As it lies in the server."""
        weight: torch.Tensor = self._unpacked[layer] if layer in self._unpacked else self._layers[layer].weight.data
        return weight

    def _keep(self, piece: torch.Tensor) -> torch.Tensor:
        """The clean copy of a piece of the base, where the plan has room for it."""
        where = os.environ.get(CLEAN_COPY, GPU)
        if where not in (GPU, HOST):
            raise ValueError(f"{CLEAN_COPY} must be {GPU} or {HOST}, got {where!r}")
        on_host = where == HOST and piece.device.type != "cpu"
        try:
            if on_host:
                return torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(piece)
            return piece.clone()
        except RuntimeError as error:  # torch's OutOfMemoryError is one, and so is CUDA's when it cannot pin
            kept = "in pinned host memory" if on_host else "on the GPU"
            why = f"no room for the clean copy of the base {kept} ({error}); use publish: adapter"
            raise MemoryError(why) from error

    def _unpack(self, names: Iterable[str]) -> None:
        """On a CPU vLLM packs each weight for its kernels and forgets it, so the base is read from its files again."""
        layers = {locate(name, self._layers, self._packed).layer for name in names} - set(self._unpacked)
        if not layers:
            return
        parts = {
            name: locate(name, self._layers, self._packed) for layer in layers for name in within(layer, self._packed)
        }
        found = {}
        for key, tensor in self._checkpoint():
            name = key.removesuffix(".weight")
            if name in parts and key != name:
                part = parts[name]
                found[name] = tensor[slice(*part.outputs), slice(*part.inputs)].to(self.model_config.dtype)
        if lacking := sorted(set(parts) - set(found)):
            raise CannotFold(f"the model's files have no {listed(lacking)}; use publish: adapter")
        for layer in layers:
            # In the order of a fused layer's rows.
            self._unpacked[layer] = torch.cat([found[name] for name in within(layer, self._packed)])

    def _checkpoint(self) -> Iterable[tuple[str, torch.Tensor]]:
        from vllm.model_executor.model_loader import get_model_loader

        loader = get_model_loader(self.vllm_config.load_config)
        weights: Iterable[tuple[str, torch.Tensor]] = loader.get_all_weights(self.model_config, self.model)
        return weights

    def _pack(self, changed: Iterable[str]) -> None:
        for name in changed:
            layer = self._layers[name]
            # A copy, since vLLM may keep what it packs in the memory that it is given.
            layer.weight = torch.nn.Parameter(self._unpacked[name].clone(), requires_grad=False)
            layer.quant_method.process_weights_after_loading(layer)
