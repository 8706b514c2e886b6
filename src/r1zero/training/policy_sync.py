"""Publishing a policy version: what the trainer has learnt becomes what the policy servers sample from.

Four routes behind one door. An adapter goes as files, and the servers serve it under a new name or fold it into their
own weights. All weights go over NCCL or, where server and trainer share a GPU or have none, as files in shared memory.
Unlike TRL's: no adapter is merged before it travels, nothing is sent twice, no wait is without an end, and a server
that failed is named on every rank.
"""

import json
import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import save_file

from r1zero.plan import GROUP_ADDRESS
from r1zero.policy_client import PolicyClient
from r1zero.serving import VERSION_HEADER
from r1zero.training.mapped_file import HostCopy, MappedFile

ADAPTER = "default"  # PEFT's name for the adapter that is trained
BUCKET_BYTES = 2**30
LATE_S = 5.0  # what a server's own deadline may come late by: its error says more than ours
MOST_OF_FREE = 0.5  # of the space that is free there, for files that stay
SPARE_BYTES = 2**20  # headers of files, and what the file system keeps for itself
RESET_FIRST = "running generations keep the cache alive: publish when none is under way"

Answer = TypeVar("Answer")
Bucket = list[tuple[str, torch.Tensor]]


class PublishError(Exception):
    """A policy version could not be published; the message says what is in the way."""


@dataclass(frozen=True)
class Published:
    """One publish.

    >>> Published(version=3, seconds=0.2, bytes=240_000_000, route="adapter").route
    'adapter'

    Attributes:
        version: the optimizer step whose weights are served now.
        seconds: from the call to the servers' last answer.
        bytes: of weights that were handed over, once however many servers there are.
        route: "adapter", "folded", "nccl" or "shared_memory".
    """

    version: int
    seconds: float
    bytes: int
    route: str


class Publisher(Protocol):
    """One route to the policy servers."""

    @property
    def adapter_name(self) -> str | None:
        """The model that completions are asked of; None: the server's base model."""
        ...

    def publish(self, version: int) -> Published:
        """Make `version` what the servers sample from. A collective: every rank calls it, the main process talks.

        Raises:
            PublishError: on every rank, when it could not be done.
            PolicyServerError: on the main process, when a server refused, was gone or was too slow.
        """
        ...

    def close(self) -> None:
        """Leave the servers; they go on."""
        ...


