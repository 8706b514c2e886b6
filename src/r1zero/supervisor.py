"""Starts the processes of a run, notices when one fails, and leaves nothing behind, however the run ends.

The usual ``Popen.terminate()`` is not enough here: torch elastic starts its workers in sessions of their own, and vLLM
renames its engine processes, which wipes the environment that others read under /proc. What belongs to a run is found
in several ways therefore (see `_Tree`). And since a launcher that gets ``kill -9`` can clean up nothing, a warden does:
a small process (this file, run as a script) that waits on a pipe from the launcher and, when it closes, ends the run.
"""

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from r1zero import log_ends
from r1zero.slurm import without_mpi

if TYPE_CHECKING:  # the warden runs this file alone, and must be up at once
    from r1zero.plan import Process

RUN_ID = "R1ZERO_RUN_ID"
POLL_S = 0.1
LAST_LINES = 30
SETTLE_S = 1.0  # how long after a first death another one still counts as part of the same failure
PEERS_S = 15.0  # and so long the other trainers', where one of several has died
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNKILLABLE_S = 10.0  # a process that outlives SIGKILL by this is stuck in the kernel, and waiting on is no use
WARDEN_GRACE_S = 4.0
WARDEN_LOOK_S = 2.0
FOLDER_PREFIX = "r1zero-"


class ProcessFailed(Exception):
    """A process of the run ended, or did not end, as it should. `str` is one line: which, why, and where its log is.

    Attributes:
        name: of the process that failed first.
        reason: in plain words: "exited with code 3", "killed by SIGKILL".
        log: the file that holds its output.
        last_lines: the end of that file.
        others: what else failed within the same second, one sentence each.
        error: the exception that its log ends with, where it exited with a code; else empty.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        log: Path,
        last_lines: tuple[str, ...] = (),
        others: tuple[str, ...] = (),
        error: str = "",
    ) -> None:
        self.name, self.reason, self.log, self.last_lines, self.others = name, reason, log, last_lines, others
        self.error = error
        super().__init__(f"{self.cause}, its log: {log}")

    @property
    def cause(self) -> str:
        """What failed and why, in one line."""
        why = " ".join(self.reason.split()) + (f": {self.error}" if self.error else "")
        return ", then ".join([f"{self.name}: {why}", *self.others])

    @property
    def log_end(self) -> str:
        """The last lines of its log, under a heading; empty where it wrote none."""
        if not self.last_lines:
            return ""
        heading = f"the last {len(self.last_lines)} lines of {self.log}:"
        return "\n".join([heading, *(f"  {line}" for line in self.last_lines)])


class NodeLost(ProcessFailed):
    """A node of the run does not answer any more: nothing can be started on it again."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP (a lost ssh) arrived.

    Attributes:
        signum: the signal's number, so that the exit code can be 128 + signum.
        name: "SIGINT", "SIGTERM" or "SIGHUP".

    Args:
        where: the node that it arrived at; empty for this one.
    """

    def __init__(self, signum: int, where: str = "") -> None:
        self.signum, self.name = signum, signal.Signals(signum).name
        super().__init__(f"{self.name} received{f' on {where}' if where else ''}")


@dataclass(frozen=True)
class _Seen:
    """One living process, as it was looked at."""

    process: psutil.Process
    parent: int
    session: int
    marked: bool


class _Tree:
    """The living processes that belong to what was started.

    A process belongs when the mark in its environment begins with the tree's own (the run's id, for one process of the
    run with its name after it), when its session was opened by a process that belongs, when its parent belongs, or when
    it was seen to belong before (its parent may be dead by now). Processes are compared as psutil compares them, by pid
    and start: a pid that was used again is not taken for the old one.
    """

    def __init__(self, mark: str, apart: frozenset[int]) -> None:
        self._mark, self._apart = mark, apart
        self._known: dict[int, psutil.Process | None] = {}

    def add(self, pid: int) -> None:
        """`pid` was started: it, its session and its descendants belong."""
        self._known[pid] = None
        with suppress(psutil.NoSuchProcess):
            self._known[pid] = psutil.Process(pid)

    def living(self) -> list[psutil.Process]:
        """Those that live now; zombies do not."""
        here = {pid: seen for pid, seen in _look(self._mark) if pid not in self._apart}
        members: dict[int, psutil.Process] = {}
        while new := {pid: seen for pid, seen in here.items() if pid not in members and self._belongs(pid, here)}:
            members |= {pid: seen.process for pid, seen in new.items()}
            self._known |= members
        return list(members.values())

    def _belongs(self, pid: int, here: dict[int, _Seen]) -> bool:
        seen = here[pid]
        opened_here = seen.session in self._known and (seen.session not in here or self._knows(seen.session, here))
        return seen.marked or opened_here or self._knows(pid, here) or self._knows(seen.parent, here)

    def _knows(self, pid: int, here: dict[int, _Seen]) -> bool:
        return pid in here and self._known.get(pid) == here[pid].process


def _look(mark: str) -> Iterator[tuple[int, _Seen]]:
    for pid in psutil.pids():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() != psutil.STATUS_ZOMBIE:
                    marked = _environment(process).get(RUN_ID, "").startswith(mark)
                    yield pid, _Seen(process, process.ppid(), os.getsid(pid), marked)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.AccessDenied, OSError, ValueError):  # another user's, or overwritten with something unreadable
        return {}


def _end(tree: _Tree, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> list[psutil.Process]:
    """SIGTERM to all of `tree`, SIGKILL to the rest after `grace_s` or once `hurry()`. Returns what even that left.

    The shared memory that Python made for them goes too: who is killed leaves it in /dev/shm, and vLLM's is large.
    """
    deadline = time.monotonic() + grace_s
    asked: set[psutil.Process] = set()
    shared: dict[psutil.Process, set[str]] = {}
    looks_without = 0  # two: a process can be born while one looks, by a parent that is gone when it is looked at
    while looks_without < 2:
        living = tree.living()
        looks_without = 0 if living else looks_without + 1
        now = time.monotonic()
        if now > deadline + UNKILLABLE_S:
            return living
        for process in living:
            if process not in shared:
                shared[process] = _shared_memory(process.pid)
            with suppress(psutil.Error):
                if now >= deadline or hurry():
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
                    process.resume()  # one that was stopped (SIGSTOP) would not take the signal before it is killed
        if living:
            time.sleep(POLL_S)
    for file in set().union(*shared.values()):
        Path(file).unlink(missing_ok=True)
    return []


def _shared_memory(pid: int) -> set[str]:
    """The files of `multiprocessing.shared_memory` that the process has mapped."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/maps").read_text(errors="replace").split()
        return {word for word in words if word.startswith("/dev/shm/psm_")}
    return set()


