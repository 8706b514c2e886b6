"""The evaluation, top to bottom: models, questions, protocols, answers, scores. ``launch/evaluate.py`` calls `main`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from r1zero.evaluation.asking import Answered, Ask
    from r1zero.evaluation.benchmarks import Questions
    from r1zero.evaluation.models import Candidate
    from r1zero.evaluation.protocol import Preset, Protocol
    from r1zero.evaluation.results import ResultFolder

SHOWN_CHANGES = 20
SECONDS_BETWEEN_REPORTS = 10.0
FILE_WIDTH = 140  # of tables that go into a file
ENGINES = ("auto", "vllm", "transformers")
# The keys of a protocol that the command line can set.
OVERRIDES = (
    *("prompt_template", "answer_format", "answer_choice", "answer_match", "stop_strings"),
    *("samples", "temperature", "top_p", "max_tokens"),
)


class UsageError(Exception):
    """Arguments that do not go together; the message says which, and what to do."""


def main(project: Path, words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        project: the checkout, for its git commit.
        words: arguments; None: those of the process.

    Returns:
        The exit code: 0 done; 1 a server failed, or re-scoring came out otherwise; 2 nothing could be started; 130, 143
        and 129 after Ctrl-C, SIGTERM and SIGHUP.
    """
    arguments = _parser().parse_args(words)
    # Imported after parsing, so that --help is instant.
    from rich.console import Console

    from r1zero.evaluation.models import ModelError
    from r1zero.evaluation.results import ResultError
    from r1zero.hardware import HardwareError
    from r1zero.policy_client import PolicyServerError
    from r1zero.supervisor import Interrupted, ProcessFailed
    from r1zero.tasks.problem import DatasetError
    from r1zero.tasks.prompts import TemplateError

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    try:
        if arguments.rescore is not None:
            return _rescore(arguments, console)
        return _evaluate(arguments, project, console)
    except (UsageError, ModelError, ResultError, DatasetError, TemplateError, HardwareError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except ProcessFailed as error:
        sys.stderr.write(f"{error.log_end}\nerror: {error}\n")
        return 1
    except (PolicyServerError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except Interrupted as error:
        sys.stderr.write(f"error: {error}: nothing more is asked, and no result was written\n")
        return 128 + error.signum
    except KeyboardInterrupt:
        sys.stderr.write("error: SIGINT received: nothing more is asked, and no result was written\n")
        return 130


def _evaluate(arguments: argparse.Namespace, project: Path, console: "Console") -> int:
    from r1zero import hardware, run_folder
    from r1zero.evaluation import models, results, tables
    from r1zero.evaluation.protocol import PRESETS, verifier_version

    _check(arguments)
    preset = PRESETS[arguments.preset] if arguments.preset else None
    candidates = models.find(arguments.models, arguments.checkpoints, arguments.with_base)
    questions = _questions(arguments, candidates, preset)
    protocols = {
        (candidate.label, each.name): _protocol(arguments, candidate, candidates, each, preset)
        for candidate in candidates
        for each in questions
    }
    here = hardware.of_nodes((hardware.this_node(),))
    folder = _folder(arguments, candidates)
    notes = _notes(candidates, preset, protocols)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    progress = _Progress(console)
    asks = _asks(candidates, questions, protocols)
    began = time.monotonic()
    evaluations: dict[tuple[str, str], dict[str, Any]] = {}
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    described = {each.label: each.written() for each in candidates}
    benchmarks = {each.name: _described(each) for each in questions}
    with _engine(arguments, folder, here) as engine:
        for answered in engine.answer(asks, progress):
            ask = answered.ask
            label, name = ask.candidate.label, ask.questions.name
            entry, graded = results.scored(
                described[label], benchmarks[name], ask.protocol.written(), _rows(answered), folder
            )
            evaluations[label, name], rows[label, name] = entry, graded
            score = entry["scores"]
            progress.say(
                f"{label} on {ask.questions.title}: {100 * score['mean']:.1f} % "
                f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
            )
        description = engine.description()
    seconds = time.monotonic() - began
    ordered = [evaluations[each.label, one.name] for each in candidates for one in questions]
    tokens = sum(row["length"] for each in rows.values() for row in each)
    gpus = tuple(gpu.name for gpu in here.nodes[0].gpus)
    result = {
        "format": results.FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "seed": arguments.seed,
        "preset": arguments.preset,
        "notes": notes,
        "engine": description,
        "verifier": verifier_version(),
        "versions": run_folder.versions(project, gpus),
        "models": list(described.values()),
        "benchmarks": list(benchmarks.values()),
        "evaluations": ordered,
        "differences": results.differences(ordered, rows),
    }
    folder.write(result, tables.markdown(result))
    progress.end()
    for table in tables.terminal(result):
        console.print()
        console.print(table)
    console.print(f"\n{tokens:,} tokens in {seconds:.0f} s with loading; look next at")
    for what, where in (
        ("every score", folder.result),
        ("for a README", folder.table),
        ("every completion", folder.path / "completions"),
    ):
        console.print(f"  {what:<18}{where}", markup=False, soft_wrap=True)
    return 0


def _rescore(arguments: argparse.Namespace, console: "Console") -> int:
    from r1zero.evaluation import results, tables
    from r1zero.evaluation.results import ResultFolder

    if arguments.models:
        raise UsageError("--rescore takes a result's folder and no models: nothing is generated")
    folder = ResultFolder(arguments.rescore)
    stored = folder.read()
    into = None if arguments.output_dir is None else ResultFolder(_fresh(arguments.output_dir))
    changes: list[str] = []
    result, changed = results.rescore(folder, into, changes.append)
    if into is not None:
        into.write(result, tables.markdown(result))
    for table in tables.terminal(result):
        console.print(table)
        console.print()
    for line in changes[:SHOWN_CHANGES]:
        console.print(line, markup=False, soft_wrap=True)
    was, now = stored["verifier"]["sha256"][:12], result["verifier"]["sha256"][:12]
    which = f"verifier {now}" if was == now else f"verifier {now} where {was} graded first"
    count = sum(each["scores"]["questions"] * each["scores"]["samples"] for each in result["evaluations"])
    if changed:
        console.print(f"{changed} verdicts or scores of {count} completions came out otherwise, {which}", markup=False)
        return 1
    console.print(f"all of {count} completions and every score came out the same, {which}", markup=False)
    return 0


def _questions(
    arguments: argparse.Namespace, candidates: "Sequence[Candidate]", preset: "Preset | None"
) -> "list[Questions]":
    """Of the benchmarks that were named, else of the preset's, else what the first run measures on."""
    from r1zero.evaluation import benchmarks

    count = arguments.count if arguments.count is not None else preset.count if preset else None
    named = arguments.benchmarks.split(",") if arguments.benchmarks else list(preset.benchmarks if preset else ())
    runs = [each.recipe for each in candidates if each.role == "trained" and each.recipe is not None]
    if not named:
        if not runs:
            raise UsageError(f"name --benchmarks, some of: {', '.join(benchmarks.BENCHMARKS)}; or a --preset")
        named = [benchmarks.OWN]
    found = []
    for name in dict.fromkeys(named):
        if name == benchmarks.OWN:
            if not runs:
                raise UsageError("--benchmarks own: is what a run's recipe measures on, and no run was given")
            found += _own_questions(runs[0], arguments.data, count)
        elif name in benchmarks.BENCHMARKS:
            found.append(benchmarks.read(name, arguments.data, count))
        else:
            known = ", ".join((*benchmarks.BENCHMARKS, benchmarks.OWN))
            raise UsageError(f"--benchmarks {name}: is not a benchmark; there are {known}")
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise UsageError(f"--benchmarks {arguments.benchmarks}: own is {', '.join(names)} here: leave one of them out")
    return found


def _own_questions(recipe: Any, data: str | None, count: int | None) -> "list[Questions]":
    """What a recipe measures on, also one that measures nothing by itself."""
    from dataclasses import replace

    from r1zero.evaluation import benchmarks
    from r1zero.tasks import sources

    asked = replace(recipe, own=replace(recipe.own, eval_count=None))
    found = []
    for source in sources.measured_on(asked):
        place = source if data is None else replace(source, dataset_name=data, config=None)
        problems = sources.load(place, recipe.own.remove_commas).problems
        wanted = count if count is not None else recipe.own.eval_count
        name = source.label.partition("/")[0]
        found.append(
            benchmarks.of_problems(name, name, source.task, str(place.dataset_name or source.task), problems, wanted)
        )
    return found


def _protocol(
    arguments: argparse.Namespace,
    candidate: "Candidate",
    candidates: "Sequence[Candidate]",
    questions: "Questions",
    preset: "Preset | None",
) -> "Protocol":
    """How this model is asked on this benchmark: the preset, else the first run's own way for all, else the default."""
    from dataclasses import replace

    from r1zero.evaluation.models import own_protocol
    from r1zero.evaluation.protocol import Protocol

    runs = [each.recipe for each in candidates if each.role == "trained" and each.recipe is not None]
    if preset is not None:
        role = "trained" if arguments.as_trained else candidate.role
        chosen = preset.of(role, questions.name)
    else:
        chosen = own_protocol(runs[0]) if runs else Protocol()
    given = {key: getattr(arguments, key) for key in OVERRIDES if getattr(arguments, key) is not None}
    if "stop_strings" in given:
        given["stop_strings"] = tuple(given["stop_strings"])
    chosen = replace(chosen, seed=arguments.seed, **given)
    if "prompt_template" in given and "answer_format" not in given and chosen.template.answer_format:
        chosen = replace(chosen, answer_format=chosen.template.answer_format)
    if chosen.greedy:
        # Greedy answers are all alike.
        chosen = replace(chosen, samples=1, top_p=1.0)
    return chosen


def _asks(
    candidates: "Sequence[Candidate]", questions: "Sequence[Questions]", protocols: "dict[tuple[str, str], Protocol]"
) -> "list[Ask]":
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from r1zero import model_facts
    from r1zero.evaluation import asking

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    asks = []
    for candidate in candidates:
        tokenizer = AutoTokenizer.from_pretrained(candidate.tokenizer, trust_remote_code=candidate.trust_remote_code)
        facts = model_facts.read(candidate.base, candidate.revision, download=True)
        context = facts.context_length if facts else None
        asks += [
            asking.make(candidate, each, protocols[candidate.label, each.name], context, tokenizer)
            for each in questions
        ]
    return asks


def _engine(arguments: argparse.Namespace, folder: "ResultFolder", here: Any) -> Any:
    """What answers: a policy server of ours where vLLM is installed and can run, else transformers in this process."""
    from contextlib import nullcontext
    from importlib.util import find_spec

    gpus = 0 if here.torch_cpu_only else here.gpus_per_node
    serves = find_spec("vllm") is not None and (gpus > 0 or here.cpu_server)
    if arguments.engine == "vllm" and not serves:
        raise UsageError(
            "--engine vllm: vLLM is not installed here, or not for this hardware: pip install -e '.[gpu]' on a machine "
            "with GPUs, python -m r1zero.serving.cpu_build without; or --engine transformers"
        )
    if arguments.engine == "transformers" or not serves:
        from r1zero.evaluation.in_process import InProcessEngine

        return nullcontext(InProcessEngine(arguments.dtype))
    from r1zero.evaluation.serving import ServerEngine, Settings

    if gpus and gpus < arguments.tensor_parallel:
        raise UsageError(f"--tensor_parallel {arguments.tensor_parallel}: {gpus} GPUs are here")
    settings = Settings(
        tensor_parallel=arguments.tensor_parallel if gpus else 1,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        dtype=arguments.dtype,
        exact=arguments.exact,
        timeout_s=arguments.timeout,
    )
    return ServerEngine(folder.path, here, settings, arguments.seed)


def _rows(answered: "Answered") -> list[dict[str, Any]]:
    from r1zero.training.recorder import prompt_text

    ask = answered.ask
    template = ask.protocol.template
    return [
        {
            "index": index,
            "sample": sample,
            "question": problem.question,
            "prompt": prompt_text(template.build(problem.question)),
            "completion": each.text,
            "gold": problem.gold,
            "length": each.length,
            "clipped": each.clipped,
            "source": problem.source,
        }
        for index, (problem, own) in enumerate(zip(ask.questions.problems, answered.completions, strict=True))
        for sample, each in enumerate(own)
    ]


def _described(questions: "Questions") -> dict[str, Any]:
    return {
        "name": questions.name,
        "title": questions.title,
        "task": questions.task,
        "numbers": questions.numbers,
        "source": questions.source,
        "questions": len(questions.problems),
        "of": questions.of,
        "sha256": questions.sha256,
    }


def _notes(
    candidates: "Sequence[Candidate]", preset: "Preset | None", protocols: "dict[tuple[str, str], Protocol]"
) -> list[str]:
    """How each model is asked, and what a reader must know to compare; for the terminal and for the table."""
    notes = []
    for candidate in candidates:
        by_line: dict[str, list[str]] = {}
        for (label, name), protocol in protocols.items():
            if label == candidate.label:
                by_line.setdefault(protocol.line(), []).append(name)
        for line, names in by_line.items():
            where = "" if len(by_line) == 1 else f" on {', '.join(names)}"
            notes.append(f"{candidate.label} ({candidate.role}){where}: {line}")
        if preset is not None and candidate.role == "trained" and candidate.recipe is not None:
            trained = candidate.recipe.template.name
            asked = {each.template.name for (label, _), each in protocols.items() if label == candidate.label}
            if asked != {trained}:
                notes.append(
                    f"{candidate.label} was trained with the template {trained}, and is asked with "
                    f"{', '.join(sorted(asked))}: --prompt_template asks as it was trained"
                )
    return notes


def _folder(arguments: argparse.Namespace, candidates: "Sequence[Candidate]") -> "ResultFolder":
    from r1zero.evaluation.results import ResultFolder
    from r1zero.run_folder import RunFolder

    if arguments.output_dir is not None:
        return ResultFolder(_fresh(arguments.output_dir))
    named = candidates[-1].label.replace("/", "_")
    place = Path("evaluations") / f"{named}-{time.strftime('%Y%m%d-%H%M%S')}"
    return ResultFolder(RunFolder(place).create().path)


def _fresh(folder: Path) -> Path:
    """`folder`, made; one that holds anything is never written into."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder}: exists already, and a result never writes over another; name another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.models:
        raise UsageError("name a model or a run to evaluate, or --rescore FOLDER")
    for key, least in (("samples", 1), ("count", 1), ("max_tokens", 1), ("temperature", 0), ("seed", 0)):
        value = getattr(arguments, key)
        if value is not None and value < least:
            raise UsageError(f"--{key} {value:g}: must be at least {least}")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top_p {arguments.top_p:g}: is a share above 0, up to 1")
    if arguments.samples is not None and arguments.samples > 1 and arguments.temperature == 0:
        raise UsageError(f"--samples {arguments.samples}: greedy answers are all alike; raise --temperature")


class _Progress:
    """What goes on: one line that is rewritten on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: "Console") -> None:
        from rich.status import Status

        self._console = console
        self._status = Status("", console=console) if console.is_terminal else None
        self._told = ("", 0.0)
        self._began = time.monotonic()
        if self._status:
            self._status.start()

    def __call__(self, what: str, done: int, total: int) -> None:
        from r1zero.reporting.progress import duration

        now = time.monotonic()
        line = f"{what}  {done}/{total}" if total else what
        if self._status:
            self._status.update(f"{line}  {duration(now - self._began)}")
        elif what.partition(",")[0] != self._told[0] or now - self._told[1] > SECONDS_BETWEEN_REPORTS:
            self._told = (what.partition(",")[0], now)
            self._console.print(line, markup=False, soft_wrap=True)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def end(self) -> None:
        if self._status:
            self._status.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description="Evaluate models and runs on benchmarks, side by side, with the interval that chance allows.",
        epilog="A run is asked as its recipe says: template, answer format, stop strings, sampling. A preset, or an "
        "option above, asks otherwise. docs/evaluation.md says how each score comes about.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[LABEL=]MODEL_OR_RUN",
        help="a run folder, one of its checkpoints, a model's folder or a hub id",
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--benchmarks", metavar="A,B", help="gsm8k, math500, aime24, amc23, minerva_math, olympiadbench; own"
    )
    what.add_argument(
        "--preset", choices=("simplerl-v0", "simplerl-v1", "r1rl", "r1rl-full"), help="as a seed measures"
    )
    what.add_argument(
        "--data", metavar="FOLDER", help="holds NAME/test.jsonl of each benchmark; else they come from the hub"
    )
    what.add_argument("--count", type=int, metavar="N", help="so many questions of each, always the same draw")
    what.add_argument("--checkpoints", default="final", metavar="all|N,M", help="of each run; default: its final model")
    what.add_argument("--with_base", action="store_true", help="and the model that each run began with")
    what.add_argument("--as_trained", action="store_true", help="ask models of no run as a preset asks trained ones")
    how = parser.add_argument_group("how it is asked")
    how.add_argument("--prompt_template", metavar="NAME_OR_TEXT", help="as in a recipe")
    how.add_argument("--answer_format", choices=("tagged", "boxed"))
    how.add_argument("--answer_choice", choices=("agreed", "first", "last"))
    how.add_argument("--answer_match", choices=("math", "exact"))
    how.add_argument("--stop_strings", nargs="+", metavar="TEXT", help="a completion ends with the first of them")
    how.add_argument("--samples", type=int, metavar="K", help="completions of each question")
    how.add_argument("--temperature", type=float, help="0 is greedy")
    how.add_argument("--top_p", type=float)
    how.add_argument("--max_tokens", type=int, help="of a completion")
    how.add_argument("--seed", type=int, default=0, help="of the sampling")
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: vLLM where it can run, else transformers"
    )
    where.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on GPUs, else float32"
    )
    where.add_argument(
        "--tensor_parallel", type=int, default=1, metavar="GPUS", help="that share one copy of the model"
    )
    where.add_argument("--gpu_memory_utilization", type=float, default=0.9, metavar="SHARE")
    where.add_argument("--exact", action="store_true", help="vLLM answers the same each time on this machine; slower")
    where.add_argument("--timeout", type=float, default=43200.0, metavar="SECONDS", help="for all answers of one model")
    where.add_argument("--output_dir", type=Path, metavar="FOLDER", help="default: a fresh one in evaluations/")
    where.add_argument(
        "--rescore", type=Path, metavar="FOLDER", help="grade a stored result again, and generate nothing"
    )
    return parser
