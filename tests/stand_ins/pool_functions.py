"""What a worker of the pool may be made to do: `call` runs one of the functions below by its name."""

import _posixsubprocess
import faulthandler
import json
import multiprocessing.synchronize
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

kept: list[Any] = []  # what a call leaves behind in its worker


def call(name: str, *arguments: Any) -> Any:
    return globals()[name](*arguments)


def warm_up() -> None:
    """The manager's process id, as the workers' functions can tell it, is known before they are forked."""
    kept.append(os.getpid())


def echo(value: Any) -> Any:
    return value


def process_ids() -> list[int]:
    return [kept[0], os.getpid()]


# Calls that do not end.


def endless_loop() -> None:
    while True:
        pass


def endless_power() -> int:
    return 7 ** (10**9)  # one C function


def endless_match() -> None:
    re.match(r"(a+)+b", "a" * 60)  # one C function


def endless_sleep() -> None:
    time.sleep(3600)


def endless_and_deaf() -> None:
    """Takes its own timers away first."""
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    while True:
        pass


# Calls that end in a bad way.


def eat_memory() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 24))


def keep_memory(size: int) -> int:
    kept.append(b"x" * size)
    return os.getpid()


def use_memory(size: int) -> int:
    return len(b"x" * size)


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def crash() -> None:
    faulthandler._sigsegv()


def leave(code: int) -> None:
    os._exit(code)


def ask_to_leave() -> None:
    raise SystemExit("the end")


def interrupt() -> None:
    raise KeyboardInterrupt


def complain(text: str) -> None:
    raise ValueError(text)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def complain_in_silence() -> None:
    raise Unprintable


def not_json() -> object:
    return object()


def deep_list() -> Any:
    value: Any = 0
    for _ in range(100_000):
        value = [value]
    return value


# Calls that write where they should not.


def chatter() -> str:
    print("0 returned 0.0 1")
    print("ready", file=sys.stderr)
    for number in (0, 1, 2):
        os.write(number, b"\n0 returned 0.0 1\n")
    return "done"


def long_text(size: int) -> str:
    return "é" * size


def late_import() -> float:
    import colorsys  # a module that nothing else imports

    return colorsys.rgb_to_hls(1, 0, 0)[1]


def attempts(folder: str) -> dict[str, str]:
    """Tries to reach the outside in many ways; what each came to."""
    here = Path(folder)
    (there := here / "there").exists()
    ways = {
        "open": lambda: there.write_text("x"),
        "append": lambda: open(here / "kept", "a"),  # noqa: PTH123, SIM115
        "os.open": lambda: os.open(there, os.O_CREAT),
        "O_TMPFILE": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        "mkdir": lambda: os.mkdir(there),  # noqa: PTH102
        "mkfifo": lambda: os.mkfifo(there),
        "mknod": lambda: os.mknod(there),
        "posix.mkfifo": lambda: sys.modules["posix"].mkfifo(there),
        "symlink": lambda: os.symlink("/", there),  # noqa: PTH211
        "link": lambda: os.link(here / "kept", there),
        "rename": lambda: os.rename(here / "kept", there),  # noqa: PTH104
        "remove": lambda: os.remove(here / "kept"),  # noqa: PTH107
        "truncate": lambda: os.truncate(here / "kept", 0),
        "chmod": lambda: os.chmod(here / "kept", 0),  # noqa: PTH101
        "chdir": lambda: os.chdir("/"),
        "socket": lambda: socket.socket(),
        "connect": lambda: socket.create_connection(("127.0.0.1", 1)),
        "subprocess": lambda: subprocess.run(["touch", str(there)], check=False),
        "fork_exec": lambda: _posixsubprocess.fork_exec(),
        "system": lambda: os.system(f"touch {there}"),
        "popen": lambda: os.popen(f"touch {there}"),
        "fork": lambda: os.fork() or os._exit(0),
        "forkpty": lambda: os.forkpty()[0] or os._exit(0),
        "spawn": lambda: os.spawnlp(os.P_WAIT, "touch", "touch", str(there)),
        "posix_spawn": lambda: os.posix_spawn("/usr/bin/touch", ["touch", str(there)], {}),
        "exec": lambda: os.execlp("touch", "touch", str(there)),
        "kill": lambda: os.kill(os.getppid(), 0),
        "thread": lambda: threading.Thread(target=print).start(),
        "semaphore": lambda: multiprocessing.synchronize.Lock(ctx=multiprocessing.get_context("spawn")),
        "shared memory": lambda: shared_memory.SharedMemory(create=True, size=1),
        "ctypes": lambda: __import__("ctypes").CDLL(None),
        "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
        "gc": lambda: __import__("gc").get_objects(),
        "eval": lambda: eval("__import__('os').system('true')"),
        "pickle": lambda: __import__("pickle").loads(b"cos\nsystem\n(S'true'\ntR."),
    }
    found = {}
    for name, way in ways.items():
        try:
            found[name] = f"did {way()!r}"
        except Exception as error:  # noqa: BLE001
            found[name] = type(error).__name__
    return found


def can_do() -> Any:
    """What computing needs, and is not refused."""
    names: dict[str, Any] = {}
    exec("import fractions\nvalue = str(fractions.Fraction(3, 4))", names)
    source = Path(json.__file__).read_text()
    return [names["value"], eval("2 ** 10"), "def loads" in source, sys._getframe(0).f_code.co_name]


def hash_of(text: str) -> int:
    return hash(text)
