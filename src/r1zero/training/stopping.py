"""The request to stop soon, as the trainer's processes see it: they look together, and leave together."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from r1zero.reporting.doctor import Finding
from r1zero.run_folder import RunFolder, read_json
from r1zero.training import alarm

LOOK_S = 1.0  # seconds between looks while waiting for something else


class Stopped(Exception):
    """The run was asked to stop, and this is a place where it can; the message says why it was asked.

    Attributes:
        summary: what summary.json says of it besides.
    """

    def __init__(self, why: str, summary: Mapping[str, Any] | None = None) -> None:
        super().__init__(why)
        self.summary = summary or {}


class StopRequest:
    """Whether somebody has asked this run to stop, which `RunFolder.stop` says.

    Args:
        folder: of the run.
        accelerator: of the trainer. The main process looks, and all processes hear the same answer.
    """

    def __init__(self, folder: RunFolder, accelerator: Any) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._asked = False
        self._asked_at = 0.0
        self._finding: Finding | None = None

    def asked(self) -> bool:
        """Whether to stop. A collective."""
        return any_rank(self._accelerator, self.seen_here())[0]

    def seen_here(self) -> bool:
        """What this process contributes to `asked`: only the main process looks, and once asked it stays so."""
        if self._accelerator.is_main_process and not self._asked:
            self._asked, self._asked_at = self._folder.stop.exists(), time.time()
        return self._asked

    def pressing(self) -> bool:
        """Whether nothing can be waited for any more, as this process sees it; only the main one looks.

        Of the time that is left for stopping, half is for what is under way, half for writing the checkpoint.
        """
        if self._finding is not None or not self.seen_here():
            return False
        deadline = (read_json(self._folder.stop) or {}).get("deadline")
        return deadline is not None and time.time() > (self._asked_at + float(deadline)) / 2

    def raise_alarm(self, finding: Finding | None) -> None:
        """Ask from within, on all processes at once, since one of ``stop_on`` came up; only the main one knows what."""
        self._asked, self._finding = True, finding

    def check(self) -> None:
        """Stop here if asked to. A collective.

        Raises:
            Stopped: on all processes.
        """
        if self.asked():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The error that ends the work here."""
        if self._finding is not None:
            why = f"alarm {self._finding.name}: {self._finding.what}; {self._finding.evidence}"
            return Stopped(why, alarm.summary_of(self._finding))
        request = read_json(self._folder.stop) or {}
        return Stopped(str(request.get("why", "it was asked to")))


def any_rank(accelerator: Any, *flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is set on any process. A collective."""
    if accelerator.num_processes == 1:
        return flags
    together = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(each) for each in together.tolist())
