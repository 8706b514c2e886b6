"""Which failures end a run, and how a trainer is started again."""

from pathlib import Path

import pytest

from r1zero import restarts
from r1zero.plan import Process
from r1zero.restarts import Restarts, RunFailed, last_step, memory_used, resuming, wait_until_released
from r1zero.run_folder import RunFolder, append_json_line
from r1zero.supervisor import ProcessFailed

LOG = Path("logs/trainer.log")


def failed(reason: str, *last_lines: str, name: str = "trainer", error: str = "") -> ProcessFailed:
    return ProcessFailed(name, reason, LOG, last_lines, error=error)


def killed(name: str = "server") -> ProcessFailed:
    return failed("killed by SIGKILL", name=name)


def test_an_accident_after_the_first_step_is_none_of_the_end() -> None:
    counted = Restarts(3)
    assert counted.after(killed(), 7).step == 7
    assert counted.after(killed(), 8).cause == "server: killed by SIGKILL"


def test_numbers_and_addresses_make_no_other_error() -> None:
    counted = Restarts(3)
    counted.after(failed("exited with code 1", error="OutOfMemoryError: tried 512.5 MiB at 0x7f3a on GPU 0"), 7)
    with pytest.raises(RunFailed) as over:
        counted.after(failed("exited with code 1", error="OutOfMemoryError: tried 498 MiB at 0x7e00 on GPU 1"), 7)
    assert str(over.value) == (
        "trainer: exited with code 1: OutOfMemoryError: tried 498 MiB at 0x7e00 on GPU 1 (the same error at step 7 as "
        "before), its log: logs/trainer.log"
    )
    assert [each.step for each in over.value.failures] == [7, 7]


@pytest.mark.parametrize(
    "second", [killed("trainer"), failed("killed by SIGSEGV", name="server"), failed("made no token for 30 s: why")]
)
def test_another_error_at_the_same_step_is_tried_again(second: ProcessFailed) -> None:
    counted = Restarts(3)
    counted.after(killed(), 7)
    counted.after(second, 7)


@pytest.mark.parametrize(("most", "words"), [(1, "(1 restart used up)"), (2, "(2 restarts used up)")])
def test_the_limit(most: int, words: str) -> None:
    counted = Restarts(most)
    for step in range(1, most + 1):
        counted.after(killed(), step)
    with pytest.raises(RunFailed) as over:
        counted.after(killed(), 9)
    assert words in str(over.value)


def test_before_the_first_step_nothing_is_tried_again() -> None:
    with pytest.raises(RunFailed, match="before the first step, so it is not tried again"):
        Restarts(3).after(killed(), 0)


def test_without_a_pair_a_failure_is_the_end_and_needs_no_more_words() -> None:
    with pytest.raises(RunFailed) as over:
        Restarts(0).after(killed(), 7)
    assert str(over.value) == "server: killed by SIGKILL, its log: logs/trainer.log"


@pytest.mark.parametrize("code", [2, 3])
@pytest.mark.parametrize(
    "error",
    [
        "exited with code {}",
        "accelerate: the script returned non-zero exit status {}.",
        "torch elastic: the first to fail was rank 3, exited with code {}",
    ],
)
def test_a_code_that_says_no_is_the_end_also_through_accelerate(code: int, error: str) -> None:
    said = error.format(code)
    with pytest.raises(RunFailed):
        Restarts(3).after(failed(said) if said.startswith("exited") else failed("exited with code 1", said), 7)
    other = error.format(f"{code}1")
    Restarts(3).after(failed(other) if other.startswith("exited") else failed("exited with code 1", other), 7)


def test_the_last_step_is_the_last_recorded_also_after_a_restart(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert last_step(folder) == 0
    for step in (1, 2, 3):
        append_json_line(folder.metrics, {"kind": "step", "step": step})
    append_json_line(folder.metrics, {"kind": "restart", "step": 3})
    assert last_step(folder) == 3
    append_json_line(folder.metrics, {"kind": "step", "step": 2})
    assert last_step(folder) == 2


def test_a_trainer_without_a_group_is_given_none() -> None:
    trainer = Process("trainer", ("accelerate", "grpo.py"), gpus=(0,), log="logs/trainer.log")
    assert resuming([trainer], None, (5, 6)) == (trainer,)
    assert resuming([trainer], Path("c"), (5, 6))[0].argv == ("accelerate", "grpo.py", "--resume", "c")


def test_all_trainers_of_an_attempt_meet_at_the_same_new_port() -> None:
    pair = [Process(f"trainer-{n}", ("a", "--main_process_port", "1", "--machine_rank", str(n))) for n in range(2)]
    ports = [each.argv[2] for each in resuming(pair, Path("c"), (5, 6))]
    assert ports == ["6", "6"]


def test_memory_is_waited_for_until_it_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi itself is replaced: it counts down from 20 GiB, by 8 GiB a look."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nn=$(cat "$0.n" 2>/dev/null || echo 20000)\necho $((n - 8000)) > "$0.n"\necho "$n"\n'
        'echo "$@" > "$0.argv"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(restarts, "RELEASE_LOOK_S", 0.01)
    ticks: list[int] = []
    assert wait_until_released(lambda: memory_used("0,1"), (4100,), lambda: ticks.append(1))
    assert len(ticks) == 2
    assert (tmp_path / "nvidia-smi.argv").read_text().startswith("-i 0,1 --query-gpu=memory.used")
    (tmp_path / "nvidia-smi.n").write_text("90000")
    monkeypatch.setattr(restarts, "RELEASE_DEADLINE_S", 0.0)
    assert not wait_until_released(lambda: memory_used("0"), (4100,), lambda: None)


def test_without_nvidia_smi_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory_used("0") == ()
    assert wait_until_released(lambda: memory_used("0"), (), lambda: None)
