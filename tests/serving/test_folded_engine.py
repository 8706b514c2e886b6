"""Our engine for folded adapters where vLLM is not installed: a stand-in has what the engine takes from it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from safetensors.torch import save_file

from r1zero.serving import CLEAN_COPY, PUBLISH_FOLDER
from r1zero.serving.folding import CannotFold, locate
from tests.serving import test_folding as layers_of
from tests.serving.test_folding import PACKED, Layer, adapter, base, merged

Init, Update = TypeVar("Init"), TypeVar("Update")


class Base(Generic[Init, Update]):
    """vLLM's WeightTransferEngine."""

    update_info_cls: type

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, torch.device(device)
        self.model_config = SimpleNamespace(dtype=torch.bfloat16)
        self.vllm_config = SimpleNamespace(load_config=None)

    def parse_update_info(self, given: dict[str, Any]) -> Any:
        try:
            return self.update_info_cls(**given)
        except TypeError as error:
            raise ValueError(f"Invalid update_info: {error}") from error


class UnquantizedLinearMethod:
    """vLLM's on a CPU: it packs the weight and forgets it."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed, layer.weight = layer.weight.detach().clone(), torch.empty(0)


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    info = type("Info", (), {})
    parts = {
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": Base,
            "WeightTransferInitInfo": info,
            "WeightTransferUpdateInfo": info,
        },
        "vllm.model_executor.model_loader": {
            "get_model_loader": lambda config: SimpleNamespace(
                get_all_weights=lambda config, model: ((f"{name}.weight", each) for name, each in base().items())
            )
        },
    }
    for name, content in parts.items():
        for number in range(1, name.count(".") + 2):
            package = ".".join(name.split(".")[:number])
            if package not in sys.modules or package == name:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        for what, value in content.items():
            setattr(sys.modules[name], what, value)
    monkeypatch.delitem(sys.modules, "r1zero.serving.folded_engine", raising=False)
    monkeypatch.setenv(PUBLISH_FOLDER, str(tmp_path))
    from r1zero.serving.folded_engine import FoldedEngine

    def build(layers: dict[str, Layer], device: str = "cpu") -> Any:
        model = SimpleNamespace(named_modules=lambda: layers.items(), packed_modules_mapping=PACKED)
        return FoldedEngine(model, device)

    yield build
    sys.modules.pop("r1zero.serving.folded_engine", None)


def packed_server(rank: int, ranks: int) -> dict[str, Layer]:
    layers = layers_of.server(rank, ranks)
    for layer in layers.values():
        layer.quant_method = UnquantizedLinearMethod()
        layer.weight = torch.empty(0)
    return layers


def publish(engine: Any, folder: Path, seed: int) -> None:
    save_file(adapter(seed), folder / "a.safetensors")
    engine.update_weights({"file": "a.safetensors", "scaling": 2.0})


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
def test_on_a_cpu_the_base_is_read_again_and_what_changed_is_packed(
    engine_of: Any, tmp_path: Path, rank: int, ranks: int
) -> None:
    layers = packed_server(rank, ranks)
    engine = engine_of(layers)
    first = {}
    for seed in (1, 2, 1):
        publish(engine, tmp_path, seed)
        for name, whole in merged(adapter(seed), 2.0, torch.bfloat16).items():
            part = locate(name, layers, PACKED)
            own = layers[part.layer].packed[slice(*part.rows)]
            expected = whole[slice(*part.outputs), slice(*part.inputs)]
            torch.testing.assert_close(own, expected, atol=0, rtol=2**-7)
            assert torch.equal(first.setdefault((seed, name), own), own)
        assert all(layer.weight.numel() == 0 for layer in layers.values())


def test_what_leads_out_of_the_publish_folder_is_not_read(engine_of: Any, tmp_path: Path) -> None:
    engine = engine_of(packed_server(0, 1))
    for name in ("../a.safetensors", "/etc/passwd", "a.bin", "."):
        with pytest.raises(PermissionError, match="is not a safetensors file inside the folder"):
            engine.update_weights({"file": name, "scaling": 2.0})


@pytest.mark.parametrize(
    "given", [{}, {"file": "a"}, {"file": "", "scaling": 1.0}, {"file": "a", "scaling": "1"}, {"files": ["a"]}]
)
def test_what_is_no_update_is_refused(engine_of: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"update_info"):
        engine_of(packed_server(0, 1)).update_weights(given)


def test_a_model_whose_files_have_other_names_is_refused(engine_of: Any, tmp_path: Path) -> None:
    layers = packed_server(0, 1)
    renamed = {name.replace("layers.0", "layers.1"): each for name, each in layers.items()}
    save_file(
        {name.replace("layers.0", "layers.1"): each for name, each in adapter(1).items()}, tmp_path / "b.safetensors"
    )
    with pytest.raises(CannotFold, match=r"the model's files have no model\.layers\.1\."):
        engine_of(renamed).update_weights({"file": "b.safetensors", "scaling": 2.0})


def test_where_the_clean_copy_is_kept_must_be_known(
    engine_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CLEAN_COPY, "disk")
    with pytest.raises(ValueError, match=f"{CLEAN_COPY} must be gpu or host, got 'disk'"):
        publish(engine_of(packed_server(0, 1)), tmp_path, 1)


def test_no_room_for_the_clean_copy_is_said(engine_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*unused: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = engine_of(packed_server(0, 1))
    monkeypatch.setattr(torch.Tensor, "clone", fails)
    with pytest.raises(MemoryError, match=r"no room for the clean copy of the base on the GPU .*publish: adapter"):
        publish(engine, tmp_path, 1)
