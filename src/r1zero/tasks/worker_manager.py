"""The manager of a worker pool: one small process that forks workers, hands them calls, kills them and replaces them.

`r1zero.tasks.worker_pool` runs this file as a script. A trainer cannot fork safely, with CUDA, NCCL and many threads in
it; this process has one thread and nothing but the function's module in it, so it can, in about a millisecond.

On the socket that is its standard input the manager speaks in lines. It is told its `Settings` as a JSON object, and
says ``ready`` or ``fault "text"``. Each call is a line ``number [arguments]``, each outcome a line ``number ended
seconds value``, in the order in which the calls end; arguments, value and text are JSON.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

PARENT_LOOK_S = 0.25  # a fork of the parent may hold its end of the socket open, so the parent itself is looked at too
KILL_GRACE_S = 0.5  # a worker ends itself at the wall limit; this much later the manager ends it
REPLY_BYTES = 1 << 24
RECEIVE_BYTES = 1 << 18
ERROR_CHARACTERS = 1000
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TIME_SIGNALS = (signal.SIGPROF, signal.SIGALRM)

# Of the events in Python's audit table, those that computing and importing need. Any other is refused, so that an event
# that a later Python adds is refused too. "open" is allowed for reading.
ALLOWED_EVENTS = frozenset(
    {
        "array.__new__",
        "builtins.id",
        "code.__new__",
        "compile",
        "exec",
        "function.__new__",
        "import",
        "marshal.load",
        "marshal.loads",
        "object.__delattr__",
        "object.__getattr__",
        "object.__setattr__",
        "os.listdir",
        "os.scandir",
        "sys._getframe",
        "sys._getframemodulename",
        "sys.unraisablehook",
        "time.sleep",
    }
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What makes files, processes or threads, or sends signals, and raises no audit event (starting a thread: before 3.12).
UNAUDITED = {
    "os": ("chroot", "mkfifo", "mknod", "setns", "unshare"),
    "posix": ("chroot", "mkfifo", "mknod", "setns", "unshare"),
    "signal": ("pidfd_send_signal",),
    "_signal": ("pidfd_send_signal",),
    "_posixsubprocess": ("fork_exec",),
    "_posixshmem": ("shm_open", "shm_unlink"),
    "_multiprocessing": ("SemLock", "sem_unlink"),
    "_thread": ("start_new_thread", "start_new", "start_joinable_thread"),
    "threading": ("_start_new_thread", "_start_joinable_thread"),
}
REFUSED_IMPORTS = frozenset({"_posixsubprocess", "_posixshmem", "_multiprocessing"})  # they would come back unchanged


@dataclass(frozen=True)
class Settings:
    """What the manager is told before anything else.

    Attributes:
        function: "module:name" of what the workers call. A `warm_up()` in that module runs once, before the first fork.
        workers: how many workers there are.
        wall_seconds: time that one call may take.
        memory_bytes: address space of a worker, what the module takes included.
        parent: process id of whoever started the manager, without which it ends.
        path: the `sys.path` that the module is looked for on.
    """

    function: str
    workers: int
    wall_seconds: float
    memory_bytes: int
    parent: int
    path: list[str]

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode("ascii") + b"\n"


class Lines:
    """Cuts a stream of bytes into lines, in time linear in its length."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without their newlines."""
        *complete, rest = chunk.split(b"\n")
        if complete:
            complete[0] = b"".join((*self._parts, complete[0]))
            self._parts.clear()
        if rest:
            self._parts.append(rest)
        return complete


@dataclass(frozen=True)
class _Call:
    number: bytes
    cpu_seconds: float
    arguments: bytes


@dataclass(eq=False)
class _Worker:
    """A forked process, as the manager sees it; `began` is when its present call was handed to it."""

    pid: int
    channel: socket.socket
    lines: Lines = field(default_factory=Lines)
    call: _Call | None = None
    began: float = 0.0
    fresh: bool = True


