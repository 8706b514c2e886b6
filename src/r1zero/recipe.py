"""A recipe: flat YAML in Hugging Face names, then ``--key value`` overrides, checked as a whole before anything starts.

TRL's keys (``GRPOConfig`` or ``SFTConfig``, ``ModelConfig``, ``ScriptArguments``) keep their names and their meaning;
they are known here from a generated table, so that a wrong key is answered at once and without importing torch. Our own
keys are the fields of `OwnKeys`: their one documentation is the help text beside each.
"""

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1zero import library_keys
from r1zero.hardware import MOST_SERVERS_PER_GPU
from r1zero.library_keys import LibraryKey
from r1zero.removed_keys import REMOVED
from r1zero.reporting import ailments
from r1zero.tasks import prompts, rewards, sources
from r1zero.tasks.answers import ANSWER_CHOICES, ANSWER_FORMATS
from r1zero.tasks.decontamination import DEFAULT_NGRAM
from r1zero.tasks.prompts import TEMPLATES, Template
from r1zero.tasks.rewards import RewardError, RewardFunction
from r1zero.tasks.sources import SIMPLERL_LEVELS, TASKS
from r1zero.tasks.verifier import ANSWER_MATCHES, Verifier

METHODS = ("grpo", "sft")
PUBLISH_ROUTES = ("auto", "adapter", "folded", "nccl", "shared_memory")
SERVER_BASES = ("rounded", "unrounded", "vllm_4bit")
TAGGED_TASKS = ("arithmetic", "gsm8k")  # where neither recipe nor template says how an answer is given
TINY_MODEL = "r1zero/tiny-arithmetic"
BASE = "base"  # the one key that is about the file and not about the run

# How the name of a model or dataset begins that is no hub id: runs/ is where this project lays models down.
PATH_STARTS = (".", "/", "~", "runs/")
# What people type for it elsewhere, where the spelling alone would not lead there.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "base": "a line base: OTHER.yaml in the recipe; it cannot be overridden",
    "config": "the recipe itself, first and without a key: launch/run.py RECIPE",
    "dry_run": "--dry-run, with a hyphen",
    "dryrun": "--dry-run",
}


