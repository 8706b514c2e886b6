"""The request to stop soon, as the trainer's processes see it: they look together, and leave together."""

from typing import Any

import torch

from r1zero.run_folder import RunFolder, read_json

LOOK_S = 1.0  # seconds between looks while waiting for something else


class Stopped(Exception):
    """The run was asked to stop, and this is a place where it can; the message says why it was asked."""


class StopRequest:
    """Whether somebody has asked this run to stop, which `RunFolder.stop` says.

    Args:
        folder: of the run.
        accelerator: of the trainer. The main process looks, and all processes hear the same answer.
    """

    def __init__(self, folder: RunFolder, accelerator: Any) -> None:
        self._folder, self._accelerator = folder, accelerator
        self._asked = False

    def asked(self) -> bool:
        """Whether to stop. A collective."""
        return any_rank(self._accelerator, self.seen_here())[0]

    def seen_here(self) -> bool:
        """What this process contributes to `asked`: only the main process looks, and once asked it stays so."""
        if self._accelerator.is_main_process and not self._asked:
            self._asked = self._folder.stop.exists()
        return self._asked

    def check(self) -> None:
        """Stop here if asked to. A collective.

        Raises:
            Stopped: on all processes.
        """
        if self.asked():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The error that ends the work here."""
        request = read_json(self._folder.stop) or {}
        return Stopped(str(request.get("why", "it was asked to")))


def any_rank(accelerator: Any, *flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is set on any process. A collective."""
    if accelerator.num_processes == 1:
        return flags
    together = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(each) for each in together.tolist())
