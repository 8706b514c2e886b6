"""The table of metrics: the page is it, and every number that a run writes is in it."""

import json
from pathlib import Path

import pytest

from r1zero.reporting import metrics
from tests.conftest import PROJECT

RECORDED = sorted((PROJECT / "tests" / "reporting" / "recorded").glob("*/metrics.jsonl"))


def test_the_page_is_the_table() -> None:
    assert (PROJECT / "docs" / "metrics.md").read_text() == metrics.page(), "python -m r1zero.reporting.metrics"


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.parent.name)
def test_every_number_of_a_recorded_run_is_defined(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if line["kind"] in (metrics.STEP, metrics.EVALUATION):
            assert not [name for name in line if name != "kind" and not metrics.definition(name, line["kind"])]


def test_each_metric_is_defined_once() -> None:
    names = [(each.kind, each.name) for each in metrics.METRICS]
    assert len(set(names)) == len(names)
    plain = [each for each in metrics.METRICS if "*" not in each.name]
    for each in metrics.METRICS:
        others = [one.name for one in plain if one.kind == each.kind and one is not each and each.is_of(one.name)]
        assert not others, f"{each.name} is a definition of {others} too"


def test_what_no_metric_is_has_no_definition() -> None:
    assert metrics.definition("reward_standard_deviation") is None
    assert metrics.definition("mean") is None  # of a measurement, not of a step
