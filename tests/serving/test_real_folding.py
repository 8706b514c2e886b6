"""Adapters folded into the weights of the real `vllm serve`, by its CPU build."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from r1zero.model_facts import PROJECTIONS
from r1zero.serving import FOLDED, POLICY_ROUTE, VERSION_HEADER
from tests.serving.conftest import Reply, Server, logprobs, started

pytestmark = [pytest.mark.xdist_group("real_folding_server"), pytest.mark.timeout(600)]
CLOSE = {"atol": 2e-4, "rtol": 1e-3}  # float32 on both sides, by other kernels
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def folding(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without LoRA that folds adapters."""
    with started(model_folder, tmp_path_factory.mktemp("folding"), adapters=False, weight_transfer=FOLDED) as server:
        yield server


@pytest.fixture
def adapted(policy: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    return get_peft_model(policy, config)


def learn(adapted: PeftModel, seed: int, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))


def lay_down(adapted: PeftModel, folder: Path) -> Path:
    adapted.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def publish(server: Server, version: int, file: str, scaling: float = ALPHA / RANK) -> Reply:
    """A whole update; the answer of the first step that failed, else of the last."""
    info = {"update_info": {"file": file, "scaling": scaling}}
    for path, content in (("/start_weight_update", None), ("/update_weights", info)):
        reply = server.post(path, content)
        if reply.status != 200:
            return reply
    finished = server.post("/finish_weight_update", X_Policy_Version=str(version))
    assert server.post("/reset_prefix_cache").content == {"success": True}
    return finished


def test_a_folded_adapter_is_the_policy_that_answers(folding: Server, adapted: PeftModel, probe: list[int]) -> None:
    base = folding.logprobs(probe)
    with adapted.disable_adapter():
        torch.testing.assert_close(base, logprobs(adapted, probe), **CLOSE)
    answers = {}
    for version, seed in enumerate((1, 2, 3, 1)):
        learn(adapted, seed)
        file = lay_down(adapted, folding.publish / "adapter")
        assert publish(folding, version, str(file.relative_to(folding.publish))).status == 200
        expected = logprobs(adapted, probe)
        assert not torch.allclose(expected, base, atol=0.05)
        found = folding.logprobs(probe)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert torch.equal(answers.setdefault(seed, found), found), "the first adapter again: to the last bit"
        assert folding.ask("GET", POLICY_ROUTE).content["version"] == version
        reply = folding.post("/v1/completions", {"model": str(folding.model), "prompt": "1", "max_tokens": 2})
        assert reply.headers[VERSION_HEADER.lower()] == str(version)
    learn(adapted, 4, size=0.0)
    file = lay_down(adapted, folding.publish / "adapter")
    assert publish(folding, 9, str(file.relative_to(folding.publish))).status == 200
    assert torch.equal(folding.logprobs(probe), base), "an adapter of zeros gives the base itself back"


def test_it_serves_without_lora(folding: Server) -> None:
    words = (folding.folder / "server.log").read_text(errors="replace")
    assert "enable_lora" not in words or "'enable_lora': True" not in words
    assert folding.post("/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": "x"}).status >= 400


@pytest.mark.parametrize(
    "info",
    [
        {"file": "../server.log", "scaling": 2.0},
        {"file": "/etc/passwd", "scaling": 2.0},
        {"file": "absent.safetensors", "scaling": 2.0},
        {"file": "torn.safetensors", "scaling": 2.0},
        {"file": "half.safetensors", "scaling": 2.0},
        {"file": "more.safetensors", "scaling": 2.0},
        {"file": "good.safetensors", "scaling": "2"},
        {"file": "good.safetensors"},
        {"files": ["good.safetensors"]},
    ],
)
def test_what_cannot_be_folded_is_refused_until_one_that_can_has_come(
    folding: Server, adapted: PeftModel, probe: list[int], info: dict[str, object]
) -> None:
    learn(adapted, 5)
    good = lay_down(adapted, folding.publish / "adapter").rename(folding.publish / "good.safetensors")
    whole = load_file(good)
    (folding.publish / "torn.safetensors").write_bytes(good.read_bytes()[:2000])
    save_file(dict(list(whole.items())[1:]), folding.publish / "half.safetensors")
    save_file(whole | {"lm_head.weight": torch.ones(2, 2)}, folding.publish / "more.safetensors")
    assert folding.post("/start_weight_update").status == 200
    assert folding.post("/update_weights", {"update_info": info}).status >= 400
    refused = folding.post("/v1/completions", {"model": str(folding.model), "prompt": "1", "max_tokens": 2})
    assert refused.status == 409 and "failed at /update_weights" in refused.body
    assert publish(folding, 7, good.name).status == 200
    torch.testing.assert_close(folding.logprobs(probe), logprobs(adapted, probe), **CLOSE)