class _Manager:
    def __init__(self, settings: Settings, channel: socket.socket, function: Callable[..., Any]) -> None:
        self._settings, self._channel, self._function = settings, channel, function
        self._pid, self._prctl = os.getpid(), ctypes.CDLL(None).prctl
        self._lines = Lines()
        self.unsent = bytearray()  # to the parent
        self._waiting: deque[_Call] = deque()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serves calls until the parent is gone."""
        self._channel.setblocking(False)
        self._selector.register(self._channel, selectors.EVENT_READ)
        for _ in range(self._settings.workers):
            self._idle.append(self._fork())
        self.unsent += b"ready\n"
        parent_seen = time.monotonic()
        try:
            while True:
                for key, _ in self._selector.select(self._patience()):
                    if key.fileobj is not self._channel:
                        self._hear(key.data)
                    elif not self._listen():
                        return
                now = time.monotonic()
                if now - parent_seen > PARENT_LOOK_S:
                    if os.getppid() != self._settings.parent:
                        return
                    parent_seen = now
                self._kill_overrunning(now)
                while self._waiting and self._idle:
                    self._hand(self._idle.pop(), self._waiting.popleft())
                if not self._speak():
                    return
        finally:
            for worker in list(self._workers):
                self._bury(worker)

    def _patience(self) -> float:
        limit = self._settings.wall_seconds + KILL_GRACE_S
        began = min((worker.began for worker in self._workers if worker.call), default=None)
        return PARENT_LOOK_S if began is None else max(min(began + limit - time.monotonic(), PARENT_LOOK_S), 0.0)

    def _listen(self) -> bool:
        """Takes what the parent sent; False: it has gone."""
        try:
            while chunk := self._channel.recv(RECEIVE_BYTES):
                for line in self._lines.feed(chunk):
                    number, cpu_seconds, arguments = line.split(b" ", 2)
                    self._waiting.append(_Call(number, float(cpu_seconds), arguments))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _speak(self) -> bool:
        """Sends the parent what it will take now; False: it has gone."""
        try:
            while self.unsent:
                del self.unsent[: self._channel.send(self.unsent, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            return False
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)
        if self._selector.get_key(self._channel).events != events:
            self._selector.modify(self._channel, events)
        return True

    def _hand(self, worker: _Worker, call: _Call) -> None:
        worker.call, worker.began = call, time.monotonic()
        try:
            worker.channel.sendall(b"%f %b\n" % (call.cpu_seconds, call.arguments), socket.MSG_NOSIGNAL)
        except OSError:  # it has ended, or it does not listen
            self._ended(worker)

    def _hear(self, worker: _Worker) -> None:
        """Takes what a worker says: the outcome of its call, or, by an end of file, that it has ended."""
        try:
            chunk = worker.channel.recv(RECEIVE_BYTES)
        except OSError:
            chunk = b""
        if not chunk:
            self._ended(worker)
            return
        for line in worker.lines.feed(chunk):
            call = worker.call
            if call is None:  # it speaks without having been asked
                self._ended(worker)
                return
            if line.startswith(b"memory "):
                self._bury(worker)
                self._settle(worker, line)
                return
            self.unsent += b"%b %b\n" % (call.number, line)
            worker.call, worker.fresh = None, False
            self._idle.append(worker)

    def _ended(self, worker: _Worker) -> None:
        """Buries a worker that has ended, or must, and settles its call by the way it ended."""
        status = self._bury(worker)
        seconds = time.monotonic() - worker.began
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number in TIME_SIGNALS:
                text = f"over wall_seconds = {self._settings.wall_seconds:g}"
                if number == signal.SIGPROF and worker.call is not None:
                    text = f"over cpu_seconds = {worker.call.cpu_seconds:g}"
                self._settle(worker, _outcome("time", seconds, text))
                return
            # There is no name for the real-time signals.
            names = {each.value: each.name for each in signal.Signals}
            text = f"killed by {names.get(number, f'signal {number}')}"
        else:
            text = f"ended with exit code {os.WEXITSTATUS(status)}"
        self._settle(worker, _outcome("died", seconds, text))

    def _settle(self, dead: _Worker, outcome: bytes) -> None:
        """Puts a new worker in place of `dead`, and reports `outcome` for its call.

        Except where the worker had served other calls before: what these left behind in it, such as memory, may be why
        it ended. Then the call is run again, in the new worker, where its outcome is its own. Time is counted by the
        call, so overrunning it needs no such proof.
        """
        worker = self._fork()
        call = dead.call
        if call is not None and (dead.fresh or outcome.startswith(b"time ")):
            self.unsent += b"%b %b\n" % (call.number, outcome)
            call = None
        if call is None:
            self._idle.append(worker)
        else:
            self._hand(worker, call)

    def _kill_overrunning(self, now: float) -> None:
        limit = self._settings.wall_seconds + KILL_GRACE_S
        for worker in [each for each in self._workers if each.call and now - each.began >= limit]:
            self._bury(worker)
            text = f"over wall_seconds = {self._settings.wall_seconds:g}"
            self._settle(worker, _outcome("time", now - worker.began, text))

    def _bury(self, worker: _Worker) -> int:
        """Kills and reaps `worker`. Returns its wait status, which tells what ended it first."""
        self._workers.remove(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._selector.unregister(worker.channel)
        os.kill(worker.pid, signal.SIGKILL)
        _, status = os.waitpid(worker.pid, 0)
        worker.channel.close()
        return status

    def _fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker(theirs)
            finally:
                os._exit(1)
        theirs.close()
        ours.settimeout(self._settings.wall_seconds + KILL_GRACE_S)
        worker = _Worker(pid, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _become_worker(self, channel: socket.socket) -> NoReturn:
        # When the manager dies the kernel kills the worker. It may have died before this was said.
        self._prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._pid:
            os._exit(1)
        # No worker holds another's channel, or the manager's.
        self._selector.close()
        self._channel.close()
        for worker in self._workers:
            worker.channel.close()
        _work(self._settings, self._function, channel)


def _work(settings: Settings, function: Callable[..., Any], channel: socket.socket) -> NoReturn:
    """Serves calls, under limits, until the channel closes or this process has grown too large."""
    # Where memory is short the kernel's choice falls on this process, not on the trainer.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))
    _refuse_the_outside()
    requests = channel.makefile("rb")
    while request := requests.readline():
        channel.sendall(_call(settings, function, request))
        # A peak of half the limit: the next call should find more room than what this one may have left to it.
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > settings.memory_bytes // 2:
            break
    os._exit(0)


def _call(settings: Settings, function: Callable[..., Any], request: bytes) -> bytes:
    """The outcome of one call. Overrunning its time ends this process: the default action of the timers' signals."""
    began = time.perf_counter()
    cpu_seconds, _, arguments = request.partition(b" ")
    signal.setitimer(signal.ITIMER_PROF, float(cpu_seconds))
    signal.setitimer(signal.ITIMER_REAL, settings.wall_seconds)
    try:
        try:
            ended, text = "returned", _returned(function, arguments)
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001  SystemExit is an outcome as well
            ended, text = "raised", json.dumps(_described(error))
    except MemoryError:  # outside of the above, whose error may hold on to much
        ended, text = "memory", '"over memory_bytes"'
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return f"{ended} {time.perf_counter() - began:.6f} {text}\n".encode("ascii")


