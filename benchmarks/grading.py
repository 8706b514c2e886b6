"""How fast answers are graded, beside math-verify called directly, in one run on the same answers.

    python benchmarks/grading.py DATA      # a folder with gsm8k/ and math500/

Two sets: GSM8K's golds in `<answer>` tags with a random half made wrong, and MATH-500's in boxes. Each completion is
distinct, so that no cache helps; the last column is the same batch again, which the cache answers.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from r1zero.tasks import load_problems
from r1zero.tasks.verifier import Verifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(f"{'set':<10}{'answers':>9}{'ours /s':>10}{'math-verify /s':>16}{'ratio':>8}{'repeated /s':>13}")
    for task, split, answer_format in (("gsm8k", "train", "tagged"), ("math", "test", "boxed")):
        folder = arguments.data / ("gsm8k" if task == "gsm8k" else "math500")
        golds = [problem.gold for problem in load_problems(task, split, str(folder))]
        answers = [gold if rng.random() < 0.5 else f"{gold}{number % 7}" for number, gold in enumerate(golds)]
        marks = ("<answer>", "</answer>") if answer_format == "tagged" else ("\\boxed{", "}")
        completions = [f"{number}: {marks[0]}{answer}{marks[1]}" for number, answer in enumerate(answers)]
        with Verifier(answer_format=answer_format) as verifier:
            verifier.grade(["\\boxed{x+1} <answer>x+1</answer>"], ["1+x"])  # the processes are up
            ours = _seconds(lambda c=completions, g=golds, v=verifier: v.grade(c, g))
            again = _seconds(lambda c=completions, g=golds, v=verifier: v.grade(c, g))
        direct = _seconds(
            lambda a=answers, g=golds: [verify(parse(f"${x}$"), parse(f"${y}$")) for x, y in zip(g, a, strict=True)]
        )
        count = len(golds)
        print(
            f"{folder.name:<10}{count:>9}{count / ours:>10.0f}{count / direct:>16.0f}{direct / ours:>8.1f}"
            f"{count / again:>13.0f}"
        )


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
