"""What a report says of its runs, as values that go into the page: facts, curves, recipe, completions. No torch."""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from r1zero import library_keys
from r1zero import recipe as recipes
from r1zero.reporting import rollout_reader
from r1zero.reporting.doctor import diagnose
from r1zero.reporting.metrics import definition
from r1zero.reporting.progress import duration
from r1zero.reporting.run_reader import Run

MOST_POINTS = 2000  # of a curve; more are not told apart on a screen
PROJECT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Chart:
    """One figure of the page; a run without its metrics has no line in it, and a page without any leaves it out.

    >>> Chart("Gradient norm", "", ("grad_norm",)).expanded(["loss", "grad_norm"])
    [('grad_norm', 'grad_norm')]

    Attributes:
        title: of the figure.
        unit: of its y axis; "share" is shown in per cent.
        series: the metrics, by their names in metrics.jsonl; ``*`` stands for a part of a name, which labels the line.
        kind: lines; stacked: areas on top of one another, a figure for each run; intervals: the evaluations.
        bands: pairs of metrics, of which the first that is there has the area between filled; with "+-" before the
            second: a metric, and its spread.
        least: left out with fewer lines than these.
    """

    title: str
    unit: str
    series: tuple[str, ...]
    kind: str = "lines"
    bands: tuple[tuple[str, str], ...] = ()
    least: int = 1

    def expanded(self, present: Sequence[str]) -> list[tuple[str, str]]:
        """The metrics of `present` that belong here, each with its label."""
        found: dict[str, str] = {}
        for name in self.series:
            before, star, after = name.partition("*")
            pattern = re.compile(re.escape(before) + (r"(.+)" + re.escape(after) if star else ""))
            for metric in present:
                if (match := pattern.fullmatch(metric)) is not None:
                    found.setdefault(metric, match[1] if star else metric.rpartition("/")[2])
        if self.kind == "stacked":
            found.pop("seconds/step", None)  # the sum of the others
        return list(found.items())


CHARTS = (
    Chart("Reward", "", ("reward",), bands=(("reward", "+-reward_std"),)),
    Chart("Held-out accuracy, 95 % intervals", "share", (), kind="intervals"),
    Chart("Reward by function", "", ("rewards/*/mean",), least=2),
    Chart("Reward by source", "", ("source/*/reward",)),
    Chart("Correct by source", "share", ("source/*/correct",)),
    Chart("Verdicts", "share", ("verdict/*",), kind="stacked"),
    Chart(
        "Completion length",
        "tokens",
        ("completions/mean_length", "completions/p50_length"),
        bands=(
            ("completions/p10_length", "completions/p90_length"),
            ("completions/min_length", "completions/max_length"),
        ),
    ),
    Chart("Cut off at max_completion_length", "share", ("completions/clipped_ratio",)),
    Chart("Groups without reward spread", "share", ("frac_reward_zero_std",)),
    Chart("Entropy", "nats", ("entropy",)),
    Chart("KL to the reference model", "nats", ("kl",)),
    Chart("Gradient norm", "", ("grad_norm",)),
    Chart("Learning rate", "", ("learning_rate",)),
    Chart("Loss", "", ("loss",)),
    Chart("Accuracy of the next token", "share", ("mean_token_accuracy",)),
    Chart("Clipped by the trust region", "share", ("clip_ratio/region_mean",)),
    Chart("Probe: server against trainer", "nats", ("probe/difference", "probe/difference_max")),
    Chart(
        "Sampling against training logprobs",
        "nats",
        ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    ),
    Chart("Seconds of a step, by phase", "s", ("seconds/*",), kind="stacked"),
    Chart("Idle: policy servers and trainer", "share", ("idle/server", "idle/trainer")),
    Chart("Tokens a second", "tokens/s", ("tokens_per_second",)),
    Chart("GPU memory of the trainer", "GiB", ("memory/peak_gib", "memory/total_gib")),
)


