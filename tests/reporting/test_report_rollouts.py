"""What of a run's completions gets into a page: which ones, with what marked, and which phrases are counted."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.reporting import rollout_reader
from r1zero.reporting.rollout_reader import columns, marks, read, reasoning
from r1zero.reporting.run_reader import read_run
from r1zero.tasks.answers import after_reasoning
from tests.reporting import simulated_run

PIECES = st.sampled_from(["<think>", "</think>", "<reasoning>", "</reasoning>", "a", " 1 + 1 ", "\\boxed{2}", "<thin"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_what_is_marked_as_reasoning_is_what_the_verifier_leaves_out(completion: str) -> None:
    kept, at = [], 0
    for start, end in reasoning(completion):
        kept.append(completion[at:start])
        at = end
    assert "".join([*kept, completion[at:]]) == after_reasoning(completion)


@pytest.mark.parametrize(
    ("completion", "answer", "choice", "marked"),
    [
        ("<answer> 4 </answer> <answer>4</answer>", "4", "first", ["<answer> 4 </answer>"]),
        ("<answer> 4 </answer> <answer>4</answer>", "4", "last", ["<answer>4</answer>"]),
        ("\\boxed{4} or \\boxed{4}, not \\boxed{5}", "4", "agreed", ["\\boxed{4}", "\\boxed{4}"]),
        ("\\boxed{\\boxed{4}}", "4", "agreed", ["\\boxed{\\boxed{4}}"]),
        ("<think>\\boxed{4}</think> \\boxed{4", "4", "agreed", []),
        ("1 + 3</reasoning>\n<answer>4</answer> and so on", "4", "first", ["<answer>4</answer>"]),
        ("\\boxed{4}", None, "agreed", []),
    ],
)
def test_the_answer_that_was_read_is_marked(
    completion: str, answer: str | None, choice: str, marked: list[str]
) -> None:
    found = [mark for mark in marks(completion, answer, choice) if mark.kind == "answer"]
    assert [completion[mark.start : mark.end] for mark in found] == marked


def test_marks_count_as_javascript_does() -> None:
    row = {"completion": "\U0001f9ee \\boxed{4}", "answer": "4", "prompt": "p"}
    assert columns([row], "agreed")["rows"]["marks"] == [[[3, 12, "answer"]]]  # an abacus is two units there


def test_a_small_run_is_shown_whole(tmp_path: Path) -> None:
    reading = read(read_run(simulated_run.write(tmp_path / "run", steps=3, evaluate_each=3).path))
    assert len(reading.rows) == reading.total == 3 * 16 + 64
    assert reading.said == "All 112 completions of 4 files are in this page."
    assert {(row["split"], row["step"]) for row in reading.rows} == {
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("test", 3),
    }


def test_of_a_large_run_the_newest_is_fuller_and_older_ones_show_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_reader, "MOST_ROWS", 200)
    folder = simulated_run.write(tmp_path / "run", steps=12, completions=64, evaluate_each=4)
    reading = read(read_run(folder.path))
    again = read(read_run(folder.path))
    assert reading.rows == again.rows
    shown = {
        key: [row for row in reading.rows if (row["split"], row["step"]) == key]
        for key in {(row["split"], row["step"]) for row in reading.rows}
    }
    assert len(shown["train", 12]) == len(shown["test", 12]) == 40
    assert len({key for key in shown if key[0] == "train"}) == 12
    assert all(len(rows) == 9 for key, rows in shown.items() if key[1] != 12)
    questions = [{row["prompt"] for row in shown["test", step]} for step in (4, 8)]
    assert questions[0] == questions[1]
    assert len(reading.rows) < reading.total == 12 * 64 + 3 * 256
    assert f"{len(reading.rows)} of 1,536 completions are in this page, from 15 of 15 files" in reading.said


def test_text_is_bounded_and_steps_are_left_out_before_all_have_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_reader, "TEXT_BYTES", 60_000)
    reading = read(read_run(simulated_run.write(tmp_path / "run", steps=30, completions=32).path))
    assert 30_000 < sum(len(row["completion"]) for row in reading.rows) < 62_000
    older = [row["step"] for row in reading.rows if row["step"] < 30]
    assert 2 <= len(set(older)) < 15
    assert min(older.count(step) for step in set(older)) > rollout_reader.LEAST_OF_A_FILE // 2


def test_phrases_are_counted_over_all_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_reader, "MOST_ROWS", 4)
    folder = simulated_run.write(tmp_path / "run", steps=1, completions=2)
    texts = [
        "Wait, wait. I re-check: double-checked.",
        "waiters verified it",
        "no mistake",
        "TRY AGAIN",
        "checkers",
        "é",
    ]
    simulated_run.write_rollouts(folder.rollouts(2), 2, {"completion": texts})
    counted = read(read_run(folder.path)).counted[1]
    count = {name: round(share * len(texts)) for name, share in counted.shares.items()}
    assert count == {"wait": 1, "check": 1, "verify": 1, "mistake": 1, "wrong": 0, "retry": 1, "rethink": 0}
    assert counted.examples["verify"] == ("waiters verified it", "wrong")


def test_text_that_was_counted_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_reader, "MOST_ROWS", 16)
    monkeypatch.setattr(rollout_reader, "LEAST_OF_A_FILE", 8)
    folder = simulated_run.write(tmp_path / "run", steps=9)
    first = read(read_run(folder.path))
    seen: list[str] = []
    table_of = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **more: seen.append(path.name) or table_of(path, **more))
    again = read(read_run(folder.path))
    assert again.counted == first.counted
    assert len(seen) == again.shown_files < 9
    simulated_run.write_rollouts(folder.rollouts(2), 2, {"completion": ["wait"]})  # done again after a resume
    assert read(read_run(folder.path)).counted[1].shares["wait"] == 1.0


def test_a_file_that_is_no_parquet_is_named_and_left_out(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=2)
    folder.rollouts(1).write_bytes(b"PAR1")
    (folder.path / "rollouts" / ".train-000003.parquet").write_bytes(b"being written")
    reading = read(read_run(folder.path))
    assert reading.unreadable == ("train-000001.parquet",)
    assert {row["step"] for row in reading.rows} == {2}


def test_files_of_before_a_column_was_added(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=1)
    table = pq.read_table(folder.rollouts(1)).drop_columns(["source", "policy_version", "rewards"])
    pq.write_table(table, folder.rollouts(1))
    found = columns(read(read_run(folder.path)).rows, "agreed")
    assert found["tables"]["source"] == [None]
    assert found["rows"]["rewards"][0] == []