class Started:
    """A process that was started, here or on another node, and what is needed to watch and end it.

    Attributes:
        process: what was started.
        log: the file that holds its output.
        must_stay: its end is a failure even with exit code 0.
    """

    def __init__(self, process: "Process", log: Path, must_stay: bool) -> None:
        self.process, self.log, self.must_stay = process, log, must_stay

    def code(self) -> int | None:
        """Its exit code, negative after a signal; None while it lives."""
        raise NotImplementedError

    def wait(self, seconds: float) -> None:
        """Return when it has ended, after `seconds` at the latest."""
        raise NotImplementedError

    def end(self, grace_s: float, hurry: Callable[[], bool]) -> None:
        """SIGTERM to it and all that it left, SIGKILL to the rest after `grace_s` or once `hurry()`."""
        raise NotImplementedError

    def log_end(self) -> log_ends.LogEnd:
        """The end of its log."""
        raise NotImplementedError

    def fault(self) -> str | None:
        """Why its end is a failure; None while it lives, or where it ended well."""
        code = self.code()
        if code is None or (code == 0 and not self.must_stay):
            return None
        return log_ends.ended(code) + (", and it should have stayed up" if code == 0 else "")

    def failed(self, reason: str, others: tuple[str, ...] = ()) -> ProcessFailed:
        end = self.log_end()
        error = end.error if reason.startswith("exited ") else ""
        return ProcessFailed(self.process.name, reason, self.log, end.lines[-LAST_LINES:], others, error)


class _Local(Started):
    """A process on this machine."""

    def __init__(
        self, process: "Process", log: Path, must_stay: bool, popen: "subprocess.Popen[bytes]", tree: _Tree, start: int
    ) -> None:
        super().__init__(process, log, must_stay)
        self.popen, self._tree, self._log_start = popen, tree, start

    def code(self) -> int | None:
        return self.popen.poll()

    def wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)

    def end(self, grace_s: float, hurry: Callable[[], bool]) -> None:
        _end(self._tree, grace_s, hurry)
        self.popen.poll()  # so that no zombie stays

    def log_end(self) -> log_ends.LogEnd:
        return log_ends.read(self.log, self._log_start)