def page(runs: Sequence[Run], now: float | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the page is made of: what it shows at once, and the completions, which it reads after that.

    Args:
        runs: those that are compared, one or more.
        now: unix seconds.
    """
    with_rollouts = sum(bool(run.rollout_files("train") or run.rollout_files("test")) for run in runs)
    readings = [rollout_reader.read(run, 1 / max(1, with_rollouts)) for run in runs]
    names = _names(runs)
    shown = [_run(run, name, reading) for run, name, reading in zip(runs, names, readings, strict=True)]
    facts = {
        "written": time.time() if now is None else now,
        "runs": shown,
        "charts": _charts([tuple(each["metrics"]) for each in shown], any(run.evaluations for run in runs)),
        "recipe": _recipe(runs),
        "phrases": dict(rollout_reader.PHRASES),
        "definitions": _definitions(name for each in shown for name in each["metrics"]),
    }
    rollouts = {
        "runs": [
            rollout_reader.columns(reading.rows, str(run.recipe.get("answer_choice") or "agreed"))
            for run, reading in zip(runs, readings, strict=True)
        ]
    }
    return facts, rollouts


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with the folder above where two are alike."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.folder.path.resolve().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]


def _run(run: Run, name: str, reading: rollout_reader.Reading) -> dict[str, Any]:
    lines = _thinned(run.steps)
    began = next((float(line["time"]) for line in run.lines if "time" in line), 0.0)
    names = [metric for metric in run.metrics if metric not in ("step", "steps", "seconds_left")]
    metrics = {metric: [_short(line.get(metric)) for line in lines] for metric in names}
    if "tokens_per_second" not in metrics and "num_tokens" in metrics:
        metrics["tokens_per_second"] = _tokens_per_second(lines)
    return {
        "name": name,
        "state": state(run),
        "tiles": [{"question": question, "answers": answers} for question, answers in _tiles(run)],
        "findings": [asdict(finding) for finding in diagnose(run)],
        "facts": [[label, value] for label, value in _facts(run) if value],
        "steps": [line["step"] for line in lines],
        "hours": [_short((float(line.get("time") or began) - began) / 3600) for line in lines],
        "metrics": metrics,
        "thinned": len(lines) < len(run.steps),
        "evaluations": [
            {"hours": _short((float(line.get("time") or began) - began) / 3600), **line} for line in run.evaluations
        ],
        "events": [{**asdict(event), "hours": _short((event.time - began) / 3600)} for event in run.events],
        "plan": run.plan,
        "packages": dict(run.manifest.get("packages") or {}),
        "counted": [asdict(each) for each in reading.counted],
        "said": reading.said,
        "unreadable": list(reading.unreadable),
    }


def state(run: Run) -> str:
    """How the run ended, or where it is."""
    outcome = run.summary.get("outcome")
    if outcome is not None:
        why = run.summary.get("reason") or run.summary.get("why")
        return f"{outcome}: {why}" if why else str(outcome)
    phase = run.status.get("phase", "starting")
    if not run.status.get("total"):
        return f"{phase} (no summary.json: it runs, or was killed)"
    return f"{phase}, {run.status.get('done')} of {run.status['total']} (no summary.json: it runs, or was killed)"


def _tiles(run: Run) -> Iterator[tuple[str, list[str]]]:
    """What a person wants to know first; each answer is left out where the run cannot give it."""
    learning = [_first_and_last(run, "reward", "reward")]
    if not run.series("reward")[1]:
        learning.append(_first_and_last(run, "loss", "loss"))
    scores = [run.evaluations[0], run.evaluations[-1]] if len(run.evaluations) > 1 else run.evaluations
    if scores:
        said = " → ".join(
            f"{100 * each['mean']:.1f} % [{100 * each['low']:.1f}, {100 * each['high']:.1f}]" for each in scores
        )
        learning.append(f"held-out accuracy {said}")
    yield "Is it learning?", [each for each in learning if each]
    writes = [
        _first_and_last(run, "completions/mean_length", "mean length", " tokens", digits=0),
        _first_and_last(run, "completions/clipped_ratio", "cut off", " %", 100, 1),
        _first_and_last(run, "verdict/unparsed", "without a readable answer", " %", 100, 1),
    ]
    yield "What does it write?", [each for each in writes if each]
    yield "Where does the time go?", list(_where_time_goes(run))


def _where_time_goes(run: Run) -> Iterator[str]:
    phases = {
        name.removeprefix("seconds/"): _mean(run.series(name)[1])
        for name in run.metrics
        if name.startswith("seconds/") and name != "seconds/step"
    }
    whole = sum(phases.values())
    if whole:
        largest = sorted(phases.items(), key=lambda item: -item[1])[:3]
        parts = [f"{name} {100 * value / whole:.0f} %" for name, value in largest if value / whole > 0.005]
        yield f"{duration(whole)} a step: {', '.join(parts)}"
    server, trainer = (run.series(f"idle/{side}")[1] for side in ("server", "trainer"))
    if server and trainer:
        yield f"policy server idle {100 * _mean(server):.0f} %, trainer {100 * _mean(trainer):.0f} %"
    if run.seconds:
        yield f"{duration(run.seconds)} in all" + (f", {_gpu_hours(run)}" if run.gpus else "")


def _first_and_last(
    run: Run, metric: str, label: str, unit: str = "", scale: float = 1.0, digits: int = 3
) -> str | None:
    """The mean over the first and over the last tenth of the steps, which one lucky step does not decide."""
    values = run.series(metric)[1]
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    first, last = _mean(values[:tenth]) * scale, _mean(values[-tenth:]) * scale
    if len(values) == 1:
        return f"{label} {last:.{digits}f}{unit}"
    return f"{label} {first:.{digits}f} → {last:.{digits}f}{unit}"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    manifest = run.manifest
    yield "state", state(run)
    yield "folder", str(run.folder.path.resolve())
    last = run.steps[-1] if run.steps else {}
    yield "steps", f"{last['step']} of {last.get('steps', '?')}" if last else "none recorded"
    yield "model", str(run.recipe.get("model_name_or_path") or "")
    mixture = run.recipe.get("mixture")
    parts = [each for each in mixture if isinstance(each, Mapping)] if isinstance(mixture, list) else [run.recipe]
    yield (
        "task",
        ", ".join(" ".join(str(part[key]) for key in ("task", "dataset_name") if part.get(key)) for part in parts),
    )
    yield "time", duration(run.seconds) if run.seconds else ""
    yield "cost", _gpu_hours(run) if run.gpus else "no GPU"
    gpus = {name: run.gpus.count(name) for name in run.gpus}
    yield "GPUs", ", ".join(f"{count} x {name}" for name, count in gpus.items())
    yield (
        "machine",
        ", ".join(
            str(part)
            for part in (manifest.get("host"), manifest.get("system"), f"{manifest['cpu_count']} CPUs")
            if part
        )
        if manifest.get("cpu_count")
        else "",
    )
    yield "began", str(manifest.get("time") or "")
    commit = manifest.get("git_commit")
    yield "commit", f"{commit}{', with uncommitted changes' if manifest.get('git_dirty') else ''}" if commit else ""
    yield "Python", str(manifest.get("python") or "")
    yield "command", " ".join(manifest.get("argv") or ())
    counts = {
        kind: sum(event.kind == kind for event in run.events) for kind in ("restart", "resume", "requeue", "alert")
    }
    yield "events", ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count)


def _gpu_hours(run: Run) -> str:
    """Of all GPUs of the run's machines, used or not: that is what is paid for."""
    return f"{len(run.gpus) * run.seconds / 3600:.2f} GPU-hours ({len(run.gpus)} x {run.seconds / 3600:.2f} h)"


def _charts(present: Sequence[Sequence[str]], evaluated: bool) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for each in present for name in each))
    found = []
    for chart in CHARTS:
        series = chart.expanded(names)
        missing = not evaluated if chart.kind == "intervals" else len(series) < chart.least
        if missing:
            continue
        found.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "kind": chart.kind,
                "series": [{"metric": metric, "label": label} for metric, label in series],
                "bands": [
                    {"low": low, "high": high.removeprefix("+-"), "around": high.startswith("+-")}
                    for low, high in chart.bands
                ],
            }
        )
    return found


