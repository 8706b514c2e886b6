"""Adapters in a server's own weights, on plain torch: layers that carry what vLLM's carry, cut as vLLM cuts them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch

from r1zero.serving import folding
from r1zero.serving.folding import PREFIX, CannotFold, Folding, locate, maps

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEAD, HEADS, KV_HEADS, WIDE, RANK = 24, 4, 8, 2, 32, 3
LAYER = "model.layers.0"
# Outputs and inputs of the whole maps.
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    f"{LAYER}.self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    f"{LAYER}.self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    f"{LAYER}.self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    f"{LAYER}.mlp.gate_proj": (WIDE, HIDDEN),
    f"{LAYER}.mlp.up_proj": (WIDE, HIDDEN),
    f"{LAYER}.mlp.down_proj": (HIDDEN, WIDE),
}
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"
OUT, DOWN = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"


class UnquantizedLinearMethod:
    pass


class Fp8LinearMethod:
    pass


@dataclass
class Layer:
    """What `folding` reads of a layer of vLLM."""

    tp_rank: int
    tp_size: int
    input_size: int
    output_size: int
    quant_method: object = field(default_factory=UnquantizedLinearMethod)
    weight: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class QKVParallelLinear(Layer):
    head_size: int = HEAD
    total_num_heads: int = HEADS
    total_num_kv_heads: int = KV_HEADS

    def __post_init__(self) -> None:
        self.num_heads = HEADS // self.tp_size
        self.num_kv_heads = max(1, KV_HEADS // self.tp_size)
        self.num_kv_head_replicas = max(1, self.tp_size // KV_HEADS)


@dataclass
class MergedColumnParallelLinear(Layer):
    output_sizes: list[int] = field(default_factory=lambda: [WIDE, WIDE])


class ColumnParallelLinear(Layer):
    pass


class RowParallelLinear(Layer):
    pass


class ReplicatedLinear(Layer):
    pass


class FusedMoE(Layer):
    pass


def base(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The whole maps of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def adapter(seed: int, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (outputs, inputs) in SHAPES.items():
        made[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(dtype)
        made[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).to(dtype)
    return made


def server(rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Layer]:
    """One rank's layers with its shard of the base, cut as vLLM's weight loaders cut it."""
    whole = base(dtype)

    def rows(weight: torch.Tensor, place: int, places: int) -> torch.Tensor:
        return weight.chunk(places)[place]

    key = f"{LAYER}.self_attn"
    kv_place, kv_places = rank * min(ranks, KV_HEADS) // ranks, min(ranks, KV_HEADS)
    qkv = [rows(whole[f"{key}.q_proj"], rank, ranks)]
    qkv += [rows(whole[f"{key}.{each}_proj"], kv_place, kv_places) for each in "kv"]
    mlp = [rows(whole[f"{LAYER}.mlp.{each}_proj"], rank, ranks) for each in ("gate", "up")]
    layers: dict[str, Layer] = {
        QKV: QKVParallelLinear(rank, ranks, HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD, weight=torch.cat(qkv)),
        GATE_UP: MergedColumnParallelLinear(rank, ranks, HIDDEN, 2 * WIDE, weight=torch.cat(mlp)),
        OUT: RowParallelLinear(rank, ranks, HEADS * HEAD, HIDDEN),
        DOWN: RowParallelLinear(rank, ranks, WIDE, HIDDEN),
    }
    for name in (OUT, DOWN):
        layers[name].weight = whole[name].chunk(ranks, dim=1)[rank].contiguous()
    return layers


def folded(layers: Mapping[str, Layer]) -> Folding:
    return Folding(layers, PACKED, lambda name: layers[name].weight)


def weights(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    return {name: layer.weight.clone() for name, layer in layers.items()}


def merged(adapted: Mapping[str, torch.Tensor], scaling: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole maps as anybody merges them, in float64 and rounded once."""
    result = {}
    for name, weight in base(dtype).items():
        a, b = (adapted[f"{PREFIX}{name}.lora_{half}.weight"].double() for half in "AB")
        result[name] = (weight.double() + scaling * b @ a).to(dtype)
    return result


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 6), (1, 16), (8, 1)])
def test_each_rank_has_its_shard_of_the_merged_weights(ranks: int, rank: int, alpha: int) -> None:
    """Rows of fused layers, columns of row-parallel ones, key and value heads that several ranks hold."""
    given, scaling = adapter(1, torch.float32, rank), alpha / rank
    expected = merged(given, scaling, torch.float32)
    for place in range(ranks):
        layers = server(place, ranks, torch.float32)
        changed = folded(layers).fold(given, scaling)
        assert sorted(changed) == sorted(layers)
        for name, whole in expected.items():
            part = locate(name, layers, PACKED)
            own = whole[slice(*part.outputs), slice(*part.inputs)]
            torch.testing.assert_close(layers[part.layer].weight[slice(*part.rows)], own, atol=1e-5, rtol=1e-5)
        assert sum(locate(name, layers, PACKED).shape[0] for name in maps(given)) == sum(
            layer.weight.shape[0] for layer in layers.values()
        ), "every row is of one of them"


