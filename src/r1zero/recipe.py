"""A recipe: flat YAML in Hugging Face names, then ``--key value`` overrides, checked as a whole before anything starts.

TRL's keys (``GRPOConfig`` or ``SFTConfig``, ``ModelConfig``, ``ScriptArguments``) keep their names and their meaning;
they are known here from a generated table, so that a wrong key is answered at once and without importing torch. Our own
keys are the fields of `OwnKeys`: their one documentation is the help text beside each.
"""

import copy
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1zero import library_keys
from r1zero.library_keys import LibraryKey
from r1zero.policy_server import LORA_RANKS
from r1zero.removed_keys import REMOVED
from r1zero.reporting import ailments
from r1zero.tasks import prompts, rewards, rows, sources
from r1zero.tasks.answers import ANSWER_CHOICES, ANSWER_FORMATS
from r1zero.tasks.decontamination import DEFAULT_NGRAM
from r1zero.tasks.prompts import TEMPLATES, Template, TemplateError
from r1zero.tasks.rewards import RewardError, RewardFunction
from r1zero.tasks.sources import SIMPLERL_LEVELS, TASKS
from r1zero.tasks.verifier import ANSWER_MATCHES, Verifier

METHODS = ("grpo", "sft")
PUBLISH_ROUTES = ("auto", "adapter", "folded", "nccl", "shared_memory")
SERVER_BASES = ("rounded", "unrounded", "vllm_4bit")
UNSERVED_MODULES = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out")  # with an adapter
TAGGED_TASKS = ("arithmetic", "gsm8k")  # where neither recipe nor template says how an answer is given
TINY_MODEL = "r1zero/tiny-arithmetic"
BASE = "base"  # the one key that is about the file and not about the run

# Keys of TRL that would be read by nobody here: a run that ignored them would not be the run that was asked for.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "--resume RUN goes on with a run; --model_name_or_path RUN/model begins with its model",
    "load_best_model_at_end": "keep_best: true keeps the model that measured best",
    "dataset_streaming": "leave it out: the data is read whole",
}
# Keys that only one reward reads.
REWARD_KEYS = {
    "correctness_scale": "correctness",
    "overlong_cache_tokens": "soft_overlong",
    "repetition_ngram": "repetition",
}
# Keys of TRL whose loss depends on which sequences go through the model together: packing would change it.
UNPACKABLE = {
    "use_adaptive_entropy": "the entropy bonus is a mean over the tokens of a pass",
    "use_liger_kernel": "its kernels were not compared with packed rows",
    "router_aux_loss_coef": "the load of experts is balanced over the tokens of a pass",
    "torch_compile": "nearly every packed row has other lengths, for which the model would be compiled anew",
}
# How the name of a model or dataset begins that is no hub id: runs/ is where this project lays models down.
PATH_STARTS = (".", "/", "~", "runs/")
PACKABLE_ATTENTION = (None, "sdpa", "flash_attention_2", "flash_attention_3")
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
        return tuple(MixtureEntry(**_checked_entry(entry)[0]) for entry in self.own.mixture)

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
    faults = list(_impossible(recipe))
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


