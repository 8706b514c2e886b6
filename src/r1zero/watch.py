"""Whether the policy servers are alive while the trainer works. The supervisor sees a death; this sees a silence.

Alive is a server whose engine makes tokens: one that made some since the last look (its policy route counts them) has
proved it under whatever load; one that made none is asked for one. Dead is one that listens no more: vLLM, whose engine
was killed, closes its port and then waits for its last connections, for minutes where an update of weights hangs.
"""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from r1zero.policy_client import TRIES, PolicyServerError, PolicyServerUnreachable

LOOK_S = 3.0  # between two looks at one server
CLOSED_LOOKS = 2  # in a row that find nobody listening
PAUSED_S = 5.0  # after so long without a `check`, this process itself was stopped, and its clocks tell nothing


class Client(Protocol):
    """What is asked of a policy client here."""

    def policy(self, url: str) -> dict[str, Any]: ...

    def first_token(self, url: str, timeout_s: float) -> int: ...


class Silent(Exception):
    """A policy server has not proved alive for too long.

    Attributes:
        name: of the server's process.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


class Watch:
    """Looks at each server every `LOOK_S` seconds, in a thread for each, so that one that hangs hides no other.

        with Watch({"server": "http://127.0.0.1:8000"}, client, silence_timeout_s=30, publish_timeout_s=300) as watch:
            supervisor.wait("trainer", on_tick=watch.check)

    Args:
        servers: the URL of each, by the name of its process.
        client: asks them; each of its calls must end by itself.
        silence_timeout_s: a server may go without a proof so long.
        publish_timeout_s: while its weights are being updated, so long.
    """

    def __init__(
        self,
        servers: dict[str, str],
        client: Client,
        silence_timeout_s: float,
        publish_timeout_s: float,
    ) -> None:
        self._over = threading.Event()
        self._checked = time.monotonic()
        self._servers: Sequence[_Server] = [
            _Server(name, url, client, silence_timeout_s, publish_timeout_s, self._over)
            for name, url in servers.items()
        ]

    def __enter__(self) -> "Watch":
        for server in self._servers:
            server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()  # a thread that still waits for an answer ends with it

    def check(self) -> None:
        """Return at once where every server has proved alive in time.

        Raises:
            Silent: for the first that has not.
        """
        now = time.monotonic()
        paused, self._checked = now - self._checked > PAUSED_S, now
        for server in self._servers:
            if paused:
                server.excuse()
            server.check(now)


class _Server(threading.Thread):
    """One server and until when it counts as alive."""

    def __init__(
        self,
        name: str,
        url: str,
        client: Client,
        silence_timeout_s: float,
        publish_timeout_s: float,
        over: threading.Event,
    ) -> None:
        super().__init__(name=f"watch-{name}", daemon=True)
        self._server, self._url, self._client, self._over = name, url, client, over
        self._silence_s, self._publish_s = silence_timeout_s, publish_timeout_s
        self._tokens: int | None = None
        self._own_tokens = 0  # those that it may have made for us since the last look
        self._updating = False
        self._closed_looks = 0
        self._why = "it has not answered"
        self.excuse()

    def excuse(self) -> None:
        """Count its silence from now on."""
        self._answered = time.monotonic()
        self._allowed_s = self._publish_s if self._updating else self._silence_s
        self._alive_until = self._answered + self._allowed_s

    def check(self, now: float) -> None:
        if self._closed_looks >= CLOSED_LOOKS:
            raise Silent(self._server, f"listens no more: {self._why}")
        if self._updating and now > self._answered + self._silence_s:  # its doors answer during an update too
            raise Silent(self._server, f"did not answer for {self._silence_s:g} s, amid an update: {self._why}")
        if now > self._alive_until:
            did = "did not finish an update of its weights" if self._updating else "made no token"
            raise Silent(self._server, f"{did} for {self._allowed_s:g} s: {self._why}")

    def run(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                self._look()
                self._closed_looks = 0
            except PolicyServerError as error:
                self._why = str(error)
                closed = isinstance(error, PolicyServerUnreachable) and error.nobody_listens
                self._closed_looks = self._closed_looks + 1 if closed else 0
            except Exception as error:  # noqa: BLE001 - an answer that nobody foresaw is no proof of life, and no end of the watch
                self._why = f"{type(error).__name__}: {error}"

    def _look(self) -> None:
        policy = self._client.policy(self._url)
        self._answered = time.monotonic()
        if bool(policy["updating"]) != self._updating:
            self._updating = not self._updating
            self.excuse()
        if self._updating:
            self._why = "it says that the update is still under way"
            return
        tokens, before, own = policy.get("tokens"), self._tokens, self._own_tokens
        # A token that was made for us and did not arrive is no proof: nothing else may arrive either.
        busy = tokens is not None and before is not None and tokens - before > own
        self._tokens, self._own_tokens = tokens, 0
        if not busy and not policy.get("sleeping"):
            self._own_tokens = TRIES
            # Not for all of the time that is left: a request that waits behind others is asked again, after a look.
            self._client.first_token(self._url, self._silence_s / 3)
        self.excuse()