def _key(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(
        default_factory=lambda: copy.copy(default), metadata={"default": default, "help": help, "choices": choices}
    )


@dataclass(frozen=True)
class OwnKeys:
    """The keys that are ours and not TRL's. ``launch/run.py --help`` prints this list."""

    method: str = _key("grpo", "what trains: grpo (reinforcement learning) or sft (cold start)", METHODS)
    task: str = _key(
        "gsm8k",
        "what is asked: arithmetic (makes its own sums), gsm8k, math (competition mathematics in its published forms) "
        "or dataset (any, by its columns); dataset_name is a hub id, a folder or a file, empty for the task's own",
        TASKS,
    )
    question_column: str | None = _key(
        None, "the column with the question, for task math or dataset; empty: question, for math also problem"
    )
    answer_column: str | None = _key(
        None,
        "the column with the gold answer, for task math or dataset; empty: answer, for math also final_answer or the "
        "last \\boxed{} of the solution",
    )
    solution_column: str | None = _key(
        None,
        "the column with a worked solution, for task math or dataset; empty: solution for math, else none; the cold "
        "start learns from it",
    )
    levels: list[int] | None = _key(
        None,
        "train only on problems whose column level says one of these, for task math or dataset; empty: "
        f"{', '.join(map(str, SIMPLERL_LEVELS))} for math where there is such a column, as simpleRL; all are measured",
    )
    mixture: list[dict[str, Any]] | None = _key(
        None,
        "several datasets to train on, in place of task and dataset_name: a list of mappings with task and, where "
        "wanted, dataset_name, dataset_config, split, weight (its share, relative to the other weights), "
        "question_column, answer_column, solution_column, levels",
    )
    shuffle_seed: int | None = _key(
        None, "shuffle the training problems by this seed; empty: as in the dataset (TRL then shuffles by seed)"
    )
    eval_task: str | None = _key(
        None, "what is measured; empty: as in training, for a mixture the test split of each part", TASKS
    )
    eval_dataset_name: str | None = _key(
        None,
        "the dataset to measure on, its split dataset_test_split; empty: as in training, for math's own "
        f"{sources.MEASURED_ON['math']}",
    )
    decontaminate_ngram: int = _key(
        DEFAULT_NGRAM,
        "leave out training problems that share this many words in a row with a question that is measured; shorter "
        "questions are compared whole; 0: never; words",
    )
    decontaminate_against: list[str] | None = _key(
        None,
        "further datasets whose questions training must not contain, since they are measured later: hub ids, folders "
        "or files, each with :SPLIT where that is not test",
    )
    prompt_template: str | list[dict[str, str]] = _key(
        "r1rl",
        f"how a question becomes the prompt: {', '.join(TEMPLATES)}; or one of your own, a text or a list of chat "
        "messages {role, content}, with {question} where the question goes",
    )
    stop_strings: list[str] | None = _key(
        None, "a completion ends with the first of these, for example </answer>, as it does with the end token"
    )
    answer_format: str | None = _key(
        None,
        "where the answer is read: tagged (<answer>) or boxed (\\boxed); empty: as the prompt template asks, else "
        "tagged for arithmetic and gsm8k, boxed for all others",
        ANSWER_FORMATS,
    )
    answer_choice: str = _key(
        "agreed",
        "which of several answers counts: first, last, or agreed (where they contradict each other, none)",
        ANSWER_CHOICES,
    )
    answer_match: str = _key(
        "math",
        "what makes an answer right: math (equal in value) or exact (the same text, R1RL's rule)",
        ANSWER_MATCHES,
    )
    reward_funcs: list[str] = _key(
        ["correctness"],
        f"what a completion is rewarded for: {', '.join(rewards.REWARDS)}, or module:function of your own; "
        "TRL's reward_weights gives each its weight",
    )
    correctness_scale: float = _key(1.0, "what the reward correctness gives for a correct answer")
    overlong_cache_tokens: int | None = _key(
        None,
        "how long before max_completion_length the punishment of soft_overlong begins; empty: a fifth of that; tokens",
    )
    repetition_ngram: int = _key(
        20, "words in an n-gram, for the reward repetition; a short one also punishes a formula that is quoted again"
    )
    # A base model starts with 60 to 90 % of its answers unreadable, and a healthy run begins there. Above 90 % four
    # groups of 8 completions in ten hold no answer at all.
    alert_unparsed: float = _key(
        0.9, "say so when a larger share of the completions of the last 10 generations has no answer; 1: never"
    )
    alert_timed_out: float = _key(
        0.01, "say so when the verifier gave up on a larger share of the answers of the last 10 generations; 1: never"
    )
    stop_on: list[str] | None = _key(
        None,
        "stop the run, with a checkpoint, when the doctor sees one of these in its metrics (docs/doctor.md): "
        f"{', '.join(ailments.stoppable('grpo'))}; empty: never",
    )
    remove_commas: bool = _key(True, "drop thousands commas from gold and answer before they are compared")
    max_unreadable_golds: float = _key(
        0.005, "refuse data in which a larger share of the golds cannot be read as an answer; they are listed"
    )
    max_prompt_tokens: int | None = _key(
        None, "leave problems with a longer prompt out of the data, and count them; tokens"
    )
    eval_count: int | None = _key(
        None, "held-out problems to measure on; empty: the whole test split, 0: never measure"
    )
    eval_samples: int = _key(1, "completions sampled for each held-out problem")
    eval_temperature: float = _key(1.0, "sampling temperature when measuring; 0 is greedy")
    keep_best: bool = _key(
        False, "keep the model that measured best so far in RUN_FOLDER/best, beside the final one; with eval_steps"
    )
    accelerate_config: str | None = _key(
        None, "a name in accelerate_configs/ or a file; empty: cpu, single_gpu or ddp, as the number of processes says"
    )
    server_gpus: int | None = _key(
        None,
        "GPUs for the policy servers, vllm_tensor_parallel_size of them for each server; 0: it shares the trainer's; "
        "empty: one server, or 0 where there is only one GPU; on several nodes a whole node",
    )
    servers_per_gpu: int | None = _key(
        None,
        f"policy servers on each of their GPUs, 1 to {MOST_SERVERS_PER_GPU}: what bounds a small model is not the GPU "
        "but the one processor thread of each vLLM engine; empty: 1, or 2 where a model of up to half a billion "
        "weights shares its GPU with the trainer and both fit",
    )
    trainer_gpus: int | None = _key(
        None, "GPUs for the trainer on all nodes, one process each; empty: all that the server leaves; 0: the CPU"
    )
    cpu_processes: int = _key(
        1, "trainer processes on each node that has no GPU; several run under accelerate_config ddp, zero2 or zero3"
    )
    server_ready_timeout: float = _key(600.0, "give up when the policy server has not made a token by then; seconds")
    server_silence_timeout: float = _key(
        30.0, "a policy server that makes no token for so long, when asked for one, has failed; seconds"
    )
    generation_timeout: float = _key(900.0, "one round of generation may take so long; seconds")
    publish_timeout: float = _key(300.0, "a new policy version must have reached the policy server by then; seconds")
    max_restarts: int = _key(
        3, "start server and trainer again, as a pair and from the newest checkpoint, so often after one of them failed"
    )
    preemption_grace: float = _key(
        240.0,
        "after the signal that the time is over (SIGUSR1) the run has so long to write a checkpoint; then it is ended "
        "and goes on from the one before; seconds",
    )
    max_requeues: int = _key(
        3, "give up after so many requeues in a row by which no optimizer step was made; the count is in requeues.json"
    )
    micro_batch_tokens: int | None = _key(
        None,
        "learn without padding, from micro-batches of whole sequences up to so many tokens (prompts and completions) "
        "on each GPU; per_device_train_batch_size and gradient_accumulation_steps then only say how many completions a "
        "step takes; empty: TRL's padded batches; tokens",
    )
    seed_rollouts: bool = _key(
        False,
        "ask the policy server for each completion with a seed of its own, from seed, step and place, so that a run "
        "that was interrupted draws the same ones again; costs some speed",
    )
    max_staleness: int = _key(
        0,
        "with 1 the policy server makes the next window of completions while the trainer learns from this one, which "
        "was then made by the policy of one window before; 0: they take turns, and nothing is stale",
    )
    publish: str = _key(
        "auto",
        "how a new policy version reaches the policy server: adapter or folded (LoRA; folded: the server adds it to "
        "its own weights and generates as fast as without), nccl or shared_memory (all weights); auto: for LoRA folded "
        "where a clean copy of the base fits on the GPU or in the host's memory, else adapter; for all weights nccl "
        "where server and trainer have GPUs of their own, else shared_memory",
        PUBLISH_ROUTES,
    )
    server_base: str = _key(
        "rounded",
        "with load_in_4bit, what the policy server serves beneath the adapter: rounded (the trainer's own 4-bit values "
        "in bf16), unrounded (the original weights: another policy than the trainer's) or vllm_4bit (vLLM's own)",
        SERVER_BASES,
    )
    probe_tolerance: float = _key(
        0.1,
        "stop when, after a publish, the log-probabilities of server and trainer on fixed tokens differ by more than "
        "this on average; nats",
    )
    gpu_memory_limit: float | None = _key(
        None, "hold server and trainer together to so much of each GPU they share; empty: all of it; GiB"
    )
    runs_dir: str = _key(
        "runs", "where run folders go, one per run, named by recipe and time; output_dir names one exactly"
    )


@dataclass(frozen=True)
class MixtureEntry:
    """One entry of a recipe's mixture; its keys mean what they mean in a recipe of one dataset."""

    task: str = _key("dataset", "how the dataset is read", TASKS)
    dataset_name: str | None = _key(None, "hub id, folder or file; empty: the task's own")
    dataset_config: str | None = _key(None, "the dataset's configuration")
    split: str = _key("train", "the split to train on")
    weight: float = _key(1.0, "the share of the training problems, relative to the other weights")
    question_column: str | None = _key(None, "the column with the question")
    answer_column: str | None = _key(None, "the column with the gold answer")
    solution_column: str | None = _key(None, "the column with a worked solution")
    levels: list[int] | None = _key(None, "the levels to train on")


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: the key, its value, why it cannot be, and what to do."""

    key: str
    value: Any
    why: str
    remedy: str

    def __str__(self) -> str:
        shown = f" = {self.value!r}" if self.value is not None else ""
        return f"{self.key}{shown}: {self.why}\n    -> {self.remedy}"


class RecipeError(Exception):
    """A recipe that cannot run. Carries every fault found, so that one edit can mend them all."""

    def __init__(self, source: str, faults: Sequence[Fault]) -> None:
        self.source = source
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source}: {count}, nothing was started\n" + "\n".join(f"  {fault}" for fault in self.faults))


@dataclass(frozen=True)
class Recipe:
    """What to train, how, and on what; complete and checked, except for what only the hardware can tell.

    >>> recipe = load("recipes/tiny/arithmetic_grpo.yaml", ["--max_steps", "3"])
    >>> recipe.name, recipe.own.task, recipe["max_steps"], recipe["num_iterations"]
    ('tiny-arithmetic_grpo', 'arithmetic', 3, 1)

    Attributes:
        name: folder and file name of the YAML, for the run folder.
        path: the YAML file.
        overrides: the ``--key value`` arguments as they were given.
        own: our keys, defaults filled in.
        library: the TRL keys that the recipe gives; `recipe[key]` also answers with TRL's default.
    """

    name: str
    path: Path
    overrides: tuple[str, ...]
    own: OwnKeys
    library: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value in effect for one of TRL's keys: the recipe's, else TRL's default."""
        if key in self.library:
            return self.library[key]
        return library_keys.load(self.own.method)[key].default

    @property
    def model(self) -> str:
        return str(self["model_name_or_path"])

    @property
    def mixture(self) -> tuple[MixtureEntry, ...] | None:
        """The datasets of the mixture, None where the recipe trains on one."""
        if self.own.mixture is None:
            return None
        return tuple(MixtureEntry(**checked_entry(entry)[0]) for entry in self.own.mixture)

    @property
    def template(self) -> Template:
        """How a question becomes the prompt."""
        return prompts.template(self.own.prompt_template)

    @property
    def answer_format(self) -> str:
        """Where answers are read, "tagged" or "boxed": the recipe's word, else the template's, else the task's."""
        task = "tagged" if self._asks_for_numbers else "boxed"
        return self.own.answer_format or self.template.answer_format or task

    @property
    def _asks_for_numbers(self) -> bool:
        """Whether every answer of the tasks is a plain number."""
        tasks = [self.own.task] if self.mixture is None else [entry.task for entry in self.mixture]
        return all(task in TAGGED_TASKS for task in tasks) and self.own.eval_task in (None, *TAGGED_TASKS)

    def verifier(self) -> Verifier:
        """What grades the run's completions; starts no process yet."""
        return Verifier(
            answer_format=self.answer_format,
            answer_choice=self.own.answer_choice,
            answer_match=self.own.answer_match,
            remove_commas=self.own.remove_commas,
            numbers=self._asks_for_numbers,
        )

    def reward_functions(self) -> list[RewardFunction]:
        """The functions of ``reward_funcs``, in that order; the user's own are imported, from the current folder too.

        Raises:
            RecipeError: one cannot be imported or called.
        """
        shape = rewards.Shape(
            template=self.template,
            answer_format=self.answer_format,
            max_completion_length=self["max_completion_length"],
            correctness_scale=self.own.correctness_scale,
            overlong_cache_tokens=self.own.overlong_cache_tokens,
            repetition_ngram=self.own.repetition_ngram,
        )
        try:
            return rewards.make(self.own.reward_funcs, shape)
        except RewardError as error:
            fault = Fault("reward_funcs", error.name, error.why, error.remedy)
            raise RecipeError(str(self.path), [fault]) from error

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM generates, in a process of its own or inside the trainer; the cold start generates nothing."""
        return self.own.method == "grpo" and bool(self["use_vllm"])

    @property
    def dedicated_server(self) -> bool:
        """Whether generation happens in a vLLM process of its own (TRL's ``vllm_mode: server``)."""
        return self.uses_vllm and self["vllm_mode"] == "server"

    @property
    def running_server(self) -> str | None:
        """The address of a policy server that the user started, where the recipe names one."""
        return self["vllm_server_base_url"] if self.dedicated_server else None

    @property
    def launches_server(self) -> bool:
        """Whether the policy server is ours to start."""
        return self.dedicated_server and self.running_server is None

    @property
    def servers_per_gpu(self) -> int:
        """What is asked for; 1 where it is left open, of which the plan may make 2."""
        return 1 if self.own.servers_per_gpu is None else self.own.servers_per_gpu

    def served_dtype(self, cpu: bool) -> str:
        """The type of the weights that the policy server computes with, as vLLM and torch name it."""
        if self["fp16"]:
            return "float16"
        return "float32" if cpu and not self["bf16"] else "bfloat16"

    def resolved(self) -> dict[str, Any]:
        """Every own key and every given TRL key, flat, as it is written into the run folder and can be run again.

        Without output_dir: running it again must not ask for the folder of the first time.
        """
        given = {key: value for key, value in self.library.items() if key != "output_dir"}
        return {**dataclasses.asdict(self.own), **given}

    def fault(self, key: str, why: str, remedy: str) -> "RecipeError":
        """The error that names `key` with its value in effect."""
        value = getattr(self.own, key) if hasattr(self.own, key) else self[key]
        return RecipeError(str(self.path), [Fault(key, value, why, remedy)])


def own_keys() -> dict[str, LibraryKey]:
    """Our keys in the same form as the libraries', so that one checker and one parser serve both."""
    return _keys_of(OwnKeys)


def _keys_of(owner: type[OwnKeys] | type[MixtureEntry]) -> dict[str, LibraryKey]:
    hints = typing.get_type_hints(owner)
    keys = {}
    for item in dataclasses.fields(owner):
        hint = hints[item.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple("none" if member is type(None) else member.__name__ for member in members)
        keys[item.name] = LibraryKey(
            name=item.name,
            kinds=kinds,
            default=item.metadata["default"],
            choices=item.metadata["choices"],
            owner="r1zero",
            help=item.metadata["help"],
            items=tuple(item.__name__ for each in members for item in typing.get_args(each)),
        )
    return keys


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay the overrides over it, check every key and every combination.

    Args:
        path: a YAML file of flat ``key: value`` pairs; with ``base: OTHER.yaml`` it is laid over that one.
        overrides: command-line words, ``--key value`` or ``--key=value``; a bare ``--flag`` means true.

    Raises:
        RecipeError: with every fault found.
    """
    path = Path(path)
    given = _with_base(path)
    texts = _split_overrides(overrides, str(path))
    method = " ".join(texts["method"]) if "method" in texts else given.get("method", "grpo")
    if method not in METHODS:
        raise RecipeError(str(path), [Fault("method", method, "is not a method", f"one of: {', '.join(METHODS)}")])
    legal = {**library_keys.load(method), **own_keys()}
    faults: list[Fault] = []
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in texts:
            continue
        if key not in legal:
            faults.append(_unknown(key, value, method, legal))
            continue
        try:
            values[key] = library_keys.check(legal[key], value)
        except ValueError as error:
            faults.append(Fault(key, value, str(error), _type_remedy(legal[key], value)))
    for key, words in texts.items():
        if key not in legal:
            faults.append(_unknown(key, " ".join(words), method, legal))
            continue
        try:
            values[key] = _parse_words(legal[key], words)
        except ValueError as error:
            faults.append(Fault(key, " ".join(words), str(error), _type_remedy(legal[key], " ".join(words))))
    if faults:
        raise RecipeError(str(path), faults)
    own_names = {item.name for item in dataclasses.fields(OwnKeys)}
    recipe = Recipe(
        name=_name_of(path),
        path=path,
        overrides=tuple(overrides),
        own=OwnKeys(**{key: value for key, value in values.items() if key in own_names}),
        library={key: value for key, value in values.items() if key not in own_names},
    )
    from r1zero.recipe_faults import impossible  # which knows what a recipe is

    faults = list(impossible(recipe))
    if faults:
        raise RecipeError(str(path), faults)
    return recipe


def _with_base(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe, laid over those of its ``base``: a path relative to the recipe's own folder.

    A family of recipes so shares its facts. What is loaded, and written into the run folder, is flat.

    Args:
        path: of the recipe.
        derived: the recipes that are laid over this one, the last first.
    """
    given = _read_yaml(path)
    if BASE not in given:
        return given
    base, chain = given.pop(BASE), (path, *derived)
    if not isinstance(base, str) or not base:
        fault = Fault(BASE, base, "is not the path of a recipe", "write base: ../family/base.yaml, or leave it out")
        raise RecipeError(str(path), [fault])
    file = path.parent / base
    if not file.is_file():
        why = f"no such file, seen from {path.parent}"
        raise RecipeError(str(path), [Fault(BASE, base, why, "mend the path, which is relative to this recipe")])
    if file.resolve() in {each.resolve() for each in chain}:
        circle = " -> ".join(map(str, (*reversed(chain), file)))
        raise RecipeError(str(path), [Fault(BASE, base, f"leads in a circle: {circle}", "leave one of them out")])
    return {**_with_base(file, chain), **given}


def _name_of(path: Path) -> str:
    folder = path.resolve().parent.name
    return path.stem if folder in ("", "recipes") else f"{folder}-{path.stem}"


class _NoDuplicates(yaml.SafeLoader):
    """A safe loader that refuses a key written twice, where YAML would quietly keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = sorted(str(p) for p in Path("recipes").rglob("*.yaml"))
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "recipes that exist: " + (", ".join(names) or "none here")
        raise RecipeError(str(path), [Fault("recipe", None, "no such file", hint)]) from None
    except (OSError, UnicodeDecodeError) as error:
        inside = ", ".join(sorted(map(str, path.glob("*.yaml")))) if path.is_dir() else ""
        remedy = f"give one of {inside}" if inside else "give a YAML file"
        raise RecipeError(str(path), [Fault("recipe", None, f"cannot be read: {error}", remedy)]) from None
    try:
        content = yaml.load(text, Loader=_NoDuplicates)  # a SafeLoader
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise RecipeError(str(path), [Fault("recipe", None, f"is not valid YAML: {why}", "mend that line")]) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        remedy = "write flat 'key: value' lines"
        raise RecipeError(str(path), [Fault("recipe", None, f"holds a {type(content).__name__}", remedy)])
    return {str(key): value for key, value in content.items()}


def _split_overrides(words: Iterable[str], source: str) -> dict[str, list[str]]:
    """``--key value value`` words by key. Only ``--`` begins a key, so that -0.5 can be a value."""
    texts: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            current = texts[key.replace("-", "_")] = [value] if equals else []
        elif current is None:
            key, _, value = word.partition("=")
            remedy = f"did you mean --{key} {value}?" if value else "write overrides as --key value"
            fault = Fault(word, None, "is neither the recipe nor a --key", remedy)
            raise RecipeError(source, [fault])
        else:
            current.append(word)
    return texts


def _parse_words(key: LibraryKey, words: list[str]) -> Any:
    if not words:
        if "bool" in key.kinds:
            return True
        raise ValueError("has no value")
    if len(words) > 1:
        if "list" not in key.kinds:
            raise ValueError("takes one value")
        return library_keys.parse_texts(key, words)
    return library_keys.parse_text(key, words[0])


def _type_remedy(key: LibraryKey, value: Any) -> str:
    if key.choices:
        choices = [str(choice) for choice in key.choices]
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f"did you mean {near[0]}?" if near else "one of: " + ", ".join(choices)
    kinds = " or ".join("null" if kind == "none" else kind for kind in key.kinds)
    return f"give {kinds}: {key.help}" if key.help else f"give {kinds}"


def _unknown(key: str, value: Any, method: str, legal: Mapping[str, LibraryKey]) -> Fault:
    if key in REMOVED:
        return Fault(key, value, "no longer exists in TRL or open-r1 as pinned here", REMOVED[key])
    for other in METHODS:
        if other != method and key in library_keys.load(other):
            return Fault(key, value, f"belongs to method {other}, this recipe's method is {method}", "leave it out")
    if key in ALIASES:
        return Fault(key, value, "is not a key", f"did you mean {ALIASES[key]}?")
    near = difflib.get_close_matches(key, legal, n=3, cutoff=0.6)
    if near:
        also = f" (or {', '.join(near[1:])})" if len(near) > 1 else ""
        return Fault(key, value, "is not a key", f"did you mean {near[0]}?{also}")
    return Fault(
        key, value, "is not a key", "launch/run.py --help lists our keys; TRL's GRPOConfig documents the others"
    )


def checked_entry(entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The keys of a mixture's entry as `MixtureEntry` takes them, and what is wrong with the others."""
    legal = _keys_of(MixtureEntry)
    values: dict[str, Any] = {}
    faults = []
    for key, value in entry.items():
        if key not in legal:
            near = difflib.get_close_matches(str(key), legal, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"one of: {', '.join(legal)}"
            faults.append(Fault(str(key), value, "is not a key of an entry", remedy))
            continue
        try:
            values[key] = library_keys.check(legal[key], value)
        except ValueError as error:
            faults.append(Fault(key, value, str(error), _type_remedy(legal[key], value)))
    if "task" not in entry:
        faults.append(Fault("task", None, "is missing", f"one of: {', '.join(TASKS)}"))
    return values, faults


def looks_like_a_path(name: str) -> bool:
    return name.startswith(PATH_STARTS) or name.count("/") > 1