def _impossible(recipe: Recipe) -> Iterable[Fault]:
    """Combinations that no hardware can run. What depends on the hardware is the plan's to refuse."""
    own = recipe.own
    model = recipe["model_name_or_path"]
    if not model:
        yield Fault("model_name_or_path", model, "is missing", "name a hub model, a local folder, or " + TINY_MODEL)
    elif (looks_like_a_path(model) or Path(model).is_dir()) and not (
        Path(model).expanduser() / "config.json"
    ).is_file():
        inside = Path(model).expanduser() / "model"
        remedy = f"did you mean {inside}?" if (inside / "config.json").is_file() else "mend the path"
        yield Fault("model_name_or_path", model, "no such model folder (no config.json in it)", remedy)
    yield from _impossible_data(recipe)
    for key, least in (("max_prompt_tokens", 1), ("eval_count", 0), ("eval_samples", 1), ("server_gpus", 0)):
        value = getattr(own, key)
        if value is not None and value < least:
            yield Fault(key, value, f"must be at least {least}", "raise it, or leave it out for the default")
    if own.trainer_gpus is not None and own.trainer_gpus < 0:
        yield Fault("trainer_gpus", own.trainer_gpus, "cannot be negative", "0 trains on the CPU")
    if own.eval_temperature < 0:
        yield Fault("eval_temperature", own.eval_temperature, "cannot be negative", "0 is greedy, 1 samples as trained")
    for key in ("server_ready_timeout", "server_silence_timeout", "generation_timeout", "publish_timeout"):
        if getattr(own, key) <= 0:
            default = own_keys()[key].default
            yield Fault(key, getattr(own, key), "must be positive", f"{default:g} seconds is the default")
    alarms = ailments.stoppable(own.method)
    for name in own.stop_on or ():
        if name not in alarms:
            why = "is not an alarm" if own.method == "grpo" else f"is not an alarm of method {own.method}"
            remedy = f"one of: {', '.join(alarms)}"
            if "," in name:
                remedy = f"several are words of their own: --stop_on {name.replace(',', ' ')}; {remedy}"
            yield Fault("stop_on", name, why, remedy)
    if own.max_restarts < 0:
        yield Fault("max_restarts", own.max_restarts, "cannot be negative", "0 never starts them again")
    if own.probe_tolerance <= 0:
        why = "must be positive: two programs never agree to the last bit"
        yield Fault("probe_tolerance", own.probe_tolerance, why, f"{own_keys()['probe_tolerance'].default} is usual")
    if own.gpu_memory_limit is not None and own.gpu_memory_limit <= 0:
        yield Fault("gpu_memory_limit", own.gpu_memory_limit, "must be positive", "leave it out for all of the GPU")
    try:
        prompts.template(own.prompt_template)
    except TemplateError as error:
        yield Fault("prompt_template", own.prompt_template, error.why, error.remedy)
    for key, remedy in WITHOUT_EFFECT.items():
        if recipe.library.get(key) not in (None, False, library_keys.load(own.method)[key].default):
            yield Fault(key, recipe[key], "would have no effect here", remedy)
    if recipe["max_steps"] == 0 or recipe["max_steps"] < -1:
        yield Fault("max_steps", recipe["max_steps"], "must be positive", "-1 trains for num_train_epochs")
    if recipe["seed"] < 0:
        yield Fault("seed", recipe["seed"], "cannot be negative", "give 0 or more")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if recipe[key] < 1:
            yield Fault(key, recipe[key], "must be at least 1", "the smallest batch is 1")
    if recipe["bf16"] and recipe["fp16"]:
        yield Fault("fp16", True, "bf16 is true as well", "keep one of the two; bf16 from Ampere GPUs on")
    if recipe["learning_rate"] <= 0:
        yield Fault("learning_rate", recipe["learning_rate"], "must be positive", "GRPO full fine-tuning: about 1e-6")
    if recipe["load_in_4bit"] and recipe["load_in_8bit"]:
        yield Fault("load_in_8bit", True, "load_in_4bit is true as well", "keep one of the two")
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe[key] and not recipe["use_peft"]:
            yield Fault(
                key, True, "quantized weights cannot be trained themselves", "add use_peft: true for an adapter"
            )
    yield from _impossible_packing(recipe)
    yield from _refused_by_the_trainer(recipe)
    if own.method == "grpo":
        yield from _impossible_grpo(recipe)