def make(
    route: str,
    model: torch.nn.Module,
    accelerator: Any,
    client: PolicyClient,
    *,
    publish_folder: Path,
    timeout_s: float,
    group_port: int,
    dtype: torch.dtype,
    master_address: str | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Publisher:
    """The publisher of a route.

    Args:
        route: "adapter", "folded", "nccl" or "shared_memory".
        model: the policy, as it is trained.
        accelerator: of the trainer.
        client: speaks to the servers; used on the main process only.
        publish_folder: where files are laid down for the servers, which read them from the same path. It is the
            publisher's own: what an earlier one left there is deleted.
        timeout_s: for one publish as a whole.
        group_port: TCP port at which the servers' workers meet the trainer, for nccl.
        dtype: the servers'. Weights are rounded to it here: so they would be there, and half of the bytes travel.
        master_address: where the workers find the trainer, for nccl; None: at `GROUP_ADDRESS`, which the plan sets
            where servers are on other machines, else on this machine.
        bucket_bytes: all weights go in buckets of so much, so that no more is gathered at a time.
    """
    peft = hasattr(_unwrapped(accelerator, model), "peft_config")
    if route in ("adapter", "folded"):
        if not peft:
            raise PublishError(f"publish = {route!r}: the policy has no adapter; set use_peft, or publish to auto")
        of_adapter = AdapterPublisher if route == "adapter" else FoldedPublisher
        return of_adapter(model, accelerator, client, publish_folder, timeout_s, dtype)
    if peft:
        raise PublishError(f"publish = {route!r} sends all weights, and only an adapter is trained; set it to auto")
    if route == "nccl":
        meeting = Meeting(master_address or os.environ.get(GROUP_ADDRESS, "127.0.0.1"), group_port)
        return NcclPublisher(model, accelerator, client, meeting, timeout_s, dtype, bucket_bytes)
    return SharedMemoryPublisher(model, accelerator, client, publish_folder, timeout_s, dtype, bucket_bytes)


class TrainedAdapter:
    """The adapter that is trained, as the servers get it.

    Args:
        model: the policy, possibly wrapped.
        accelerator: of the trainer.
        dtype: the servers'.
        copied: makes the copies that are handed over.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Any, dtype: torch.dtype, copied: HostCopy) -> None:
        self._model, self._accelerator, self._dtype, self._copied = model, accelerator, dtype, copied

    @property
    def policy(self) -> Any:
        """The policy without what the trainer wraps it in."""
        return _unwrapped(self._accelerator, self._model)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Under their names in the policy; under ZeRO-3 sharded."""
        named = self.policy.named_parameters()
        return {name: each for name, each in named if f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}")}

    def weights(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """The adapter under the names of its file, valid until the next call.

        PEFT is given the adapter's parameters, since by itself it would take the state of the whole model: for 4-bit
        layers that means packing the state of their quantization, each time.
        """
        from peft import get_peft_model_state_dict

        named: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.policy, state_dict=self._copied(parameters), adapter_name=ADAPTER, save_embedding_layers=False
        )
        return named

    def bytes(self, parameters: Mapping[str, torch.nn.Parameter]) -> int:
        """Of the weights, as they are handed over."""
        return sum(self._dtype.itemsize * _size(each) for each in parameters.values())


class WholeAdapterPublisher:
    """The adapter that is trained, in one piece; how the servers come to it is a subclass's matter."""

    route: str

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        client: PolicyClient,
        publish_folder: Path,
        timeout_s: float,
        dtype: torch.dtype,
    ) -> None:
        self._accelerator, self._client, self._timeout_s = accelerator, client, timeout_s
        self._folder = publish_folder.absolute()  # the server has a working folder of its own
        self._adapter = TrainedAdapter(model, accelerator, dtype, self._copier(dtype))
        self._version: int | None = None

    @property
    def adapter_name(self) -> str | None:
        return None

    def publish(self, version: int) -> Published:
        if version == self._version:
            return Published(version, 0.0, 0, self.route)  # it is served already, under the name that it would get
        began = time.monotonic()
        parameters = self._adapter.parameters()
        with _gathered(list(parameters.values())):
            on_main_process(self._accelerator, lambda: self._hand_over(version, parameters, began + self._timeout_s))
        self._version = version
        return Published(version, time.monotonic() - began, self._adapter.bytes(parameters), self.route)

    def close(self) -> None:
        pass

    def _copier(self, dtype: torch.dtype) -> HostCopy:
        """What makes the copies that are handed over."""
        return HostCopy(dtype)

    def _hand_over(self, version: int, parameters: Mapping[str, torch.nn.Parameter], deadline: float) -> None:
        """Make the servers sample from it."""
        raise NotImplementedError


