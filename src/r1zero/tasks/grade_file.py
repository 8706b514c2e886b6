"""Grade a file of completions, to check a verdict by eye or to compare verifiers; behind ``r1zero.tasks.verifier``."""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from r1zero.reporting.progress import duration
from r1zero.tasks.answers import ANSWER_CHOICES
from r1zero.tasks.verifier import ANSWER_MATCHES, Verdict, Verifier

TASKS = {"math": "boxed", "gsm8k": "tagged"}  # task: where its answer stands
LINES_AT_A_TIME = 512
SECONDS_BETWEEN_REPORTS = 5.0
SHOWN = 10


class BadLine(Exception):
    """A line that cannot be graded; the message names it."""


def main(words: list[str] | None = None) -> int:
    """Run the command line: 0 when every line was graded, 2 when a line or a file is not what it must be."""
    arguments = _parser().parse_args(words)
    try:
        rows = _read(arguments.input)
        aside = arguments.output.with_name(f".{arguments.output.name}.part")
        aside.touch()
    except (BadLine, OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    began = time.monotonic()
    verdicts: Counter[Verdict] = Counter()
    choices = {"answer_choice": arguments.answer_choice, "answer_match": arguments.answer_match}
    verifiers = {
        task: Verifier(answer_format=place, numbers=task == "gsm8k", **choices) for task, place in TASKS.items()
    }
    try:
        _warn_of_golds(rows, verifiers)
        with aside.open("w", encoding="utf-8") as file:
            reported = time.monotonic()
            for at in range(0, len(rows), LINES_AT_A_TIME):
                for row in _graded(rows[at : at + LINES_AT_A_TIME], verifiers):
                    verdicts[Verdict(row["verdict"])] += 1
                    file.write(json.dumps(row) + "\n")
                if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
                    reported, done = time.monotonic(), min(len(rows), at + LINES_AT_A_TIME)
                    left = (reported - began) / done * (len(rows) - done)
                    sys.stderr.write(f"{done} of {len(rows)} lines graded, {duration(left)} left\n")
        aside.replace(arguments.output)
    finally:
        aside.unlink(missing_ok=True)
        for verifier in verifiers.values():
            verifier.close()
    counts = ", ".join(f"{verdicts[verdict]} {verdict.value.replace('_', ' ')}" for verdict in Verdict)
    sys.stderr.write(f"{len(rows)} lines in {duration(time.monotonic() - began)}: {counts}; see {arguments.output}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1zero.tasks.verifier",
        description="Grade lines of JSON with the keys gold, completion and optionally task (math, the default: the "
        "completion's \\boxed{}; gsm8k: its <answer>). Adds answer, verdict and seconds; other keys are kept.",
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="written whole at the end")
    parser.add_argument(
        "--answer_choice",
        choices=ANSWER_CHOICES,
        default="agreed",
        help="of several answers; agreed (the default): contradicting ones are no answer",
    )
    parser.add_argument(
        "--answer_match",
        choices=ANSWER_MATCHES,
        default="math",
        help="math (the default): equal as mathematics; exact: equal as text once commas are removed, R1RL's rule",
    )
    return parser


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Lines end at \n alone: a completion may hold any other separator.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadLine(f"{where}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadLine(f"{where}: is {type(row).__name__}, not an object with gold and completion")
        for key in ("gold", "completion"):
            if isinstance(row.get(key), int | float) and not isinstance(row[key], bool):
                row[key] = str(row[key])
            if not isinstance(row.get(key), str):
                raise BadLine(f"{where}: needs the key {key!r} with a text, has {row.get(key)!r}")
        if row.get("task", "math") not in TASKS:
            raise BadLine(f"{where}: task {row['task']!r} is not one of {', '.join(TASKS)}")
        rows.append(row)
    return rows


def _graded(rows: list[dict[str, Any]], verifiers: dict[str, Verifier]) -> list[dict[str, Any]]:
    graded: dict[int, dict[str, Any]] = {}
    for task, verifier in verifiers.items():
        own = [index for index, row in enumerate(rows) if row.get("task", "math") == task]
        results = verifier.grade([rows[i]["completion"] for i in own], [rows[i]["gold"] for i in own])
        for index, result in zip(own, results, strict=True):
            added = {"answer": result.answer, "verdict": result.verdict.value, "seconds": round(result.seconds, 6)}
            graded[index] = {**rows[index], **added}
    return [graded[index] for index in range(len(rows))]


def _warn_of_golds(rows: list[dict[str, Any]], verifiers: dict[str, Verifier]) -> None:
    golds = list(dict.fromkeys(row["gold"] for row in rows))
    bad = [(gold, why) for gold, why in zip(golds, verifiers["math"].check_golds(golds), strict=True) if why]
    if bad:
        sys.stderr.write(f"{len(bad)} of {len(golds)} golds cannot be read; only the same text is right:\n")
        for gold, why in bad[:SHOWN]:
            sys.stderr.write(f"  {gold!r}: {why}\n")
