"""A run over several nodes: the launcher runs once on each, the first leads (the head), the others serve (agents).

They meet without ssh, a list of hosts or a fixed port. The head listens on a port of the system's choice and writes
where, with a secret, into a file that only this user can read, in a folder that all nodes share; the file is deleted
once all have come. Each side proves to the other that it knows the secret, which never travels. Then the agents tell
what their nodes are, and start, watch and end processes as the head says, through lines of JSON.

Both sides give a sign of life every `BEAT_S`. When the head is gone, an agent ends all that it started; when an agent
is gone, the head fails the run by that node's name.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from r1zero.agent import LOOK_AGAIN_S, MEET_S, POLL_S, MeetingFailed
from r1zero.connection import HANDSHAKE_S, HURRY, Connection, Lost, Message, admitted
from r1zero.log_ends import LogEnd
from r1zero.supervisor import UNKILLABLE_S, Interrupted, NodeLost, ProcessFailed, Started

if TYPE_CHECKING:
    from r1zero.hardware import Node
    from r1zero.plan import Process

ORDER_S = 60.0  # an order that is carried out at once is answered by then


class _Remote(Started):
    """A process on another node, as the head knows it: what its agent said of it."""

    def __init__(self, process: "Process", log: Path, must_stay: bool, node: "RemoteNode") -> None:
        super().__init__(process, log, must_stay)
        self.exit_code: int | None = None
        self.end_of_log: LogEnd | None = None
        self._node = node

    def code(self) -> int | None:
        self._node.listen()
        return self.exit_code

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.code() is None and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    def end(self, grace_s: float, hurry: Callable[[], bool]) -> None:
        self._node.end(self.process.name, grace_s, hurry)

    def log_end(self) -> LogEnd:
        if self.end_of_log is None:
            with suppress(Lost):
                answer = self._node.ask({"do": "log", "name": self.process.name}, ORDER_S)
                return _log_end(answer)
        return self.end_of_log or LogEnd()


class RemoteNode:
    """Another node of the run, through the connection to its agent. It keeps what `supervisor.OtherNode` asks for.

    Attributes:
        number: its place among the nodes, from 1; 0 is the head.
        node: what it is.
    """

    def __init__(self, number: int, node: "Node", connection: Connection) -> None:
        self.number, self.node = number, node
        self._connection = connection
        self._processes: dict[str, _Remote] = {}
        self._answers: dict[int, Message] = {}
        self._orders = 0
        self._lost = ""
        self._interrupt: int | None = None
        self._log = Path()
        self._stopping: int | None = None
        self._stop_by = 0.0

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.node.host})"

    @property
    def reaches_head_at(self) -> str:
        """The head's address, as the agent knows it."""
        return str(self._connection.here)

    def begin(self, run_folder: Path) -> None:
        """Tell the agent where the run is written; it looks whether that is so on its node as well.

        Raises:
            MeetingFailed: when it is not.
        """
        self._log = run_folder / "logs" / f"warden-{self.number}.log"
        order = {"do": "begin", "cwd": str(Path.cwd()), "run_folder": str(run_folder.absolute())}
        try:
            answer = self.ask(order, ORDER_S)
        except Lost as error:
            raise MeetingFailed(f"{self.name}: {error}") from error
        if "failed" in answer:
            raise MeetingFailed(f"{self.name}: {answer['failed']}")

    def start(self, process: "Process", more_env: Mapping[str, str], log: Path, must_stay: bool) -> Started:
        """See `supervisor.OtherNode`."""
        started = _Remote(process, log, must_stay, self)
        self._processes[process.name] = started
        order = {"do": "start", "process": asdict(process), "more_env": dict(more_env), "must_stay": must_stay}
        try:
            answer = self.ask(order, ORDER_S)
        except Lost as error:
            raise self._gone(str(error)) from error
        if "failed" in answer:
            raise ProcessFailed(process.name, f"{answer['failed']} on {self.name}", log)
        return started

    def check(self) -> None:
        """See `supervisor.OtherNode`."""
        self.listen()
        if self._interrupt is not None:
            raise Interrupted(self._interrupt, self.name)
        if self._lost:
            raise self._gone(self._lost)

    def memory_used(self, gpus: tuple[int, ...]) -> tuple[int, ...]:
        """MiB in use on these of its GPUs, as `restarts.memory_used` finds them there."""
        with suppress(Lost):
            return tuple(self.ask({"do": "memory", "gpus": gpus}, ORDER_S)["used"])
        return ()

    def end(self, name: str, grace_s: float, hurry: Callable[[], bool]) -> None:
        """End one process there and all that it left."""
        order = {"do": "end", "name": name}
        with suppress(Lost):  # then its agent ends it
            self.ask(order, grace_s + UNKILLABLE_S + ORDER_S, hurry)
        self._processes.pop(name, None)

    def begin_to_stop(self, grace_s: float) -> None:
        """See `supervisor.OtherNode`."""
        self._stop_by = time.monotonic() + grace_s + UNKILLABLE_S + ORDER_S
        with suppress(Lost):
            self._stopping = self._order({"do": "stop"})

    def stop(self, hurry: Callable[[], bool]) -> None:
        """See `supervisor.OtherNode`."""
        if self._stopping is not None:
            with suppress(Lost):
                self._answer(self._stopping, self._stop_by, hurry)

    def leave(self) -> None:
        """Let the agent go; one that has begun nothing yet ends well with it."""
        with suppress(Lost):
            self._order({"do": "stop"})
        self._connection.close()

    def ask(self, order: Message, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> Message:
        """Give an order and wait for its answer.

        Raises:
            Lost: when there is none within `timeout_s`, or the agent is gone.
        """
        return self._answer(self._order(order), time.monotonic() + timeout_s, hurry)

    def listen(self, timeout_s: float = 0.0) -> None:
        """Take in what the agent has said."""
        while not self._lost:
            try:
                message = self._connection.receive(timeout_s)
            except Lost as error:
                self._lost = str(error)
                return
            if message is None:
                return
            timeout_s = 0.0
            self._heard(message)

    def _heard(self, message: Message) -> None:
        if "answers" in message:
            self._answers[message["answers"]] = message
        elif "interrupted" in message:
            self._interrupt = message["interrupted"]
        elif message.get("ended") in self._processes:
            process = self._processes[message["ended"]]
            process.end_of_log, process.exit_code = _log_end(message), message["code"]

    def _order(self, order: Message) -> int:
        self._orders += 1
        self._connection.send({**order, "order": self._orders})
        return self._orders

    def _answer(self, order: int, deadline: float, hurry: Callable[[], bool]) -> Message:
        hurried = False
        while order not in self._answers:
            self.listen(POLL_S)
            if self._lost and order not in self._answers:
                raise Lost(self._lost)
            if time.monotonic() > deadline:
                raise Lost("no answer to an order")
            if hurry() and not hurried:
                hurried = True
                self._connection.send(HURRY)
        return self._answers.pop(order)

    def _gone(self, why: str) -> NodeLost:
        ran = ", ".join(self._processes) or "nothing"
        return NodeLost(self.name, f"its launcher is gone ({why}); {ran} ran there", self._log)


@contextmanager
def gathered(
    file: Path, here: "Node", nodes: int, on_tick: Callable[[], None]
) -> "Iterator[tuple[Node, tuple[RemoteNode, ...]]]":
    """The head's side of the meeting: `here` with its address, and all other nodes. They are let go at the end.

    Args:
        file: where the agents look, in a folder that all nodes share.
        here: this node.
        nodes: how many there are, this one among them.
        on_tick: called while they are waited for; may raise.

    Raises:
        MeetingFailed: when they have not come within `MEET_S`.
    """
    secret = secrets.token_hex(32)
    joined: dict[int, RemoteNode] = {}
    try:
        with socket.create_server(("", 0), backlog=nodes) as server:
            place = {"names": _own_names(), "port": server.getsockname()[1], "secret": secret}
            _write_for_this_user(file, place)
            try:
                _accept(server, secret, nodes, joined, on_tick)
            finally:
                file.unlink(missing_ok=True)
        others = tuple(joined[number] for number in sorted(joined))
        yield replace(here, address=others[0].reaches_head_at), others
    finally:
        for each in joined.values():
            each.leave()


def _accept(
    server: socket.socket, secret: str, nodes: int, joined: dict[int, RemoteNode], on_tick: Callable[[], None]
) -> None:
    deadline = time.monotonic() + MEET_S
    server.settimeout(LOOK_AGAIN_S)
    while len(joined) < nodes - 1:
        on_tick()
        if time.monotonic() > deadline:
            missing = ", ".join(str(number) for number in range(1, nodes) if number not in joined)
            raise MeetingFailed(f"of {nodes} nodes number {missing} did not come within {MEET_S:g} s")
        try:
            sock, _ = server.accept()
        except TimeoutError:
            continue
        try:
            number = admitted(sock, secret)
            if number is None or not 0 < number < nodes:
                sock.close()
                continue
            connection = Connection(sock)
            said = connection.receive(HANDSHAKE_S)
        except (OSError, ValueError, LookupError, TypeError, Lost):
            sock.close()  # a port scanner, or an agent that will come again
            continue
        if said is None:
            connection.close()
            continue
        joined[number] = RemoteNode(number, replace(_node(said["node"]), address=connection.there), connection)


def _own_names() -> list[str]:
    """Names and addresses under which others may reach this machine, the likeliest first."""
    names = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), socket.getfqdn()]
    for addresses in psutil.net_if_addrs().values():
        names += [each.address for each in addresses if each.family == socket.AF_INET]
    found = dict.fromkeys(name for name in names if name)
    return sorted(found, key=lambda name: name.startswith(("127.", "localhost")))


def _write_for_this_user(file: Path, content: Message) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
    aside.replace(file)


def _log_end(message: Message) -> LogEnd:
    return LogEnd(tuple(message["lines"]), message["error"])


def _node(said: Message) -> "Node":
    from r1zero.hardware import Gpu, Node

    gpus = tuple(Gpu(**each) for each in said["gpus"])
    return Node(**{**said, "gpus": gpus, "ports": tuple(said["ports"])})
