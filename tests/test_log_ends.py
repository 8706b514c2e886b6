"""The cause that the end of a log tells, from logs as accelerate, torch elastic and vLLM have written them."""

from pathlib import Path

import pytest

from r1zero import checkpoints
from r1zero.log_ends import LogEnd, ended, read

LAUNCH = """Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/x/site-packages/accelerate/commands/launch.py", line 1423, in <module>
    main()
"""
LOST = "RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:13445"
TABLE = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launch/grpo.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_18:52:01
  rank      : {other} (local_rank: {other})
  exitcode  : -15 (pid: 12009)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_18:52:01
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 12010)
  error_file: <N/A>
============================================================
"""


def raised(rank: int, error: str) -> str:
    lines = ["Traceback (most recent call last):", '  File "launch/grpo.py", line 9, in <module>', error]
    return "".join(f"[rank{rank}]: {line}\n" for line in lines)


def table(rank: int, code: int) -> str:
    return LAUNCH + TABLE.format(rank=rank, other=1 - rank, code=code)


def end_of(tmp_path: Path, text: str) -> LogEnd:
    (tmp_path / "log").write_text(f"of an earlier start\n{text}")
    return read(tmp_path / "log", len("of an earlier start\n"))


@pytest.mark.parametrize("seen_first", [0, 1])
@pytest.mark.parametrize("printed_first", [0, 1])
def test_of_two_ranks_the_one_that_did_not_lose_its_peer_is_the_cause(
    tmp_path: Path, seen_first: int, printed_first: int
) -> None:
    """Whichever of them torch elastic saw first, and whichever printed first."""
    said = [raised(1, "ValueError: its reward"), raised(0, LOST)]
    end = end_of(tmp_path, "step 1\n" + "".join(said if printed_first else said[::-1]) + table(seen_first, 1))
    assert end.error == "ValueError: its reward"
    assert not end.follows
    assert end.lines[-2:] == (
        "[rank1]: ValueError: its reward",
        "torch elastic: the first to fail was rank 1, exited with code 1",
    )
    assert end.lines[0] == "step 1"
    assert not any("ChildFailedError" in line or "launch.py" in line for line in end.lines)


def test_where_all_lost_their_peers_the_log_says_so(tmp_path: Path) -> None:
    end = end_of(tmp_path, raised(0, LOST) + table(0, 1))
    assert end.error == LOST and end.follows


def test_a_rank_that_was_killed_is_the_cause_whatever_the_others_say(tmp_path: Path) -> None:
    end = end_of(tmp_path, raised(0, LOST) + table(1, -9))
    assert end.error == "torch elastic: the first to fail was rank 1, killed by SIGKILL"
    assert not end.follows


def test_a_rank_that_refused_is_the_cause_with_what_it_said(tmp_path: Path) -> None:
    end = end_of(tmp_path, "error: the server has another policy\n" + raised(0, LOST) + table(1, 3))
    assert end.error == "the server has another policy"
    assert end.lines[-1] == "torch elastic: the first to fail was rank 1, exited with code 3"


@pytest.mark.parametrize("seen_first", [0, 1])
@pytest.mark.parametrize("printed_first", [0, 1])
def test_of_two_ranks_that_refused_the_one_that_knows_why_is_the_cause(
    tmp_path: Path, seen_first: int, printed_first: int
) -> None:
    given_up = str(checkpoints.given_up(Path("checkpoints/checkpoint-2")))
    said = ["error: no room for checkpoint-2 in checkpoints\n", f"error: {given_up}\n"]
    end = end_of(tmp_path, "".join(said if printed_first else said[::-1]) + table(seen_first, 3))
    assert end.error == "no room for checkpoint-2 in checkpoints" and not end.follows
    alone = end_of(tmp_path, said[1] + table(seen_first, 3))
    assert alone.error == given_up and alone.follows


def test_of_one_process_accelerates_own_traceback_goes(tmp_path: Path) -> None:
    called = "subprocess.CalledProcessError: Command '['python', 'grpo.py']' returned non-zero exit status 3.\n"
    end = end_of(tmp_path, f"error: refused\n{LAUNCH}{called}")
    assert end == LogEnd(("error: refused", "accelerate: the script returned non-zero exit status 3."), "refused")


def test_a_log_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "absent", 0) == LogEnd()


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exited with code 0"), (-15, "killed by SIGTERM"), (-40, "killed by signal 40")]
)
def test_ended(code: int, words: str) -> None:
    assert ended(code) == words
