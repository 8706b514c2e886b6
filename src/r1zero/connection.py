"""How the nodes of a run speak with each other: lines of JSON over TCP, each side known to the other by a secret.

The secret itself never travels: each side is asked for a proof that only who knows it can give. Then both send
messages, and a sign of life every `BEAT_S`; who gives none for `SILENT_S` is gone.
"""

import hmac
import json
import queue
import secrets
import select
import socket
import threading
import time
from contextlib import suppress
from typing import Any

CONNECT_S = 3.0
HANDSHAKE_S = 10.0
BEAT_S = 2.0
SILENT_S = 30.0
LONGEST_GREETING = 4096  # bytes
LONGEST_LINE = 2**24

Message = dict[str, Any]
HURRY: Message = {"do": "hurry"}


class Lost(Exception):
    """The other side is gone; the message says how that was seen."""


class Connection:
    """Messages to the other side and from it, and a sign of life in both directions.

    Args:
        sock: connected, and past the handshake.

    Attributes:
        here: the address that the other side reaches this one under.
        there: the other side's.
        hurried: the other side has asked for haste, in whatever is going on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.here, self.there = sock.getsockname()[0], sock.getpeername()[0]
        self._socket, self._sending = sock, threading.Lock()
        self._received: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lost = ""
        self._closing = False
        self.hurried = False
        sock.settimeout(SILENT_S)
        threading.Thread(target=self._keep, name=f"node-{self.there}", daemon=True).start()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            Lost: when the other side is gone.
        """
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError as error:
            raise Lost(self._lost or f"connection lost: {error}") from error

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None when there is none within `timeout_s`.

        Raises:
            Lost: when the other side is gone, and all that it sent was received.
        """
        try:
            message = self._received.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._received.put(None)
            raise Lost(self._lost)
        return message

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _keep(self) -> None:
        try:
            self._read_and_beat()
        except (OSError, ValueError) as error:
            self._lost = "closed" if self._closing else f"connection lost: {error}"
        self._received.put(None)

    def _read_and_beat(self) -> None:
        rest, heard = b"", time.monotonic()
        beaten = looked = 0.0
        while True:
            now = time.monotonic()
            if now - looked > SILENT_S / 2:
                heard = now  # this process itself was stopped, or has just begun, and its clock tells nothing
            looked = now
            if now - heard > SILENT_S:
                raise TimeoutError(f"no sign of life for {SILENT_S:g} s")
            if now - beaten > BEAT_S:
                with self._sending:
                    self._socket.sendall(b"\n")
                beaten = now
            if not select.select([self._socket], [], [], BEAT_S / 2)[0]:
                continue
            received = self._socket.recv(2**16)
            if not received:
                raise ConnectionError("the other side has ended")
            heard = time.monotonic()
            *lines, rest = (rest + received).split(b"\n")
            if len(rest) > LONGEST_LINE:
                raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            for message in map(json.loads, filter(None, lines)):
                if message == HURRY:  # whoever carries out an order does not look for the next one
                    self.hurried = True
                else:
                    self._received.put(message)


def admitted(sock: socket.socket, secret: str) -> int | None:
    """The number of the node that has proved that it knows the secret; None where it has not."""
    sock.settimeout(HANDSHAKE_S)
    nonce = secrets.token_hex(16)
    _say(sock, {"nonce": nonce})
    greeting = _hear(sock)
    if not hmac.compare_digest(str(greeting["proof"]), _proof(secret, f"agent {greeting['number']} {nonce}")):
        return None
    _say(sock, {"proof": _proof(secret, f"head {greeting['nonce']}")})
    return int(greeting["number"])


def connect(name: str, port: int, secret: str, number: int) -> socket.socket:
    """A connection to the head as node `number`, once each has proved that it knows the secret.

    Raises:
        OSError, ValueError, LookupError, TypeError: when nobody is there, or somebody else.
    """
    sock = socket.create_connection((name, port), timeout=CONNECT_S)
    try:
        sock.settimeout(HANDSHAKE_S)
        nonce = secrets.token_hex(16)
        proof = _proof(secret, f"agent {number} {_hear(sock)['nonce']}")
        _say(sock, {"number": number, "proof": proof, "nonce": nonce})
        if not hmac.compare_digest(str(_hear(sock)["proof"]), _proof(secret, f"head {nonce}")):
            raise ValueError("it does not know the secret")
    except BaseException:
        sock.close()
        raise
    return sock


def _proof(secret: str, of: str) -> str:
    return hmac.new(secret.encode(), of.encode(), "sha256").hexdigest()


def _say(sock: socket.socket, message: Message) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


def _hear(sock: socket.socket) -> Message:
    """One line, and not a byte more: what follows is the connection's."""
    line, deadline = b"", time.monotonic() + HANDSHAKE_S
    while not line.endswith(b"\n"):
        received = sock.recv(1)
        if not received or len(line) > LONGEST_GREETING or time.monotonic() > deadline:
            raise ValueError("it does not speak as a node of a run does")
        line += received
    said: Message = json.loads(line)
    return said