def test_the_sum_is_made_in_float32_and_rounded_once() -> None:
    layers, given = server(), adapter(2)
    folded(layers).fold(given, 2.0)
    expected = merged(given, 2.0, torch.bfloat16)
    for name, weight in expected.items():
        part = locate(name, layers, PACKED)
        own = layers[part.layer].weight[slice(*part.rows)]
        assert own.dtype == torch.bfloat16
        different = own != weight
        # Where float32's sum falls on the other side of a tie; elsewhere to the last bit.
        assert different.double().mean() < 0.01
        torch.testing.assert_close(own, weight, atol=0, rtol=2**-7)


def test_after_200_adapters_the_first_gives_the_same_bits() -> None:
    layers = server()
    fold = folded(layers)
    before, places = weights(layers), {name: layer.weight.data_ptr() for name, layer in layers.items()}
    fold.fold(adapter(0), 2.0)
    first = weights(layers)
    assert not any(torch.equal(first[name], before[name]) for name in layers)
    for seed in range(1, 201):
        fold.fold(adapter(seed), 0.5 + seed % 7)
    assert not any(torch.equal(first[name], layers[name].weight) for name in layers)
    fold.fold(adapter(0), 2.0)
    assert all(torch.equal(first[name], layers[name].weight) for name in layers)
    fold.fold({name: torch.zeros_like(each) for name, each in adapter(0).items()}, 2.0)
    assert all(torch.equal(before[name], layers[name].weight) for name in layers), "nothing added: the base itself"
    assert places == {name: layer.weight.data_ptr() for name, layer in layers.items()}, "where CUDA graphs read them"
    assert fold.clean_bytes == sum(each.nbytes for each in before.values())


def test_an_addition_that_goes_by_pieces_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_pieces = server(), server()
    folded(at_once).fold(adapter(3), 2.0)
    monkeypatch.setattr(folding, "CHUNK_ELEMENTS", 5 * HIDDEN)
    folded(in_pieces).fold(adapter(3), 2.0)
    for name, layer in at_once.items():
        torch.testing.assert_close(in_pieces[name].weight, layer.weight, atol=0, rtol=2**-7)
    again = server()
    folded(again).fold(adapter(3), 2.0)
    assert all(torch.equal(again[name].weight, layer.weight) for name, layer in in_pieces.items())


def test_what_the_adapter_does_not_change_stays() -> None:
    layers = server()
    before = weights(layers)
    some = {name: each for name, each in adapter(1).items() if ".q_proj." in name or ".v_proj." in name}
    fold = folded(layers)
    assert fold.fold(some, 1.0) == [QKV]
    q, k = HEADS * HEAD, KV_HEADS * HEAD
    assert torch.equal(layers[QKV].weight[q : q + k], before[QKV][q : q + k])
    assert not torch.equal(layers[QKV].weight[:q], before[QKV][:q])
    assert all(torch.equal(layers[name].weight, before[name]) for name in (GATE_UP, OUT, DOWN))
    assert fold.clean_bytes == 2 * HIDDEN * (q + k), "a copy of what is changed alone"


def test_replicated_and_column_parallel_layers() -> None:
    whole = torch.randn(8, 6)
    given = {f"{PREFIX}{name}.lora_A.weight": torch.randn(2, 6) for name in ("free", "cut")}
    given |= {f"{PREFIX}{name}.lora_B.weight": torch.randn(8, 2) for name in ("free", "cut")}
    layers = {
        "free": ReplicatedLinear(1, 2, 6, 8, weight=whole.clone()),
        "cut": ColumnParallelLinear(1, 2, 6, 8, weight=whole[4:].clone()),
    }
    folded(layers).fold(given, 1.5)
    for name, rows in (("free", slice(None)), ("cut", slice(4, None))):
        delta = given[f"{PREFIX}{name}.lora_B.weight"] @ given[f"{PREFIX}{name}.lora_A.weight"]
        torch.testing.assert_close(layers[name].weight, (whole + 1.5 * delta)[rows])


DOWN_A, DOWN_B = f"{PREFIX}{DOWN}.lora_A.weight", f"{PREFIX}{DOWN}.lora_B.weight"


