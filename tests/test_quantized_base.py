"""The rounded base, made for real on the CPU from a small model: the trainer's policy, found again, never torn."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from r1zero import quantized_base, tiny
from r1zero.quantized_base import BaseNotMade, Settings
from tests.conftest import PROJECT

SETTINGS = Settings()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights of some size, so that rounding them shows; four blocks of 64 in each row."""
    folder = tmp_path_factory.mktemp("source") / "my model"
    tokenizer = tiny.make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            attention_bias=True,
            initializer_range=0.1,
            tie_word_embeddings=True,
        )
        model = Qwen3ForCausalLM(config)
        for name, each in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(each)
        model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1ZERO_CACHE", str(tmp_path_factory.mktemp("made")))
        return quantized_base.ensure(str(source), None, SETTINGS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logprobs(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 90, (4, 60), generator=torch.Generator().manual_seed(0))
    model.train()  # on a CPU, evaluation packs 4-bit weights anew; there is no dropout
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.float(), dim=-1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


# --- what is served is what is trained


def test_the_base_is_the_trainers_policy_and_not_the_unrounded_one(source: Path, made: Path) -> None:
    trained = logprobs(quantized_base.load(str(source), None, SETTINGS))
    served = logprobs(AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16))
    unrounded = logprobs(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))
    apart = float((served - trained).abs().mean())
    assert apart < 0.05
    assert float((unrounded - trained).abs().mean()) > 5 * apart


def test_what_is_not_rounded_is_as_it_was(source: Path, made: Path) -> None:
    before, after = weights(source), weights(made)
    assert after.keys() == before.keys() and {each.dtype for each in after.values()} == {torch.bfloat16}
    rounded = {name for name in before if name.endswith("_proj.weight")}
    assert len(rounded) == 2 * 7
    for name in before:
        assert torch.equal(before[name], after[name]) is (name not in rounded), name
    each = after["model.layers.0.self_attn.q_proj.weight"][0, :64]
    assert len(each.unique()) <= 16, "a block of 64 has the 16 values of nf4"


def test_the_folder_is_a_plain_model(source: Path, made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    text = "What is 12 + 30?\n<answer>"
    assert AutoTokenizer.from_pretrained(made)(text) == AutoTokenizer.from_pretrained(source)(text)


def test_rounding_again_gives_the_same_bits(source: Path, made: Path) -> None:
    first, second = weights(made), weights(quantized_base.ensure(str(source), None, SETTINGS))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_double_quantization_is_another_base(source: Path, made: Path) -> None:
    other = quantized_base.ensure(str(source), None, Settings(double_quant=True))
    trained = logprobs(quantized_base.load(str(source), None, Settings(double_quant=True)))
    served = logprobs(AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16))
    assert float((served - trained).abs().mean()) < 0.05
    assert any(not torch.equal(each, weights(made)[name]) for name, each in weights(other).items())


# --- the cache


def test_a_base_is_made_once(source: Path, cache: Path) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(3) as several:
        folders = set(several.map(lambda _: quantized_base.ensure(str(source), None, SETTINGS, said.append), range(3)))
    assert len(folders) == 1 and sum(line.startswith("rounding") for line in said) == 1
    assert folders == {quantized_base.folder(str(source), None, SETTINGS)}
    assert sorted(each.suffix for each in cache.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("tear", ["cut", "missing", "without manifest"])
def test_a_torn_base_is_made_anew(source: Path, made: Path, cache: Path, tear: str) -> None:
    place = quantized_base.folder(str(source), None, SETTINGS)
    assert place is not None
    shutil.copytree(made, place)
    assert quantized_base.is_made(place)
    file = place / {"without manifest": quantized_base.MANIFEST}.get(tear, "model.safetensors")
    if tear == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    assert not quantized_base.is_made(place)
    assert quantized_base.ensure(str(source), None, SETTINGS) == place and quantized_base.is_made(place)


def test_each_model_and_each_way_of_rounding_has_a_folder_of_its_own(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    variants = (
        SETTINGS,
        Settings(quant_type="fp4"),
        Settings(double_quant=True),
        Settings(dtype="float32"),
        Settings(storage_dtype="bfloat16"),
    )
    folders = [quantized_base.folder(str(path), None, each) for path in (source, other) for each in variants]
    (other / "model.safetensors").touch()
    folders.append(quantized_base.folder(str(other), None, SETTINGS))
    assert len(set(folders)) == 11
    assert quantized_base.folder(str(source), None, Settings(trust_remote_code=True)) == folders[0]


def test_a_model_of_the_hub_goes_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    found: dict[str, str] = {}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: found.get("path"))
    assert quantized_base.folder("who/what-3B", None, SETTINGS) is None, "not downloaded: nobody knows the commit"
    folders = []
    for commit in ("aaaa", "bbbb"):
        snapshot = tmp_path / "models--who--what-3B" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        found["path"] = str(snapshot / "config.json")
        folders.append(quantized_base.folder("who/what-3B", None, SETTINGS))
    assert len(set(folders)) == 2 and all(each is not None and each.name.startswith("what-3B-nf4-") for each in folders)


def test_too_little_space_is_said_and_nothing_is_left(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 2**20))
    with pytest.raises(BaseNotMade, match=r"GiB free: make room there, or give another folder in R1ZERO_CACHE"):
        quantized_base.ensure(str(source), None, SETTINGS)
    assert [each for each in cache.iterdir() if each.is_dir()] == []


# --- the command


def command(recipe: Path, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1zero.quantized_base", "--config", str(recipe), *words],
        env={**os.environ, "R1ZERO_CACHE": str(cache), "PYTHONPATH": str(PROJECT / "src")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_the_command_makes_the_base_of_a_recipe(source: Path, tmp_path: Path, cache: Path) -> None:
    recipe = tmp_path / "gsm8k_qlora.yaml"
    keys = {"model_name_or_path": str(source), "load_in_4bit": True, "use_peft": True, "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump({"method": "grpo", "task": "gsm8k", **keys}))
    done = command(recipe, cache)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert lines[0] == f"rounding {source} to nf4, on {'the GPU' if torch.cuda.is_available() else 'the CPU'}"
    assert Path(last) == quantized_base.folder(str(source), None, SETTINGS) and quantized_base.is_made(Path(last))
    refused = command(recipe, cache, "--load_in_4bit", "false")
    assert refused.returncode == 2 and "load_in_4bit = False" in refused.stderr


def test_finding_a_base_takes_no_torch(source: Path) -> None:
    code = (
        "import sys; from r1zero.quantized_base import Settings, folder; "
        f"print(folder({str(source)!r}, None, Settings())); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
