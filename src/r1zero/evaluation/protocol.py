"""How a model is asked and how its answers are read: all that decides a score besides the model and the questions.

A preset is a protocol with a name and a source. It has two sides, since the seeds ask a baseline otherwise than the
model they trained.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from r1zero import __version__, tasks
from r1zero.tasks import prompts
from r1zero.tasks.prompts import Template
from r1zero.tasks.verifier import Verifier

# What an answer's verdict depends on; the files of the reader and of the comparison.
VERIFIER_FILES = ("answers.py", "boxes.py", "verifier.py", "worker_manager.py", "worker_pool.py", "mathematics/*.py")
VERIFIER_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")


@dataclass(frozen=True)
class Protocol:
    """How completions are sampled and graded.

    >>> PRESETS["simplerl-v1"].of("trained", "aime24").samples
    32

    Attributes:
        prompt_template: as in a recipe: a name, a text, or chat messages.
        answer_format: where the answer is read: "tagged" or "boxed".
        answer_choice: which of several answers counts: "agreed", "first" or "last".
        answer_match: "math" or "exact".
        remove_commas: for "exact", see `Verifier`.
        stop_strings: a completion ends with the first of them.
        samples: completions of each question.
        temperature: 0 is greedy.
        top_p: of nucleus sampling.
        max_tokens: of a completion; fewer where the model has no more positions.
        seed: of the sampling.
    """

    prompt_template: str | tuple[tuple[tuple[str, str], ...], ...] = "qwen_boxed"
    answer_format: str = "boxed"
    answer_choice: str = "agreed"
    answer_match: str = "math"
    remove_commas: bool = True
    stop_strings: tuple[str, ...] = ()
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 4096
    seed: int = 0

    @property
    def template(self) -> Template:
        given = self.prompt_template
        return prompts.template(given if isinstance(given, str) else [dict(message) for message in given])

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def verifier(self, numbers: bool) -> Verifier:
        """What grades by this protocol; starts no process yet.

        Args:
            numbers: whether every answer has to be a plain number.
        """
        return Verifier(
            answer_format=self.answer_format,
            answer_choice=self.answer_choice,
            answer_match=self.answer_match,
            remove_commas=self.remove_commas,
            numbers=numbers,
        )

    def written(self) -> dict[str, Any]:
        """As a result keeps it: with the text of the template, whatever a name may mean later."""
        template = self.template
        written = {**asdict(self), "stop_strings": list(self.stop_strings), "prompt_template": template.name}
        return {**written, "template": _json(template.text)}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Protocol":
        """The protocol that `written` wrote."""
        names = {name: content[name] for name in asdict(cls())}
        text = content["template"]
        given = text if isinstance(text, str) else messages(text)
        return cls(**{**names, "prompt_template": given, "stop_strings": tuple(names["stop_strings"])})

    def line(self) -> str:
        """In one line for a person."""
        how = "greedy" if self.greedy else f"T={self.temperature:g} top-p {self.top_p:g}"
        stop = f", stops at {', '.join(map(repr, self.stop_strings))}" if self.stop_strings else ""
        return (
            f"{self.template.name}, {self.answer_format} answers ({self.answer_choice}, {self.answer_match}), {how}, "
            f"{self.samples} a question, at most {self.max_tokens} tokens{stop}"
        )


def messages(given: Any) -> Any:
    """Chat messages as a frozen protocol holds them, from mappings or (role, content) pairs; a text as it is."""
    if isinstance(given, str):
        return given
    pairs = [(each["role"], each["content"]) if isinstance(each, Mapping) else tuple(each) for each in given]
    return tuple((("role", role), ("content", content)) for role, content in pairs)


@dataclass(frozen=True)
class Preset:
    """A published way of measuring, exactly.

    Attributes:
        name: on the command line.
        benchmarks: what it measures on.
        baseline: how a model is asked that was not trained in a run.
        trained: how a run's model is asked.
        samples: of a trained model, by benchmark, where they are not those of `trained`.
        count: questions of each benchmark; None: all.
        source: where it was published.
        differs: what is not as there.
    """

    name: str
    benchmarks: tuple[str, ...]
    baseline: Protocol
    trained: Protocol
    samples: Mapping[str, int]
    count: int | None
    source: str
    differs: str

    def of(self, role: str, benchmark: str) -> Protocol:
        """The protocol for a "baseline" or a "trained" model on one benchmark."""
        if role == "baseline":
            return self.baseline
        return replace(self.trained, samples=self.samples.get(benchmark, self.trained.samples))


_SIMPLERL = ("gsm8k", "math500", "minerva_math", "olympiadbench", "aime24", "amc23")
# simpleRL-reason grades the last box, by a comparison of its own.
_GREEDY = Protocol(answer_choice="last", max_tokens=16000)
_R1RL = Protocol(
    prompt_template="r1rl",
    answer_format="tagged",
    answer_choice="first",
    answer_match="exact",
    temperature=0.9,
    max_tokens=750,
)
_R1RL_SOURCE = "R1RL (github.com/dhh1995/R1RL), src/r1rl: TRL's default temperature of its day, 750 tokens"
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="simplerl-v0",
            benchmarks=("math500", "minerva_math", "olympiadbench", "aime24", "amc23"),
            baseline=_GREEDY,
            trained=_GREEDY,
            samples={},
            count=None,
            source="simpleRL-reason v0 (hkust-nlp.notion.site/simplerl-reason): greedy, pass@1",
            differs="the verifier is ours (docs/grading.md)",
        ),
        Preset(
            name="simplerl-v1",
            benchmarks=_SIMPLERL,
            baseline=_GREEDY,
            trained=replace(_GREEDY, temperature=1.0, top_p=0.95),
            samples={"aime24": 32},
            count=None,
            source="SimpleRL-Zoo, arXiv:2503.18892, and its eval_math_nodes.sh: baselines greedy, trained models "
            "T=1.0 top-p 0.95, 16,000 tokens, avg@32 on AIME 2024",
            differs="the verifier is ours (docs/grading.md); models that the paper asked with the simpler prompt "
            "(Qwen2.5-0.5B and 1.5B, Llama-3.1-8B, Mistral-7B) need --prompt_template abel",
        ),
        Preset("r1rl", ("gsm8k",), _R1RL, _R1RL, {}, 200, _R1RL_SOURCE, "the 200 questions are another draw"),
        Preset("r1rl-full", ("gsm8k",), _R1RL, _R1RL, {}, None, _R1RL_SOURCE, "nothing known"),
    )
}


def verifier_version() -> dict[str, Any]:
    """What grades: a hash over the files that decide a verdict, and the packages that they ask."""
    folder = Path(tasks.__file__).parent
    files = sorted(file for pattern in VERIFIER_FILES for file in folder.glob(pattern))
    content = b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)
    packages = {name: metadata.version(name) for name in VERIFIER_PACKAGES}
    return {"r1zero": __version__, "sha256": hashlib.sha256(content).hexdigest(), **packages}


def _json(text: Any) -> Any:
    return text if isinstance(text, str) else [list(pair) for pair in text]
