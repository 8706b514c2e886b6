"""An adapter added to the server's own weights: W = base + scaling * B A (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Always from a clean copy of the base, never by taking the last adapter away again: a sum in bfloat16 that is taken back
leaves its rounding behind, and after some hundred publishes the base would be another one. Added in float32 and rounded
once, as merged weights are.

Plain torch: vLLM's layers are known by the names of their classes and the numbers that they carry.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PREFIX = "base_model.model."  # PEFT's, before each name of an adapter's file
HALVES = ("lora_A", "lora_B")
CHUNK_ELEMENTS = 2**24  # of the base are added to at a time: 64 MiB in float32, and as much for the sum
SHOWN = 4  # names in an error
FUSED = "QKVParallelLinear", "MergedColumnParallelLinear"
COLUMN_PARALLEL = "ColumnParallelLinear"
ROW_PARALLEL = "RowParallelLinear"
REPLICATED = "ReplicatedLinear"


class CannotFold(ValueError):
    """The adapter does not fit these weights; the message names what does not. Nothing was changed."""


@dataclass(frozen=True)
class Part:
    """Where one linear map of a checkpoint lies on this rank of a tensor parallel server.

    >>> Part("layers.0.self_attn.qkv_proj", (64, 80), (16, 32), (0, 64), (32, 64)).shape
    (16, 64)

    Attributes:
        layer: name of the server's layer; of a fused layer the map is some rows.
        rows: the first and the one after the last, in the layer's weight.
        outputs: the same of the map's outputs, rows of B, that are this rank's.
        inputs: the same of the map's inputs, columns of A.
        whole: outputs and inputs of the map on all ranks together.
    """

    layer: str
    rows: tuple[int, int]
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    whole: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the map's piece on this rank: outputs and inputs."""
        return self.outputs[1] - self.outputs[0], self.inputs[1] - self.inputs[0]


