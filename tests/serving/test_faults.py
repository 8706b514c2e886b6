"""What goes wrong between the trainer and a real policy server: each fault ends in time with its name, or is mended.

Here is the trainer's side of the servers (`PolicyServer`), and a proxy that spoils answers; whole runs are in
test_real_accidents.py.
"""

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from r1zero.policy_client import (
    PolicyServerError,
    PolicyServerTimeout,
    PolicyServerUpdating,
    Rollout,
)
from r1zero.serving import POLICY_ROUTE
from r1zero.training.generation import PolicyServer, ServerSettings
from r1zero.training.policy_sync import PublishError
from tests.serving.conftest import Server
from tests.serving.launched import PROJECTIONS
from tests.stand_ins import faulty_proxy
from tests.stand_ins.faulty_proxy import FAULTS, Proxy
from tests.training.conftest import one_process

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(600)]
DEADLINE_S = 6.0  # of what cannot end by itself
AMPLE_S = 60.0  # of what ends by itself, on a machine that does other things too
LATE_S = 15.0  # what a loaded machine may add to a deadline
COMPLETIONS = "/v1/completions"
ADAPTER_ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
WEIGHTS_ROUTES = ("/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache")
UPDATES = [("adapter", path) for path in ADAPTER_ROUTES] + [("shared_memory", path) for path in WEIGHTS_ROUTES]


