"""A reward function of a recipe under test. It notes what only the trainer knows, and harms the policy server or the
publishing where R1ZERO_STRIKE says so: at a moment of a step that cannot be hit from outside.

R1ZERO_NOTES names a folder that takes the notes: `secrets.json` (the token and the publish folder) and, once per run,
`struck.json` (when). R1ZERO_STRIKE is one of

- WHO SIGNAL PHASE: WHO is "api" or "engine", the signal goes to that process of the server. PHASE of the second step
  is "generating", "training", "publishing" (its file is written, the server has not been told) or "measuring".
- old-adapter: every publish gives its new name to the first adapter's weights. For a trainer that is started by hand:
  it looks at the reward before it publishes anything.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_measuring = False


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Differs within a group, so that each step moves the policy."""
    if Path(sys.argv[0]).name == "grpo.py":  # the look at the recipe before training calls it too
        notes = Path(os.environ["R1ZERO_NOTES"])
        secrets = [os.environ["R1ZERO_SERVER_TOKEN"], os.environ["R1ZERO_PUBLISH_FOLDER"]]
        (notes / "secrets.json").write_text(json.dumps(secrets))
        strike = os.environ.get("R1ZERO_STRIKE", "")
        if strike and not (notes / "struck.json").exists():
            _prepare(strike.split(), notes)
    return [(sum(map(ord, text)) % 11) / 11 for text in completions]


@functools.cache
def _calls() -> list[None]:
    return []


def _prepare(strike: Any, notes: Path) -> None:
    calls = _calls()
    calls.append(None)
    if strike == ["old-adapter"]:
        if len(calls) == 1:
            _serve_the_first_adapter_for_ever()
        return
    who, name, phase = strike
    hit = functools.partial(_hit, who, signal.Signals[name], notes / "struck.json")
    if phase == "training" and len(calls) == 2:
        hit()
    if len(calls) == 1:
        _wait_for(phase, hit)


def _wait_for(phase: str, hit: Callable[[], None]) -> None:
    """Call `hit` in `phase` of what comes after the first batch's rewards."""
    from r1zero.training import held_out, policy_sync, rollouts

    measure, collect = held_out.measure, rollouts.ServerRollouts.collect

    def measured(*arguments: Any) -> Any:
        global _measuring
        _measuring = True
        try:
            return measure(*arguments)
        finally:
            _measuring = False

    def collected(self: Any, ticket: Any) -> Any:
        if phase == ("measuring" if _measuring else "generating"):
            time.sleep(0.1)  # so that the server has begun
            hit()
        return collect(self, ticket)

    held_out.measure, rollouts.ServerRollouts.collect = measured, collected  # type: ignore[method-assign]
    if phase == "publishing":
        for kind, name in ((policy_sync.AdapterPublisher, "_write"), (policy_sync.SharedMemoryPublisher, "_start")):
            before = getattr(kind, name)

            def publishing(self: Any, *arguments: Any, before: Any = before) -> None:
                before(self, *arguments)
                hit()

            setattr(kind, name, publishing)


def _hit(who: str, number: signal.Signals, note: Path) -> None:
    if note.exists():
        return
    launcher = next(each for each in psutil.Process().parents() if any("run.py" in word for word in each.cmdline()))
    # vLLM renames all but the process that answers HTTP.
    api = next(each for each in launcher.children() if "serve" in each.cmdline())
    engine = next(each for each in api.children() if "EngineCore" in "".join(each.cmdline()))
    note.write_text(json.dumps({"time": time.time()}))
    (api if who == "api" else engine).send_signal(number)


def _serve_the_first_adapter_for_ever() -> None:
    from r1zero.training.policy_sync import AdapterPublisher

    write, kept = AdapterPublisher._write, {}

    def broken(self: Any, name: str, weights: dict[str, Any]) -> None:
        # The publisher lends these: its next version overwrites them.
        write(self, name, kept.setdefault("weights", {key: value.clone() for key, value in weights.items()}))

    AdapterPublisher._write = broken  # type: ignore[method-assign]