def locate(name: str, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> Part:
    """Where the linear map `name` lies on this rank.

    Args:
        name: of the map in a checkpoint, such as model.layers.0.self_attn.q_proj.
        layers: the server's modules by their names.
        packed: of each fused layer the maps in it, in the order of its rows; vLLM's ``packed_modules_mapping``.

    Raises:
        CannotFold: there is no such layer, or one whose weight is not laid out as is known here.
    """
    before, _, last = name.rpartition(".")
    if name in layers:
        return _alone(name, layers[name])
    for fused, maps in packed.items():
        layer = f"{before}.{fused}" if before else fused
        if last in maps and layer in layers:
            return _fused(layer, layers[layer], list(maps).index(last), len(maps))
    raise CannotFold(f"the server has no layer {name}; publish: adapter serves what vLLM can serve")


def within(layer: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The linear maps of a checkpoint that are in a layer of the server.

    >>> within("layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['layers.0.mlp.gate_proj', 'layers.0.mlp.up_proj']
    """
    before, dot, last = layer.rpartition(".")
    return [f"{before}{dot}{each}" for each in packed.get(last, (last,))]


def maps(adapter: Mapping[str, torch.Tensor]) -> list[str]:
    """The linear maps that an adapter changes.

    Raises:
        CannotFold: it holds something else than an A and a B of each.
    """
    return list(_pairs(adapter))


def _alone(name: str, layer: Any) -> Part:
    kind, rank, ranks = _kind(name, layer)
    if kind in FUSED:
        raise CannotFold(
            f"{name} is fused in the checkpoint too, and its rows are not known here; use publish: adapter"
        )
    outputs, inputs = int(layer.output_size), int(layer.input_size)
    if kind == ROW_PARALLEL:
        each = inputs // ranks
        return Part(name, (0, outputs), (0, outputs), (rank * each, (rank + 1) * each), (outputs, inputs))
    each = outputs // ranks if kind == COLUMN_PARALLEL else outputs
    first = rank * each if kind == COLUMN_PARALLEL else 0
    return Part(name, (0, each), (first, first + each), (0, inputs), (outputs, inputs))


def _fused(name: str, layer: Any, index: int, maps: int) -> Part:
    kind, rank, ranks = _kind(name, layer)
    if kind == "QKVParallelLinear" and maps == 3:
        # Key and value heads that are fewer than the ranks are held by several of them.
        head, replicas = int(layer.head_size), int(layer.num_kv_head_replicas)
        value_head = int(getattr(layer, "v_head_size", head))
        here: list[int] = [layer.num_heads * head, layer.num_kv_heads * head, layer.num_kv_heads * value_head]
        whole: list[int] = [
            layer.total_num_heads * head,
            layer.total_num_kv_heads * head,
            layer.total_num_kv_heads * value_head,
        ]
        place = rank if index == 0 else rank // replicas
    elif kind == "MergedColumnParallelLinear" and maps == len(layer.output_sizes):
        whole = list(layer.output_sizes)
        here = [each // ranks for each in whole]
        place = rank
    else:
        raise CannotFold(f"{name} is a {kind} of {maps} maps, whose rows are not known here; use publish: adapter")
    first, inputs = int(sum(here[:index])), int(layer.input_size)
    rows = (first, first + int(here[index]))
    outputs = (place * int(here[index]), (place + 1) * int(here[index]))
    return Part(name, rows, outputs, (0, inputs), (int(whole[index]), inputs))


def _kind(name: str, layer: Any) -> tuple[str, int, int]:
    """Class, rank and ranks of a layer whose weight is laid out as is known here."""
    kind, method = type(layer).__name__, type(getattr(layer, "quant_method", None)).__name__
    if kind not in (*FUSED, COLUMN_PARALLEL, ROW_PARALLEL, REPLICATED):
        raise CannotFold(f"{name} is a {kind}, whose weight is not known here; use publish: adapter")
    if method != "UnquantizedLinearMethod":
        raise CannotFold(f"{name} is quantized ({method}): nothing can be added to it; use publish: adapter")
    return kind, int(layer.tp_rank), int(layer.tp_size)


class Folding:
    """A server's weights with an adapter in them.

    Args:
        layers: the server's modules by their names.
        packed: of each fused layer the maps in it.
        weight: the weight of the layer of that name as it is now, to be changed in place: (outputs, inputs).
        keep: makes the clean copy of a piece of the base; it is kept as it is given back.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        packed: Mapping[str, Sequence[str]],
        weight: Callable[[str], torch.Tensor],
        keep: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
    ) -> None:
        self._layers, self._packed, self._weight, self._keep = layers, packed, weight, keep
        self._clean: dict[str, torch.Tensor] = {}

    @property
    def clean_bytes(self) -> int:
        """Of the clean copy, on this rank."""
        return sum(each.nbytes for each in self._clean.values())

    def fold(self, adapter: Mapping[str, torch.Tensor], scaling: float) -> list[str]:
        """Let the weights be base + scaling * B A, whatever was in them before.

        Args:
            adapter: under PEFT's names: A of shape (rank, inputs), B of shape (outputs, rank), of whole maps.
            scaling: alpha / rank, or what the adapter has instead.

        Returns:
            The layers that were changed.

        Raises:
            CannotFold: with the names of what is missing, is too much, or does not fit; nothing was changed.
        """
        pairs = _pairs(adapter)
        if not math.isfinite(scaling):
            raise CannotFold(f"the adapter's scaling is {scaling}")
        if self._clean:
            _require_same(pairs, self._clean)
        parts = {name: locate(name, self._layers, self._packed) for name in pairs}
        for name, (a, b) in pairs.items():
            _require_fit(name, a, b, parts[name], self._weight(parts[name].layer))
        # All of it or, where there is no room, none.
        self._clean = self._clean or {name: self._keep(self._piece(part)) for name, part in parts.items()}
        for name, part in parts.items():
            _add(self._piece(part), self._clean[name], *_shards(*pairs[name], part), scaling)
        return list(dict.fromkeys(part.layer for part in parts.values()))

    def _piece(self, part: Part) -> torch.Tensor:
        return self._weight(part.layer)[slice(*part.rows)]


def _pairs(adapter: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each linear map."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in adapter.items():
        name, _, half = key.removesuffix(".weight").removeprefix(PREFIX).rpartition(".")
        if key != f"{PREFIX}{name}.{half}.weight" or half not in HALVES:
            strange.append(key)
        else:
            halves.setdefault(name, {})[half] = tensor
    if strange:
        raise CannotFold(f"no half of an adapter: {listed(strange)}; only A and B of linear maps can be folded")
    if not halves:
        raise CannotFold("the adapter's file holds nothing")
    lacking = [f"{name}.{half}" for name, found in halves.items() for half in HALVES if half not in found]
    if lacking:
        raise CannotFold(f"missing from the adapter: {listed(lacking)}")
    return {name: (found["lora_A"], found["lora_B"]) for name, found in halves.items()}


def _require_same(given: Iterable[str], expected: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    said = [f"{label} {listed(names)}" for label, names in (("missing", missing), ("extra", extra)) if names]
    if said:
        raise CannotFold(f"this adapter changes other linear maps than the first one: {'; '.join(said)}")


def _require_fit(name: str, a: torch.Tensor, b: torch.Tensor, part: Part, weight: torch.Tensor) -> None:
    outputs, inputs = part.whole
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != part.whole:
        found = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
        raise CannotFold(f"{name} maps {inputs} inputs to {outputs} outputs, which {found} do not")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise CannotFold(f"{name}: A is {a.dtype} and B is {b.dtype}, which are no weights")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise CannotFold(f"{part.layer} is {weight.dtype} of shape {tuple(weight.shape)}, which cannot be added to")
    if weight.shape[0] < part.rows[1] or weight.shape[1] != part.shape[1]:
        raise CannotFold(f"{part.layer} has shape {tuple(weight.shape)}, and {name} would be its rows {part.rows}")


def _shards(a: torch.Tensor, b: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return a[:, slice(*part.inputs)], b[slice(*part.outputs)]


def _add(weight: torch.Tensor, clean: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """weight = clean + scaling * b a, some rows at a time: the same ones each time, so to the same bits."""
    device, width = weight.device, weight.shape[1]
    # Converted there, not here: else one thread of the CPU does it, and twice as many bytes travel.
    a, b = a.to(device).float(), b.to(device).float()
    rows = max(1, CHUNK_ELEMENTS // width)
    for first in range(0, weight.shape[0], rows):
        chunk = slice(first, first + rows)
        base = clean[chunk].to(device, non_blocking=True).float()
        weight[chunk] = torch.addmm(base, b[chunk], a, alpha=scaling)


def listed(names: Sequence[str]) -> str:
    """Some names for an error, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
