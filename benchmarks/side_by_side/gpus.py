"""What the GPUs do while a run goes on, as `nvidia-smi` says it twice a second; nothing where there is none."""

import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType

LOOK_MS = 200


@dataclass(frozen=True)
class Look:
    """One GPU at one moment.

    Attributes:
        time: seconds since the epoch.
        gpu: its index.
        busy: the share of nvidia-smi's last sampling period (1/6 s to 1 s) in which any kernel ran, 0 to 1.
        memory_gib: in use, by all processes.
    """

    time: float
    gpu: int
    busy: float
    memory_gib: float


def read_line(line: str, now: float) -> Look | None:
    """One line of nvidia-smi's CSV, index, utilization.gpu and memory.used; None where it is something else.

    >>> read_line("1, 50, 2048", 7.0)
    Look(time=7.0, gpu=1, busy=0.5, memory_gib=2.0)
    """
    try:
        gpu, busy, memory = (float(each) for each in line.split(","))
    except ValueError:
        return None
    return Look(now, int(gpu), busy / 100, memory / 1024)


class Watch:
    """Looks at the GPUs in a thread for as long as it is open.

    Attributes:
        looks: so far.
    """

    def __init__(self, gpus: tuple[str, ...]) -> None:
        """
        Args:
            gpus: indices or UUIDs, as in CUDA_VISIBLE_DEVICES; none: nothing is watched.
        """
        self.looks: list[Look] = []
        self._gpus = gpus
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Watch":
        if self._gpus and shutil.which("nvidia-smi"):
            self._process = subprocess.Popen(
                [
                    *("nvidia-smi", f"--id={','.join(self._gpus)}", f"--loop-ms={LOOK_MS}"),
                    *("--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(10)

    def _read(self) -> None:
        assert self._process and self._process.stdout  # noqa: S101 - the thread is started after it
        for line in self._process.stdout:
            look = read_line(line, time.time())
            if look:
                self.looks.append(look)
