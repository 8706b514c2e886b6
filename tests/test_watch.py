"""The watch over policy servers, with clients that answer, hang and fail as servers do; times are tenths of seconds."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from r1zero import watch
from r1zero.policy_client import PolicyServerError, PolicyServerUnreachable
from r1zero.watch import Silent, Watch

SILENCE_S, PUBLISH_S = 0.6, 1.5


class Server:
    """A client of one server, and the server."""

    def __init__(self, **policy: Any) -> None:
        self.answer: dict[str, Any] = {"version": None, "updating": False, "in_flight": 0, **policy}
        self.makes: Callable[[float], int] = lambda timeout_s: 2
        self.asked = 0

    def policy(self, url: str) -> dict[str, Any]:
        return self.answer

    def first_token(self, url: str, timeout_s: float) -> int:
        self.asked += 1
        return self.makes(timeout_s)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.05)


def watched(server: Server, seconds: float, at: dict[float, Callable[[], None]] | None = None) -> str | None:
    """What the watch says within `seconds`, None for nothing; `at` these times something is done."""
    left = dict(at or {})
    began = time.monotonic()
    with Watch({"server": "http://x"}, server, SILENCE_S, PUBLISH_S) as watching:
        while (now := time.monotonic() - began) < seconds:
            for when in [when for when in left if when <= now]:
                left.pop(when)()
            try:
                watching.check()
            except Silent as silent:
                assert silent.name == "server"
                return str(silent)
            time.sleep(0.02)
    return None


def refuse(timeout_s: float) -> int:
    raise PolicyServerError("http://x", "POST /v1/completions", "no answer within 10 s")


def break_down(timeout_s: float) -> int:
    raise ZeroDivisionError("nobody foresaw it")


def hang(timeout_s: float) -> int:
    time.sleep(timeout_s)
    raise PolicyServerError("http://x", "POST /v1/completions", "no answer in time")


def hang_for_good(timeout_s: float) -> int:
    threading.Event().wait(10)
    return 2


def test_a_server_that_makes_tokens_is_alive() -> None:
    server = Server()
    assert watched(server, 1.5) is None
    assert server.asked > 3


@pytest.mark.parametrize(
    ("makes", "why"),
    [
        (refuse, "policy server at http://x: POST /v1/completions: no answer within 10 s"),
        (hang, "no answer in time"),
        (hang_for_good, "it has not answered"),
        (break_down, "ZeroDivisionError: nobody foresaw it"),
    ],
)
def test_a_server_that_makes_none_is_named_in_time(makes: Callable[[float], int], why: str) -> None:
    server = Server()
    began = time.monotonic()
    said = watched(server, 20, {0.3: lambda: setattr(server, "makes", makes)})
    assert said is not None and said.startswith("made no token for 0.6 s: ")
    assert why in said
    assert 0.3 + SILENCE_S - 0.3 < time.monotonic() - began < 5


def test_a_busy_server_proves_itself_by_its_count_and_is_asked_for_nothing() -> None:
    server = Server(tokens=0)
    server.makes = hang  # a request would wait behind hundreds
    threading.Thread(target=_count, args=(server,), daemon=True).start()
    assert watched(server, 1.5) is None
    server.answer = {**server.answer, "tokens": 0}
    assert watched(server, 20) is not None  # it counts no more


def _count(server: Server) -> None:
    for tokens in range(1, 200):
        time.sleep(0.01)
        server.answer = {**server.answer, "tokens": tokens}


def test_a_token_that_never_arrives_is_no_proof_of_life() -> None:
    """As behind a proxy that lets a byte through now and then: the engine makes our token, and its count rises."""
    server = Server(tokens=100)

    def made_in_vain(timeout_s: float) -> int:
        server.answer = {**server.answer, "tokens": server.answer["tokens"] + 1}
        return hang(timeout_s)

    server.makes = made_in_vain
    said = watched(server, 20)
    assert said is not None and "no answer in time" in said


def test_a_server_that_sleeps_is_asked_for_no_token() -> None:
    server = Server(sleeping=True)
    assert watched(server, 1.0) is None
    assert server.asked == 0


def test_an_update_has_its_own_time_and_the_silence_begins_anew_after_it() -> None:
    server = Server()
    server.makes = hang

    def updating(yes: bool) -> Callable[[], None]:
        return lambda: server.answer.update(updating=yes)

    server.answer["updating"] = True
    began = time.monotonic()
    said = watched(server, 20, {1.0: updating(False)})
    assert said is not None and said.startswith("made no token for 0.6 s")
    assert time.monotonic() - began > 1.0 + SILENCE_S - 0.3
    server.answer["updating"] = True
    said = watched(server, 20)
    assert said == "did not finish an update of its weights for 1.5 s: it says that the update is still under way"


def test_a_server_that_answers_nothing_amid_an_update_is_named_before_the_update_is_late() -> None:
    """As when its engine is killed: it stops listening, and waits for the update that will never end."""

    class Deaf(Server):
        def policy(self, url: str) -> dict[str, Any]:
            if time.monotonic() - began > 0.3:
                raise PolicyServerError(url, "GET /policy", "the connection failed")
            return super().policy(url)

    began = time.monotonic()
    said = watched(Deaf(updating=True), 20)
    assert said is not None and said.startswith("did not answer for 0.6 s, amid an update: ")
    assert "GET /policy: the connection failed" in said
    assert time.monotonic() - began < PUBLISH_S


@pytest.mark.parametrize("cause", [ConnectionRefusedError(), ConnectionResetError()])
def test_a_server_that_listens_no_more_is_named_before_it_was_silent_for_long(cause: OSError) -> None:
    """As when its engine is killed: it closes its port and waits for its last connections. A broken one proves less."""

    class Closed(Server):
        def policy(self, url: str) -> dict[str, Any]:
            if self.asked > 2:
                raise PolicyServerUnreachable(url, "GET /policy", "the connection failed") from cause
            return super().policy(url)

    began = time.monotonic()
    said = watched(Closed(), 20)
    assert said is not None
    assert said.startswith("listens no more: ") == isinstance(cause, ConnectionRefusedError)
    assert (time.monotonic() - began < SILENCE_S) == isinstance(cause, ConnectionRefusedError)


def test_one_server_that_hangs_is_named_among_others() -> None:
    class Two(Server):
        def first_token(self, url: str, timeout_s: float) -> int:
            return hang_for_good(timeout_s) if url == "http://two" else 2

    urls = {"server-0": "http://one", "server-1": "http://two"}
    with Watch(urls, Two(), SILENCE_S, PUBLISH_S) as watching, pytest.raises(Silent) as silent:
        for _ in range(500):
            watching.check()
            time.sleep(0.02)
    assert silent.value.name == "server-1"


def test_a_launcher_that_was_stopped_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PAUSED_S", 1.0)
    monkeypatch.setattr(watch, "LOOK_S", 60)
    with Watch({"server": "http://x"}, Server(), SILENCE_S, PUBLISH_S) as watching:
        time.sleep(1.2)  # twice the silence that is allowed
        watching.check()
        with pytest.raises(Silent):
            for _ in range(200):
                time.sleep(0.05)
                watching.check()
