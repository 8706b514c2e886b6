"""A reward function of a recipe under test. It notes what only the trainer knows, and harms the policy server, what is
between it and the trainer, or the publish folder where R1ZERO_STRIKE says so: at a moment of a step that cannot be hit
from outside.

R1ZERO_NOTES names a folder that takes the notes: `secrets.json` (the token, the publish folder and, under the launcher,
that of vLLM's sockets) and `struck.jsonl` (a line for each accident: when, which). R1ZERO_STRIKE is one of

- accidents, separated by semicolons; the first trainer process meets the first, the one that goes on from its
  checkpoint the second. An accident is WHO WHAT PHASE and, for a proxy, the PATH of the requests that it spoils:
  - api or engine, the name of a signal, PHASE: the signal goes to that process of the server;
  - proxy, one of `faulty_proxy.FAULTS`, PHASE, PATH: for a run of `launch_behind_proxy.py`;
  - disk full|fills|stays-full publishing: full before the policy is written; filled up while it is; and so from then
    on. The first two leave a `FILLER` for somebody to delete.
- old-adapter: every publish gives its new name to the first adapter's weights. For a trainer that is started by hand:
  it looks at the reward before it publishes anything.
"""

import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# Of what comes after the first batch's rewards, but "joining": before the first publish. A process is struck in
# "publishing" when the files are written, or the update has begun, and the server has not been told more.
PHASES = ("joining", "generating", "training", "publishing", "probing", "measuring", "saving", "ending")
BEGUN_S = 0.1  # by then the server works on what it was asked for
LONG_STEP_S = 30.0  # the trainer is busy by itself for so long, and will notice nothing
SAVING_S = 3.0
FILLER = "filler"
_measuring = False


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Differs within a group, so that each step moves the policy."""
    if _in_trainer():  # the look at the recipe before training calls it too
        secrets = [os.environ["R1ZERO_SERVER_TOKEN"], os.environ["R1ZERO_PUBLISH_FOLDER"]]
        if sockets := os.environ.get("VLLM_RPC_BASE_PATH"):  # a server that the launcher started
            assert any(path.is_socket() for path in Path(sockets).iterdir())  # they are deleted with it in the end
            secrets.append(sockets)
        (_notes() / "secrets.json").write_text(json.dumps(secrets))
        _prepare()
    return [(sum(map(ord, text)) % 11) / 11 for text in completions]


def _in_trainer() -> bool:
    return Path(sys.argv[0]).name == "grpo.py"


def _notes() -> Path:
    return Path(os.environ["R1ZERO_NOTES"])


@functools.cache
def _calls() -> list[None]:
    return []


@functools.cache
def _accident() -> list[str]:
    """What this process will meet; nothing when all has happened."""
    struck = _notes() / "struck.jsonl"
    before = struck.read_text().count("\n") if struck.exists() else 0
    planned = [each.split() for each in os.environ.get("R1ZERO_STRIKE", "").split(";") if each.split()]
    return planned[before] if before < len(planned) else []


def _prepare() -> None:
    calls = _calls()
    calls.append(None)
    accident = _accident()
    if accident == ["old-adapter"]:
        if len(calls) == 1:
            _serve_the_first_adapter_for_ever()
    elif accident and len(calls) == 1:
        _wait_for(accident)
    elif accident and len(calls) == 2 and accident[2] == "training":
        _hit(accident)
        time.sleep(LONG_STEP_S)


def _wait_for(accident: list[str]) -> None:
    """Strike in its phase, of what comes after the first batch's rewards."""
    from r1zero.policy_client import PolicyClient
    from r1zero.training import held_out, rollouts
    from r1zero.training.trainer import PolicyTrainer

    who, _, phase = accident[:3]
    once = functools.cache(functools.partial(_hit, accident))
    shortly = functools.cache(lambda: threading.Timer(BEGUN_S, once).start())
    at_once = shortly if who in ("api", "engine") else once
    measure = held_out.measure

    def now() -> None:
        if _measuring == (phase == "measuring"):
            at_once()

    def measured(*arguments: Any) -> Any:
        global _measuring
        _measuring = True
        try:
            return measure(*arguments)
        finally:
            _measuring = False

    held_out.measure = measured
    match phase:
        case "generating" | "measuring":
            _before(rollouts.ServerRollouts, "submit", now)
        case "probing":
            _before(PolicyClient, "prompt_logprobs", now)
        case "saving":  # between a checkpoint's weights and the rest of it
            _before(PolicyTrainer, "_save_optimizer_and_scheduler", once, SAVING_S)
        case "ending":

            def ending(**given: Any) -> None:
                if not given.get("_internal_call"):
                    once()
                    time.sleep(SAVING_S)

            _before(PolicyTrainer, "save_model", ending, with_keys=True)
        case "publishing":
            _while_publishing(accident, lambda: None if _measuring else once())


