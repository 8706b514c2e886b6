"""The folder of one evaluation: every completion, what was asked and how, and the scores that follow from it.

``result.json`` holds all but the completions; those are in ``completions/``, one file for each model and benchmark. The
scores can be made again from the two, without a model.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.evaluation import grading
from r1zero.evaluation.grading import Row
from r1zero.evaluation.protocol import Protocol, verifier_version
from r1zero.run_folder import read_json, write_json, write_parquet, write_text

FORMAT = 1  # of result.json; raise when a key changes its meaning
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # of the question, in the order in which they were asked
        ("sample", pa.int64()),
        ("question", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("gold", pa.string()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("length", pa.int64()),
        ("clipped", pa.bool_()),
        ("source", pa.string()),
    ]
)


class ResultError(Exception):
    """A folder that holds no result, or not all of it; the message says what is missing."""


@dataclass(frozen=True)
class ResultFolder:
    """An evaluation on disk.

    >>> ResultFolder(Path("evaluations/mine")).result.name
    'result.json'
    """

    path: Path

    @property
    def result(self) -> Path:
        """What was asked, how, and the scores."""
        return self.path / "result.json"

    @property
    def table(self) -> Path:
        """The same as a Markdown table."""
        return self.path / "table.md"

    def completions(self, model: str, benchmark: str) -> Path:
        """Parquet of every completion of one model on one benchmark."""
        return self.path / "completions" / f"{re.sub(r'[^A-Za-z0-9_.@-]+', '_', model)}-{benchmark}.parquet"

    def write_completions(self, model: str, benchmark: str, rows: Sequence[Row]) -> dict[str, Any]:
        """Write them whole or not at all; returns what `result.json` says of the file."""
        path = self.completions(model, benchmark)
        write_parquet(path, rows, SCHEMA)
        return {"file": str(path.relative_to(self.path)), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def read(self) -> dict[str, Any]:
        """What `result.json` holds.

        Raises:
            ResultError: there is none, or one of another form.
        """
        result = read_json(self.result)
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            found = "none" if result is None else "one of another form"
            raise ResultError(f"{self.path}: no result.json of form {FORMAT} in it ({found})")
        return result

    def read_completions(self, evaluation: Mapping[str, Any]) -> list[Row]:
        """The completions of one entry of ``evaluations``.

        Raises:
            ResultError: the file is missing, or is not the one that was written.
        """
        path, said = self.path / evaluation["completions"]["file"], evaluation["completions"]["sha256"]
        if not path.is_file():
            raise ResultError(f"{path}: is missing, without it nothing can be graded again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != said:
            raise ResultError(f"{path}: is not the file that was written: its hash differs from result.json's")
        return list(pq.read_table(path).to_pylist())

    def write(self, result: Mapping[str, Any], markdown: str) -> None:
        """`result.json` last: where it is, all else is."""
        write_text(self.table, markdown)
        write_json(self.result, result)


def scored(
    model: Mapping[str, Any],
    benchmark: Mapping[str, Any],
    protocol: Mapping[str, Any],
    rows: Sequence[Row],
    folder: ResultFolder | None,
) -> tuple[dict[str, Any], list[Row]]:
    """Grade the completions of one model on one benchmark: the entry of ``evaluations``, and the graded rows.

    Args:
        model: as in ``models``.
        benchmark: as in ``benchmarks``.
        protocol: as `Protocol.written` says it.
        rows: the completions.
        folder: where the graded ones are written; None: nowhere.
    """
    graded = grading.grade(rows, Protocol.read(protocol), bool(benchmark["numbers"]))
    entry: dict[str, Any] = {"model": model["label"], "benchmark": benchmark["name"], "protocol": dict(protocol)}
    entry["scores"] = grading.score(graded)
    if folder is not None:
        entry["completions"] = folder.write_completions(model["label"], benchmark["name"], graded)
    return entry, graded


def differences(evaluations: Sequence[Mapping[str, Any]], rows: Mapping[tuple[str, str], list[Row]]) -> list[Any]:
    """Of every further model to the first one, on each benchmark that both were asked."""
    if not evaluations:
        return []
    first = evaluations[0]["model"]
    return [
        {
            "model": each["model"],
            "less": first,
            "benchmark": each["benchmark"],
            **grading.difference(rows[first, each["benchmark"]], rows[each["model"], each["benchmark"]]),
        }
        for each in evaluations
        if each["model"] != first and (first, each["benchmark"]) in rows
    ]


def rescore(folder: ResultFolder, into: ResultFolder | None, say: Callable[[str], None]) -> tuple[dict[str, Any], int]:
    """Grade the stored completions again by the stored protocols.

    Args:
        folder: of the evaluation.
        into: where the new result is written; None: nowhere.
        say: gets a line for each verdict or score that came out otherwise.

    Returns:
        The new result, and how many verdicts and scores differ from the stored ones.
    """
    stored = folder.read()
    models = {each["label"]: each for each in stored["models"]}
    benchmarks = {each["name"]: each for each in stored["benchmarks"]}
    evaluations, rows, changed = [], {}, 0
    for each in stored["evaluations"]:
        before = folder.read_completions(each)
        entry, after = scored(models[each["model"]], benchmarks[each["benchmark"]], each["protocol"], before, into)
        for old, new in zip(before, after, strict=True):
            if (old["answer"], old["verdict"]) != (new["answer"], new["verdict"]):
                changed += 1
                where = f"{each['model']} on {each['benchmark']}, question {old['index']}, sample {old['sample']}"
                say(f"{where}: {old['answer']!r} was {old['verdict']}, is {new['verdict']} as {new['answer']!r}")
        if entry["scores"] != each["scores"]:
            changed += 1
            say(f"{each['model']} on {each['benchmark']}: scores {each['scores']} are now {entry['scores']}")
        entry.setdefault("completions", each["completions"])
        evaluations.append(entry)
        rows[each["model"], each["benchmark"]] = after
    result = {
        **stored,
        "verifier": verifier_version(),
        "evaluations": evaluations,
        "differences": differences(evaluations, rows),
    }
    if result["differences"] != stored["differences"]:
        changed += 1
        say("the paired differences are others")
    return result, changed
