"""The launcher on any node of a run but the first: it starts, watches and ends processes as the first one says."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from r1zero.connection import Connection, Lost, Message, connect
from r1zero.log_ends import LogEnd
from r1zero.supervisor import Interrupted, ProcessFailed, Supervisor, visible_gpus

if TYPE_CHECKING:
    from r1zero.plan import Process

MEET_S = 300.0  # between the first and the last node: they start together, but one may read its packages more slowly
LOOK_AGAIN_S = 0.5
POLL_S = 0.1
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class MeetingFailed(Exception):
    """The nodes of the run did not find each other; the message names who is missing."""


def serve(file: Path, number: int, nodes: int, say: Callable[[str], None]) -> int:
    """The agent of node `number`: join the head, do as it says, to its end.

    Args:
        file: where the head writes how it can be reached.
        number: of this node, from 1.
        nodes: how many there are.
        say: prints a line.

    Returns:
        The exit code: 0 when the head let it go, 1 when the head was not found or was lost, 128 + a signal's number
        after that signal.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # all nodes get it, and only the head acts
    from r1zero import hardware

    try:
        connection = _join(file, number)
    except MeetingFailed as error:
        say(f"error: node {number}: {error}")
        return 1
    here = hardware.this_node()
    say(f"node {number} of {nodes} ({here.host}) serves the run that {connection.there} leads")
    try:
        connection.send({"node": asdict(here)})
        agent = _Agent(connection, number)
        code = agent.run()
    except Lost as error:
        say(f"node {number} ({here.host}): the head is gone ({error}); all that it had started here was ended")
        return 1
    except Interrupted as error:
        say(f"node {number} ({here.host}): {error}; all that ran here was ended")
        return 128 + error.signum
    finally:
        connection.close()
    say(f"node {number} ({here.host}): {'done' if code == 0 else 'could not take part'}")
    return code


class _Agent:
    """Carries out what the head says, one order after the other."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self._number = connection, number
        self._told: set[str] = set()

    def run(self) -> int:
        """To the end of the run.

        Raises:
            Lost: when the head is gone.
            Interrupted: after a signal.
        """
        while True:
            order = self._connection.receive(POLL_S)
            if order is not None and order["do"] == "begin":
                break
            if order is not None and order["do"] == "stop":
                return 0
        folder = Path(order["run_folder"])
        if why := _absence(Path(order["cwd"]), folder):
            self._connection.send({"answers": order["order"], "failed": why})
            return 1
        os.chdir(order["cwd"])
        part = str(self._number)
        with Supervisor(folder, part=part, told_to_hurry=lambda: self._connection.hurried) as supervisor:
            try:
                self._connection.send({"answers": order["order"]})
                stop = self._obey(supervisor)
            except Interrupted as error:
                with suppress(Lost):
                    self._connection.send({"interrupted": error.signum})
                raise
            supervisor.stop()
        with suppress(Lost):
            self._connection.send({"answers": stop})
        return 0

    def _obey(self, supervisor: Supervisor) -> int:
        """Until it is told to stop; the number of that order."""
        while True:
            self._tell_of_exits(supervisor)
            order = self._connection.receive(POLL_S)
            if order is None:
                continue
            if order["do"] == "stop":
                return int(order["order"])
            self._connection.send({"answers": order["order"], **self._carry_out(order, supervisor)})

    def _carry_out(self, order: Message, supervisor: Supervisor) -> Message:
        match order["do"]:
            case "start":
                process = _process(order["process"])
                self._told.discard(process.name)
                more_env = {**meeting_env(process, self._connection.here), **order["more_env"]}
                try:
                    supervisor.start(process, more_env, order["must_stay"])
                except ProcessFailed as error:
                    return {"failed": error.reason}
            case "end":
                supervisor.end([order["name"]])
            case "log":
                return _as_message(supervisor.log_end(order["name"]))
            case "memory":
                from r1zero.restarts import memory_used

                gpus = visible_gpus(tuple(order["gpus"]), os.environ.get("CUDA_VISIBLE_DEVICES"))
                return {"used": memory_used(gpus)}
        return {}

    def _tell_of_exits(self, supervisor: Supervisor) -> None:
        supervisor.check_interrupt()
        for name, code in supervisor.exit_codes().items():
            if name not in self._told:
                self._told.add(name)
                self._connection.send({"ended": name, "code": code, **_as_message(supervisor.log_end(name))})


def _join(file: Path, number: int) -> Connection:
    """Find the head and let each prove to the other that it belongs.

    Raises:
        MeetingFailed: when there was none within `MEET_S`.
    """
    deadline = time.monotonic() + MEET_S
    why = f"there is no file {file}: either it has not begun, or that folder is not one that all nodes share"
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            meeting = json.loads(file.read_text(encoding="utf-8"))
            for name in meeting["names"]:
                try:
                    return Connection(connect(name, meeting["port"], meeting["secret"], number))
                except (OSError, ValueError, LookupError, TypeError) as error:
                    why = f"{file} says that it is at {name} port {meeting['port']}, but {error}"
        time.sleep(LOOK_AGAIN_S)
    raise MeetingFailed(f"the head of the run was not found within {MEET_S:g} s: {why}")


def _absence(cwd: Path, run_folder: Path) -> str:
    """Which folder of the head's is not here; empty where all are."""
    deadline = time.monotonic() + LOOK_AGAIN_S * 20  # a network file system shows a new folder a little later
    while missing := [str(each) for each in (cwd, run_folder) if not each.is_dir()]:
        if time.monotonic() > deadline:
            return f"{missing[0]} is not here: checkout and run folder must lie on a file system that all nodes share"
        time.sleep(LOOK_AGAIN_S)
    return ""


def meeting_env(process: "Process", address: str) -> dict[str, str]:
    """What `process` needs to meet those on other nodes: gloo would choose the interface of the machine's name, which
    many machines give to the loopback.

    Args:
        address: of the node that it runs on.
    """
    if GLOO_INTERFACE in os.environ or GLOO_INTERFACE in dict(process.env):
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return {GLOO_INTERFACE: name}
    return {}


def _as_message(end: LogEnd) -> Message:
    return {"lines": list(end.lines), "error": end.error}


def _process(said: Message) -> "Process":
    from r1zero.plan import Process

    env = tuple((str(name), str(value)) for name, value in said["env"])
    return Process(**{**said, "argv": tuple(said["argv"]), "env": env, "gpus": tuple(said["gpus"])})
