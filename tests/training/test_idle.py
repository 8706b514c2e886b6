"""How long each side was idle: a clock that the test sets, and servers that answer when the test lets them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from r1zero.policy_client import PolicyClient, Ticket
from r1zero.training.clock import Clock
from r1zero.training.idle import Account
from tests.stand_in_server import Handler, serving

LONG_S = 30.0  # what must not be reached
SAMPLING = {"max_tokens": 8}


class Times:
    """The clock of client and trainer, which stands still until `passes`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Server:
    """A server that keeps each request for completions until `answer`."""

    def __init__(self) -> None:
        self.came, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def complete(self, handler: Handler, request: Any) -> None:
        if "prompt_logprobs" not in request:
            self.came.release()
            assert self._go.acquire(timeout=LONG_S)
        Handler._complete(handler, request)

    def answer(self, requests: int = 1) -> None:
        self._go.release(requests)


class Run:
    """What a trainer does with its clock and its client."""

    def __init__(self, servers: list[Server], client: PolicyClient, times: Times) -> None:
        self.servers, self.client, self.times = servers, client, times
        self.clock = Clock()
        self.watch()

    def watch(self, *others: Account) -> None:
        self.clock.watch(self.client.busy, lambda own: [*own, *others])

    def ask(self) -> list[Ticket]:
        """For a completion from each server, which all have begun when this returns."""
        tickets = [self.client.submit([[1]], SAMPLING) for _ in self.servers]
        for server in self.servers:
            assert server.came.acquire(timeout=LONG_S)
        return tickets

    def collect(self, tickets: list[Ticket], *seconds: float) -> None:
        """Each server takes so long from now on, the later ones longer."""
        before = (0.0, *seconds)
        for server, ticket, whole, shorter in zip(self.servers, tickets, seconds, before, strict=False):
            self.times.passes(whole - shorter)
            server.answer()
            self.client.collect(ticket)

    def phase(self, name: str, seconds: float) -> None:
        with self.clock.phase(name):
            self.times.passes(seconds)

    def idle(self) -> dict[str, float]:
        read = self.clock.read(steps=1)
        return {name: value for name, value in read.items() if name.startswith("idle/")}


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    with ExitStack() as stack:

        def make(count: int = 1) -> Run:
            times, servers = Times(), [Server() for _ in range(count)]
            monkeypatch.setattr(time, "perf_counter", lambda: times.now)
            held = [lambda handler, request, server=server: server.complete(handler, request) for server in servers]
            urls = [stack.enter_context(serving(_complete=each))[0] for each in held]
            client = PolicyClient(urls, None, generation_timeout_s=LONG_S, control_timeout_s=LONG_S)
            return Run(servers, stack.enter_context(client), times)

        yield make


def shares(server: float, trainer: float) -> Any:
    return pytest.approx({"idle/server": server, "idle/trainer": trainer})


def test_what_servers_do_while_processes_wait_for_each_other_is_of_the_next_step(run_with: Callable[..., Run]) -> None:
    """The others are 2 s late with what they know, in the trainer's 8 s beside a server that is never idle."""
    run = run_with()

    def late(own: list[Account]) -> list[Account]:
        run.times.passes(2)
        return own

    run.clock.watch(run.client.busy, late)
    tickets = run.ask()
    run.times.passes(8)
    assert run.idle() == shares(0, 0)
    run.times.passes(6)
    assert run.idle() == shares(0, 0)
    run.collect(tickets, 0)


def test_turn_by_turn_one_of_the_two_is_idle(run_with: Callable[..., Run]) -> None:
    """The server also while a version is published and probed, which is no generating, and then the trainer is not."""
    run = run_with()
    for generating in (10, 5):
        run.phase("publish", 2)
        with run.clock.phase("probe"):
            run.client.prompt_logprobs([[1, 2]], timeout_s=LONG_S)
            run.times.passes(1)
        with run.clock.phase("generate"):
            run.collect(run.ask(), generating)
        run.phase("grade", 3)
        run.times.passes(4)
        whole = generating + 10
        assert run.idle() == shares(server=10 / whole, trainer=generating / whole)


