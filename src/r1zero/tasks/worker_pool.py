"""Calls of one function in processes that can be killed: what hangs, eats memory or crashes costs that call alone.

The usual `concurrent.futures` does not do here: it forks the trainer or pickles, and cannot end a call that runs. And a
timeout by signals, as math-verify has it, works in the main thread only and not inside of C code. Here the trainer
starts one manager process (`r1zero.tasks.worker_manager`) and speaks JSON with it; all forking and killing is there.
No signal handler is touched, and a call is the same from any thread.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from r1zero.tasks import worker_manager
from r1zero.tasks.worker_manager import Lines, Settings

MOST_WORKERS = 4  # by default; the other CPUs are the trainer's and the policy server's
READY_S = 300.0  # for importing the function's module: a cold network file system is slow
SILENCE_S = 60.0  # beyond the wall limit of a call: then the manager is stuck
END_S = 2.0  # for the manager to kill and reap its workers


class WorkerPoolError(Exception):
    """The pool cannot run calls: its function cannot be had, or its manager process keeps dying. `str` says why."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Attributes:
        value: what the function returned; where it did not return, a text that says why.
        ended: "returned"; "raised", any exception but MemoryError; "time", over the CPU or the wall limit; "memory",
            over the memory limit; "died", the worker ended in the middle of the call, such as by a segmentation fault.
        seconds: how long the call took.

    >>> Outcome(value=6.0, ended="returned", seconds=0.0001)
    Outcome(value=6.0, ended='returned', seconds=0.0001)
    """

    value: Any
    ended: str
    seconds: float


class WorkerPool:
    """Runs one function in worker processes, each call under limits of CPU time, wall time and memory.

    The processes start at the first call, or with `begin()`. They end with `close()`, with the last reference to the
    pool, and within a second of this process, even when it is killed; calls under way do not hold them up. A process
    forked from this one can use the pool as well: it starts a manager of its own.

    Calls of `map` from several threads run one after the other. Each keeps all the workers busy, so nothing would be
    gained by mixing them, and an interrupted one (Ctrl-C) can simply stop the manager and leave nothing behind.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int | None = None,
        cpu_seconds: float,
        wall_seconds: float,
        memory_bytes: int = 1 << 30,
    ) -> None:
        """Starts nothing yet.

        Args:
            function: "module:name" of a function of JSON values that returns a JSON value. Its module is imported once,
                and its `warm_up()` called, where it has one, before workers are forked from there.
            workers: how many processes; None: one for each CPU this process may use, 4 at most.
            cpu_seconds: CPU time that one call may take. It makes the verdict: it is the same on a loaded machine.
            wall_seconds: time that one call may take, sleeping or waiting for a CPU included.
            memory_bytes: address space of one worker, what the module takes included.

        Raises:
            ValueError: when a limit is not positive, or `function` is not of that form.
        """
        module, _, name = function.partition(":")
        if not module or not name:
            raise ValueError(f"function {function!r} is not of the form module:name")
        if workers is None:
            workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        limits = {
            "workers": workers,
            "cpu_seconds": cpu_seconds,
            "wall_seconds": wall_seconds,
            "memory_bytes": memory_bytes,
        }
        for key, value in limits.items():
            if not value > 0:
                raise ValueError(f"{key} is {value}; give a number above 0")
        self._settings = Settings(function, workers, wall_seconds, memory_bytes, parent=0, path=[])
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._manager: _Manager | None = None
        self._stop_manager: weakref.finalize[[], WorkerPool] | None = None
        _pools.add(self)

    def begin(self) -> None:
        """Start the processes, and do not wait for them: importing the module can take seconds.

        What is wrong with them, the next `map` says.
        """
        with self._lock:
            if self._manager is None and not self._closed:
                self._start()

    def map(self, calls: Sequence[Sequence[Any]], cpu_seconds: float | None = None) -> list[Outcome]:
        """The outcomes of the function for each list of arguments in `calls`, in the order of `calls`.

        Args:
            calls: lists of arguments.
            cpu_seconds: CPU time that each of these calls may take; None: the pool's own limit.

        Raises:
            TypeError, ValueError: when arguments are not JSON values; then nothing was run.
            WorkerPoolError: when the function cannot be had, or the manager died twice without an outcome in between.
            RuntimeError: when the pool is closed.
        """
        limit = b"%f" % (self._cpu_seconds if cpu_seconds is None else cpu_seconds)
        requests = [b"%b %b" % (limit, json.dumps(list(arguments)).encode("ascii")) for arguments in calls]
        outcomes: dict[int, Outcome] = {}
        deaths = 0
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            while len(outcomes) < len(requests):
                before = len(outcomes)
                try:
                    manager = self._manager or self._start()
                    manager.wait_until_ready()
                    manager.run(requests, outcomes)
                except _ManagerDied as death:
                    self._stop()
                    deaths = 1 if len(outcomes) > before else deaths + 1
                    if deaths == 2:
                        raise WorkerPoolError(
                            f"the manager process of the worker pool died twice in a row, {len(outcomes)} of "
                            f"{len(requests)} calls done: {death}"
                        ) from None
                except BaseException:  # Ctrl-C: what the manager would still say belongs to nobody
                    self._stop()
                    raise
        return [outcomes[number] for number in range(len(requests))]

    def close(self) -> None:
        """Ends the processes and waits for their end. Waits for a `map` of another thread; may be called twice."""
        with self._lock:
            self._closed = True
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> "_Manager":
        manager = _Manager(replace(self._settings, parent=os.getpid(), path=list(sys.path)))
        self._manager = manager
        # Also when the pool is collected without close(), and when the interpreter ends.
        self._stop_manager = weakref.finalize(self, manager.stop)
        return manager

    def _stop(self) -> None:
        stop, self._manager, self._stop_manager = self._stop_manager, None, None
        if stop is not None:
            stop()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # the other one may be held, by a thread that does not exist here
        if self._stop_manager is not None:
            self._stop_manager.detach()
        if self._manager is not None:
            self._manager.forget()
        self._manager = self._stop_manager = None