def changed(without: str = "") -> dict[str, torch.Tensor]:
    return {name: each for name, each in adapter(1).items() if name != without}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "holds nothing"),
        (changed(without=DOWN_B), f"missing from the adapter: {DOWN}.lora_B"),
        (changed() | {"lm_head.weight": torch.ones(1)}, "no half of an adapter: lm_head.weight"),
        (changed() | {f"{PREFIX}{DOWN}.lora_magnitude_vector": torch.ones(1)}, "lora_magnitude_vector"),
        (changed() | {f"{PREFIX}{DOWN}.lora_B.bias": torch.ones(1)}, "lora_B.bias"),
        (
            changed() | {f"{PREFIX}model.lm_head.lora_{half}.weight": torch.ones(1, 1) for half in "AB"},
            "no layer model.lm_head",
        ),
        (changed() | {DOWN_A: torch.ones(RANK, WIDE + 1)}, f"{DOWN} maps {WIDE} inputs to {HIDDEN} outputs"),
        (changed() | {DOWN_B: torch.ones(HIDDEN, RANK + 1)}, f"{DOWN} maps {WIDE} inputs to {HIDDEN} outputs"),
        (changed() | {DOWN_B: torch.ones(HIDDEN, RANK, dtype=torch.int8)}, f"{DOWN}: A is torch.bfloat16 and B is"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_and_changes_nothing(given: dict[str, torch.Tensor], said: str) -> None:
    layers = server()
    fold, before = folded(layers), weights(layers)
    with pytest.raises(CannotFold) as stopped:
        fold.fold(given, 1.0)
    assert said in str(stopped.value)
    assert all(torch.equal(before[name], layers[name].weight) for name in layers)
    fold.fold(adapter(0), 1.0)  # it goes on with one that does


def test_a_later_adapter_must_change_what_the_first_one_changed() -> None:
    """A map that is left out would keep the last adapter."""
    layers = server()
    fold = folded(layers)
    only_down = {name: each for name, each in adapter(1).items() if DOWN in name}
    fold.fold(only_down, 1.0)
    before = weights(layers)
    with pytest.raises(CannotFold, match=rf"extra {GATE_UP.replace('gate_up', 'gate')}.* and 2 more"):
        fold.fold(adapter(1), 1.0)
    assert all(torch.equal(before[name], layers[name].weight) for name in layers)
    every = folded(server())
    every.fold(adapter(1), 1.0)
    with pytest.raises(CannotFold, match=rf"other linear maps than the first one: missing .*{OUT}"):
        every.fold({name: each for name, each in adapter(1).items() if OUT not in name}, 1.0)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf")])
def test_a_scaling_that_is_no_number(scaling: float) -> None:
    with pytest.raises(CannotFold, match="scaling"):
        folded(server()).fold(adapter(1), scaling)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (RowParallelLinear(0, 1, WIDE, HIDDEN, quant_method=Fp8LinearMethod()), "is quantized (Fp8LinearMethod)"),
        (FusedMoE(0, 1, WIDE, HIDDEN), "is a FusedMoE, whose weight is not known here"),
        (QKVParallelLinear(0, 1, WIDE, HIDDEN), "is fused in the checkpoint too"),
        (torch.nn.Linear(WIDE, HIDDEN), "is a Linear, whose weight is not known here"),
        (RowParallelLinear(0, 1, WIDE, HIDDEN, weight=torch.ones(HIDDEN, 3)), "has shape (24, 3)"),
        (RowParallelLinear(0, 1, WIDE, HIDDEN, weight=torch.ones(HIDDEN, WIDE, dtype=torch.int8)), "is torch.int8"),
    ],
)
def test_a_layer_that_cannot_be_added_to_is_named(layer: Layer, said: str) -> None:
    layers = {**server(), DOWN: layer}
    with pytest.raises(CannotFold) as stopped:
        folded(layers).fold(adapter(1), 1.0)
    assert DOWN in str(stopped.value) and said in str(stopped.value)


def test_where_there_is_no_room_for_the_clean_copy_nothing_is_changed() -> None:
    layers, room = server(), iter(range(3))

    def keep(piece: torch.Tensor) -> torch.Tensor:
        if next(room, None) is None:
            raise MemoryError("no room")
        return piece.clone()

    before = weights(layers)
    fold = Folding(layers, PACKED, lambda name: layers[name].weight, keep)
    with pytest.raises(MemoryError):
        fold.fold(adapter(1), 1.0)
    assert all(torch.equal(before[name], layers[name].weight) for name in layers) and fold.clean_bytes == 0