class OtherNode(Protocol):
    """A node of the run other than this one, as the supervisor needs it; `nodes.RemoteNode` is one."""

    def start(self, process: "Process", more_env: Mapping[str, str], log: Path, must_stay: bool) -> Started:
        """Start `process` there.

        Raises:
            ProcessFailed: when it cannot be.
        """

    def check(self) -> None:
        """Return at once where the node is there.

        Raises:
            NodeLost: when it is not.
            Interrupted: when it was told to end.
        """

    def begin_to_stop(self, grace_s: float) -> None:
        """Have it end everything there, without waiting for it."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Return once everything there has ended, or its deadline has passed."""


class Supervisor:
    """Starts processes and, on the way out of the ``with`` block, ends all that they left.

    While entered, the `SIGNALS` raise `Interrupted` in the main thread; another one during the stop that follows
    kills at once.

        with Supervisor(run_folder) as supervisor:
            supervisor.start(plan.server)
            supervisor.start(plan.trainers[0])
            supervisor.wait("trainer", on_tick=display.tick)
    """

    def __init__(
        self,
        run_folder: Path,
        stop_grace_s: float = 10.0,
        others: Sequence[OtherNode] = (),
        part: str = "",
        told_to_hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            run_folder: the logs of the processes are relative to it.
            stop_grace_s: how long a process may take to end after SIGTERM.
            others: the nodes of the run other than this one, in the order of the plan's, from its second on.
            part: of the run that is supervised here, where that is not all of it; then how the run ends is not ours to
                write down.
            told_to_hurry: whether ending must not wait for anybody any more; a second signal says the same.
        """
        self._run_folder, self._stop_grace_s, self._others, self._part = run_folder, stop_grace_s, others, part
        self._run_id = secrets.token_hex(8)
        self._started: dict[str, Started] = {}
        self._folders: list[Path] = []
        self._handlers: dict[signal.Signals, Any] = {}
        self._interrupt: int | None = None
        self._holding = self._stopping = self._hurry = False
        self._told_to_hurry = told_to_hurry

    def __enter__(self) -> "Supervisor":
        self._warden_log = self._run_folder / "logs" / f"warden{self._part and '-'}{self._part}.log"
        self._warden_log.parent.mkdir(parents=True, exist_ok=True)
        summary = None if self._part else self._run_folder / "summary.json"
        self._warden, self._warden_pipe = _start_warden(self._run_id, self._warden_log, summary)
        self._all = _Tree(f"{self._run_id}/", frozenset({os.getpid(), self._warden.pid}))
        for each in SIGNALS:
            self._handlers[each] = signal.signal(each, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            for each, handler in self._handlers.items():
                signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def temporary_folder(self, places: Sequence[Path]) -> Path:
        """A fresh folder that only this user can enter, in the first of `places` that takes one.

        It is deleted when everything has been stopped, also where the launcher is killed.

        Raises:
            OSError: when none of `places` takes one.
        """
        with self._signals_held():
            folder = Path(_made_in(places)).absolute()
            self._folders.append(folder)
            self._tell_warden(str(folder))
            return folder

    def start(
        self, process: "Process", more_env: Mapping[str, str] | None = None, must_stay: bool | None = None
    ) -> None:
        """Start `process` on its node, in a session of its own, its output appended to its log.

        Args:
            process: what to start.
            more_env: variables on top of those of `process`, such as a secret, which no plan may hold.
            must_stay: its end is a failure even with exit code 0. Left out, that holds for the policy servers.

        Raises:
            ProcessFailed: when there is no such command, or no such GPU.
            Interrupted: when a signal came meanwhile; the process is started and will be stopped.
        """
        log = self._run_folder / (process.log or f"logs/{process.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        stay = process.name.startswith("server") if must_stay is None else must_stay
        with self._signals_held():
            if process.node and not self._part:
                other = self._others[process.node - 1]
                self._started[process.name] = other.start(process, more_env or {}, log, stay)
            else:
                self._started[process.name] = self._start_here(process, more_env or {}, log, stay)

    def _start_here(self, process: "Process", more_env: Mapping[str, str], log: Path, must_stay: bool) -> Started:
        try:
            gpus = visible_gpus(process.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        except ValueError as error:
            raise ProcessFailed(process.name, f"could not be started: {error}", log) from error
        mark = f"{self._run_id}/{process.name}/"
        own = without_mpi(os.environ)
        env = {**own, **dict(process.env), **more_env, "CUDA_VISIBLE_DEVICES": gpus, RUN_ID: mark}
        with log.open("ab") as output, _preemption_held():
            log_start = output.tell()
            try:
                popen = subprocess.Popen(
                    process.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                )
            except OSError as error:
                why = f"could not be started: {error.strerror}: {error.filename or process.argv[0]}"
                raise ProcessFailed(process.name, why, log) from error
        tree = _Tree(mark, frozenset({os.getpid(), self._warden.pid}))
        tree.add(popen.pid)
        self._all.add(popen.pid)
        self._tell_warden(str(popen.pid))
        return _Local(process, log, must_stay, popen, tree, log_start)

    def exit_codes(self) -> dict[str, int]:
        """Of those that have ended and were not forgotten, by their names."""
        return {name: code for name, each in self._started.items() if (code := each.code()) is not None}

    def log_end(self, name: str) -> log_ends.LogEnd:
        """The end of the log of the process called `name`."""
        return self._started[name].log_end()

    def failed(self, name: str, reason: str) -> ProcessFailed:
        """The error that says `reason` of the process called `name`, with its log and the end of it."""
        return self._started[name].failed(reason)

    def end(self, names: Sequence[str]) -> None:
        """End the processes of these `names` and all that they left, the last first, and forget them; others stay.

        A name that was not started is passed over.
        """
        for name in reversed(names):
            if name in self._started:
                self._started[name].end(self._stop_grace_s, self._must_hurry)
                del self._started[name]

    def run(
        self,
        process: "Process",
        deadline_s: float,
        on_tick: Callable[[], None] | None = None,
        more_env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `process` and wait until it exits with 0.

        Raises:
            ProcessFailed: when it fails, or has not ended after `deadline_s`.
        """
        self.start(process, more_env, must_stay=False)
        self.wait(process.name, on_tick or (lambda: None), deadline_s=deadline_s)

    def check(self) -> None:
        """Look once at every process.

        Raises:
            ProcessFailed: when one exited with another code than 0, or exited although it must stay. Of several it
                names the first to die as the one that failed, and the others after it.
            Interrupted: when a signal came, also where the first raising of it was swallowed.
        """
        self.check_interrupt()
        for other in self._others:
            other.check()
        # A trainer falls when its server does, hardly the other way round: seen dead together, the server is the cause.
        order = sorted(self._started.values(), key=lambda each: not each.must_stay)
        dead = {each.process.name: reason for each in order if (reason := each.fault())}
        if not dead:
            return
        began = time.monotonic()
        while (waited := time.monotonic() - began) < PEERS_S and any(each.code() is None for each in order):
            # Of trainers on several nodes one falls with the other, and which was first only their errors tell.
            peers = [each for each in order if not each.must_stay and each.code() is None]
            if waited > SETTLE_S and not (peers and all(name.startswith("trainer-") for name in dead)):
                break
            time.sleep(POLL_S)
            for each in order:
                if each.process.name not in dead and (reason := each.fault()):
                    dead[each.process.name] = reason
        first = next(iter(dead))
        if not self._started[first].must_stay:
            first = next((name for name in dead if not self._started[name].log_end().follows), first)
        others = tuple(f"{name}: {reason}" for name, reason in dead.items() if name != first)
        raise self._started[first].failed(dead[first], others)

    def check_interrupt(self) -> None:
        """Raise `Interrupted` where a signal came."""
        if self._interrupt is not None and not self._stopping:
            raise Interrupted(self._interrupt)

    def wait(
        self, name: str, on_tick: Callable[[], None], poll_s: float = 0.2, deadline_s: float | None = None
    ) -> None:
        """Wait until the process called `name` exits with 0; look at all others, and call `on_tick`, each round.

        Raises:
            ProcessFailed: as `check`, and when `deadline_s` has passed.
        """
        waited = self._started[name]
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        while waited.code() != 0:
            self.check()
            on_tick()
            if deadline is not None and time.monotonic() > deadline:
                failed = waited.failed(f"not finished after {deadline_s:g} s")
                waited.end(self._stop_grace_s, self._must_hurry)
                raise failed
            waited.wait(poll_s)

    def stop(self) -> tuple[int, ...]:
        """End everything that was started, the last first; then what it left elsewhere. May be called again.

        Returns:
            The pids that even SIGKILL did not end (stuck in the kernel); empty but for a sick machine.
        """
        if self._stopping:
            return ()
        self._stopping = True
        for other in self._others:
            other.begin_to_stop(self._stop_grace_s)
        for started in reversed(self._started.values()):
            if isinstance(started, _Local):
                started.end(self._stop_grace_s, self._must_hurry)
        left = _end(self._all, self._stop_grace_s, self._must_hurry)
        for other in self._others:
            other.stop(self._must_hurry)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(self._warden_pipe)
        try:
            self._warden.wait(WARDEN_GRACE_S + UNKILLABLE_S)
        except subprocess.TimeoutExpired:
            self._warden.kill()
            self._warden.wait()
        if self._warden_log.exists() and not self._warden_log.stat().st_size:
            self._warden_log.unlink()
        return tuple(each.pid for each in left)

    def _must_hurry(self) -> bool:
        return self._hurry or self._told_to_hurry()

    def _tell_warden(self, line: str) -> None:
        with suppress(BrokenPipeError):  # someone killed the warden: the launcher itself still cleans up
            os.write(self._warden_pipe, f"{line}\n".encode())

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stopping or self._interrupt is not None:
            self._hurry = True
            return
        self._interrupt = signum
        if not self._holding:
            raise Interrupted(signum)

    @contextmanager
    def _signals_held(self) -> Iterator[None]:
        """A signal in here is raised at the end, so that no process is started without being written down."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._interrupt is not None and not self._stopping:
            raise Interrupted(self._interrupt)


def visible_gpus(gpus: tuple[int, ...], own: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a process that may see `gpus`, where the launcher itself was given `own`.

    >>> visible_gpus((0, 1), None), visible_gpus((1,), "2,3"), visible_gpus((), "2,3")
    ('0,1', '3', '')

    Raises:
        ValueError: when the launcher does not have that many.
    """
    if own is None:
        return ",".join(map(str, gpus))
    entries = [entry.strip() for entry in own.split(",") if entry.strip()]
    if gpus and max(gpus) >= len(entries):
        raise ValueError(f"it needs GPU {max(gpus)} of those in CUDA_VISIBLE_DEVICES={own}, which has {len(entries)}")
    return ",".join(entries[index] for index in gpus)


def _made_in(places: Sequence[Path]) -> str:
    for place in places[:-1]:
        with suppress(OSError):
            return tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=place)
    return tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=places[-1])


