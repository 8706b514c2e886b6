"""The policy server, as the trainer sees it: publish a policy version, prove that it arrived, sample from it.

TRL builds a `VLLMGeneration` of its own, which has no deadlines, merges adapters, and believes that what it sent is
what is served. `PolicyServer` stands in its place.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.trainer import grpo_trainer

from r1zero.policy_client import PolicyClient
from r1zero.training import policy_sync
from r1zero.training.probe import Probe
from r1zero.training.rollouts import ServerRollouts


@dataclass(frozen=True)
class ServerSettings:
    """Where the policy servers are, and how a policy version gets there.

    Attributes:
        urls: base addresses of the servers.
        token: what they ask for with each request; None where they ask for none.
        publish_folder: where adapters and weights are laid down for them.
        route: "adapter", "folded", "nccl" or "shared_memory".
        group_port: TCP port at which the servers meet the trainer, for nccl.
        dtype: of the servers' weights.
        generation_timeout: seconds for a round of generation.
        publish_timeout: seconds for a publish.
        probe_tolerance: nats, see `Probe`.
        evidence: the file that keeps what a probe found when it failed.
        sleep: whether the servers give up their memory while the trainer works.
    """

    urls: tuple[str, ...]
    token: str | None
    publish_folder: Path
    route: str
    group_port: int
    dtype: torch.dtype
    generation_timeout: float
    publish_timeout: float
    probe_tolerance: float
    evidence: Path
    sleep: bool = False


class PolicyServer:
    """What TRL keeps as `vllm_generation`, for servers in processes of their own.

    Attributes:
        rollouts: samples from the version that was published last.
        version: that version; None before the first publish.
        sampling: vLLM's sampling parameters of training, from the trainer's configuration.
    """

    def __init__(
        self, settings: ServerSettings, probed: list[list[int]], model: Any, accelerator: Any, **given: Any
    ) -> None:
        """
        Args:
            settings: where the servers are.
            probed: sequences of token ids on which server and trainer must agree.
            model: the policy, possibly with an adapter.
            accelerator: of the trainer.
            given: what else TRL gives a `VLLMGeneration`; the sampling is taken from it.
        """
        self.settings = settings
        self.version: int | None = None
        self.sampling: dict[str, Any] = {
            name: given[name] for name in ("repetition_penalty", "temperature", "top_p", "top_k")
        }
        self.sampling["min_p"] = given["min_p"] or 0.0
        self.sampling["max_tokens"] = given["max_completion_length"]
        self.sampling |= given["generation_kwargs"] or {}
        self._accelerator = accelerator
        self._model = model
        self._asleep = False
        self.client = PolicyClient(
            settings.urls,
            settings.token,
            generation_timeout_s=settings.generation_timeout,
            control_timeout_s=settings.publish_timeout,
            first=accelerator.process_index,
        )
        self.publisher = policy_sync.make(
            settings.route,
            model,
            accelerator,
            self.client,
            publish_folder=settings.publish_folder,
            timeout_s=settings.publish_timeout,
            group_port=settings.group_port,
            dtype=settings.dtype,
        )
        self.probe = Probe(probed, settings.probe_tolerance, settings.evidence)
        self.rollouts = ServerRollouts(self.client, lambda: (self.version, self.publisher.adapter_name))

    @property
    def vllm_client(self) -> "PolicyServer":
        return self

    def get_server_info(self) -> Mapping[str, Any]:
        """What TRL asks its client for: `policy_server.serve_argv` says so to the server."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def publish(self, version: int) -> dict[str, float]:
        """Make `version` what the servers sample from. A collective.

        Returns:
            Metrics: seconds and bytes.

        Raises:
            PolicyServerError: a server refused, was gone, or was too slow.
        """
        self.wake()
        published = self.publisher.publish(version)
        self.version = version
        return {"publish/seconds": published.seconds, "publish/bytes": float(published.bytes)}

    def begin_proof(self) -> Callable[[], dict[str, float]]:
        """Ask the servers, after a publish, for what proves that they have the trainer's policy. A collective.

        They have answered when it returns, so they can be asked for completions.

        Returns:
            What compares their answer with the trainer's own; a collective too, to be called before anything is learned
            from these completions. It returns metrics: what the probe found.

        Raises:
            PolicyServerError: a server refused, was gone, or was too slow.
            PolicyMismatch: by what is returned: the servers have another policy than the trainer.
        """
        version, began = self.version, time.monotonic()
        if version is None:
            raise RuntimeError("nothing was published yet")
        model, timeout_s = self.publisher.adapter_name, self.settings.publish_timeout
        answers = policy_sync.on_main_process(
            self._accelerator,
            lambda: self.client.prompt_logprobs(self.probe.sequences, model=model, timeout_s=timeout_s),
        )
        asking = time.monotonic() - began

        def compare() -> dict[str, float]:
            found = self.probe.check(self._model, self._accelerator, version, answers)
            return {**found, "probe/seconds": asking + found["probe/seconds"]}

        return compare

    def wake(self) -> None:
        """Give the servers their memory back, where they gave it up."""
        if self._asleep:
            self._on_main_process("/wake_up")
            self._asleep = False

    def rest(self) -> None:
        """Let the servers give up their memory until the next publish, where the recipe says so."""
        if self.settings.sleep and not self._asleep:
            self._on_main_process("/sleep?level=1")
            self._asleep = True

    def close(self) -> None:
        """Leave the servers; they go on."""
        self.publisher.close()
        self.client.close()

    def _on_main_process(self, path: str) -> None:
        def call() -> None:
            self.client.control_all("POST", path, timeout_s=self.settings.publish_timeout)

        policy_sync.on_main_process(self._accelerator, call)


@contextmanager
def in_place_of_vllm(build: Callable[..., PolicyServer] | None) -> Iterator[None]:
    """While a `GRPOTrainer` is made, `build` is what it makes where it would make a `VLLMGeneration`."""
    if build is None:
        yield
        return
    theirs = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = build
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = theirs