def _definitions(names: Iterable[str]) -> dict[str, dict[str, str]]:
    found = {name: definition(name) for name in names}
    return {name: {"unit": each.unit, "meaning": each.meaning} for name, each in found.items() if each}


def _recipe(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each key that a run has, with what it would be without the recipe, and under the recipe's base."""
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))
    bases = [_base(run) for run in runs]
    asked = [_overridden(run) for run in runs]
    rows = []
    for key in keys:
        values, defaults, of_bases = [], [], []
        for run, base in zip(runs, bases, strict=True):
            default = _defaults(str(run.recipe.get("method", "grpo"))).get(key)
            values.append(_said(run.recipe.get(key, default)))
            defaults.append(_said(default))
            of_bases.append(_said(base.get(key, default)) if base else None)
        rows.append(
            {
                "key": key,
                "values": values,
                "defaults": defaults,
                "bases": of_bases,
                "asked": [key in words for words in asked],
            }
        )
    return rows


def _defaults(method: str) -> dict[str, Any]:
    known = {**library_keys.load(method if method in recipes.METHODS else "grpo"), **recipes.own_keys()}
    return {name: key.default for name, key in known.items()}


def _base(run: Run) -> dict[str, Any]:
    """The recipe that the run's recipe is laid over; empty where that cannot be told from here.

    The run folder holds the resolved recipe alone. Which file it came from is in the command line, and that file is
    looked at where this checkout still has it.
    """
    words = [word for word in map(str, run.manifest.get("argv") or ()) if word.endswith((".yaml", ".yml"))]
    for path in (Path(word) if Path(word).is_absolute() else PROJECT / word for word in words[:1]):
        try:
            base = yaml.safe_load(path.read_text(encoding="utf-8")).get(recipes.BASE)
            return dict(recipes.load(path.parent / base).resolved()) if base else {}
        except (OSError, AttributeError, yaml.YAMLError, recipes.RecipeError):
            return {}
    return {}


def _overridden(run: Run) -> set[str]:
    words = map(str, run.manifest.get("argv") or ())
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _said(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()


def _thinned(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every n-th step, and the last one."""
    every = math.ceil(len(lines) / MOST_POINTS) or 1
    return [line for number, line in enumerate(lines) if number % every == 0 or number == len(lines) - 1]


def _tokens_per_second(lines: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """For runs from before that was a metric: what ``num_tokens`` grew by, over the seconds of the steps between."""
    found: list[float | None] = []
    before: Mapping[str, Any] = {"step": 0, "num_tokens": 0.0}
    for line in lines:
        seconds = float(line.get("seconds/step") or 0.0) * (line["step"] - before["step"])
        grown = float(line.get("num_tokens") or 0.0) - float(before.get("num_tokens") or 0.0)
        found.append(_short(grown / seconds) if seconds > 0 and grown >= 0 else None)
        before = line
    return found


def _short(value: Any) -> float | None:
    """Six digits; a page of many numbers is half as large for it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
