"""Both sources of completions behind the one interface of the trainer."""

from typing import Any

import pytest

from r1zero.policy_client import PolicyClient, Rollout, TicketCancelled, WrongPolicyVersion
from r1zero.training.rollouts import InProcessRollouts, Rollouts, ServerRollouts
from tests.stand_in_server import Handler, serving

SAMPLING = {"max_tokens": 4, "temperature": 1.0}
# As TRL gives them: two groups of three, then the rest of a group whose beginning another process has.
PROMPTS = [[1], [1], [1], [2, 2], [2, 2], [2, 2], [3]]


def echo(self: Handler, request: dict[str, Any]) -> None:
    """Each completion tells its prompt's first token and its own number."""
    choices = []
    for number in range(request["n"]):
        ids = [request["prompt"][0], number]
        logprobs = {"tokens": [f"token_id:{each}" for each in ids], "token_logprobs": [-0.1, -0.2]}
        choices.append({"index": number, "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"})
    self._answer(200, {"model": request.get("model") or "base", "choices": choices[::-1]})


def asked(handler: type[Handler]) -> list[tuple[list[int], int]]:
    return sorted((body["prompt"], body["n"]) for _, _, body in handler.seen)


def test_groups_are_asked_for_at_once_and_come_back_in_order() -> None:
    with serving(_complete=echo, version="7") as (url, handler):
        with PolicyClient([url], None, generation_timeout_s=30) as client:
            source: Rollouts = ServerRollouts(client, lambda: (7, None))
            rollouts = source.collect(source.submit(PROMPTS, 3, SAMPLING))
        assert [list(rollout.prompt_ids) for rollout in rollouts] == PROMPTS
        assert [rollout.completion_ids for rollout in rollouts] == [
            *[(1, 0), (1, 1), (1, 2)],
            *[(2, 0), (2, 1), (2, 2)],
            (3, 0),
        ]
        assert {rollout.policy_version for rollout in rollouts} == {7}
        assert asked(handler) == [([1], 3), ([2, 2], 3), ([3], 1)]


def test_two_groups_of_one_prompt_stay_two_requests() -> None:
    with serving(_complete=echo, version="7") as (url, handler):
        with PolicyClient([url], None, generation_timeout_s=30) as client:
            source = ServerRollouts(client, lambda: (7, None))
            assert len(source.collect(source.submit([[1]] * 4, 2, SAMPLING))) == 4
        assert asked(handler) == [([1], 2), ([1], 2)]


def test_the_policy_is_that_of_the_moment_of_submitting() -> None:
    versions = iter([(4, "policy-4"), (5, "policy-5")])
    with serving(_complete=echo) as (url, _), PolicyClient([url], None, generation_timeout_s=30) as client:
        source = ServerRollouts(client, lambda: next(versions))
        first, second = source.submit([[1]], 1, SAMPLING), source.submit([[1]], 1, SAMPLING)
        assert [source.collect(ticket)[0].policy_version for ticket in (second, first)] == [5, 4]


def test_each_completion_has_a_seed_by_its_place_however_the_places_are_shared() -> None:
    """vLLM gives the completions of one request the seeds from that of the request on."""

    def seeds_of(*shares: tuple[list[list[int]], int]) -> list[tuple[int, int]]:
        with serving(_complete=echo, version="7") as (url, handler):
            with PolicyClient([url], None, generation_timeout_s=30) as client:
                source = ServerRollouts(client, lambda: (7, None))
                for prompts, seed in shares:
                    source.collect(source.submit(prompts, 3, SAMPLING, seed))
            bodies = [body for _, _, body in handler.seen]
        return sorted((body["prompt"][0], body["seed"] + number) for body in bodies for number in range(body["n"]))

    alone = seeds_of((PROMPTS, 100))
    assert alone == [*((1, 100 + place) for place in range(3)), *((2, 103 + place) for place in range(3)), (3, 106)]
    assert seeds_of((PROMPTS[:4], 100), (PROMPTS[4:], 104)) == alone


def test_without_seeds_none_is_asked_for() -> None:
    with serving(_complete=echo, version="7") as (url, handler):
        with PolicyClient([url], None, generation_timeout_s=30) as client:
            source = ServerRollouts(client, lambda: (7, None))
            source.collect(source.submit(PROMPTS, 3, SAMPLING))
        assert all("seed" not in body for _, _, body in handler.seen)


def test_a_round_can_be_waited_for_in_pieces_and_given_up() -> None:
    with serving(mode="hang-after-health") as (url, _), PolicyClient([url], None, generation_timeout_s=30) as client:
        source = ServerRollouts(client, lambda: (7, None))
        ticket = source.submit([[1]], 1, SAMPLING)
        assert not source.wait(ticket, 0.05)
        source.cancel(ticket)
        assert source.wait(ticket, 10)
        with pytest.raises(TicketCancelled):
            source.collect(ticket)
    with serving(_complete=echo, version="6") as (url, _), PolicyClient([url], None, generation_timeout_s=30) as client:
        source = ServerRollouts(client, lambda: (7, None))
        ticket = source.submit([[1]], 1, SAMPLING)
        assert source.wait(ticket, 10)  # over, but not well
        with pytest.raises(WrongPolicyVersion):
            source.collect(ticket)


def test_a_stale_server_is_an_error() -> None:
    with serving(_complete=echo, version="6") as (url, _), PolicyClient([url], None, generation_timeout_s=30) as client:
        source = ServerRollouts(client, lambda: (7, None))
        with pytest.raises(WrongPolicyVersion, match=r"expected policy version 7, .* policy version 6"):
            source.collect(source.submit([[1]], 1, SAMPLING))


def test_nothing_is_generated_before_the_first_publish() -> None:
    with serving(_complete=echo) as (url, handler):
        with PolicyClient([url], None, generation_timeout_s=30) as client:
            source = ServerRollouts(client, lambda: (None, None))
            with pytest.raises(RuntimeError, match="no policy version was published"):
                source.submit([[1]], 1, SAMPLING)
        assert handler.seen == []


def test_in_process_generation_waits_until_it_is_collected() -> None:
    calls: list[tuple[list[list[int]], int]] = []
    version = [3]

    def generate(prompts: list[list[int]], num_generations: int) -> tuple[list[list[int]], list[list[float]]]:
        calls.append((prompts, num_generations))
        return [[10, 11, 12, 13], [10, 11, 12, 0], [10, 0]], [[-1.0] * 4, [-2.0] * 4, [-3.0] * 2]

    source: Rollouts = InProcessRollouts(generate, lambda: version[0], end_token_ids=[0])
    ticket = source.submit([(1,), (1,), (2,)], 2, SAMPLING)
    assert calls == []
    version[0] = 4
    assert source.collect(ticket) == [
        Rollout((1,), (10, 11, 12, 13), (-1.0,) * 4, 4, True, ""),
        Rollout((1,), (10, 11, 12, 0), (-2.0,) * 4, 4, False, ""),
        Rollout((2,), (10, 0), (-3.0,) * 2, 4, False, ""),
    ]
    assert calls == [([[1], [1], [2]], 2)]


def test_in_process_generation_without_logprobs() -> None:
    source = InProcessRollouts(lambda prompts, num_generations: ([[5] for _ in prompts], None), lambda: 0)
    assert source.collect(source.submit([[1]], 1, {}))[0] == Rollout((1,), (5,), None, 0, False, "")


def test_in_process_generation_that_loses_one() -> None:
    source = InProcessRollouts(lambda prompts, num_generations: ([[5]], None), lambda: 0)
    with pytest.raises(ValueError, match="zip"):
        source.collect(source.submit([[1], [1]], 2, {}))