class Trainer:
    """The trainer's side of a policy server, with a policy that never stays the same."""

    def __init__(self, route: str, url: str, policy: PreTrainedModel, folder: Path, server: Server, probe: Any) -> None:
        self.route, self.url, self.server, self.probe = route, url, server, probe
        self.folder = folder
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        self.policy = get_peft_model(policy, config) if route == "adapter" else policy
        self.accelerator = Accelerator(cpu=True)

    @contextmanager
    def joined(self, generation_s: float = AMPLE_S, publish_s: float = AMPLE_S) -> Iterator[PolicyServer]:
        """As a trainer that starts anew, with these deadlines."""
        settings = ServerSettings(
            urls=(self.url,),
            token=self.server.token,
            publish_folder=self.folder,
            route=self.route,
            group_port=0,
            dtype=torch.float32,
            generation_timeout=generation_s,
            publish_timeout=publish_s,
            probe_tolerance=1e-3,
            evidence=self.folder.parent / "probe.json",
        )
        sampling = {"repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None}
        more = {"max_completion_length": 8, "generation_kwargs": None}
        joined = PolicyServer(settings, [self.probe], self.policy, self.accelerator, **sampling, **more)
        try:
            yield joined
        finally:
            joined.close()

    def learn(self) -> None:
        with torch.no_grad():
            for name, weight in self.policy.named_parameters():
                if self.route == "shared_memory" or "lora_" in name:
                    weight.add_(0.03 * torch.randn_like(weight))

    def publish(self, joined: PolicyServer, version: int) -> dict[str, float]:
        self.learn()
        return joined.publish(version) | joined.begin_proof()()

    def generate(self, joined: PolicyServer) -> list[Rollout]:
        ticket = joined.rollouts.submit([self.probe[:8]] * 4, 4, joined.sampling)
        return joined.rollouts.collect(ticket)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with faulty_proxy.before(server.port) as proxy:
        yield proxy


@pytest.fixture
def trainer(
    server: Server, proxy: Proxy, policy: PreTrainedModel, probe: list[int]
) -> Iterator[Callable[[str], Trainer]]:
    """Makes a trainer by its route; afterwards the server has the weights that it began with, and no adapter."""
    untouched = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    with one_process():
        yield lambda route: Trainer(route, proxy.url, policy, server.publish, server, probe)
    proxy.heal()
    for each in server.ask("GET", "/v1/models").content["data"]:
        if each["id"].startswith("policy-"):
            server.post("/v1/unload_lora_adapter", {"lora_name": each["id"]})
    save_file(untouched, server.publish / "first.safetensors")
    # One was left open, before or after the weights came: vLLM begins no other before its end.
    if server.ask("GET", POLICY_ROUTE).content["updating"] and not finished(server):
        assert server.post("/update_weights", {"update_info": {"files": ["first.safetensors"]}}).status == 200
        assert finished(server)
    assert server.publish_weights(0, "first.safetensors").status == 200


def finished(server: Server) -> bool:
    return server.post("/finish_weight_update", X_Policy_Version="0").status == 200


def assert_named(error: BaseException, proxy: Proxy, path: str) -> None:
    text = str(error)
    assert text.startswith(f"policy server at {proxy.url}: POST {path}: "), text
    assert "\n" not in text


# Generating.


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_of_generation_that_cannot_be_had(fault: str, proxy: Proxy, trainer: Callable[[str], Trainer]) -> None:
    mine = trainer("adapter")
    slow = fault in ("loris", "hang")
    with mine.joined(generation_s=DEADLINE_S if slow else AMPLE_S) as joined:
        mine.publish(joined, 1)
        proxy.seen.clear()
        proxy.spoil(fault, COMPLETIONS)
        began = time.monotonic()
        with pytest.raises(PolicyServerError) as caught:
            mine.generate(joined)
        assert time.monotonic() - began < DEADLINE_S + LATE_S
        assert_named(caught.value, proxy, COMPLETIONS)
        assert isinstance(caught.value, PolicyServerTimeout) == slow
        assert proxy.sent(COMPLETIONS) == (1 if slow else 3)  # it may be tried again, and was
        proxy.heal()
        if not slow:
            assert {each.policy_version for each in mine.generate(joined)} == {1}


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_a_passing_fault_of_generation_is_mended(fault: str, proxy: Proxy, trainer: Callable[[str], Trainer]) -> None:
    mine = trainer("adapter")
    with mine.joined() as joined:
        mine.publish(joined, 1)
        proxy.spoil(fault, COMPLETIONS, times=2)
        assert {each.policy_version for each in mine.generate(joined)} == {1}


# Publishing and probing.


@pytest.mark.parametrize("fault", ["error", "loris", "cut", pytest.param("hang", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("route", "path"), UPDATES)
def test_an_update_is_sent_once_and_never_half_served(
    route: str, path: str, fault: str, proxy: Proxy, trainer: Callable[[str], Trainer]
) -> None:
    mine = trainer(route)
    slow = fault in ("loris", "hang")
    with mine.joined(publish_s=DEADLINE_S if slow else AMPLE_S) as joined:
        if path == "/v1/unload_lora_adapter":
            mine.publish(joined, 1)
        proxy.seen.clear()
        proxy.spoil(fault, path)
        began = time.monotonic()
        with pytest.raises(PolicyServerError) as caught:
            mine.publish(joined, 2)
        assert time.monotonic() - began < DEADLINE_S + LATE_S
        assert_named(caught.value, proxy, path)
        assert isinstance(caught.value, PolicyServerTimeout) == slow
        assert proxy.sent(path) == 1
        assert not [name for _, name in proxy.seen if name == COMPLETIONS]
        proxy.heal()
    with mine.joined() as anew:
        if stays_open(path, fault):  # vLLM cannot give an update up: the launcher starts both again
            with pytest.raises(PolicyServerUpdating, match="start server and trainer again"):
                anew.client.first_token(proxy.url, AMPLE_S)
        else:
            assert mine.publish(anew, 3)["probe/difference"] < 1e-3
            assert {each.policy_version for each in mine.generate(anew)} == {3}


def stays_open(path: str, fault: str) -> bool:
    """Whether the server's engine was told that an update begins, and never that it ends."""
    match path:
        case "/start_weight_update":
            return fault != "error"
        case "/finish_weight_update":
            return fault == "error"
    return path == "/update_weights"


@pytest.mark.parametrize("fault", ["error", "loris"])
def test_a_probe_that_cannot_be_had(fault: str, proxy: Proxy, trainer: Callable[[str], Trainer]) -> None:
    mine = trainer("adapter")
    with mine.joined(publish_s=DEADLINE_S if fault == "loris" else AMPLE_S) as joined:
        joined.publish(1)
        proxy.spoil(fault, COMPLETIONS)
        with pytest.raises(PolicyServerError) as caught:
            joined.begin_proof()()
        assert_named(caught.value, proxy, COMPLETIONS)


# A full disk.


@contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """A file system of 4 MiB at `folder`."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file of this process may become longer: a write fails half-way, as on a disk that fills up meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_before_the_adapter_is_written(
    server: Server, proxy: Proxy, trainer: Callable[[str], Trainer]
) -> None:
    mine = trainer("adapter")
    mine.folder = server.publish / "small"
    with tiny_disk(mine.folder), mine.joined() as joined:
        mine.publish(joined, 1)
        (mine.folder / "other").write_bytes(bytes(shutil.disk_usage(mine.folder).free - 2**16))
        with pytest.raises(PublishError, match=r"policy-2 takes [\d.]+ MiB and .*/small has [\d.]+ MiB free: make"):
            mine.publish(joined, 2)
        assert sorted(each.name for each in mine.folder.iterdir()) == ["other", "policy-1"]
        (mine.folder / "other").unlink()
        assert mine.publish(joined, 2)["probe/difference"] < 1e-3
        assert {each.policy_version for each in mine.generate(joined)} == {2}


@pytest.mark.parametrize("route", ["adapter", "shared_memory"])
def test_a_disk_that_fills_up_while_the_policy_is_written(
    route: str, server: Server, proxy: Proxy, trainer: Callable[[str], Trainer]
) -> None:
    mine = trainer(route)
    with mine.joined() as joined:
        if route == "adapter":  # files that carry all weights have their space from the first publish on
            mine.publish(joined, 1)
        before = sorted(each.name for each in server.publish.iterdir())
        proxy.seen.clear()
        with at_most(50_000), pytest.raises(PublishError, match=r"cannot be written: .*File too large"):
            mine.publish(joined, 2)
        assert sorted(each.name for each in server.publish.iterdir()) == before
        assert not proxy.sent("/v1/load_lora_adapter") and not proxy.sent("/update_weights")
        if route == "adapter":  # the old version is what it was
            assert {each.policy_version for each in mine.generate(joined)} == {1}
            assert mine.publish(joined, 3)["probe/difference"] < 1e-3
            assert {each.policy_version for each in mine.generate(joined)} == {3}
        else:
            joined.version = 1  # as for a trainer that has published before
            with pytest.raises(PolicyServerUpdating):
                mine.generate(joined)
