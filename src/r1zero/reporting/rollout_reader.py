"""What a page shows of a run's completions: a sample of the texts, and phrases counted over all of them. No torch.

A run of 500 steps of 512 completions holds some 400 MB of text, and a page has to open from a laptop. So the newest
step is shown in full where it fits, older ones by a sample, and nothing of it is left to chance: questions are taken in
the order of the hash of their prompt, the same ones from each step, as the same question across steps says more than
another one at each. Files are read one at a time, which bounds the memory.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1zero.reporting.run_reader import RolloutFile, Run
from r1zero.run_folder import read_json, write_json
from r1zero.tasks import boxes

TEXT_BYTES = 7 * 2**20  # of completions and prompts in one page: under 10 MB of base64 where nothing can be compressed
MOST_ROWS = 12_000  # completions in one page
NEWEST_SHARE = 0.2  # of both, for the newest step, and again for the newest evaluation
OF_A_QUESTION = 4  # completions, before the next question is taken: enough to see right and wrong side by side
LEAST_OF_A_FILE = 8  # completions; where there is room for fewer, fewer steps are shown
COLUMNS = (
    *("step", "prompt", "completion", "gold", "answer", "verdict", "reward", "rewards"),
    *("length", "clipped", "policy_version", "source"),
)

# Words with which a model looks back at what it wrote. DeepSeek-R1 (Guo et al. 2025, Nature 645, Extended Data Fig. 1)
# counted wait, mistake, however, but, retry, error, verify, wrong, evaluate and check over the course of training; left
# out are those that mostly mean something else in a solution ("evaluate the expression", "but", "however", "error").
# "rethink" gathers keywords such as those of Liu et al. 2025 (arXiv:2503.20783). RE2 syntax, any case.
PHRASES = {
    "wait": r"\bwait\b",
    "check": r"\b(?:re-?|double[- ]?)?check(?:s|ed|ing)?\b",
    "verify": r"\b(?:verif(?:y|ies|ied|ying)|verification)\b",
    "mistake": r"\bmistakes?\b",
    "wrong": r"\bwrong\b",
    "retry": r"\b(?:retry|try again)\b",
    "rethink": r"\b(?:re-?(?:think|consider|evaluate|examine|assess|analyze)(?:ed|d|s|ing)?|think again)\b",
}
_EXAMPLE_SIDE = 90  # characters to each side of the phrase
_CACHE = ".report-cache.json"
_SECTION = re.compile(r"<(/?)(?:think|reasoning)>")  # as tasks.answers reads it; a test holds the two together
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Mark:
    """A part of a completion that stands out.

    >>> marks("<think>1 + 1</think> 2 <answer>2</answer>", "2", "first")[-1]
    Mark(start=23, end=41, kind='answer')

    Attributes:
        start: of the part, in characters.
        end: one past it.
        kind: reasoning, or answer: what the verifier has read.
    """

    start: int
    end: int
    kind: str


def marks(completion: str, answer: str | None, answer_choice: str) -> list[Mark]:
    """Where the reasoning of a completion stands, and the answer that was read from it.

    Args:
        completion: the text.
        answer: as it was extracted; None where none was.
        answer_choice: the recipe's: of several equal ones first and last mark one, agreed marks all.
    """
    found, outside = [], []
    at = 0
    for start, end in reasoning(completion):
        found.append(Mark(start, end, "reasoning"))
        outside.append((at, start))
        at = end
    outside.append((at, len(completion)))
    if answer is None:
        return found
    answers = [
        Mark(start + here, start + there, "answer")
        for start, end in outside
        for here, there in _answers(completion[start:end], answer)
    ]
    chosen = {"first": answers[:1], "last": answers[-1:]}.get(answer_choice, answers)
    return sorted([*found, *chosen], key=lambda mark: mark.start)


def reasoning(completion: str) -> list[tuple[int, int]]:
    """Start and end of each reasoning section with its tags: what `r1zero.tasks.answers.after_reasoning` leaves out."""
    found: list[tuple[int, int]] = []
    opened: int | None = None
    for tag in _SECTION.finditer(completion):
        if tag[1] and opened is not None:
            found.append((opened, tag.end()))
            opened = None
        elif tag[1] and not found:
            found.append((0, tag.end()))  # the prompt opened it
        elif not tag[1] and opened is None:
            opened = tag.start()
    if opened is not None:
        found.append((opened, len(completion)))
    return found


def _answers(text: str, answer: str) -> Iterator[tuple[int, int]]:
    for match in _TAG.finditer(text):
        if match[1].strip() == answer:
            yield match.span()
    for box in boxes.whole(text):
        if box.content == answer or any(inner.content == answer for inner in boxes.whole(box.content)):
            yield box.start, box.end


@dataclass(frozen=True)
class Counted:
    """How often each phrase stands in the completions of one file.

    >>> Counted(step=3, split="train", completions=8, shares={"wait": 0.25}, examples={}).shares["wait"]
    0.25

    Attributes:
        step: of the file.
        split: of the file.
        completions: how many were counted.
        shares: of them, by phrase: those with the phrase in them.
        examples: by phrase: text around the first of them, and its verdict.
    """

    step: int
    split: str
    completions: int
    shares: Mapping[str, float]
    examples: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Reading:
    """What was read of a run's completions.

    Attributes:
        rows: the sample, in the columns of the files, by split and step.
        counted: phrases in all completions of all files, by split and step.
        total: completions on disk.
        files: files on disk.
        shown_files: files of which rows are among the sample.
        unreadable: names of files that are no parquet.
    """

    rows: tuple[Mapping[str, Any], ...]
    counted: tuple[Counted, ...]
    total: int
    files: int
    shown_files: int
    unreadable: tuple[str, ...]

    @property
    def said(self) -> str:
        """What was sampled and how, for the page."""
        if not self.total:
            return "This run has no completions on disk."
        if len(self.rows) == self.total:
            return f"All {self.total:,} completions of {self.files:,} files are in this page."
        return (
            f"{len(self.rows):,} of {self.total:,} completions are in this page, from {self.shown_files:,} of "
            f"{self.files:,} files: the newest step and the newest evaluation as far as there is room, older ones by a "
            f"sample that is the same each time (questions in the order of the hash of their prompt, {OF_A_QUESTION} "
            "completions of each first). The run folder's rollouts/ has all of them. Phrases are counted over all."
        )


def read(run: Run, share: float = 1.0) -> Reading:
    """Read the completions of a run.

    Args:
        run: whose.
        share: of a page's room that this run has.
    """
    found = [*run.rollout_files("train"), *run.rollout_files("test")]
    sizes: dict[RolloutFile, _Size] = {}
    for file in found:
        try:
            sizes[file] = _size(file.path)
        except (pa.ArrowInvalid, OSError):
            continue
    room = _room(sizes, int(MOST_ROWS * share), int(TEXT_BYTES * share))
    cache = _Cache(run.folder.path / _CACHE)
    rows: list[Mapping[str, Any]] = []
    counted, shown = [], 0
    for file in sizes:
        known = cache.get(file)
        if known is None or file in room:
            table = pq.read_table(file.path, columns=sizes[file].columns)
            if known is None:
                known = cache.put(file, _count(file, table))
            if file in room:
                taken = _sample(table, room[file])
                shown += bool(taken)
                rows += [{**row, "split": file.split, "step": file.step} for row in taken]
        counted.append(known)
    cache.save()
    return Reading(
        rows=tuple(rows),
        counted=tuple(counted),
        total=sum(size.rows for size in sizes.values()),
        files=len(sizes),
        shown_files=shown,
        unreadable=tuple(file.path.name for file in found if file not in sizes),
    )


@dataclass(frozen=True)
class _Size:
    rows: int
    text_bytes: int  # of prompts and completions, as they are stored before compression
    columns: list[str]


@dataclass(frozen=True)
class _Room:
    rows: int
    text_bytes: int


def _size(path: Path) -> _Size:
    metadata = pq.read_metadata(path)
    text_bytes = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema in ("prompt", "completion"):
                text_bytes += column.total_uncompressed_size
    present = set(metadata.schema.to_arrow_schema().names)
    return _Size(metadata.num_rows, text_bytes, [name for name in COLUMNS if name in present])


def _room(sizes: Mapping[RolloutFile, _Size], most_rows: int, text_bytes: int) -> dict[RolloutFile, _Room]:
    """How much of each file is shown; files that are not named, nothing."""
    files = [file for file, size in sizes.items() if size.rows]
    rows, stored = sum(sizes[file].rows for file in files), sum(sizes[file].text_bytes for file in files)
    if rows <= most_rows and stored <= text_bytes:
        return {file: _Room(sizes[file].rows, text_bytes) for file in files}
    newest = {file.split: file for file in files}  # the last of each, as they come by step
    of_newest = _Room(max(1, int(most_rows * NEWEST_SHARE)), int(text_bytes * NEWEST_SHARE))
    older = [file for file in files if file not in newest.values()]
    left_rows = most_rows - len(newest) * of_newest.rows
    left_bytes = text_bytes - len(newest) * of_newest.text_bytes
    fitting = min(left_rows, int(left_bytes * rows / max(1, stored)))
    chosen = _evenly(older, max(1, fitting // LEAST_OF_A_FILE))
    each = _Room(left_rows // max(1, len(chosen)), left_bytes // max(1, len(chosen)))
    return {**dict.fromkeys(chosen, each), **dict.fromkeys(newest.values(), of_newest)}


def _evenly(files: Sequence[RolloutFile], most: int) -> list[RolloutFile]:
    if len(files) <= most:
        return list(files)
    return [files[len(files) * number // most] for number in range(most)]


def _sample(table: pa.Table, room: _Room) -> list[dict[str, Any]]:
    prompts = table["prompt"].to_pylist()
    lengths = pc.binary_length(table["completion"].cast(pa.binary())).to_pylist()
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(index)
    questions = sorted(by_prompt, key=lambda prompt: hashlib.blake2b(prompt.encode(), digest_size=8).digest())
    first = [index for question in questions for index in by_prompt[question][:OF_A_QUESTION]]
    rest = [index for question in questions for index in by_prompt[question][OF_A_QUESTION:]]
    taken: list[int] = []
    seen: set[str] = set()
    used = 0
    for index in (*first, *rest):
        used += (lengths[index] or 0) + (0 if prompts[index] in seen else len(prompts[index].encode()))
        if len(taken) == room.rows or (taken and used > room.text_bytes):
            break
        seen.add(prompts[index])
        taken.append(index)
    return list(table.take(pa.array(sorted(taken), pa.int64())).to_pylist())


def _count(file: RolloutFile, table: pa.Table) -> Counted:
    completions, verdicts = table["completion"].combine_chunks(), table["verdict"]
    shares, examples = {}, {}
    for name, pattern in PHRASES.items():
        has = pc.match_substring_regex(completions, pattern=pattern, ignore_case=True)
        number = pc.sum(has).as_py() or 0
        shares[name] = number / max(1, table.num_rows)
        if number:
            first = pc.index(has, pa.scalar(True)).as_py()
            examples[name] = (_around(completions[first].as_py(), pattern), str(verdicts[first].as_py()))
    return Counted(file.step, file.split, table.num_rows, shares, examples)


def _around(text: str, pattern: str) -> str:
    found = re.search(pattern, text, re.IGNORECASE | re.ASCII)
    start, end = found.span() if found else (0, 0)
    left, right = max(0, start - _EXAMPLE_SIDE), end + _EXAMPLE_SIDE
    return ("…" if left else "") + text[left:right] + ("…" if right < len(text) else "")


class _Cache:
    """Counts of files that were read before: a report that is made anew each minute must not read all text again.

    A folder that cannot be written into has none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._patterns = hashlib.blake2b(repr(PHRASES).encode(), digest_size=8).hexdigest()
        try:
            stored = read_json(path) or {}
        except ValueError:
            stored = {}
        self._known: dict[str, Any] = stored.get("files", {}) if stored.get("patterns") == self._patterns else {}
        self._changed = False

    def get(self, file: RolloutFile) -> Counted | None:
        entry = self._known.get(file.path.name)
        if entry is None or entry["is"] != self._identity(file):
            return None
        examples = {name: (text, verdict) for name, (text, verdict) in entry["examples"].items()}
        return Counted(file.step, file.split, entry["completions"], entry["shares"], examples)

    def put(self, file: RolloutFile, counted: Counted) -> Counted:
        self._changed = True
        self._known[file.path.name] = {
            "is": self._identity(file),
            "completions": counted.completions,
            "shares": dict(counted.shares),
            "examples": dict(counted.examples),
        }
        return counted

    def save(self) -> None:
        if not self._changed:
            return
        try:
            write_json(self._path, {"patterns": self._patterns, "files": self._known})
        except OSError:
            return

    @staticmethod
    def _identity(file: RolloutFile) -> list[int]:
        stat = file.path.stat()
        return [stat.st_size, stat.st_mtime_ns]


def columns(rows: Iterable[Mapping[str, Any]], answer_choice: str) -> dict[str, Any]:
    """The rows as a page takes them: by column, texts that repeat said once, marks in JavaScript's characters."""
    tables: dict[str, dict[Any, int]] = {name: {} for name in ("prompt", "gold", "verdict", "source", "split")}
    found: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "split", "marks")}
    for row in rows:
        for name in (*COLUMNS, "split"):
            value = row.get(name)
            if name in tables:
                value = tables[name].setdefault(value, len(tables[name]))
            elif name == "rewards":
                value = [[key, _short(each)] for key, each in value or ()]
            elif name == "reward":
                value = _short(value)
            found[name].append(value)
        marked = marks(row["completion"], row.get("answer"), answer_choice)
        found["marks"].append(
            [[_utf16(row["completion"], mark.start), _utf16(row["completion"], mark.end), mark.kind] for mark in marked]
        )
    return {"rows": found, "tables": {name: list(table) for name, table in tables.items()}}


def _short(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.6g}")


def _utf16(text: str, at: int) -> int:
    """JavaScript counts UTF-16 units."""
    return at if text.isascii() else len(text[:at].encode("utf-16-le")) // 2
