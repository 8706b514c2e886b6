"""What the end of a process's log says of its failure: the lines to show, and the one error that was the cause.

The last lines alone would often mislead. accelerate adds a traceback of its own, torch elastic a table; of several
ranks the one that failed prints its error first, and then all others print that they lost their connection to it.
"""

import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

READ_BYTES = 64 * 1024
ERROR_CHARACTERS = 400
SCRIPT_ENDED = "accelerate: the script "
RANK_ENDED = "torch elastic: the first to fail was rank "
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"(\([^)]*\) )?(?P<error>error|[A-Za-z_][\w.]*(Error|Exception)): ")
# vLLM's and torch elastic's last words: the cause is above.
_SAYS_LITTLE = ("See root cause above", "See stack trace (above)", "ChildFailedError")
_TABLE = "Root Cause (first observed failure):"
_TABLE_RANK = re.compile(r"\s*rank\s*: (\d+)")
_TABLE_CODE = re.compile(r"\s*exitcode\s*: (-?\d+)")
_RANK = re.compile(r"\[rank(\d+)\]: ")
# What a rank says when another one is gone.
_FOLLOWS = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|DistBackendError|DistNetworkError|"
    r"recvValue failed|remote process exited|Timed out waiting|NCCL communicator was aborted|Read timeout|"
    r"was given up by another process",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LogEnd:
    """The end of one log.

    >>> LogEnd(("ValueError: nan",), "ValueError: nan").follows
    False

    Attributes:
        lines: of the log, without what only says that a child of the process failed.
        error: the exception that was the cause, as far as the log tells; else empty.
    """

    lines: tuple[str, ...] = ()
    error: str = ""

    @property
    def follows(self) -> bool:
        """Whether the error only tells that another process is gone."""
        return bool(_FOLLOWS.search(self.error))


def read(log: Path, start: int) -> LogEnd:
    """What was written into `log` from byte `start` on, at most its last 64 KiB; of a progress bar its last state."""
    with suppress(OSError), log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - READ_BYTES))
        text = file.read().decode(errors="replace").rstrip().split("\n")
        lines = _own([line.rstrip().rpartition("\r")[2] for line in text if line.strip()])
        return LogEnd(tuple(lines), _error_in(lines))
    return LogEnd()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def ended(code: int) -> str:
    """How a process with this exit code ended.

    >>> ended(3), ended(-9)
    ('exited with code 3', 'killed by SIGKILL')
    """
    return f"killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"


def _error_in(lines: Sequence[str]) -> str:
    """The exception of the last traceback in `lines`, else the last line that names an error; empty without one."""
    if lines and lines[-1].startswith(RANK_ENDED):
        rank = lines[-1].removeprefix(RANK_ENDED).partition(",")[0]
        its_own = [line for line in lines[:-1] if line.startswith(f"[rank{rank}]: ")]
        said = [line for line in lines[:-1] if not _RANK.match(line)] if "code" in lines[-1] else []
        causes = [line for line in said if not _FOLLOWS.search(line)]
        return _last_error(its_own) or _last_error(causes) or _last_error(said) or lines[-1]
    if error := _last_error(lines):
        return error
    if lines and lines[-1].startswith(SCRIPT_ENDED):
        return lines[-1]
    return _last_error(lines, passed_over=())  # of an engine that was killed there is no other


def _last_error(lines: Sequence[str], passed_over: Sequence[str] = _SAYS_LITTLE) -> str:
    for at in range(len(lines) - 1, -1, -1):
        column = lines[at].find(_TRACEBACK)  # vLLM puts a process's name before each of its lines, torch a rank's
        if column >= 0:
            after = (line[column:] for line in lines[at + 1 :])
            error = next((line for line in after if line[:1].strip()), "")
        else:
            match = _ERROR.match(lines[at])
            error = lines[at][match.start("error") :] if match else ""
        if error and not any(words in error for words in passed_over):
            return error.removeprefix("error: ")[:ERROR_CHARACTERS]
    return ""


def _own(lines: list[str]) -> list[str]:
    """`lines` without the traceback and table that accelerate adds to its script's own: they only say how it ended."""
    top = max((at for at, line in enumerate(lines) if line.startswith("Traceback ")), default=0)
    if not lines or "accelerate/commands/launch.py" not in "".join(lines[top : top + 4]):
        return lines
    if lines[-1].startswith("subprocess.CalledProcessError: "):
        return [*lines[:top], SCRIPT_ENDED + lines[-1].rpartition("']' ")[2]]
    if _TABLE in lines:
        return _of_the_first_rank(lines[:top], lines[lines.index(_TABLE) :])
    return lines


def _of_the_first_rank(lines: list[str], table: list[str]) -> list[str]:
    """`lines` with those of the rank that failed first as the last of them, and one line that says how it ended.

    The table names the rank whose end was seen first. Where several ended between two looks, that may be one that only
    lost its connection; which it was is told by the errors themselves.
    """
    fields = [
        next((match[1] for line in table if (match := field.match(line))), "") for field in (_TABLE_RANK, _TABLE_CODE)
    ]
    rank, code = fields
    blocks: dict[str, list[str]] = {}
    for line in lines:
        if match := _RANK.match(line):
            blocks.setdefault(match[1], []).append(line)
    if code == "1":  # an exception: another code, or a signal, is nobody's follow-up
        causes = [
            each for each, block in blocks.items() if (error := _last_error(block)) and not _FOLLOWS.search(error)
        ]
        rank = rank if rank in causes or not causes else causes[0]
    others = [line for line in lines if not line.startswith(f"[rank{rank}]: ")]
    return [*others, *blocks.get(rank, []), f"{RANK_ENDED}{rank}, {ended(int(code or 1))}"]