@contextmanager
def _preemption_held() -> Iterator[None]:
    """What is started in here never gets SIGUSR1, which is meant for the launcher: some sites send it to every process.

    A mask is inherited through exec, and loses no signal that comes meanwhile, as ignoring it for a moment would.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_warden(run_id: str, log: Path, summary: Path | None) -> "tuple[subprocess.Popen[bytes], int]":
    """The warden, and the end of the pipe that keeps it waiting. Python lets no child inherit that end."""
    read, write = os.pipe()
    ending = [] if summary is None else [str(summary.absolute())]
    command = [sys.executable, "-P", __file__, run_id, str(os.getpid()), *ending]
    try:
        with log.open("ab") as errors, _preemption_held():
            warden = subprocess.Popen(
                command, stdin=read, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
    finally:
        os.close(read)
    return warden, write


def _warden(run_id: str, launcher: int, summary: Path | None) -> None:
    """Remember what the launcher starts, processes by pid and folders by path, a line each; when the launcher is gone,
    end and delete all of it and write how the run ended, where that is known here."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    tree = _Tree(f"{run_id}/", frozenset({os.getpid(), launcher}))
    folders: list[str] = []
    rest = b""
    while os.getppid() == launcher:
        if not select.select([0], [], [], WARDEN_LOOK_S)[0]:
            tree.living()  # to remember descendants whose parents may die before it matters
            continue
        received = os.read(0, 4096)
        if not received:
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.isdigit():
                tree.add(int(line))
            else:
                folders.append(os.fsdecode(line))
    left_alone = [str(process.pid) for process in tree.living()]
    if left_alone:
        sys.stderr.write(f"ending what the launcher (pid {launcher}) left: {', '.join(left_alone)}\n")
        if summary is not None and not summary.exists():
            summary.write_text(
                '{\n  "outcome": "failed",\n  "reason": "the launcher was killed"\n}\n', encoding="utf-8"
            )
    if stuck := _end(tree, WARDEN_GRACE_S):
        sys.stderr.write(f"could not end {', '.join(str(process.pid) for process in stuck)}\n")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _warden(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3:] else None)