def _refused_by_the_trainer(recipe: Recipe) -> Iterable[Fault]:
    """What TRL or transformers refuse themselves, or do otherwise than it reads, but only once the servers are up."""
    if recipe["save_strategy"] == "best":
        why = "the trainer measures nothing by itself, so it knows of no best"
        yield Fault("save_strategy", "best", why, "use steps or epoch; keep_best: true keeps the best model")
    if recipe["auto_find_batch_size"]:
        why = "another batch would be another run: a batch holds whole groups, and a checkpoint continues its own"
        yield Fault("auto_find_batch_size", True, why, "drop it; the plan says what fits")
    if recipe["fsdp"]:
        why = "is not supported: weights are published and saved as DeepSpeed's ZeRO shards them"
        yield Fault("fsdp", recipe["fsdp"], why, "use accelerate_config: zero3")
    if recipe.own.method != "grpo":
        return
    if recipe["log_completions_hub_repo"] is not None and not recipe["log_completions"]:
        why = "without log_completions no table of them is made"
        yield Fault(
            "log_completions_hub_repo", recipe["log_completions_hub_repo"], why, "add log_completions: true, or drop it"
        )
    if recipe["sync_ref_model"] and (recipe["beta"] == 0 or recipe["use_peft"]):
        why = (
            "with beta: 0 there is no reference model" if recipe["beta"] == 0 else "an adapter's reference is its base"
        )
        yield Fault("sync_ref_model", True, f"{why}, and so nothing to follow the policy", "drop sync_ref_model")
    if not (recipe["use_vllm"] and recipe["vllm_importance_sampling_correction"]):
        return
    mode = recipe["vllm_importance_sampling_mode"]
    least, most = (recipe[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
    if recipe["loss_type"] == "vespo" and not mode.startswith("token_"):
        why = "loss_type: vespo takes a ratio for each token"
        yield Fault("vllm_importance_sampling_mode", mode, why, "use token_truncate")
    if least is not None and most is not None and least >= most:
        why = f"is not below vllm_importance_sampling_clip_max, {most:g}"
        yield Fault("vllm_importance_sampling_clip_min", least, why, "lower it, or drop it: no ratio is raised then")
    if mode.endswith("_truncate") and least is None and most is None:
        why = f"vllm_importance_sampling_mode: {mode} truncates ratios at it"
        yield Fault("vllm_importance_sampling_clip_max", None, why, "3.0 is TRL's default")


def _impossible_data(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    yield from _absent("dataset_name", recipe["dataset_name"])
    yield from _absent("eval_dataset_name", own.eval_dataset_name)
    for name, _, _ in sources.kept_apart_from(recipe):
        yield from _absent("decontaminate_against", name)
    if own.decontaminate_ngram < 0:
        yield Fault("decontaminate_ngram", own.decontaminate_ngram, "cannot be negative", "0 leaves nothing out")
    if own.decontaminate_against and not own.decontaminate_ngram:
        why = "decontaminate_ngram is 0, which compares nothing"
        yield Fault("decontaminate_against", own.decontaminate_against, why, f"set it to {DEFAULT_NGRAM}, or drop this")
    faults = list(_impossible_training(recipe) if own.mixture is None else _impossible_mixture(recipe))
    yield from faults
    if not faults:  # what is measured follows from what is trained on
        yield from _impossible_measuring(recipe)


def _impossible_training(recipe: Recipe) -> Iterable[Fault]:
    given = _description(recipe)
    yield from _impossible_source(recipe.own.task, given)
    for key, split in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
        if recipe.own.task == "arithmetic" and recipe[key] != split:
            yield Fault(key, recipe[key], f"task arithmetic has its own split {split}", f"leave {key} out")


def _description(recipe: Recipe) -> dict[str, Any]:
    """The keys that describe the one dataset a recipe trains on."""
    ours = ("question_column", "answer_column", "solution_column", "levels")
    library = {key: recipe[key] for key in ("dataset_name", "dataset_config")}
    return library | {key: getattr(recipe.own, key) for key in ours}


def _impossible_source(task: str, given: Mapping[str, Any]) -> Iterable[Fault]:
    """What one dataset to train on cannot be; `given` holds the keys that describe it."""
    if task in ("arithmetic", "gsm8k"):
        what = "makes its own problems" if task == "arithmetic" else "knows its columns, and has no levels"
        legal = () if task == "arithmetic" else ("dataset_name", "dataset_config")
        for key, value in given.items():
            if value is not None and key not in legal:
                yield Fault(key, value, f"task {task} {what}", f"leave {key} out, or take task math or dataset")
    if task == "dataset" and not given["dataset_name"]:
        yield Fault("dataset_name", given["dataset_name"], "is missing: task dataset has none of its own", "name one")
    if given["levels"] == []:
        yield Fault("levels", [], "no level is left", "name some, such as [3, 4, 5], or leave levels out")


def _impossible_mixture(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    if not own.mixture:
        yield Fault("mixture", own.mixture, "holds no dataset", "name some, or leave mixture out")
    given = _description(recipe)
    given["task"] = own.task if own.task != own_keys()["task"].default else None
    given["dataset_train_split"] = recipe.library.get("dataset_train_split")
    for key, value in given.items():
        if value is not None:
            inside = "split" if key == "dataset_train_split" else key
            why = "the mixture says what is trained on"
            yield Fault(key, value, why, f"leave it out, and write {inside} into the entries of the mixture")
    for number, entry in enumerate(own.mixture or (), start=1):
        values, faults = _checked_entry(entry)
        if not faults:
            faults = list(_impossible_entry(MixtureEntry(**values)))
        for fault in faults:
            yield Fault(f"mixture, entry {number}: {fault.key}", fault.value, fault.why, fault.remedy)


def _impossible_entry(entry: MixtureEntry) -> Iterable[Fault]:
    ours = ("dataset_name", "dataset_config", "question_column", "answer_column", "solution_column", "levels")
    yield from _impossible_source(entry.task, {key: getattr(entry, key) for key in ours})
    yield from _absent("dataset_name", entry.dataset_name)
    if entry.weight <= 0:
        yield Fault("weight", entry.weight, "must be positive", "leave the entry out for none of it")
    if entry.task == "arithmetic" and entry.split != "train":
        yield Fault("split", entry.split, "task arithmetic has its own split train", "leave split out")


def _checked_entry(entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
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


def _impossible_measuring(recipe: Recipe) -> Iterable[Fault]:
    """What cannot be measured on, or must not be since it is trained on."""
    own = recipe.own
    if recipe.mixture is not None and own.eval_dataset_name and own.eval_task is None:
        why = "the mixture leaves open how it is read"
        yield Fault("eval_dataset_name", own.eval_dataset_name, why, f"set eval_task, one of: {', '.join(TASKS)}")
        return
    trained = sources.trained_on(recipe)
    for source in sources.measured_on(recipe):
        named = source.dataset_name
        if source.task == "arithmetic" and own.eval_dataset_name:
            why = "task arithmetic makes its own problems, and eval_task is arithmetic"
            yield Fault("eval_dataset_name", named, why, "leave it out, or set eval_task")
        elif source.task == "arithmetic" and source.split != "test":
            yield Fault("dataset_test_split", source.split, "task arithmetic has its own split test", "leave it out")
        elif source.task == "dataset" and named is None:
            why = "is missing: task dataset has none of its own"
            yield Fault("eval_dataset_name", None, why, "name one, or set eval_count: 0 to measure nothing")
        elif source.key != "eval_dataset_name" and named and Path(named).expanduser().is_file():
            remedy = "set eval_dataset_name to what is measured on, or eval_count: 0 to measure nothing"
            yield Fault(source.key, named, "is one file, and all of it is trained on", remedy)
        elif any(rows.same_rows(source.place, each.place) for each in trained):
            key = "eval_dataset_name" if own.eval_dataset_name else "dataset_test_split"
            value = own.eval_dataset_name or source.split
            why = f"is what is trained on: {named}, split {source.split}"
            yield Fault(key, value, why, "measure on another split (dataset_test_split) or dataset (eval_dataset_name)")


def _absent(key: str, name: str | None) -> Iterable[Fault]:
    if name and looks_like_a_path(name) and not rows.local(name):
        yield Fault(key, name, "no such file or folder", "mend the path, or give a hub id")


def _impossible_grpo(recipe: Recipe) -> Iterable[Fault]:
    group = recipe["num_generations"]
    if group is None or group < 2:
        why = "GRPO compares the completions of one prompt with each other"
        yield Fault("num_generations", group, why, "give at least 2; 8 is common")
    if recipe["max_completion_length"] is not None and recipe["max_completion_length"] < 1:
        yield Fault("max_completion_length", recipe["max_completion_length"], "must be at least 1 token", "raise it")
    if recipe["temperature"] <= 0:
        why = "training needs completions that differ"
        yield Fault("temperature", recipe["temperature"], why, "give a positive temperature; 1.0 is TRL's default")
    if recipe["generation_batch_size"] is not None and recipe["steps_per_generation"] is not None:
        why = "steps_per_generation is given as well, and each fixes the other"
        yield Fault("generation_batch_size", recipe["generation_batch_size"], why, "keep one of the two")
    yield from _impossible_rewards(recipe)
    if recipe.own.stop_strings is not None and not all(recipe.own.stop_strings):
        yield Fault("stop_strings", recipe.own.stop_strings, "an empty text stops everything", "leave that one out")
    if recipe.own.stop_strings and recipe["mask_truncated_completions"]:
        why = (
            "TRL takes a completion that ended with a stop string for one that was cut off, and would not learn from it"
        )
        yield Fault(
            "mask_truncated_completions", True, why, "leave out one of mask_truncated_completions, stop_strings"
        )
    for key in ("alert_unparsed", "alert_timed_out", "max_unreadable_golds"):
        if not 0 <= getattr(recipe.own, key) <= 1:
            yield Fault(
                key, getattr(recipe.own, key), "is a share, from 0 to 1", f"{own_keys()[key].default} is the default"
            )
    yield from _impossible_serving(recipe)
    if recipe["vllm_server_base_url"] is not None and not recipe.dedicated_server:
        why = "without use_vllm: true and vllm_mode: server nothing would talk to it"
        yield Fault("vllm_server_base_url", recipe["vllm_server_base_url"], why, "add both keys, or drop this one")
    if recipe["eval_strategy"] not in ("no", "steps"):
        why = "held-out accuracy is measured by steps"
        yield Fault("eval_strategy", recipe["eval_strategy"], why, "use steps with eval_steps, or no")
    if recipe.own.keep_best and (
        recipe["eval_strategy"] != "steps" or recipe.own.eval_count == 0 or recipe.own.method != "grpo"
    ):
        why = "nothing is measured on the way, so there is none to keep"
        yield Fault("keep_best", True, why, "add eval_strategy: steps and eval_steps, or drop keep_best")


def _impossible_packing(recipe: Recipe) -> Iterable[Fault]:
    """What would not be the same loss, or would be learnt across sequences, where batches are packed."""
    budget = recipe.own.micro_batch_tokens
    if budget is None:
        return
    if recipe.own.method != "grpo":
        why = "is for method grpo"
        yield Fault("micro_batch_tokens", budget, why, "the cold start has TRL's packing: true and padding_free: true")
        return
    if budget < 1:
        yield Fault("micro_batch_tokens", budget, "must be at least 1 token", "16384 is a start on a GPU of 80 GB")

    def or_without(what: str) -> str:
        """A value is named: what a base recipe gives cannot be left out."""
        return f"set {what}, or drop micro_batch_tokens"

    if recipe["loss_type"] == "bnpo":
        why = "is a mean over the tokens of a pass, and micro_batch_tokens divides passes anew"
        yield Fault("loss_type", "bnpo", why, "use dapo, a mean over all tokens of a generation, or drop it")
    if recipe["top_entropy_quantile"] < 1:
        why = "which tokens have most entropy depends on the pass, and micro_batch_tokens divides passes anew"
        yield Fault(
            "top_entropy_quantile", recipe["top_entropy_quantile"], why, or_without("top_entropy_quantile: 1.0")
        )
    if recipe["entropy_coef"]:
        why = UNPACKABLE["use_adaptive_entropy"]
        yield Fault("entropy_coef", recipe["entropy_coef"], why, or_without("entropy_coef: 0"))
    legal = library_keys.load("grpo")
    for key, why in UNPACKABLE.items():
        if recipe.library.get(key, legal[key].default) != legal[key].default:
            fine = or_without(f"{key}: {json.dumps(legal[key].default)}")
            yield Fault(key, recipe[key], f"with micro_batch_tokens: {why}", fine)
    # As the model gets it: TRL's own key for anything at all comes after ours.
    attention, init = recipe["attn_implementation"], recipe["model_init_kwargs"]
    if isinstance(init, dict):
        attention = init.get("attn_implementation", attention)
    if attention not in PACKABLE_ATTENTION:
        why = "was not shown to keep packed sequences apart"
        known = ", ".join(name for name in PACKABLE_ATTENTION if name)
        yield Fault("attn_implementation", attention, why, f"leave it out, or one of: {known}")


def _impossible_serving(recipe: Recipe) -> Iterable[Fault]:
    """What no policy server can do, or would do without effect."""
    own = recipe.own
    if recipe["vllm_tensor_parallel_size"] < 1:
        yield Fault(
            "vllm_tensor_parallel_size", recipe["vllm_tensor_parallel_size"], "must be at least 1", "1 is usual"
        )
    if own.max_staleness not in (0, 1):
        yield Fault("max_staleness", own.max_staleness, "must be 0 or 1", "1 overlaps server and trainer, 0 does not")
    if not recipe.dedicated_server:
        for key in ("server_gpus", "publish", "server_base", "gpu_memory_limit", "max_staleness"):
            if getattr(own, key) != own_keys()[key].default:
                why = "this recipe starts no policy server"
                yield Fault(key, getattr(own, key), why, "add use_vllm: true and vllm_mode: server, or drop it")
        return
    if own.max_staleness:
        yield from _impossible_overlap(recipe)
    if recipe["load_in_8bit"]:
        why = "a policy server cannot serve these 8-bit weights, and any others would be another policy"
        yield Fault("load_in_8bit", True, why, "use load_in_4bit: true, or use_vllm: false")
    if own.server_base != own_keys()["server_base"].default and not recipe["load_in_4bit"]:
        why = "would have no effect: server and trainer have the same weights unless load_in_4bit rounds the trainer's"
        yield Fault("server_base", own.server_base, why, "leave it out, or add load_in_4bit: true and use_peft: true")
    if own.publish in ("adapter", "folded") and not recipe["use_peft"]:
        yield Fault("publish", own.publish, "without use_peft there is no adapter", "use auto, or add use_peft: true")
    if own.publish in ("nccl", "shared_memory") and recipe["use_peft"]:
        why = "sends all weights, and with use_peft only those of the adapter change"
        yield Fault("publish", own.publish, why, "use publish: folded, adapter or auto")
    if own.publish == "folded" and own.server_base == "vllm_4bit":
        why = "nothing can be added to weights that vLLM holds in 4 bits (server_base: vllm_4bit)"
        yield Fault("publish", own.publish, why, "use publish: adapter, or server_base: rounded")
    if recipe["use_peft"]:
        yield from _unservable_adapter(recipe)


def _impossible_overlap(recipe: Recipe) -> Iterable[Fault]:
    """What cannot be while the policy server is ahead of the trainer."""
    stale = recipe.own.max_staleness
    if not recipe["vllm_importance_sampling_correction"]:
        why = "what an older policy made is learned from as if the newest had made it, unless that is corrected for"
        remedy = "drop vllm_importance_sampling_correction: false, or max_staleness: 0"
        yield Fault("max_staleness", stale, why, remedy)
    if recipe["vllm_enable_sleep_mode"]:
        why = "the policy server would sleep while the trainer works (vllm_enable_sleep_mode), and so make nothing"
        yield Fault("max_staleness", stale, why, "drop vllm_enable_sleep_mode, or max_staleness: 0")


def _unservable_adapter(recipe: Recipe) -> Iterable[Fault]:
    """Adapters that PEFT can train and vLLM cannot serve."""
    most = LORA_RANKS[-1]
    if not 1 <= recipe["lora_r"] <= most:
        yield Fault("lora_r", recipe["lora_r"], f"vLLM serves adapters of ranks up to {most}", "16 to 64 is usual")
    targets = recipe["lora_target_modules"] or ()
    unserved = [name for name in targets if name.rpartition(".")[2] in UNSERVED_MODULES]
    if unserved:
        why = f"vLLM cannot serve an adapter on {', '.join(unserved)}"
        yield Fault("lora_target_modules", targets, why, "leave that out; the projections of the layers can have one")
    for key, what in (
        ("lora_modules_to_save", "whole modules beside the adapter"),
        ("lora_target_parameters", "an adapter on single parameters"),
        ("use_dora", "DoRA's magnitudes"),
    ):
        if recipe[key]:
            remedy = f"leave {key} out, or use_vllm: false"
            yield Fault(
                key, recipe[key], f"vLLM cannot serve {what}, the policy server would be another policy", remedy
            )


def _impossible_rewards(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    names = own.reward_funcs
    if not names:
        yield Fault(
            "reward_funcs", names, "without a reward there is nothing to learn", "name one, such as correctness"
        )
    for name in names:
        try:
            rewards.check_name(name)
        except RewardError as error:
            yield Fault("reward_funcs", name, error.why, error.remedy)
    metrics = [rewards.metric_name(name) for name in names]
    twice = sorted({name for name in metrics if metrics.count(name) > 1})
    if twice:
        why = f"two of them are called {', '.join(twice)} and would share one metric"
        yield Fault("reward_funcs", names, why, "leave one out, or rename it")
    weights = recipe["reward_weights"]
    if weights is not None and len(weights) != len(names):
        why = f"has {len(weights)} weights for the {len(names)} of reward_funcs: {', '.join(names)}"
        yield Fault("reward_weights", weights, why, "give one weight for each, in that order, or leave it out")
    for key, name in REWARD_KEYS.items():
        if name not in names and getattr(own, key) != own_keys()[key].default:
            yield Fault(key, getattr(own, key), "would have no effect here", f"add {name} to reward_funcs, or drop it")
    limit, cache = recipe["max_completion_length"], own.overlong_cache_tokens
    if cache is not None and limit is not None and not 1 <= cache <= limit:
        why = f"must be from 1 to max_completion_length, which is {limit}"
        yield Fault(
            "overlong_cache_tokens", cache, why, "a fifth of max_completion_length is usual; leave it out for that"
        )
    if limit is None and "soft_overlong" in names:
        why = "is null, and soft_overlong punishes what comes near it"
        yield Fault("max_completion_length", limit, why, "give the limit of a completion in tokens")
    if own.repetition_ngram < 1:
        yield Fault("repetition_ngram", own.repetition_ngram, "must be at least 1 word", "raise it")
    if "tag_count" in names:
        try:
            fitting = recipe.answer_format == "tagged" and recipe.template.reasoning_tag is not None
        except TemplateError:
            return  # said above
        if not fitting:
            why = "tag_count counts reasoning and answer tags, and this prompt_template or answer_format has none"
            yield Fault("reward_funcs", names, why, "leave tag_count out, or take a template with both, such as r1rl")


def looks_like_a_path(name: str) -> bool:
    return name.startswith(PATH_STARTS) or name.count("/") > 1
