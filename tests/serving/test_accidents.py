"""Fifty accidents in a row, each another one at another moment: launcher, warden and watch with stand-ins for the pair.

What a real server adds is in test_faults.py; this is about how often it goes well.
"""

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.test_run_failures import (
    STOP_S,
    Launch,
    assert_finished_after,
    kill_server,
    kill_trainer,
    launches,
    silence_server,
    start_with_server,
    stop_server,
)

__all__ = ["launches", "start_with_server"]  # fixtures
SILENCE_S = 4
REPEATS = 50


def stop_trainer_kill_server(launch: Launch) -> None:
    """Two at once: one that is stopped does not end when it is asked to."""
    launch.find("launch/grpo.py").send_signal(signal.SIGSTOP)
    kill_server(launch)


def kill_both(launch: Launch) -> None:
    kill_server(launch)
    kill_trainer(launch)


ACCIDENTS: tuple[tuple[Callable[[Launch], None], str], ...] = (
    (kill_server, "server: killed by SIGKILL"),
    (stop_server, f"server: made no token for {SILENCE_S} s: "),
    (silence_server, f"server: made no token for {SILENCE_S} s: "),
    (kill_trainer, "trainer: killed by SIGKILL"),
    (stop_trainer_kill_server, "server: killed by SIGKILL"),
    (kill_both, "killed by SIGKILL"),
)


@pytest.mark.soak
@pytest.mark.parametrize("repeat", range(REPEATS))
def test_an_accident_at_any_moment(start_with_server: Callable[..., Launch], repeat: int) -> None:
    rng = random.Random(repeat)
    accident, cause = ACCIDENTS[repeat % len(ACCIDENTS)]
    launch = start_with_server("--server_silence_timeout", str(SILENCE_S), trainer="resumes", restarts=1)
    step = rng.randint(1, 12)
    launch.until(lambda: launch.steps >= step)
    time.sleep(rng.random() * 0.1)
    began = time.monotonic()
    accident(launch)
    launch.until(lambda: launch.restarts)
    seconds = time.monotonic() - began
    (launch.folder / "silent").unlink(missing_ok=True)
    assert seconds < SILENCE_S + STOP_S
    assert cause in launch.restarts[0]["cause"]
    if launch.restarts[0]["checkpoint"] is None:  # the stand-in then trains for ever: once more, with a checkpoint
        launch.until(lambda: launch.output.count("starting the trainer") > 1)
        launch.signal(signal.SIGTERM)
        assert launch.end(STOP_S) == 143
    else:
        assert_finished_after(launch, 1)
    assert not launch.left()
    print(f"\n{repeat}: {accident.__name__} after step {step}: ended and on record after {seconds:.1f} s")
