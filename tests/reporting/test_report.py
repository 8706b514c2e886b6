"""The page's contents, from run folders of every kind, without a browser."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from r1zero.reporting import report, report_data, rollout_reader
from r1zero.reporting.metrics import definition
from r1zero.run_folder import RunFolder, append_json_line, write_json, write_yaml
from tests.conftest import PROJECT
from tests.reporting import simulated_run


def contents(page: Path, name: str = "facts") -> Any:
    """What a page carries, as its script reads it."""
    packed = re.search(rf'id="page-{name}">([^<]*)<', page.read_text())
    assert packed is not None
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def facts(run: Mapping[str, Any]) -> dict[str, str]:
    return dict(run["facts"])


def titles(page: Path) -> list[str]:
    return [chart["title"] for chart in contents(page)["charts"]]


def test_the_command_says_what_it_wrote_and_how_to_open_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = simulated_run.write(tmp_path / "run")
    assert report.main([str(folder.path)]) == 0
    page = folder.path / "report.html"
    said = capsys.readouterr().out
    assert re.search(rf"wrote {page} \(0\.\d MB, in [\d.]+ s\)\nopen {page.as_uri()}\n.*scp \S+:{page} \.", said)


def test_several_runs_in_one_page(tmp_path: Path) -> None:
    one, other = (simulated_run.write(tmp_path / where / "run", steps=2) for where in ("a", "b"))
    page = tmp_path / "both.html"
    assert report.main([str(one.path), str(other.path), "--output", str(page)]) == 0
    assert [run["name"] for run in contents(page)["runs"]] == ["a/run", "b/run"]
    assert len(contents(page, "rollouts")["runs"]) == 2
    assert not (one.path / "report.html").exists()


def test_a_run_without_completions_leaves_its_room_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_reader, "MOST_ROWS", 40)
    one = simulated_run.write(tmp_path / "one", steps=2)
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "summary.json", {"outcome": "failed", "reason": "no"})
    page = report.write([one.path, tmp_path / "other"], tmp_path / "both.html").path
    assert contents(page)["runs"][0]["said"] == "All 32 completions of 2 files are in this page."


@pytest.mark.parametrize("where", ["empty", "absent"])
def test_what_is_no_run_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / where)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / where}: ")


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("")
    assert report.main([str(folder.path), "--output", str(tmp_path / "file" / "x.html")]) == 2
    assert re.match(r"error: the page cannot be written: .*file.*--output FILE\n", capsys.readouterr().err)


def test_the_page_is_one_file_whose_policy_names_its_script_and_style(tmp_path: Path) -> None:
    page = report.write([simulated_run.write(tmp_path / "run", steps=1).path]).path.read_text()
    assert re.findall(r'(?:src|href)="([^#"]*)"', re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)) == [
        "data:,"
    ]
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert len(inside) == 1 and f"{tag}-src 'sha256-{digest}'" in page


def test_the_library_is_the_one_whose_licence_lies_beside_it() -> None:
    """uPlot 1.6.32 as npm has it; another one is put here on purpose, with its version in report.py."""
    script = (report.PAGE / "uPlot.iife.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() == UPLOT_SHA256
    assert b"v1.6.32" in script[:100] and "1.6.32" in str(report.__doc__)
    assert (report.PAGE / "uPlot.LICENSE").read_text().startswith("The MIT License")


def test_every_curve_that_is_asked_for(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=4, evaluate_each=2)
    shown = titles(report.write([folder.path]).path)
    for wanted in (
        *("Reward", "Reward by source", "Verdicts", "Completion length", "Cut off at max_completion_length", "Entropy"),
        *("KL to the reference model", "Gradient norm", "Learning rate", "Groups without reward spread"),
        *("Held-out accuracy, 95 % intervals", "Probe: server against trainer", "Seconds of a step, by phase"),
        *("Idle: policy servers and trainer", "Tokens a second", "GPU memory of the trainer"),
    ):
        assert wanted in shown


def test_how_idle_either_side_was(tmp_path: Path) -> None:
    page = report.write([simulated_run.write(tmp_path / "run", steps=4).path]).path
    tiles = {each["question"]: each["answers"] for each in contents(page)["runs"][0]["tiles"]}
    assert "policy server idle 55 %, trainer 45 %" in tiles["Where does the time go?"]


def test_each_curve_says_what_it_shows(tmp_path: Path) -> None:
    shown = contents(report.write([simulated_run.write(tmp_path / "run", steps=1).path]).path)
    for chart in shown["charts"]:
        for each in chart["series"]:
            assert shown["definitions"][each["metric"]]["meaning"]
            assert chart["unit"] == shown["definitions"][each["metric"]]["unit"]


def test_metrics_that_are_named_in_a_chart_are_defined() -> None:
    for chart in report_data.CHARTS:
        for name in (*chart.series, *(end.removeprefix("+-") for band in chart.bands for end in band)):
            assert definition(name.replace("*", "x")), name


def test_tokens_a_second_of_runs_that_did_not_measure_it(tmp_path: Path) -> None:
    page = report.write([simulated_run.write(tmp_path / "run", steps=3).path]).path
    assert contents(page)["runs"][0]["metrics"]["tokens_per_second"] == [5000.0] * 3  # 20,000 in 4 s


def test_a_cold_start_has_its_own_curves_and_no_completions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_yaml(folder.recipe, {"method": "sft", "learning_rate": 2e-5})
    for step in (10, 20):
        line = {"loss": 1 / step, "mean_token_accuracy": 0.7, "seconds/train": 0.2, "seconds/step": 0.2, "grad_norm": 1}
        append_json_line(folder.metrics, {"kind": "step", "time": step, "step": step, "steps": 20, **line})
    page = report.write([folder.path]).path
    run = contents(page)["runs"][0]
    assert {"Loss", "Accuracy of the next token", "Gradient norm"} < set(titles(page))
    assert run["tiles"][0]["answers"] == ["loss 0.100 → 0.050"]
    assert run["said"] == "This run has no completions on disk."
    assert run["state"].startswith("starting (no summary.json")


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"outcome": "failed", "reason": "trainer: exited with code 1"})
    page = report.write([tmp_path]).path
    assert contents(page)["runs"][0]["state"] == "failed: trainer: exited with code 1"
    assert titles(page) == []


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=3)
    folder.summary.unlink()
    write_json(folder.status, {"phase": "training", "done": 3, "total": 9, "seconds_left": 20})
    run = contents(report.write([folder.path]).path)["runs"][0]
    assert run["state"].startswith("training, 3 of 9 (")


def test_resumes_are_on_the_curves_at_their_step_and_hour(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=4)
    resumed = simulated_run.BEGAN + 3600
    append_json_line(folder.metrics, {"kind": "resume", "time": resumed, "step": 2, "checkpoint": "c/checkpoint-2"})
    append_json_line(folder.metrics, {**simulated_run.step_line(3, 4), "time": resumed + 360, "reward": 0.99})
    run = contents(report.write([folder.path]).path)["runs"][0]
    assert run["steps"] == [1, 2, 3] and run["metrics"]["reward"][2] == 0.99
    assert [(event["kind"], event["step"], event["hours"]) for event in run["events"]] == [("resume", 2, 1.0)]
    assert run["hours"][2] == 1.1
    assert facts(run)["events"] == "1 resume"


def test_facts_of_a_run(tmp_path: Path) -> None:
    run = contents(report.write([simulated_run.write(tmp_path / "run", steps=6).path]).path)["runs"][0]
    shown = facts(run)
    assert shown["cost"] == "0.03 GPU-hours (2 x 0.01 h)"
    assert shown["GPUs"] == "2 x NVIDIA H200"
    assert shown["commit"] == "0123456789abcdef, with uncommitted changes"
    assert shown["steps"] == "6 of 6"
    assert run["packages"] == {"torch": "2.11.0", "trl": "1.16.0"}
    assert run["plan"].startswith("Plan for recipes/x.yaml")


def test_the_recipe_beside_its_base_and_the_defaults(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=1)
    rows = {row["key"]: row for row in contents(report.write([folder.path]).path)["recipe"]}
    assert rows["learning_rate"]["values"] == ["5e-06"]
    assert rows["learning_rate"]["defaults"] == ["1e-06"]
    assert rows["learning_rate"]["asked"] == [True]
    assert (PROJECT / "recipes/simplerl-zoo/base.yaml").is_file() and rows["task"]["bases"] == ["math"]
    assert rows["num_generations"]["asked"] == [False]


def test_a_recipe_that_is_not_here_has_no_base(tmp_path: Path) -> None:
    manifest = {**simulated_run.MANIFEST, "argv": ["launch/run.py", "/elsewhere/mine.yaml"]}
    folder = simulated_run.write(tmp_path / "run", steps=1, manifest=manifest)
    assert all(row["bases"] == [None] for row in contents(report.write([folder.path]).path)["recipe"])


def test_a_long_run_has_no_more_points_than_a_screen_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MOST_POINTS", 10)
    run = contents(report.write([simulated_run.write(tmp_path / "run", steps=25, completions=1).path]).path)["runs"][0]
    assert run["steps"] == [1, 4, 7, 10, 13, 16, 19, 22, 25] and run["thinned"]


UPLOT_SHA256 = "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
