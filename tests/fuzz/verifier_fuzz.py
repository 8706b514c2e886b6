"""Fuzz what the verifier does in the trainer's own process: extraction, reading and comparison, without algebra.

    pip install atheris==3.0.0
    python tests/fuzz/verifier_fuzz.py --seconds 3600 --corpus runs/fuzz

An input is a gold, a line end, and a completion; the tables of the tests are the first ones. The fuzzer stops at an
exception other than `Unreadable`, at an input that takes longer than `--slowest` seconds, at a verdict that is not the
same the second time, and at a gold that reads but is not equal to itself. The input is then in the corpus folder, named
crash-*, timeout-* or oom-*. Not part of the tests, and no dependency of theirs.
"""

import argparse
import sys
from pathlib import Path

import atheris

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "src")]

with atheris.instrument_imports(include=["r1zero"]):
    from r1zero.tasks import answers
    from r1zero.tasks.mathematics import equivalence, values

from tests.tasks.hostile_inputs import HOSTILE  # noqa: E402
from tests.tasks.verdict_cases import cases  # noqa: E402


def same_text(gold: str, answer: str) -> bool:
    """Stands in for algebra, which a process that can be killed would do."""
    return gold == answer


def graded(gold: str, completion: str) -> list[bool | str]:
    """Each answer of the completion against the gold: equal, not equal, or why it cannot be read."""
    found: list[bool | str] = []
    for answer_format in answers.ANSWER_FORMATS:
        for answer_choice in answers.ANSWER_CHOICES:
            for answer in answers.committed(completion, answer_format, answer_choice):
                try:
                    found.append(equivalence.same(gold, answer, same_text))
                except values.Unreadable as error:
                    found.append(str(error))
    return found


def one_input(data: bytes) -> None:
    """What the fuzzer calls."""
    gold, _, completion = data.decode("utf-8", "surrogateescape").partition("\n")
    first = graded(gold, completion)
    if first != graded(gold, completion):
        raise AssertionError("another verdict the second time")
    graded(gold, rf"\boxed{{{completion}}}")  # the whole of it as one answer: most inputs hold no box
    try:
        equivalence.check(completion, same_text)
    except values.Unreadable:
        return
    if not equivalence.same(completion, completion, same_text):
        raise AssertionError("reads, and is not equal to itself")


def seeds(folder: Path) -> None:
    """The tables of the tests as the first inputs, where the folder does not hold them yet."""
    rows = [(case.gold, case.completion) for case in cases()]
    rows += [(hostile.gold, hostile.completion(100)) for hostile in HOSTILE.values()]
    for number, (gold, completion) in enumerate(rows):
        file = folder / f"seed-{number:05}"
        if len(completion) < 4_000 and not file.exists():
            file.write_bytes(f"{gold}\n{completion}".encode("utf-8", "surrogatepass"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="how long; default 60")
    parser.add_argument("--corpus", type=Path, default=Path("runs/fuzz"), help="inputs are read from and kept in here")
    parser.add_argument("--slowest", type=int, default=2, help="seconds that one input may take; default 2")
    arguments = parser.parse_args()
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    seeds(arguments.corpus)
    options = [f"-max_total_time={arguments.seconds}", f"-timeout={arguments.slowest}", "-max_len=2000"]
    options += ["-rss_limit_mb=2048", f"-artifact_prefix={arguments.corpus}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(arguments.corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
