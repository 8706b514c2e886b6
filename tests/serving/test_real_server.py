"""Our doors, our way for weights and vLLM's for adapters, on the real `vllm serve`, by its CPU build."""

import copy
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from r1zero.serving import POLICY_ROUTE, VERSION_HEADER
from r1zero.serving.routes import ROUTES
from tests.serving.conftest import CANARIES, Server, logprobs

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(600)]
CLOSE = {"atol": 2e-4, "rtol": 1e-3}  # float32 on both sides, by other kernels


def _complete(server: Server, **more: object):
    return server.post("/v1/completions", {"model": str(server.model), "prompt": "1", "max_tokens": 2, **more})


def _changed(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Every weight is another one."""
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return changed


def _lay_down(policy: PreTrainedModel, path: Path, half: bool = False) -> str:
    weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}  # tied ones once
    save_file(dict(list(weights.items())[: len(weights) // 2]) if half else weights, path)
    return path.name


@pytest.fixture
def whole(server: Server, policy: PreTrainedModel) -> Iterator[Server]:
    """The server, with the weights that it began with afterwards."""
    yield server
    assert server.publish_weights(0, _lay_down(policy, server.publish / "first.safetensors")).status == 200


def test_every_route_of_its_own_is_shut_without_the_token(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json").content["paths"]
    assert {"/collective_rpc", "/server_info", "/invocations", "/v1/completions", "/update_weights"} <= set(paths)
    routes = {(method.upper(), path.replace("{", "x").replace("}", "x")) for path in paths for method in paths[path]}
    # What FastAPI and vLLM serve beside their schema.
    routes |= {("GET", path) for path in ("/docs", "/redoc", "/metrics", "/docs/oauth2-redirect", "/", "/nothing")}
    routes |= {(method, path) for _, path in ROUTES for method in ("GET", "POST", "OPTIONS", "DELETE")} | ROUTES
    for method, path in sorted(routes):
        assert server.ask(method, path, token=None).status == 401, (method, path)
        assert server.ask(method, path, token="wrong").status == 401, (method, path)
        if (method, path) not in ROUTES:
            assert server.ask(method, path, content={}).status == 404, (method, path)
    assert {path for _, path in ROUTES} - set(paths) == {POLICY_ROUTE, "/openapi.json"}  # none of ours is a mistake
    assert server.ask("GET", "/health").status == 200


def test_it_listens_on_this_machine_only(server: Server) -> None:
    parent = psutil.Process(server.process.pid)
    sockets = [socket for each in (parent, *parent.children(recursive=True)) for socket in each.net_connections("inet")]
    listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN or not socket.raddr}
    assert server.port in {socket.laddr.port for socket in sockets}
    assert listening == {"127.0.0.1"}


def test_no_secret_is_in_its_log_its_arguments_or_its_files(server: Server) -> None:
    assert _complete(server).status == 200
    secrets = [value.encode() for value in (server.token, *CANARIES.values())]
    parent = psutil.Process(server.process.pid)
    shown = [" ".join(each.cmdline()).encode() for each in (parent, *parent.children(recursive=True))]
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert server.log in files
    for text in (*shown, *(path.read_bytes() for path in files)):
        assert not [secret for secret in secrets if secret in text]


def test_published_weights_are_the_policy_that_answers(
    whole: Server, policy: PreTrainedModel, probe: list[int]
) -> None:
    torch.testing.assert_close(whole.logprobs(probe), logprobs(policy, probe), **CLOSE)
    for version in (1, 2):
        changed = _changed(policy, version)
        assert not torch.allclose(logprobs(changed, probe), whole.logprobs(probe), atol=0.05)
        assert (
            whole.publish_weights(version, _lay_down(changed, whole.publish / f"{version}.safetensors")).status == 200
        )
        torch.testing.assert_close(whole.logprobs(probe), logprobs(changed, probe), **CLOSE)
        assert whole.ask("GET", POLICY_ROUTE).content["version"] == version
        assert _complete(whole).headers[VERSION_HEADER.lower()] == str(version)


def test_weights_in_several_files_and_updates(whole: Server, policy: PreTrainedModel, probe: list[int]) -> None:
    changed = _changed(policy, 3)
    weights = dict(changed.named_parameters())
    names = sorted(weights)
    for number in range(3):
        save_file({name: weights[name].detach() for name in names[number::3]}, whole.publish / f"{number}.safetensors")
    assert whole.post("/start_weight_update").status == 200
    for files in (["0.safetensors"], ["1.safetensors", "2.safetensors"]):
        assert whole.post("/update_weights", {"update_info": {"files": files}}).status == 200
    assert whole.post("/finish_weight_update", X_Policy_Version="4").status == 200
    torch.testing.assert_close(whole.logprobs(probe), logprobs(changed, probe), **CLOSE)


def test_nothing_is_generated_half_way(whole: Server, policy: PreTrainedModel) -> None:
    assert whole.post("/start_weight_update").status == 200
    refused = _complete(whole)
    assert (refused.status, refused.content) == (409, {"error": "an update of the weights is under way"})
    name = _lay_down(policy, whole.publish / "half.safetensors")
    assert whole.post("/update_weights", {"update_info": {"files": [name]}}).status == 200
    assert _complete(whole).status == 409
    assert whole.post("/finish_weight_update", X_Policy_Version="5").status == 200
    assert _complete(whole).status == 200


@pytest.mark.parametrize(
    "files", [["no-such.safetensors"], ["../server.log"], ["/etc/passwd"], [], ["torn.safetensors"]]
)
def test_after_a_failed_update_it_refuses_until_one_is_complete(
    whole: Server, policy: PreTrainedModel, probe: list[int], files: list[str]
) -> None:
    half = _lay_down(_changed(policy, 6), whole.publish / "half.safetensors", half=True)
    (whole.publish / "torn.safetensors").write_bytes((whole.publish / half).read_bytes()[:2000])
    assert whole.post("/start_weight_update").status == 200
    assert whole.post("/update_weights", {"update_info": {"files": [half]}}).status == 200
    assert whole.post("/update_weights", {"update_info": {"files": files}}).status >= 400
    refused = _complete(whole)
    assert refused.status == 409 and "failed at /update_weights" in refused.body
    assert whole.post("/finish_weight_update", X_Policy_Version="6").status == 409
    assert whole.ask("GET", POLICY_ROUTE).content["updating"]
    changed = _changed(policy, 7)
    assert whole.publish_weights(7, _lay_down(changed, whole.publish / "good.safetensors")).status == 200
    torch.testing.assert_close(whole.logprobs(probe), logprobs(changed, probe), **CLOSE)


def test_an_adapter_is_the_policy_that_answers_to_its_name(
    server: Server, policy: PreTrainedModel, probe: list[int]
) -> None:
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(policy, LoraConfig(r=8, lora_alpha=16, target_modules=seven, task_type="CAUSAL_LM"))
    before = server.logprobs(probe)
    for version in (1, 2, 3):  # more than it holds at once
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(version)))
        name = f"policy-{version}"
        adapted.save_pretrained(server.publish / name)
        loaded = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": name})
        assert loaded.status == 200, loaded.body
        expected = logprobs(adapted, probe)
        assert not torch.allclose(expected, before, atol=0.05)
        torch.testing.assert_close(server.logprobs(probe, name), expected, **CLOSE)
        reply = _complete(server, model=name)
        assert (reply.status, reply.content["model"]) == (200, name)
    torch.testing.assert_close(server.logprobs(probe), before, **CLOSE)  # the base is as it was
    for version in (1, 2, 3):
        assert server.post("/v1/unload_lora_adapter", {"lora_name": f"policy-{version}"}).status == 200
    assert _complete(server, model="policy-3").status == 404


def test_an_adapter_from_elsewhere_is_not_let_in(server: Server, tmp_path: Path) -> None:
    (server.publish / "link").unlink(missing_ok=True)
    (server.publish / "link").symlink_to(tmp_path)
    for path in ("/etc", "..", ".", "link", "../publish", str(tmp_path), f"{server.publish}/../home"):
        refused = server.post("/v1/load_lora_adapter", {"lora_name": "policy-9", "lora_path": path})
        assert refused.status == 403, path
        assert "is not inside the folder that R1ZERO_PUBLISH_FOLDER names" in refused.body
    # Inside, but nothing there: never asked from the hub.
    assert server.post("/v1/load_lora_adapter", {"lora_name": "policy-9", "lora_path": "org/name"}).status == 404


def test_the_prefix_cache_says_whether_it_was_reset(server: Server) -> None:
    assert server.post("/reset_prefix_cache").content == {"success": True}