def _while_publishing(accident: list[str], once: Callable[[], Any]) -> None:
    from r1zero.training import policy_sync

    publishers = (policy_sync.AdapterPublisher, policy_sync.SharedMemoryPublisher)
    if accident[0] == "disk" and accident[1] == "fills":
        _before(policy_sync, "save_file", once)
    elif accident[0] in ("proxy", "disk"):
        for publisher in publishers:
            _before(publisher, "publish", once)
    else:
        for publisher, name in zip(publishers, ("_write", "_start"), strict=True):
            _after(publisher, name, once)


def _before(owner: Any, name: str, act: Callable[..., Any], pause_s: float = 0.0, with_keys: bool = False) -> None:
    call = getattr(owner, name)

    def acting(*arguments: Any, **keys: Any) -> Any:
        act(**keys) if with_keys else act()
        time.sleep(pause_s)
        return call(*arguments, **keys)

    setattr(owner, name, acting)


def _after(owner: Any, name: str, act: Callable[[], Any]) -> None:
    call = getattr(owner, name)

    def acting(*arguments: Any) -> Any:
        answer = call(*arguments)
        act()
        return answer

    setattr(owner, name, acting)


def _hit(accident: list[str]) -> None:
    who, what, *_ = accident
    note_strike(_notes(), " ".join(accident))
    if who == "proxy":
        (_notes() / "fault.json").write_text(json.dumps({"fault": what, "path": accident[3]}))
    elif who == "disk":
        folder = Path(os.environ["R1ZERO_PUBLISH_FOLDER"])
        free = shutil.disk_usage(folder).free
        (folder / ("other" if what == "stays-full" else FILLER)).write_bytes(bytes(free - 2**16))
    else:
        launcher = next(each for each in psutil.Process().parents() if server_below(each, who) is not None)
        server = server_below(launcher, who)
        assert server is not None
        server.send_signal(signal.Signals[what])


def note_strike(notes: Path, accident: str) -> None:
    with (notes / "struck.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "accident": accident}) + "\n")


def server_below(launcher: psutil.Process, who: str) -> psutil.Process | None:
    """The server's process that answers HTTP ("api"), or the one that generates ("engine")."""
    # vLLM renames all but the first, while they start.
    for api in launcher.children():
        if "vllm.entrypoints.cli.main" in api.cmdline() and "serve" in api.cmdline():
            if who == "api":
                return api
            return next((each for each in api.children() if "EngineCore" in "".join(each.cmdline())), None)
    return None


def _serve_the_first_adapter_for_ever() -> None:
    from r1zero.training.policy_sync import AdapterPublisher

    write, kept = AdapterPublisher._write, {}

    def broken(self: Any, name: str, weights: dict[str, Any]) -> None:
        # The publisher lends these: its next version overwrites them.
        write(self, name, kept.setdefault("weights", {key: value.clone() for key, value in weights.items()}))

    AdapterPublisher._write = broken  # type: ignore[method-assign]


if _in_trainer() and _accident()[2:3] == ["joining"]:
    _hit(_accident())
