"""Publishing, as a policy server sees it: a stand-in that writes down each call and reads what is laid down for it.

The files are read with the libraries that the real server reads them with; NCCL is stood in for by a list.
"""

import json
import os
import shutil
import sys
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from r1zero.policy_client import PolicyServerError
from r1zero.serving import VERSION_HEADER
from r1zero.serving.folding import Folding
from r1zero.training import policy_sync
from r1zero.training.policy_sync import (
    Meeting,
    NcclPublisher,
    PublishError,
    iter_full_parameters,
    make,
    on_main_process,
)
from tests.conftest import PROJECT
from tests.training.conftest import one_process, start

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


class Servers:
    """Two policy servers: what they were sent, and what they found in the publish folder at that moment.

    Attributes:
        calls: method, path, body and version header of each, of the first server.
        weights: what the files of /update_weights held, all together.
        fail: path -> error that it is answered with.
    """

    base_urls = URLS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str, Any, str | None]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.folders: list[list[str]] = []  # at each call
        self.buckets: list[int] = []
        self.models: list[str] = ["base"]
        self.fail: dict[str, Exception] = {}
        self.reset: Any = {"success": True}
        self.bodies: dict[str, Sequence[Any]] = {}
        self.timeouts: list[float | None] = []

    def control_all(
        self,
        method: str,
        path: str,
        bodies: Sequence[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        body = bodies[0] if bodies else None
        if bodies:
            assert len(bodies) == len(URLS)
            self.bodies[path] = bodies
        self.calls.append((method, path, body, (headers or {}).get(VERSION_HEADER)))
        self.timeouts.append(timeout_s)
        self.folders.append(sorted(each.name for each in self.folder.iterdir()) if self.folder.is_dir() else [])
        if path in self.fail:
            raise self.fail[path]
        return [self.answer(path, body)] * len(URLS)

    def answer(self, path: str, body: Any) -> Any:
        match path:
            case "/v1/models":
                return {"data": [{"id": each} for each in self.models]}
            case "/v1/load_lora_adapter":
                self.models.append(body["lora_name"])
            case "/v1/unload_lora_adapter":
                self.models.remove(body["lora_name"])
            case "/update_weights" if "files" in body["update_info"]:
                for name in body["update_info"]["files"]:
                    self.buckets.append((self.folder / name).stat().st_size)
                    self.weights |= load_file(self.folder / name)
            case "/update_weights" if "file" in body["update_info"]:
                self.weights = load_file(self.folder / body["update_info"]["file"])
            case "/reset_prefix_cache":
                return self.reset
            case "/get_world_size":
                return {"world_size": 2}
        return None

    @property
    def posted(self) -> list[str]:
        return [path for method, path, _, _ in self.calls if method == "POST"]


def policy(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def with_adapter() -> PeftModel:
    adapted = get_peft_model(policy(), LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, lora_dropout=0.1))
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
    return adapted


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.arange(12)[None]).logits, -1)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with one_process():
        yield Accelerator(cpu=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "publish"


@pytest.fixture
def servers(folder: Path) -> Servers:
    return Servers(folder)


@pytest.fixture
def publisher(accelerator: Accelerator, servers: Servers, folder: Path) -> Callable[..., policy_sync.Publisher]:
    def build(route: str, model: torch.nn.Module, **more: Any) -> policy_sync.Publisher:
        settings: dict[str, Any] = {"timeout_s": 30, "group_port": 1, "dtype": torch.float32, **more}
        return make(route, model, accelerator, servers, publish_folder=folder, **settings)

    return build


# --- the adapter


def test_an_adapter_is_there_whole_when_the_server_is_told(publisher: Any, servers: Servers, folder: Path) -> None:
    model = with_adapter()
    published = publisher("adapter", model)
    assert published.adapter_name is None
    first = published.publish(0)
    assert published.adapter_name == "policy-0" and servers.models == ["base", "policy-0"]
    method, path, body, version = servers.calls[-1]
    assert (method, path, version) == ("POST", "/v1/load_lora_adapter", "0")
    assert body == {"lora_name": "policy-0", "lora_path": str(folder / "policy-0")}
    assert servers.folders[-1] == ["policy-0"]
    assert sorted(each.name for each in (folder / "policy-0").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (first.version, first.route) == (0, "adapter") and 0 < first.seconds < 30
    # 2 layers x (A: 4 x in, B: out x 4) of the seven projections, in float32
    inputs_and_outputs = 2 * ((16 + 16) + (16 + 8) + (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16))
    assert first.bytes == 4 * 4 * inputs_and_outputs
    read = PeftModel.from_pretrained(policy(), folder / "policy-0")
    assert torch.equal(logprobs(read), logprobs(model))


def test_an_adapter_takes_the_place_of_the_one_before(publisher: Any, servers: Servers, folder: Path) -> None:
    published = publisher("adapter", with_adapter())
    for version in range(4):
        published.publish(version)
        assert [each.name for each in folder.iterdir()] == [f"policy-{version}"]
        assert servers.models == ["base", f"policy-{version}"]
    assert max(map(len, servers.folders)) == 2, "at most two on disk at any time"
    load, unload = servers.calls[-2:]
    assert (load[1], unload[1]) == ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    assert unload[2] == {"lora_name": "policy-2"}, "the old one goes after the new one has come"


def test_a_version_that_is_served_is_not_published_again(publisher: Any, servers: Servers) -> None:
    published = publisher("adapter", with_adapter())
    published.publish(0)
    before = len(servers.calls)
    assert published.publish(0).bytes == 0 and len(servers.calls) == before


def test_a_relative_folder_is_named_in_full(
    accelerator: Accelerator, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"timeout_s": 30, "group_port": 1, "dtype": torch.float32}
    make("adapter", with_adapter(), accelerator, servers, publish_folder=Path("publish"), **settings).publish(0)
    assert servers.calls[-1][2]["lora_path"] == str(tmp_path / "publish" / "policy-0")


def test_an_adapter_has_the_servers_dtype(publisher: Any, folder: Path) -> None:
    size = publisher("adapter", with_adapter(), dtype=torch.bfloat16).publish(0).bytes
    written = load_file(folder / "policy-0" / "adapter_model.safetensors")
    assert {each.dtype for each in written.values()} == {torch.bfloat16}
    assert size == sum(each.nbytes for each in written.values())


def test_only_the_trained_adapter_is_published(publisher: Any, folder: Path) -> None:
    """TRL adds a second one as the reference policy."""
    model = with_adapter()
    publisher("adapter", model).publish(0)
    alone = load_file(folder / "policy-0" / "adapter_model.safetensors")
    model.add_adapter("ref", model.peft_config["default"])
    publisher("adapter", model).publish(0)
    both = load_file(folder / "policy-0" / "adapter_model.safetensors")
    assert both.keys() == alone.keys() and all(torch.equal(both[name], alone[name]) for name in both)


def test_what_an_earlier_trainer_left_is_taken_away(publisher: Any, servers: Servers, folder: Path) -> None:
    servers.models += ["policy-0", "policy-1"]
    (folder / "policy-0").mkdir(parents=True)
    (folder / "policy-0" / "old").touch()
    (folder / "policy-9").mkdir()
    (folder / ".policy-0").mkdir()
    publisher("adapter", with_adapter()).publish(0)
    assert servers.models == ["base", "policy-0"]
    assert [each.name for each in folder.iterdir()] == ["policy-0"] and not (folder / "policy-0" / "old").exists()


def test_a_refused_adapter_is_the_servers_error(publisher: Any, servers: Servers) -> None:
    published = publisher("adapter", with_adapter())
    published.publish(0)
    servers.fail["/v1/load_lora_adapter"] = PolicyServerError(URLS[1], "POST /v1/load_lora_adapter", "no")
    with pytest.raises(PolicyServerError, match=URLS[1]):
        published.publish(1)
    assert published.adapter_name == "policy-0" and servers.posted.count("/v1/load_lora_adapter") == 2, "sent once"


def test_too_little_space_is_said_before_anything_is_written(
    publisher: Any, servers: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 2**20))
    with pytest.raises(PublishError) as stopped:
        publisher("adapter", with_adapter()).publish(3)
    assert "policy-3 takes 0.0 MiB and" in str(stopped.value) and "has 1.0 MiB free: make room" in str(stopped.value)
    assert not folder.exists() and "/v1/load_lora_adapter" not in servers.posted


def test_a_disk_that_fills_while_writing_leaves_nothing_behind(
    publisher: Any, servers: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills(weights: Any, path: Path, **unused: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy_sync, "save_file", fills)
    with pytest.raises(PublishError, match=r"policy-3 cannot be written: .*No space left"):
        publisher("adapter", with_adapter()).publish(3)
    assert list(folder.iterdir()) == [] and "/v1/load_lora_adapter" not in servers.posted


# --- the adapter, folded into the servers' weights


class UnquantizedLinearMethod:
    pass


class ReplicatedLinear(SimpleNamespace):
    """A layer of the server, as `folding` sees one."""


def served(model: Qwen2ForCausalLM) -> Folding:
    """A server that has the policy's weights, to fold adapters into."""
    method, layers = UnquantizedLinearMethod(), {}
    for name, each in model.named_modules():
        if isinstance(each, torch.nn.Linear):
            sizes = {"input_size": each.in_features, "output_size": each.out_features}
            layers[name] = ReplicatedLinear(tp_rank=0, tp_size=1, quant_method=method, weight=each.weight.data, **sizes)
    return Folding(layers, {}, lambda name: layers[name].weight)


@pytest.mark.parametrize(("more", "scaling"), [({}, 2.0), ({"lora_alpha": 3}, 0.75), ({"use_rslora": True}, 4.0)])
def test_a_folded_adapter_is_the_policy_that_is_trained(
    publisher: Any, servers: Servers, folder: Path, more: dict[str, Any], scaling: float
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "lora_dropout": 0.1, **more}
    model = get_peft_model(policy(), LoraConfig(**settings))
    published, base = publisher("folded", model), policy()
    server, files = served(base), set()
    for version in range(3):
        with torch.no_grad():
            for name, each in model.named_parameters():
                if "lora_" in name:
                    each.normal_(std=0.3)
        done = published.publish(version)
        info = servers.bodies["/update_weights"][0]["update_info"]
        assert info == {"file": "adapter.safetensors", "scaling": scaling}
        assert servers.folders[servers.posted.index("/update_weights")] == [info["file"]]
        server.fold(servers.weights, info["scaling"])
        torch.testing.assert_close(logprobs(base), logprobs(model), atol=1e-5, rtol=1e-5)
        assert done.bytes == sum(each.nbytes for each in servers.weights.values()) and done.route == "folded"
        files.add((folder / "adapter.safetensors").stat().st_ino)
        assert len(files) == len(list(folder.iterdir())) == 1, "overwritten where it lies"
        assert published.adapter_name is None
        starts = ["/init_weight_transfer_engine"] if version == 0 else []
        ends = ["/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
        assert servers.posted == [*starts, "/start_weight_update", *ends]
        assert ("POST", "/finish_weight_update", {}, str(version)) in servers.calls
        servers.calls.clear()
        servers.folders.clear()
        assert published.publish(version).bytes == 0 and servers.calls == [], "it is served already"
    published.close()
    assert list(folder.iterdir()) == []


def test_a_folded_adapter_has_the_servers_dtype(publisher: Any, servers: Servers) -> None:
    publisher("folded", with_adapter(), dtype=torch.bfloat16).publish(0)
    assert {each.dtype for each in servers.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_dora": True}, "DoRA's magnitudes (use_dora)"),
        ({"bias": "all"}, "trained biases (bias = 'all')"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern and alpha_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "[0.5, 2.0]"),
    ],
)
def test_an_adapter_that_cannot_be_folded_is_named(publisher: Any, more: dict[str, Any], said: str) -> None:
    model = get_peft_model(policy(), LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, **more))
    with pytest.raises(PublishError) as stopped:
        publisher("folded", model)
    assert said in str(stopped.value)


def test_a_disk_too_full_for_the_folded_adapter_is_said_before_the_server_is_told(
    publisher: Any, servers: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*unused: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PublishError, match=r"adapter\.safetensors cannot be written: .*No space left"):
        publisher("folded", with_adapter()).publish(3)
    assert list(folder.iterdir()) == [] and "/update_weights" not in servers.posted


def test_a_server_that_does_not_fold_is_named(publisher: Any, servers: Servers) -> None:
    published = publisher("folded", with_adapter())
    servers.fail["/update_weights"] = PolicyServerError(URLS[0], "POST /update_weights", "500")
    with pytest.raises(PolicyServerError, match="update_weights: 500"):
        published.publish(0)
    assert "/finish_weight_update" not in servers.posted
    servers.fail.clear()
    servers.reset = {"success": False}
    with pytest.raises(PublishError, match="the prefix cache could not be reset"):
        published.publish(0)
    servers.reset = {"success": True}
    assert published.publish(0).bytes > 0, "what did not arrive is sent again"


def test_folding_needs_an_adapter(publisher: Any) -> None:
    with pytest.raises(PublishError, match="publish = 'folded': the policy has no adapter"):
        publisher("folded", policy())


# --- all weights, through shared memory


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_arrive_bucket_by_bucket(publisher: Any, servers: Servers, folder: Path, tied: bool) -> None:
    model = policy(tied)
    published = publisher("shared_memory", model, bucket_bytes=4000)
    done = published.publish(5)
    named = dict(model.named_parameters())
    assert ("lm_head.weight" in named) is not tied
    assert servers.weights.keys() == named.keys()
    assert all(torch.equal(servers.weights[name], each) for name, each in named.items())
    assert done.bytes == sum(each.nbytes for each in named.values()) and done.route == "shared_memory"
    assert max(servers.buckets) <= 4000 + 4096 and len(servers.buckets) > 3, "a page for the file's header"
    assert len(list(folder.iterdir())) == len(servers.buckets), "there is room, so they stay for the next time"
    assert published.adapter_name is None
    updates = ["/update_weights"] * len(servers.buckets)
    ends = ["/finish_weight_update", "/reset_prefix_cache"]
    assert servers.posted == ["/init_weight_transfer_engine", "/start_weight_update", *updates, *ends]
    assert ("POST", "/finish_weight_update", {}, "5") in servers.calls
    servers.calls.clear()
    with torch.no_grad():
        model.get_parameter("lm_head.weight" if not tied else "model.embed_tokens.weight").add_(1)
    published.publish(6)
    assert servers.posted == ["/start_weight_update", *updates, *ends], "the engine is initialized once"
    assert all(torch.equal(servers.weights[name], each) for name, each in named.items())
    published.close()
    assert list(folder.iterdir()) == []


def test_where_there_is_little_room_one_bucket_lies_there_at_a_time(
    publisher: Any, servers: Servers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy()
    size = sum(each.nbytes for each in model.parameters())
    room = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(policy_sync, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=int(1.5 * size)))
    publisher("shared_memory", model, bucket_bytes=4000).publish(5)
    assert max(map(len, servers.folders)) == 1 and list(folder.iterdir()) == []
    assert all(torch.equal(servers.weights[name], each) for name, each in model.named_parameters())


def test_weights_have_the_servers_dtype(publisher: Any, servers: Servers) -> None:
    publisher("shared_memory", policy(), dtype=torch.bfloat16).publish(0)
    assert {each.dtype for each in servers.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("answer", [{"success": False}, None, "", {}])
def test_a_prefix_cache_that_stays_is_an_error(publisher: Any, servers: Servers, answer: Any) -> None:
    servers.reset = answer
    with pytest.raises(PublishError, match=f"{URLS[0]}: the prefix cache could not be reset"):
        publisher("shared_memory", policy()).publish(0)


def test_a_server_that_fails_half_way_is_named_and_the_bucket_deleted(
    publisher: Any, servers: Servers, folder: Path
) -> None:
    servers.fail["/update_weights"] = PolicyServerError(URLS[0], "POST /update_weights", "500")
    published = publisher("shared_memory", policy())
    with pytest.raises(PolicyServerError, match="update_weights: 500"):
        published.publish(0)
    published.close()
    assert servers.posted.count("/update_weights") == 1 and list(folder.iterdir()) == []
    assert "/finish_weight_update" not in servers.posted


def test_a_publish_has_one_deadline(publisher: Any, servers: Servers) -> None:
    publisher("shared_memory", policy(), timeout_s=7.0, bucket_bytes=4000).publish(0)
    left = [each for each in servers.timeouts if each is not None]
    assert len(left) == len(servers.timeouts) and left == sorted(left, reverse=True) and 0 < left[-1] < left[0] <= 7


# --- all weights, over NCCL


class ListWire:
    """The trainer's end of the group, without a GPU.

    Attributes:
        stuck: "open" or "broadcast", which then does not return before `released`.
    """

    init_info: Mapping[str, Any] = {"packed": True}
    update_info: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.sent: dict[str, torch.Tensor] = {}
        self.opened: Mapping[str, Any] | None = None
        self.stuck: str | None = None
        self.released = threading.Event()

    def open(self, info: Mapping[str, Any]) -> None:
        assert self.stuck != "open" or self.released.wait(60)
        self.opened = info

    def broadcast(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert self.stuck != "broadcast" or self.released.wait(60)
        self.sent |= {name: each.clone() for name, each in tensors}

    def close(self) -> None:
        self.opened = None


@pytest.fixture
def wire() -> Iterator[ListWire]:
    made = ListWire()
    yield made
    made.released.set()


def nccl(accelerator: Accelerator, servers: Servers, wire: ListWire, timeout_s: float = 30) -> NcclPublisher:
    meeting = Meeting("127.0.0.1", 29700)
    return NcclPublisher(policy(), accelerator, servers, meeting, timeout_s, torch.bfloat16, 4000, wire)


def test_all_servers_are_in_one_group_and_get_what_was_announced(
    accelerator: Accelerator, servers: Servers, wire: ListWire
) -> None:
    published = nccl(accelerator, servers, wire)
    done = published.publish(2)
    infos = [body["init_info"] for body in servers.bodies["/init_weight_transfer_engine"]]
    common = {"master_address": "127.0.0.1", "master_port": 29700, "world_size": 5, "packed": True}
    assert infos == [{**common, "rank_offset": 1}, {**common, "rank_offset": 3}]
    assert wire.opened is not None and wire.opened["world_size"] == 5
    announced = [body["update_info"] for _, path, body, _ in servers.calls if path == "/update_weights"]
    names = [name for info in announced for name in info["names"]]
    assert names == list(wire.sent) == [name for name, _ in policy().named_parameters()]
    assert [shape for info in announced for shape in info["shapes"]] == [
        list(each.shape) for each in wire.sent.values()
    ]
    assert {name for info in announced for name in info["dtype_names"]} == {"bfloat16"}
    assert {each.dtype for each in wire.sent.values()} == {torch.bfloat16}
    assert done.bytes == sum(each.nbytes for each in wire.sent.values()) and done.route == "nccl"
    assert servers.posted[-2:] == ["/finish_weight_update", "/reset_prefix_cache"]
    published.publish(3)
    assert servers.posted.count("/init_weight_transfer_engine") == 1
    published.close()
    assert wire.opened is None


@pytest.mark.parametrize(
    ("route", "stuck"), [("/init_weight_transfer_engine", "open"), ("/update_weights", "broadcast")]
)
def test_a_server_that_refuses_ends_the_wait_for_the_others(
    accelerator: Accelerator, servers: Servers, wire: ListWire, route: str, stuck: str
) -> None:
    servers.fail[route] = PolicyServerError(URLS[0], route, "500")
    wire.stuck = stuck
    began = time.monotonic()
    with pytest.raises(PolicyServerError, match="500"):
        nccl(accelerator, servers, wire).publish(0)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("stuck", "late"), [("open", "meeting the servers' workers"), ("broadcast", "the NCCL broadcast")]
)
def test_what_never_ends_is_left_and_named(
    accelerator: Accelerator,
    servers: Servers,
    wire: ListWire,
    monkeypatch: pytest.MonkeyPatch,
    stuck: str,
    late: str,
) -> None:
    monkeypatch.setattr(policy_sync, "LATE_S", 0.1)
    wire.stuck = stuck
    with pytest.raises(PublishError, match=f"publish_timeout had passed: {late}; see"):
        nccl(accelerator, servers, wire, timeout_s=2.0).publish(0)


def test_without_a_gpu_nccl_is_refused_in_words(publisher: Any) -> None:
    with pytest.raises(PublishError, match="publish = 'nccl' needs a GPU, and the trainer is on cpu"):
        publisher("nccl", policy()).publish(0)


# --- parameters and processes


def test_wrappers_leave_no_mark_on_names(accelerator: Accelerator) -> None:
    model = policy()
    compiled = torch.compile(model)
    names = [name for bucket in iter_full_parameters(compiled, accelerator, 10**9) for name, _ in bucket]
    assert names == [name for name, _ in model.named_parameters()]


def test_a_parameter_larger_than_a_bucket_goes_alone(accelerator: Accelerator) -> None:
    buckets = list(iter_full_parameters(policy(), accelerator, 1))
    assert [len(bucket) for bucket in buckets] == [1] * len(list(policy().parameters()))


@pytest.mark.parametrize(("route", "adapted"), [("adapter", False), ("nccl", True), ("shared_memory", True)])
def test_a_route_that_does_not_fit_the_policy_is_refused(publisher: Any, route: str, adapted: bool) -> None:
    with pytest.raises(PublishError, match=f"publish = '{route}'"):
        publisher(route, with_adapter() if adapted else policy())


def test_on_one_process_an_error_keeps_its_kind(accelerator: Accelerator) -> None:
    assert on_main_process(accelerator, lambda: 7) == 7

    def fail() -> None:
        raise PolicyServerError(URLS[0], "GET /x", "gone")

    with pytest.raises(PolicyServerError, match="gone"):
        on_main_process(accelerator, fail)


RANK = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
sys.path.insert(0, {project!r})
from r1zero.training.policy_sync import make
from tests.training.test_policy_sync import Servers, policy

accelerator, folder = Accelerator(cpu=True), Path({folder!r})
servers = Servers(folder)
publisher = make("shared_memory", policy(), accelerator, servers, publish_folder=folder, timeout_s=60, group_port=1,
                 dtype=torch.float32, bucket_bytes=4000)
size = publisher.publish(1).bytes
servers.fail["/update_weights"] = RuntimeError("the server said no")
try:
    said = str(publisher.publish(2))
except Exception as error:
    said = f"{{type(error).__name__}}: {{error}}"
out = folder.with_name(f"rank{{accelerator.process_index}}.json")
out.write_text(json.dumps([size, said, len(servers.calls)]))
"""


def test_every_rank_hears_what_happened_on_the_main_process(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK.format(project=str(PROJECT), folder=str(tmp_path / "publish"))))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script]
    done = start(argv, tmp_path, timeout_s=200)
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    size = sum(each.nbytes for each in policy().parameters())
    assert [each[:2] for each in said] == [
        [size, "RuntimeError: the server said no"],
        [size, "PublishError: on the main process: the server said no"],
    ]
    assert said[0][2] > 0 and said[1][2] == 0, "only the main process talks"
