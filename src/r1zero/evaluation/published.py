"""What the seeds report, to stand beside what is measured here. In percent.

The same base model is reported at 52.4, 57.6, 63.6 and 69.0 on MATH-500, depending on template and evaluator: a row of
somebody else says something only beside a baseline that was measured here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

V0 = "simpleRL-reason v0, README"
V1 = "SimpleRL-Zoo, arXiv:2503.18892, Table 1"
R1RL = "R1RL, README (its own evaluation curve)"


@dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        preset: whose protocol it was measured by.
        model: as its authors call it.
        scores: by benchmark, in percent.
        source: where it stands.
        note: what else must be known to read it.
    """

    preset: str
    model: str
    scores: Mapping[str, float]
    source: str
    note: str = ""


def _five(aime: float, math500: float, amc: float, minerva: float, olympiad: float) -> dict[str, float]:
    return {"aime24": aime, "math500": math500, "amc23": amc, "minerva_math": minerva, "olympiadbench": olympiad}


PUBLISHED = (
    Row("simplerl-v0", "Qwen2.5-Math-7B", _five(16.7, 52.4, 52.5, 12.9, 16.4), V0),
    Row("simplerl-v0", "Qwen2.5-Math-7B + SimpleRL-Zero", _five(33.3, 77.2, 62.5, 33.5, 37.6), V0),
    Row("simplerl-v0", "Qwen2.5-Math-7B + long-CoT SFT + RL", _five(26.7, 82.4, 62.5, 39.7, 43.3), V0),
    Row("simplerl-v1", "Qwen2.5-0.5B", {"gsm8k": 36.7, "math500": 15.8}, V1),
    Row("simplerl-v1", "Qwen2.5-0.5B + SimpleRL-Zoo", {"gsm8k": 49.5, "math500": 34.4}, V1),
    Row("simplerl-v1", "Qwen2.5-1.5B", {"gsm8k": 55.7, "math500": 29.6}, V1),
    Row("simplerl-v1", "Qwen2.5-1.5B + SimpleRL-Zoo", {"gsm8k": 74.4, "math500": 59.0}, V1),
    Row("simplerl-v1", "Qwen2.5-7B", {"gsm8k": 88.2, "math500": 64.6}, V1),
    Row("simplerl-v1", "Qwen2.5-7B + SimpleRL-Zoo", {"gsm8k": 91.7, "math500": 78.2}, V1),
    Row(
        "simplerl-v1",
        "Qwen2.5-Math-7B",
        {"gsm8k": 65.5, **_five(13.3, 63.6, 42.5, 12.5, 25.8)},
        V1,
        "AIME avg@32: 8.6",
    ),
    Row(
        "simplerl-v1",
        "Qwen2.5-Math-7B + SimpleRL-Zoo",
        {"gsm8k": 90.2, **_five(40.0, 80.2, 70.0, 37.5, 39.0)},
        V1,
        "AIME avg@32: 24.0",
    ),
    Row("r1rl", "Qwen2.5-3B", {"gsm8k": 38.0}, R1RL, "about; 200 questions"),
    Row("r1rl", "Qwen2.5-3B + R1RL, 200 steps on one A10", {"gsm8k": 62.0}, R1RL, "about; 200 questions"),
    Row("r1rl-full", "Qwen2.5-3B", {"gsm8k": 40.0}, R1RL, "about"),
    Row("r1rl-full", "Qwen2.5-3B + R1RL, 1,000 steps on one A100", {"gsm8k": 70.0}, R1RL, "about; peak 71"),
)


def rows(preset: str | None) -> tuple[Row, ...]:
    """Those that were measured by a preset; none without one."""
    return tuple(row for row in PUBLISHED if row.preset == preset)
