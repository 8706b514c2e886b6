"""Where the time of each step goes, which side had nothing to do in it, and what is said of each step."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1zero.policy_client import Interval
from r1zero.training import idle
from r1zero.training.recorder import Recorder

WAITING = ("generate", "wait")  # phases in which the trainer has nothing to do, where policy servers generate


def _memory() -> dict[str, float]:
    """The most that this process has held of its GPU so far, and what that GPU has, in GiB; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"memory/peak_gib": torch.cuda.max_memory_reserved() / 2**30, "memory/total_gib": total / 2**30}


class Clock:
    """Seconds by phase since the last reading. Phases may nest: the inner one's time is not counted in the outer."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._since = time.perf_counter()
        self._busy: Callable[[], list[list[Interval]]] | None = None
        self._gather: Callable[[list[idle.Account]], list[idle.Account]] = list
        self._kept: list[list[Interval]] | None = None  # in seconds since the last reading; None: not all is known

    def watch(
        self,
        busy: Callable[[], list[list[Interval]]],
        gather: Callable[[list[idle.Account]], list[idle.Account]],
    ) -> None:
        """Tell from now on how long policy servers and trainer were idle.

        Args:
            busy: `PolicyClient.busy` of this process.
            gather: from a list of each process to that of all, as `accelerate.utils.gather_object`.
        """
        self._busy, self._gather = busy, gather
        self._kept = [[] for _ in busy()]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self._seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def read(self, steps: int) -> dict[str, float]:
        """Mean seconds by phase over the last `steps` steps, and start anew. "train" is all that no phase took.

        With policy servers also the share of the time in which either side was idle; that is a collective.
        """
        now = time.perf_counter()
        total = now - self._since
        seconds = {f"seconds/{name}": value / steps for name, value in self._seconds.items()}
        seconds["seconds/train"] = (total - sum(self._seconds.values())) / steps
        seconds["seconds/step"] = total / steps
        seconds |= self._idle(total)
        self._seconds.clear()
        self._since = now
        return seconds

    def _idle(self, total: float) -> dict[str, float]:
        self._keep_busy()
        known = self._kept
        self._forget_busy()  # before processes wait for each other: what servers do then is of the next reading
        if known is None:
            return {}
        waited = sum(self._seconds.get(name, 0.0) for name in WAITING)
        # From the end, at which the processes have just met: their clocks, and what they left out, may differ.
        busy = [[(total - end, total - begin) for begin, end in server] for server in known]
        return idle.shares(self._gather([idle.Account(total, waited, busy)]))

    def _keep_busy(self) -> None:
        if self._busy is not None and self._kept is not None:
            for kept, more in zip(self._kept, self._busy(), strict=True):
                kept += [(begin - self._since, end - self._since) for begin, end in more]

    def _forget_busy(self) -> None:
        if self._busy is not None:
            self._kept = [[] for _ in self._busy()]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside is no part of any step, such as a measurement before the step is logged."""
        self._keep_busy()
        began, before = time.perf_counter(), dict(self._seconds)
        try:
            yield
        finally:
            if self._busy is not None:
                self._busy()  # what servers did meanwhile is no part of a step either
            self._seconds = defaultdict(float, before)
            self._since += time.perf_counter() - began

    def restart(self) -> None:
        """Forget what went before."""
        self._seconds.clear()
        self._since = time.perf_counter()
        self._forget_busy()

    def state(self) -> dict[str, Any]:
        """What `resume` goes on from, in seconds since the last reading."""
        return {"total": time.perf_counter() - self._since, "phases": dict(self._seconds)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on as if the time between had not been. The next reading does not tell how idle either side was."""
        self._seconds = defaultdict(float, state["phases"])
        self._since = time.perf_counter() - state["total"]
        self._kept = None  # the servers may be other ones since


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Hands each logged step to the recorder, with seconds by phase, idle shares and seconds left.

    Attributes:
        last_step: the step that was logged last.
    """

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self.recorder = recorder
        self.clock = clock
        self.last_step = 0
        self._tokens = 0.0
        self._recent: deque[float] = deque(maxlen=20)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self.last_step = state.global_step
        self._tokens = float(state.num_input_tokens_seen)
        self.clock.restart()
        self.recorder.phase("training", 0, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        with self.clock.phase("record"):
            self.recorder.flush_rollouts(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        steps = state.global_step - self.last_step
        if steps < 1 or logs is None or "train_runtime" in logs:
            return  # the closing summary of transformers' Trainer, not a step
        self.last_step = state.global_step
        times = self.clock.read(steps)
        more = _memory()
        if "num_tokens" in logs:
            more["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / (steps * times["seconds/step"])
            self._tokens = logs["num_tokens"]
        self._recent.append(times["seconds/step"])
        left = sum(self._recent) / len(self._recent) * (state.max_steps - state.global_step)
        numbers = {"step": state.global_step, "steps": state.max_steps}
        with self.clock.phase("record"):
            self.recorder.step({**numbers, **logs, **times, **more, "seconds_left": round(left, 1)})
