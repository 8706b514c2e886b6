"""Where the time of each step goes, and what is said of each step."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1zero.training.recorder import Recorder


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
        """Mean seconds by phase over the last `steps` steps, and start anew. "train" is all that no phase took."""
        now = time.perf_counter()
        total = now - self._since
        seconds = {f"seconds/{name}": value / steps for name, value in self._seconds.items()}
        seconds["seconds/train"] = (total - sum(self._seconds.values())) / steps
        seconds["seconds/step"] = total / steps
        self._seconds.clear()
        self._since = now
        return seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside is no part of any step, such as a measurement before the step is logged."""
        began, before = time.perf_counter(), dict(self._seconds)
        try:
            yield
        finally:
            self._seconds = defaultdict(float, before)
            self._since += time.perf_counter() - began

    def restart(self) -> None:
        """Forget what went before."""
        self._seconds.clear()
        self._since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What `resume` goes on from, in seconds since the last reading."""
        return {"total": time.perf_counter() - self._since, "phases": dict(self._seconds)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on as if the time between had not been."""
        self._seconds = defaultdict(float, state["phases"])
        self._since = time.perf_counter() - state["total"]


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Hands each logged step to the recorder, with seconds by phase and seconds left.

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
        seconds = self.clock.read(steps)
        more = _memory()
        if "num_tokens" in logs:
            more["tokens_per_second"] = (logs["num_tokens"] - self._tokens) / (steps * seconds["seconds/step"])
            self._tokens = logs["num_tokens"]
        self._recent.append(seconds["seconds/step"])
        left = sum(self._recent) / len(self._recent) * (state.max_steps - state.global_step)
        numbers = {"step": state.global_step, "steps": state.max_steps}
        with self.clock.phase("record"):
            self.recorder.step({**numbers, **logs, **seconds, **more, "seconds_left": round(left, 1)})
