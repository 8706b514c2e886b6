"""python -m r1zero.tasks.verifier IN.jsonl OUT.jsonl, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1zero.tasks import grade_file


def grade(folder: Path, lines: list[Any], *flags: str) -> tuple[int, list[dict[str, Any]], Path]:
    """Exit code, lines written, and the output file."""
    given, written = folder / "in.jsonl", folder / "out.jsonl"
    given.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    code = grade_file.main([str(given), str(written), *flags])
    rows = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    return code, rows, written


def test_as_a_command(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"gold": "x+1", "completion": "\\\\boxed{\\\\frac{x^2-1}{x-1}}", "id": 7}\n')
    command = [sys.executable, "-m", "r1zero.tasks.verifier", "in.jsonl", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row.pop("seconds") > 0
    assert row == {
        "gold": "x+1",
        "completion": "\\boxed{\\frac{x^2-1}{x-1}}",
        "id": 7,
        "answer": "\\frac{x^2-1}{x-1}",
        "verdict": "correct",
    }
    assert "1 correct, 0 wrong, 0 unparsed, 0 timed out; see out.jsonl" in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_each_line_by_its_own_task_in_its_own_order(tmp_path: Path) -> None:
    lines = [
        {"gold": "42", "completion": "<answer>42</answer>", "task": "gsm8k"},
        {"gold": "42", "completion": r"\boxed{43}"},
        {"gold": "42", "completion": r"\boxed{42}", "task": "gsm8k"},
        "",
        {"gold": 42, "completion": "\\boxed{42}\u2028", "task": "math"},
        {"gold": "42", "completion": r"\boxed{41} \boxed{42}"},
    ]
    code, rows, _ = grade(tmp_path, lines)
    assert code == 0
    assert [(row["answer"], row["verdict"]) for row in rows] == [
        ("42", "correct"),
        ("43", "wrong"),
        (None, "unparsed"),
        ("42", "correct"),
        (None, "unparsed"),
    ]


def test_the_rules_can_be_chosen(tmp_path: Path) -> None:
    lines = [{"gold": "42", "completion": r"\boxed{42.0} \boxed{41}"}]
    assert grade(tmp_path, lines, "--answer_choice", "first")[1][0]["verdict"] == "correct"
    assert grade(tmp_path, lines, "--answer_choice", "last")[1][0]["verdict"] == "wrong"
    assert grade(tmp_path, lines, "--answer_choice", "first", "--answer_match", "exact")[1][0]["verdict"] == "wrong"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: is not JSON"),
        ("[1]", "line 2: is list, not an object with gold and completion"),
        ('{"gold": "42"}', "line 2: needs the key 'completion' with a text, has None"),
        ('{"gold": null, "completion": ""}', "line 2: needs the key 'gold' with a text, has None"),
        ('{"gold": true, "completion": ""}', "line 2: needs the key 'gold' with a text, has True"),
        ('{"gold": "", "completion": "", "task": "code"}', "line 2: task 'code' is not one of math, gsm8k"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_graded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "out.jsonl").write_text('{"kept": "from before"}\n')
    code, rows, written = grade(tmp_path, [{"gold": "1", "completion": ""}, line])
    assert code == 2
    assert message in capsys.readouterr().err
    assert rows == [{"kept": "from before"}]
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl", written] or len(list(tmp_path.iterdir())) == 2


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grade_file.main([str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_golds_that_cannot_be_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = grade(tmp_path, [{"gold": "see below", "completion": ""}, {"gold": r"\frac{1}{", "completion": ""}])
    assert code == 0
    assert [row["verdict"] for row in rows] == ["unparsed", "unparsed"]
    said = capsys.readouterr().err
    assert "1 of 2 golds cannot be read; only the same text is right:" in said
    assert repr(r"\frac{1}{") in said
