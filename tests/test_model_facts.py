"""A model's facts from a folder, from the hub's cache, and the ways in which there are none. The hub is never asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1zero import model_facts
from r1zero.model_facts import ModelFacts, ModelNotFound, ModelShape

COMMIT, OLD = "1" * 40, "2" * 40


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 4096}, "vision_config": {"max_position_embeddings": 1}}, 4096),
    ],
)
def test_a_local_folder(config: dict[str, object], length: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_facts.read(str(tmp_path), None, download=False) == ModelFacts(length)


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}


def shape_of(config: dict[str, object], folder: Path) -> ModelShape | None:
    (folder / "config.json").write_text(json.dumps(config))
    facts = model_facts.read(str(folder), None, download=False)
    assert facts is not None and facts.family == config.get("model_type")
    return facts.shape


def test_the_shape_of_a_model_and_its_weights(tmp_path: Path) -> None:
    shape = shape_of(QWEN, tmp_path)
    assert shape == ModelShape(2048, 36, 16, 2, 128, 11008, 151936, tied_embeddings=True)
    assert shape.parameters == pytest.approx(3.086e9, rel=1e-3)  # Qwen2.5-3B, as its card says
    assert shape.lora_parameters(64, model_facts.PROJECTIONS) == 119_734_272  # counted on the loaded model
    assert shape.lora_parameters(64, ["all-linear"]) == 119_734_272
    assert shape.lora_parameters(64, ["model.layers.*.q_proj", "v_proj"]) == shape.lora_parameters(64, None)
    assert shape.kv_bytes_per_token(2) == 36_864


def test_what_a_configuration_leaves_out(tmp_path: Path) -> None:
    bare = {key: value for key, value in QWEN.items() if key not in ("num_key_value_heads", "tie_word_embeddings")}
    shape = shape_of(bare, tmp_path)
    assert shape is not None and (shape.kv_heads, shape.tied_embeddings) == (16, False)
    wide = shape_of({**QWEN, "head_dim": 256}, tmp_path)
    assert wide is not None and wide.projection("o_proj") == (16 * 256, 2048)


@pytest.mark.parametrize(
    "change", [{"model_type": "gpt2"}, {"model_type": None}, {"vocab_size": None}, {"hidden_size": "wide"}]
)
def test_a_shape_that_cannot_be_counted_is_unknown(change: dict[str, object], tmp_path: Path) -> None:
    assert shape_of({**QWEN, **change}, tmp_path) is None


def test_a_folder_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 7}')
    assert model_facts.read("~", None, download=False) == ModelFacts(7)


def test_a_config_that_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position')
    with pytest.raises(ModelNotFound, match=r"config\.json is not JSON"):
        model_facts.read(str(tmp_path), None, download=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache as huggingface_hub lays it out, with two revisions of one model."""
    model = tmp_path / "hub" / "models--org--model"
    for ref, commit, length in (("main", COMMIT, 512), ("old", OLD, 256)):
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / ref).write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(json.dumps({"max_position_embeddings": length}))
    return tmp_path / "hub"


def read_in_a_process(cache: Path, model: str, revision: str | None, download: bool, variable: str) -> str:
    """In a process of its own: the hub library reads its environment once, at import."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN")}
    environment[variable] = str(cache if variable == "HF_HUB_CACHE" else cache.parent)
    code = (
        "from r1zero.model_facts import ModelNotFound, read\n"
        f"try: print(read({model!r}, {revision!r}, download={download}))\n"
        "except ModelNotFound as error: print('not found:', error)"
    )
    return subprocess.check_output(
        [sys.executable, "-c", code], env={**environment, "HF_HUB_OFFLINE": "1"}, text=True, timeout=60
    ).strip()


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
@pytest.mark.parametrize("download", [False, True])
def test_the_hub_cache(variable: str, download: bool, cache: Path) -> None:
    assert read_in_a_process(cache, "org/model", None, download, variable) == str(ModelFacts(512))


@pytest.mark.parametrize(("revision", "length"), [("old", 256), ("main", 512), (OLD, 256)])
def test_a_revision_in_the_hub_cache(revision: str, length: int, cache: Path) -> None:
    found = read_in_a_process(cache, "org/model", revision, False, "HF_HUB_CACHE")
    assert found == str(ModelFacts(length))


def test_a_model_that_is_not_in_the_cache_is_unknown_without_a_download_and_not_found_with_one(cache: Path) -> None:
    assert read_in_a_process(cache, "org/other", None, False, "HF_HUB_CACHE") == "None"
    found = read_in_a_process(cache, "org/other", None, True, "HF_HUB_CACHE")
    assert found.startswith("not found: ") and "local cache" in found and "\n" not in found


def test_a_name_that_no_hub_model_can_have() -> None:
    with pytest.raises(ModelNotFound):
        model_facts.read("org//model", None, download=False)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"], "sliding_window": None}, None),
        ({"model_type": "mistral"}, "sliding window"),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mamba"}, "and this is mamba"),
    ],
)
def test_which_models_keep_packed_sequences_apart(config: dict[str, object], why: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = model_facts.read(str(tmp_path), None, download=False)
    assert facts is not None
    assert facts.unpackable is None if why is None else why in str(facts.unpackable)