def test_a_request_under_way_at_the_end_of_a_step_belongs_to_both(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.phase("publish", 1)
    asked = run.ask()
    run.times.passes(9)
    assert run.idle() == shares(server=0.1, trainer=0)
    run.phase("record", 1)
    with run.clock.phase("wait"):
        run.collect(asked, 2)
    run.phase("publish", 3)
    asked = run.ask()
    run.times.passes(14)
    assert run.idle() == shares(server=3 / 20, trainer=2 / 20)
    run.times.passes(5)  # the trainer is the slower one
    run.collect(asked, 0)
    run.times.passes(5)
    assert run.idle() == shares(server=0.5, trainer=0)
    run.times.passes(1)
    assert run.idle() == shares(server=1, trainer=0)


def test_of_several_servers_it_is_the_mean(run_with: Callable[..., Run]) -> None:
    run = run_with(2)
    with run.clock.phase("generate"):
        run.collect(run.ask(), 2, 6)
    run.times.passes(4)
    assert run.idle() == shares(server=(0.8 + 0.4) / 2, trainer=0.6)


def test_requests_at_the_same_time_count_once(run_with: Callable[..., Run]) -> None:
    run = run_with()
    with run.clock.phase("generate"):
        first = run.ask()
        run.times.passes(1)
        second = run.ask()
        run.times.passes(2)
        run.servers[0].answer(2)
        for ticket in (*first, *second):
            run.client.collect(ticket)
    run.times.passes(1)
    assert run.idle() == shares(server=0.25, trainer=0.75)


def test_a_measurement_on_the_way_is_no_part_of_it(run_with: Callable[..., Run]) -> None:
    """Neither what it asks for nor the next window, which it waits for."""
    run = run_with()
    run.times.passes(9)
    asked = run.ask()
    run.times.passes(1)
    with run.clock.stopped():
        with run.clock.phase("wait"):
            run.collect(asked, 5)
        run.times.passes(5)
        with run.clock.phase("generate"):
            run.collect(run.ask(), 5)
    run.phase("publish", 2)
    asked = run.ask()
    run.times.passes(1)
    assert run.idle() == shares(server=11 / 13, trainer=0)
    run.collect(asked, 1)


def test_what_went_before_training_is_no_part_of_it(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.collect(run.ask(), 50)
    with run.clock.stopped():
        run.times.passes(1)
    run.collect(run.ask(), 50)
    run.clock.restart()
    run.times.passes(4)
    assert run.idle() == shares(server=1, trainer=0)


def test_requests_of_other_processes_count_as_well(run_with: Callable[..., Run]) -> None:
    """Their clocks may be other ones: what counts is how long before the step's end it was."""
    run = run_with(2)
    run.watch(Account(10.0, 4.0, [[(0.0, 1.0), (9.0, 12.0)], []]), Account(9.0, 9.0, [[(3.0, 5.0)], []]))
    run.times.passes(3)
    with run.clock.phase("generate"):
        run.collect(run.ask(), 2, 4)  # 7 to 5 and 7 to 3 seconds before the end
    run.times.passes(3)
    assert run.idle() == shares(server=(0.4 + 0.6) / 2, trainer=(0.4 + 0.4 + 1) / 3)


def test_after_a_resume_the_first_step_is_not_told(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.clock.resume({"total": 3.0, "phases": {"generate": 2.0}})
    run.times.passes(1)
    assert run.idle() == {}
    run.times.passes(1)
    assert run.idle() == shares(server=1, trainer=0)


def test_without_policy_servers_nothing_is_told() -> None:
    clock = Clock()
    with clock.phase("generate"):
        pass
    assert not [name for name in clock.read(steps=1) if name.startswith("idle/")]
