"""Whether a run goes on after server or trainer failed, and from where.

A failure is taken for an accident, after which both are started again, but for five that another start would repeat:

- a node of the run is gone, and nothing can be started on it;
- exit code 2 says that the recipe cannot run, exit code `REFUSED` that going on would be wrong;
- before the first optimizer step was recorded nothing is lost, and what fails then is mostly the setup;
- the same error at the same step as before;
- the limit of restarts.
"""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1zero.log_ends import RANK_ENDED
from r1zero.plan import Process
from r1zero.run_folder import RunFolder
from r1zero.supervisor import NodeLost, ProcessFailed

REFUSED = 3  # exit code of a trainer that stopped since going on would be wrong, such as with a server it cannot trust
FINAL_CODES = (2, REFUSED)
RELEASE_DEADLINE_S = 60.0
RELEASE_LOOK_S = 1.0
RELEASED_WITHIN_MIB = 512


class Refusal(Exception):
    """Raised in a trainer where going on would be wrong: it exits with `REFUSED`, and the run ends."""


class RunFailed(Exception):
    """The run is over. `str` is one line: what failed, why it is not tried again, where its log is.

    Attributes:
        error: the last failure.
        failures: all of them, in order.
    """

    def __init__(self, error: ProcessFailed, why: str, failures: "tuple[Failure, ...]") -> None:
        self.error, self.failures = error, failures
        super().__init__(f"{error.cause}{f' ({why})' if why else ''}, its log: {error.log}")


@dataclass(frozen=True)
class Failure:
    """One attempt's end.

    >>> Failure("trainer: exited with code 1: ValueError: loss is nan at 0x7f3a", step=12).identity
    'trainer: exited with code #: ValueError: loss is nan at #'

    Attributes:
        cause: what failed and why, in one line.
        step: the last recorded optimizer step, 0 before the first.
    """

    cause: str
    step: int

    @property
    def identity(self) -> str:
        """`cause` without what differs from one time to the next: numbers and addresses."""
        return re.sub(r"\b0x[0-9a-f]+\b|\d+(\.\d+)?", "#", self.cause)


class Restarts:
    """Counts a run's failures.

    Args:
        most: how often it may be started again; 0 where the launcher starts no server, as there is no pair then.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.failures: list[Failure] = []

    def after(self, error: ProcessFailed, step: int) -> Failure:
        """Take note of a failure after which the run may go on.

        Args:
            error: what ended this attempt.
            step: the last recorded optimizer step, 0 before the first.

        Raises:
            RunFailed: when it may not.
        """
        failure = Failure(error.cause, step)
        earlier = [(each.identity, each.step) for each in self.failures]
        self.failures.append(failure)
        count = f"{self.most} restart{'s' if self.most > 1 else ''} used up"
        for final, why in (
            (is_final(error), ""),
            (self.most == 0, ""),
            (step == 0, "before the first step, so it is not tried again"),
            ((failure.identity, step) in earlier, f"the same error at step {step} as before"),
            (len(self.failures) > self.most, count),
        ):
            if final:
                raise RunFailed(error, why, tuple(self.failures))
        return failure


def last_step(folder: RunFolder) -> int:
    """The optimizer step that was recorded last, 0 before the first; also one that is done again since."""
    step = 0
    for line in folder.read_metrics_after(0)[0]:
        if line["kind"] == "step":
            step = line["step"]
    return step


def resuming(trainers: Sequence[Process], checkpoint: Path | None, free_ports: tuple[int, ...]) -> tuple[Process, ...]:
    """`trainers` as they go on from `checkpoint`, with other ports for the group that weights are sent through and for
    their own: a store of the groups that were may still hold the old ones.

    >>> resuming([Process("trainer", ("t", "--vllm_group_port", "1"))], Path("c"), (2, 3))[0].argv
    ('t', '--vllm_group_port', '2', '--resume', 'c')

    Args:
        trainers: as the plan has them.
        checkpoint: None: from the beginning.
        free_ports: two, free on the node of the first trainer.
    """
    return tuple(replace(each, argv=_resuming(each.argv, checkpoint, free_ports)) for each in trainers)


def _resuming(argv: tuple[str, ...], checkpoint: Path | None, free_ports: tuple[int, ...]) -> tuple[str, ...]:
    words = list(argv)
    for flag, port in zip(("--vllm_group_port", "--main_process_port"), free_ports, strict=True):
        if flag in words:
            words[words.index(flag) + 1] = str(port)
    return (*words, *(() if checkpoint is None else ("--resume", str(checkpoint))))


def memory_used(gpus: str) -> tuple[int, ...]:
    """MiB in use on each of `gpus`, as CUDA_VISIBLE_DEVICES would name them; none where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "-i", gpus, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return tuple(int(line) for line in found.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def wait_until_released(
    used: Callable[[], tuple[int, ...]], before: tuple[int, ...], on_tick: Callable[[], None]
) -> bool:
    """Wait until no GPU has more memory in use than `before`: a driver frees that of a killed process a little later.

    Args:
        used: tells the MiB in use on each GPU.
        before: what it said before the processes were started.
        on_tick: called at each look; may raise.

    Returns:
        Whether it came to that within `RELEASE_DEADLINE_S`.
    """
    deadline = time.monotonic() + RELEASE_DEADLINE_S
    while any(now > then + RELEASED_WITHIN_MIB for now, then in zip(used(), before, strict=False)):
        if time.monotonic() > deadline:
            return False
        on_tick()
        time.sleep(RELEASE_LOOK_S)
    return True


def is_final(error: ProcessFailed) -> bool:
    """Whether another start would only repeat it."""
    return isinstance(error, NodeLost) or exit_code(error) in FINAL_CODES


def exit_code(error: ProcessFailed) -> int:
    """The launcher's exit code after `error`: that of the process, or of the script or rank that accelerate ran for it,
    where it is one of `FINAL_CODES`; else 1. A policy server's codes are not ours, and say nothing."""
    if error.name.startswith("server"):
        return 1
    said = "\n".join([error.reason, *error.last_lines])
    patterns = (
        r"^exited with code {}\b",
        r"returned non-zero exit status {}\b",
        RANK_ENDED + r"\d+, exited with code {}\b",
    )
    return next((code for code in FINAL_CODES for each in patterns if re.search(each.format(code), said)), 1)