class AdapterPublisher(WholeAdapterPublisher):
    """Each version is an adapter with a name of its own, and the one before it goes once this one is there.

    A name is never given to other weights: vLLM keys its prefix cache on the adapter's name, so nothing that was
    computed with an older version is ever found under a newer one, and no cache needs to be reset.
    """

    route = "adapter"

    @property
    def adapter_name(self) -> str | None:
        return None if self._version is None else _adapter_name(self._version)

    def _hand_over(self, version: int, parameters: Mapping[str, torch.nn.Parameter], deadline: float) -> None:
        name, previous = _adapter_name(version), self.adapter_name
        if previous is None:
            self._forget_strangers(deadline)
        self._write(name, self._adapter.weights(parameters))
        body = {"lora_name": name, "lora_path": str(self._folder / name)}
        self._post("/v1/load_lora_adapter", body, deadline, {VERSION_HEADER: str(version)})
        if previous is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": previous}, deadline)
            shutil.rmtree(self._folder / previous)

    def _forget_strangers(self, deadline: float) -> None:
        """Take away what an earlier trainer left with servers that outlived it: its names would come again."""
        answers = self._client.control_all("GET", "/v1/models", timeout_s=_left(deadline))
        loaded = [each["id"] for answer in answers for each in answer["data"]]
        for name in sorted({each for each in loaded if each.startswith(_adapter_name(""))}):
            if loaded.count(name) < len(answers):
                raise PublishError(f"only some of the policy servers know the adapter {name}: start them all anew")
            self._post("/v1/unload_lora_adapter", {"lora_name": name}, deadline)
        for left in (*self._folder.glob(_adapter_name("*")), *self._folder.glob(f".{_adapter_name('*')}")):
            shutil.rmtree(left)

    def _write(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        config = self._adapter.policy.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
        aside, folder = self._folder / f".{name}", self._folder / name
        with _writing(aside, sum(each.nbytes for each in weights.values())):
            aside.mkdir(parents=True)
            save_file(weights, aside / "adapter_model.safetensors", metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
            (aside / "adapter_config.json").write_text(text, encoding="utf-8")
            aside.rename(folder)

    def _post(self, path: str, body: Any, deadline: float, headers: Mapping[str, str] | None = None) -> None:
        _post(self._client, path, body, deadline, headers)


class FoldedPublisher(WholeAdapterPublisher):
    """An adapter that our own engine in the servers (`FOLDED`) adds to their weights, so it has no name there.

    What the servers' prefix caches hold was computed with other weights, so they are reset, as after all weights.
    """

    route = "folded"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scaling = _scaling(self._adapter.policy)
        self._met = False

    def close(self) -> None:
        self._file.close()

    def _copier(self, dtype: torch.dtype) -> HostCopy:
        self._file = MappedFile(self._folder / "adapter.safetensors", dtype)
        return self._file

    def _hand_over(self, version: int, parameters: Mapping[str, torch.nn.Parameter], deadline: float) -> None:
        if not self._met:
            _post(self._client, "/init_weight_transfer_engine", {"init_info": {}}, deadline)
            self._met = True
        _post(self._client, "/start_weight_update", {}, deadline)
        with _rewriting(self._file, self._adapter.bytes(parameters)):
            self._file.name(self._adapter.weights(parameters))
        info = {"file": self._file.path.name, "scaling": self._scaling}
        _post(self._client, "/update_weights", {"update_info": info}, deadline)
        _finish(self._client, version, deadline)


class WeightsPublisher:
    """All weights, bucket by bucket; how a bucket travels is a subclass's matter."""

    adapter_name = None
    route: str

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        client: PolicyClient,
        timeout_s: float,
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        self._model, self._accelerator, self._client = model, accelerator, client
        self._timeout_s, self._dtype, self._bucket_bytes = timeout_s, dtype, bucket_bytes
        self._met = False

    def publish(self, version: int) -> Published:
        began = time.monotonic()
        deadline = began + self._timeout_s
        on_main_process(self._accelerator, lambda: self._start(deadline))
        size = 0
        for place, bucket in enumerate(iter_full_parameters(self._model, self._accelerator, self._bucket_bytes)):
            on_main_process(self._accelerator, partial(self._send, place, bucket, deadline))
            size += _bytes(bucket, self._dtype)
        on_main_process(self._accelerator, lambda: _finish(self._client, version, deadline))
        return Published(version, time.monotonic() - began, size, self.route)

    def close(self) -> None:
        pass

    def _start(self, deadline: float) -> None:
        if not self._met:
            self._meet(deadline)
            self._met = True
        _post(self._client, "/start_weight_update", {}, deadline)

    def _meet(self, deadline: float) -> None:
        """Make ready what the servers receive weights with; once for all publishes."""
        raise NotImplementedError

    def _send(self, place: int, bucket: Bucket, deadline: float) -> None:
        """Hand the bucket at `place`, from 0 on, over; returns when the servers have it."""
        raise NotImplementedError


class SharedMemoryPublisher(WeightsPublisher):
    """All weights as files, one for each bucket; our own engine in the servers (`SHARED_MEMORY`) reads them.

    Where there is room for all of them they stay, so that what costs time, making them and pinning their memory, is
    done once. Else there is one at a time.
    """

    route = "shared_memory"

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        client: PolicyClient,
        publish_folder: Path,
        timeout_s: float,
        dtype: torch.dtype,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        super().__init__(model, accelerator, client, timeout_s, dtype, bucket_bytes)
        self._folder = publish_folder
        self._files: list[MappedFile] = []  # by bucket
        self._stay = False

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _meet(self, deadline: float) -> None:
        _post(self._client, "/init_weight_transfer_engine", {"init_info": {}}, deadline)
        size = sum(_size(each) for each in _unwrapped(self._accelerator, self._model).parameters())
        self._stay = size * self._dtype.itemsize < MOST_OF_FREE * shutil.disk_usage(_existing(self._folder)).free

    def _send(self, place: int, bucket: Bucket, deadline: float) -> None:
        if place == len(self._files):
            self._files.append(MappedFile(self._folder / f"weights-{place}.safetensors", self._dtype))
        file = self._files[place]
        with _rewriting(file, _bytes(bucket, self._dtype)):
            file.name(file(dict(bucket)))
        try:
            _post(self._client, "/update_weights", {"update_info": {"files": [file.path.name]}}, deadline)
        finally:
            if not self._stay:
                file.close()


@dataclass(frozen=True)
class Meeting:
    """Where the trainer and the servers' workers meet to form their NCCL group.

    Attributes:
        address: of the trainer, as the servers reach it.
        port: TCP.
    """

    address: str
    port: int


class NcclPublisher(WeightsPublisher):
    """All weights from the main process's GPU to the workers of all servers, in one group of their own.

    NCCL cannot be interrupted from Python. So each broadcast runs in a thread that dies with the process, and this one
    looks at the servers' answers and at the clock: when a server refuses or falls silent, it raises, and the process
    can end, although the broadcast never will.
    """

    route = "nccl"

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        client: PolicyClient,
        meeting: Meeting,
        timeout_s: float,
        dtype: torch.dtype,
        bucket_bytes: int = BUCKET_BYTES,
        wire: "Wire | None" = None,
    ) -> None:
        super().__init__(model, accelerator, client, timeout_s, dtype, bucket_bytes)
        self._meeting, self._wire = meeting, wire

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()

    def _meet(self, deadline: float) -> None:
        """Form the group: the workers of each server have the ranks after those of the server before it."""
        wire = self._wire = self._wire or VllmWire(self._accelerator.device)
        answers = self._client.control_all("GET", "/get_world_size", timeout_s=_left(deadline))
        workers = [int(answer["world_size"]) for answer in answers]
        infos = [
            {
                "master_address": self._meeting.address,
                "master_port": self._meeting.port,
                "rank_offset": 1 + sum(workers[:index]),
                "world_size": 1 + sum(workers),
                **wire.init_info,
            }
            for index in range(len(workers))
        ]
        bodies = [{"init_info": info} for info in infos]
        _at_once(
            {
                "meeting the servers' workers": lambda: wire.open(infos[0]),
                "POST /init_weight_transfer_engine": lambda: self._client.control_all(
                    "POST", "/init_weight_transfer_engine", bodies, timeout_s=_left(deadline)
                ),
            },
            deadline,
        )

    def _send(self, place: int, bucket: Bucket, deadline: float) -> None:
        wire = self._wire
        assert wire is not None  # noqa: S101 - _start has made it
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(self._dtype).removeprefix("torch.")] * len(bucket),
            "shapes": [list(each.shape) for _, each in bucket],
            **wire.update_info,
        }
        rounded = ((name, each.detach().to(self._dtype)) for name, each in bucket)
        _at_once(
            {
                "the NCCL broadcast": lambda: wire.broadcast(rounded),
                "POST /update_weights": lambda: _post(self._client, "/update_weights", {"update_info": info}, deadline),
            },
            deadline,
        )


