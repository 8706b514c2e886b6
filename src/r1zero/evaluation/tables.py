"""A result as a person reads it: on the terminal, and as Markdown for a README. Reads nothing but the result."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from r1zero.evaluation import published
from r1zero.evaluation.protocol import PRESETS

Result = Mapping[str, Any]


def terminal(result: Result) -> list[Table]:
    """Scores, what is behind them, and differences."""
    tables = [_table("accuracy in % [95 % interval]", _score_header(result), _score_rows(result, *_PLAIN))]
    tables.append(_table("behind it", _DETAILS, _detail_rows(result)))
    if result["differences"]:
        tables.append(_table("difference in points [95 % interval]", *_difference_rows(result)))
    return tables


def markdown(result: Result) -> str:
    """Tables for a README: what was measured beside the rows of the seed, and how."""
    parts = [_markdown_table(_score_header(result), _score_rows(result, *_MARKED))]
    rows = published.rows(result["preset"])
    notes = [f"- {each.model}: {each.source}{f'; {each.note}' if each.note else ''}" for each in rows]
    if notes:
        parts.append("In italics what is published, measured by others with another verifier:\n" + "\n".join(notes))
    parts.append(_markdown_table(_DETAILS, _detail_rows(result)))
    if result["differences"]:
        parts.append(_markdown_table(*_difference_rows(result)))
    parts.append(_how(result))
    return "\n\n".join(parts) + "\n"


def _how(result: Result) -> str:
    """Everything that decides the scores, a line each."""
    lines = []
    if result["preset"]:
        preset = PRESETS[result["preset"]]
        lines.append(f"- preset {preset.name}: {preset.source}. Not as there: {preset.differs}.")
    lines += [f"- {line}" for line in result["notes"]]
    for benchmark in result["benchmarks"]:
        asked = f"{benchmark['questions']} of {benchmark['of']} questions"
        source = f"{benchmark['source']} (sha256 {benchmark['sha256'][:12]})"
        lines.append(f"- {benchmark['title']}: {asked} of {source}")
    verifier, engine = result["verifier"], result["engine"]
    lines.append(
        f"- r1zero {verifier['r1zero']}, verifier {verifier['sha256'][:12]}, math-verify {verifier['math-verify']}; "
        f"{engine['engine']} on {engine['device']}, {engine['dtype']}; seed {result['seed']}; {result['time']}"
    )
    lines.append("- Intervals: 95 %, questions as clusters; mean of k where k completions a question were sampled.")
    return "\n".join(lines)


_PLAIN = ("", "")
_MARKED = ("*", "*")
_DETAILS = (
    *("model", "benchmark", "questions", "sampling", "pass@k", "majority"),
    *("unparsed", "timed out", "cut off", "length"),
)


def _score_header(result: Result) -> tuple[str, ...]:
    return ("model", *(each["title"] for each in result["benchmarks"]))


def _score_rows(result: Result, opening: str, closing: str) -> list[tuple[str, ...]]:
    found = {(each["model"], each["benchmark"]): each["scores"] for each in result["evaluations"]}
    names = [each["name"] for each in result["benchmarks"]]
    rows = []
    for model in (each["label"] for each in result["models"]):
        cells = [_score(found[model, name]) if (model, name) in found else "" for name in names]
        rows.append((model, *cells))
    for each in published.rows(result["preset"]):
        cells = [f"{opening}{each.scores[name]:.1f}{closing}" if name in each.scores else "" for name in names]
        shown = f"{opening}{each.model}{closing}" if opening else f"{each.model} (published)"
        rows.append((shown, *cells))
    return rows


def _detail_rows(result: Result) -> list[tuple[str, ...]]:
    titles = {each["name"]: each["title"] for each in result["benchmarks"]}
    rows = []
    for each in result["evaluations"]:
        score, protocol = each["scores"], each["protocol"]
        greedy = protocol["temperature"] == 0
        passes = [f"@{k} {_percent(value['mean'])}" for k, value in score["pass_at_k"].items() if k != "1"]
        rows.append(
            (
                each["model"],
                titles[each["benchmark"]],
                f"{score['questions']} x {score['samples']}",
                "greedy" if greedy else f"T={protocol['temperature']:g} top-p {protocol['top_p']:g}",
                ", ".join(passes),
                _score(score["majority"]) if score["majority"] else "",
                *(f"{_percent(score[name])} %" for name in ("unparsed", "timed_out", "clipped")),
                f"{score['mean_length']:.0f}",
            )
        )
    return rows


def _difference_rows(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    titles = {each["name"]: each["title"] for each in result["benchmarks"]}
    return ("model", "less", "benchmark", "difference"), [
        (
            each["model"],
            each["less"],
            titles[each["benchmark"]],
            f"{100 * each['mean']:+.1f} [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]",
        )
        for each in result["differences"]
    ]


def _score(score: Mapping[str, float]) -> str:
    return f"{_percent(score['mean'])} [{_percent(score['low'])}, {_percent(score['high'])}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for column in (f"{header[0]}: {title}", *header[1:]):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