def _returned(function: Callable[..., Any], arguments: bytes) -> str:
    text = json.dumps(function(*json.loads(arguments)))
    if len(text) > REPLY_BYTES:
        raise ValueError(f"the value is {len(text)} bytes of JSON; {REPLY_BYTES} is the most that is passed on")
    return text


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
    except Exception:  # noqa: BLE001  a message may fail too: an int of too many digits does
        return type(error).__name__


def _refuse_the_outside() -> None:
    """From here on this process makes no file, process, thread or socket through Python, and loads no C library.

    A second line of defence, for text that makes sympy evaluate more than mathematics. It holds against Python code;
    native code of a hostile author would need the kernel's means.
    """

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ALLOWED_EVENTS:
            if event != "open":
                raise PermissionError(f"{event} is refused in a worker")
            path, _, flags = arguments
            if flags & WRITING:
                raise PermissionError(f"opening {path!r} for writing is refused in a worker")
        elif event == "import" and arguments[0] in REFUSED_IMPORTS:
            raise ImportError(f"importing {arguments[0]} is refused in a worker")

    def refused(*_: object, **__: object) -> NoReturn:
        raise PermissionError("refused in a worker")

    for module, names in UNAUDITED.items():
        for name in names:
            if hasattr(sys.modules.get(module), name):
                setattr(sys.modules[module], name, refused)
    sys.addaudithook(refuse)


def _outcome(ended: str, seconds: float, text: str) -> bytes:
    return f"{ended} {seconds:.6f} {json.dumps(text)}".encode("ascii")


def _function(settings: Settings) -> Callable[..., Any]:
    module_name, _, name = settings.function.partition(":")
    module = importlib.import_module(module_name)
    function: Callable[..., Any] = getattr(module, name)
    if warm_up := getattr(module, "warm_up", None):
        warm_up()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if 2 * taken > settings.memory_bytes:
        raise ValueError(
            f"memory_bytes is {settings.memory_bytes}, and {module_name} alone takes {taken}: give at least {2 * taken}"
        )
    return function


def _prepare() -> socket.socket:
    """The channel to the parent. Whatever is printed after this goes nowhere; inherited signals are as at first."""
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    for number in (*TIME_SIGNALS, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return channel


def main() -> None:
    channel = _prepare()
    unsent = bytearray()
    try:
        received = b""
        while not received.endswith(b"\n"):
            if not (chunk := channel.recv(RECEIVE_BYTES)):
                return
            received += chunk
        settings = Settings(**json.loads(received))
        sys.path[:] = settings.path
        function = _function(settings)
        gc.collect()
        gc.freeze()  # a collection in a worker would copy the pages that it shares with the manager
        manager = _Manager(settings, channel, function)
        unsent = manager.unsent
        manager.run()
    except Exception:  # noqa: BLE001  told to the parent, who raises it
        unsent += b"fault %b\n" % json.dumps(traceback.format_exc()).encode("ascii")
        channel.settimeout(KILL_GRACE_S)
        with contextlib.suppress(OSError):
            channel.sendall(unsent, socket.MSG_NOSIGNAL)


if __name__ == "__main__":
    main()