class Wire(Protocol):
    """The trainer's end of the NCCL group.

    Attributes:
        init_info: what the servers must be told besides where to meet.
        update_info: what they must be told with each bucket besides its names, dtypes and shapes.
    """

    init_info: Mapping[str, Any]
    update_info: Mapping[str, Any]

    def open(self, info: Mapping[str, Any]) -> None:
        """Join the group as its rank 0; blocks until all others have."""
        ...

    def broadcast(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send the tensors; blocks until all others have them."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class VllmWire:
    """The wire that vLLM's "nccl" engine has at its other end; written against vLLM 0.26 and 0.31.

    vLLM 0.28 (vllm#50902) took the trainer's half out of the engine's class, and moved `packed` from each update to
    the first meeting. TRL 1.16 knows both in the same way.

    Args:
        device: the main process's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        from trl.import_utils import is_vllm_available

        if device.type != "cuda":
            raise PublishError(f"publish = 'nccl' needs a GPU, and the trainer is on {device.type}; set it to auto")
        # accelerate's device of a single process has no number, and a thread is not told the current one.
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stateful = is_vllm_available(min_version="0.28.0")
        self._group: Any = None
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        packed = {"packed": True}
        self.init_info: Mapping[str, Any] = packed if self._stateful else {}
        self.update_info: Mapping[str, Any] = {} if self._stateful else packed

    def open(self, info: Mapping[str, Any]) -> None:
        warnings.filterwarnings("ignore", "Tensor .* exceeds buffer_size_bytes")  # an embedding leaves whole
        torch.cuda.set_device(self._device)  # of this thread: vLLM takes the current device
        if self._stateful:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            self._group = trainer_init(dict(info))
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

            self._group = NCCLWeightTransferEngine.trainer_init(dict(info))

    def broadcast(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES, pack_tensors

        torch.cuda.set_device(self._device)
        torch.cuda.synchronize()  # the weights were made on streams that this one does not wait for
        # vLLM 0.26's own loop takes new streams each time, and the allocator keeps what each of them has used: with 32
        # streams up to 32 times a bucket. So the chunks that its workers expect leave on one stream of ours.
        with torch.cuda.stream(self._stream):
            while chunk := pack_tensors(tensors, lambda item: item[1], DEFAULT_PACKED_BUFFER_SIZE_BYTES):
                self._group.broadcast(chunk.packed_tensor, src=0, stream=self._stream)
        self._stream.synchronize()

    def close(self) -> None:
        if self._group is not None:
            # The servers would go on waiting on the socket of the meeting.
            self._group.group.store = None
            self._group.group.socket = None
            self._group = None


def iter_full_parameters(model: torch.nn.Module, accelerator: Any, bucket_bytes: int) -> Iterator[Bucket]:
    """The policy's parameters, whole, under the names of its checkpoint, some at a time. A collective under ZeRO-3.

    Tied parameters come once, under the first of their names, which is how a checkpoint has them.

    Args:
        model: the policy, possibly wrapped.
        accelerator: of the trainer.
        bucket_bytes: a bucket holds no more, except for a single parameter that is larger; in the parameters' dtype.

    Yields:
        Names and tensors, valid until the next bucket is asked for.
    """
    for bucket in _buckets(_unwrapped(accelerator, model), bucket_bytes):
        with _gathered([each for _, each in bucket]):
            yield [(name, each.data) for name, each in bucket]


def on_main_process(accelerator: Any, act: Callable[[], Answer]) -> Answer:
    """What `act` answers on the main process, on every rank. A collective.

    Raises:
        Exception: what `act` raised; a PublishError with the same message on the other ranks, which would wait for
            the main process for ever where it just ended.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            failure = error
            outcome[1] = str(error) or type(error).__name__
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise PublishError(f"on the main process: {outcome[1]}")
    answer: Answer = outcome[0]
    return answer


def _unwrapped(accelerator: Any, model: torch.nn.Module) -> Any:
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _scaling(policy: Any) -> float:
    """What B A is multiplied by, in every layer: alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA.

    Raises:
        PublishError: it cannot be folded, since layers differ in it or the adapter is more than A and B.
    """
    from peft.tuners.lora import LoraLayer

    config = policy.peft_config[ADAPTER]
    for key, what in (
        ("use_dora", "DoRA's magnitudes"),
        ("modules_to_save", "whole modules beside the adapter"),
        ("trainable_token_indices", "trained tokens beside the adapter"),
        ("target_parameters", "an adapter on single parameters"),
        ("fan_in_fan_out", "weights that are stored the other way round"),
    ):
        if getattr(config, key, None):
            raise PublishError(f"publish = 'folded': {what} ({key}) cannot be folded; set it to adapter")
    if config.bias != "none":
        raise PublishError(f"publish = 'folded': trained biases (bias = {config.bias!r}) cannot be folded; use none")
    layers = (each for each in policy.modules() if isinstance(each, LoraLayer) and ADAPTER in each.scaling)
    found = {float(each.scaling[ADAPTER]) for each in layers}
    if len(found) != 1:
        raise PublishError(
            f"publish = 'folded': one scaling is folded, and the adapter's layers have {sorted(found)}; leave out "
            "rank_pattern and alpha_pattern, or set publish to adapter"
        )
    return found.pop()


def _adapter_name(version: int | str) -> str:
    return f"policy-{version}"


def _plain(value: Any) -> Any:
    """What JSON lacks and an adapter's configuration holds."""
    return sorted(value) if isinstance(value, set) else str(value)


def _size(parameter: Any) -> int:
    """Elements of a parameter, whole: one that DeepSpeed has sharded says 0 itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _bytes(bucket: Bucket, dtype: torch.dtype) -> int:
    return sum(each.numel() for _, each in bucket) * dtype.itemsize


def _buckets(model: torch.nn.Module, limit: int) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    held = 0
    for name, parameter in model.named_parameters():
        size = _size(parameter) * parameter.element_size()
        if bucket and held + size > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append((name.replace("_checkpoint_wrapped_module.", ""), parameter))
        held += size
    if bucket:
        yield bucket


@contextmanager
def _gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """The parameters are whole inside, also where DeepSpeed's ZeRO-3 has sharded them."""
    with ExitStack() as stack:
        if any(hasattr(each, "ds_id") for each in parameters):
            import deepspeed  # type: ignore[import-not-found]

            stack.enter_context(deepspeed.zero.GatheredParameters(list(parameters)))
        yield


@contextmanager
def _rewriting(file: MappedFile, size: int) -> Iterator[None]:
    """Space for the file's `size` bytes is made sure of the first time; it has it from then on.

    Raises:
        PublishError: as `_writing`.
    """
    with nullcontext() if file.path.exists() else _writing(file.path, size):
        file.path.parent.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def _writing(path: Path, size: int) -> Iterator[None]:
    """Space for `size` bytes at `path` is made sure of first, and what was begun is taken away when it fails.

    Raises:
        PublishError: there is too little space, or it cannot be written.
    """
    existing = _existing(path.parent)
    free = shutil.disk_usage(existing).free
    if free < size + SPARE_BYTES:
        raise PublishError(_too_little(path, size, free))
    try:
        yield
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        free = shutil.disk_usage(existing).free
        if free < size:
            raise PublishError(_too_little(path, size, free)) from error
        raise PublishError(f"{path} cannot be written: {error}") from error


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _too_little(path: Path, size: int, free: int) -> str:
    return (
        f"{path.name.removeprefix('.')} takes {size / 2**20:,.1f} MiB and {path.parent} has {free / 2**20:,.1f} MiB "
        f"free: make room there (in a container, give /dev/shm more)"
    )


def _post(
    client: PolicyClient, path: str, body: Any, deadline: float, headers: Mapping[str, str] | None = None
) -> list[Any]:
    return client.control_all("POST", path, [body] * len(client.base_urls), headers, _left(deadline))


def _finish(client: PolicyClient, version: int, deadline: float) -> None:
    """End a weight update; what was computed with the old weights must not be read any more."""
    _post(client, "/finish_weight_update", {}, deadline, {VERSION_HEADER: str(version)})
    answers = client.control_all("POST", "/reset_prefix_cache", timeout_s=_left(deadline))
    for url, answer in zip(client.base_urls, answers, strict=True):
        if not isinstance(answer, Mapping) or answer.get("success") is not True:
            raise PublishError(f"policy server at {url}: the prefix cache could not be reset ({answer}); {RESET_FIRST}")


def _left(deadline: float) -> float:
    """Seconds until then; never none, so that the call itself says what was late."""
    return max(deadline - time.monotonic(), 0.1)


def _at_once(works: Mapping[str, Callable[[], Any]], deadline: float) -> None:
    """Do all of it in threads that die with the process, and go on when all is done or one has failed.

    Raises:
        Exception: the first that one of them raised; the others are left to themselves.
        PublishError: the deadline has passed; it names those that were not done.
    """
    ended: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()

    def run(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            ended.put((name, error))
        else:
            ended.put((name, None))

    for name, work in works.items():
        threading.Thread(target=run, args=(name, work), name=name, daemon=True).start()
    waiting = set(works)
    while waiting:
        try:
            name, error = ended.get(timeout=_left(deadline) + LATE_S)
        except queue.Empty:
            late = " and ".join(sorted(waiting))
            raise PublishError(f"not done when publish_timeout had passed: {late}; see the servers' log") from None
        if error is not None:
            raise error
        waiting.remove(name)