class _ManagerDied(Exception):
    """The manager ended or fell silent; the calls without an outcome can be run by another."""


class _Manager:
    """The manager process, as its parent sees it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._received = Lines()
        self._ready = False
        self._channel, theirs = socket.socketpair()
        with theirs:
            # A session of its own, so that Ctrl-C in a terminal reaches this process alone. A fixed hash seed, so that
            # what depends on the order of a set comes out the same in every run.
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker_manager.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        with suppress(ConnectionError):  # its end shows when it is read from
            self._channel.sendall(settings.to_line(), socket.MSG_NOSIGNAL)
        self._channel.setblocking(False)

    def wait_until_ready(self) -> None:
        """Returns when the workers stand, at once from the second time on.

        Raises:
            WorkerPoolError: when the function cannot be had, with the manager's traceback.
            _ManagerDied
        """
        if self._ready:
            return
        for line in self._exchange(b"", READY_S):
            if line == b"ready":
                self._ready = True
                return
            raise WorkerPoolError(f"no worker for {self._settings.function}: {_fault(line)}")

    def run(self, requests: Sequence[bytes], outcomes: dict[int, Outcome]) -> None:
        """Runs those of `requests` whose number is not in `outcomes`, and puts theirs there.

        Raises:
            _ManagerDied: `outcomes` holds what was done before.
        """
        calls = b"".join(b"%d %b\n" % each for each in enumerate(requests) if each[0] not in outcomes)
        for line in self._exchange(calls, self._settings.wall_seconds + SILENCE_S):
            if line.startswith(b"fault "):
                raise _ManagerDied(_fault(line))
            number, ended, seconds, text = line.split(b" ", 3)
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:  # it could be written there, yet cannot be read here
                value, ended = f"{type(error).__name__}: {error}", b"raised"
            outcomes[int(number)] = Outcome(value, ended.decode("ascii"), float(seconds))
            if len(outcomes) == len(requests):
                return

    def stop(self) -> None:
        """Ends the manager and its workers."""
        self._channel.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """In a fork of the parent: the manager is the parent's alone."""
        self._channel.close()
        self._process.returncode = 0  # not a child of this process, so there is nothing to wait for

    def _exchange(self, message: bytes, patience: float) -> Iterator[bytes]:
        """Sends `message`, and yields the lines that the manager says meanwhile and after.

        Raises:
            _ManagerDied: when it ends, or says nothing for `patience` seconds.
        """
        unsent = memoryview(message)
        with selectors.PollSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if message else 0))
            while True:
                if not (ready := selector.select(patience)):
                    raise _ManagerDied(f"it said nothing for {patience:g} s")
                _, events = ready[0]
                if events & selectors.EVENT_READ:
                    yield from self._received.feed(self._receive())
                elif unsent:
                    with suppress(BlockingIOError, ConnectionError):  # the latter shows when it is read from
                        # Not the SIGPIPE that this process may not have ignored.
                        unsent = unsent[self._channel.send(unsent, socket.MSG_NOSIGNAL) :]
                    if not unsent:
                        selector.modify(self._channel, selectors.EVENT_READ)

    def _receive(self) -> bytes:
        with suppress(ConnectionError):
            if chunk := self._channel.recv(worker_manager.RECEIVE_BYTES):
                return chunk
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        raise _ManagerDied(f"its exit code is {self._process.returncode}")


def _fault(line: bytes) -> str:
    """The text of a line ``fault "text"``."""
    text: str = json.loads(line.partition(b" ")[2])
    return text


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._after_fork()


os.register_at_fork(after_in_child=_after_fork)
