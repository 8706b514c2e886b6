"""A recipe: flat YAML in Hugging Face names, then ``--key value`` overrides, checked as a whole before anything starts.

TRL's keys (``GRPOConfig`` or ``SFTConfig``, ``ModelConfig``, ``ScriptArguments``) keep their names and their meaning;
they are known here from a generated table, so that a wrong key is answered at once and without importing torch. Our own
keys are the fields of `OwnKeys`: their one documentation is the help text beside each.
"""

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
from r1zero.library_keys import LibraryKey
from r1zero.removed_keys import REMOVED
from r1zero.tasks.prompts import TEMPLATES

METHODS = ("grpo", "sft")
TASKS = ("arithmetic", "gsm8k")
TINY_MODEL = "r1zero/tiny-arithmetic"

# Keys of TRL that would be read by nobody here: a run that ignored them would not be the run that was asked for.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "resuming is not built yet; to go on from a model, --model_name_or_path RUN/model",
    "dataset_config": "leave it out: the task knows its dataset",
    "dataset_train_split": "leave it out: training reads the split train, measuring the split test",
    "dataset_test_split": "leave it out: training reads the split train, measuring the split test",
    "dataset_streaming": "leave it out: the data is read whole",
}
# What people type for it elsewhere, where the spelling alone would not lead there.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "config": "the recipe itself, first and without a key: launch/run.py RECIPE",
    "dry_run": "--dry-run, with a hyphen",
    "dryrun": "--dry-run",
}


def _key(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class OwnKeys:
    """The keys that are ours and not TRL's. ``launch/run.py --help`` prints this list."""

    method: str = _key("grpo", "what trains: grpo (reinforcement learning) or sft (cold start)", METHODS)
    task: str = _key("gsm8k", "what is asked and how it is graded", TASKS)
    prompt_template: str = _key("r1rl", "how a question becomes the prompt", tuple(TEMPLATES))
    remove_commas: bool = _key(True, "drop thousands commas from gold and answer before they are compared")
    max_prompt_tokens: int | None = _key(
        None, "leave problems with a longer prompt out of the data, and count them; tokens"
    )
    eval_count: int | None = _key(
        None, "held-out problems to measure on; empty: the whole test split, 0: never measure"
    )
    eval_samples: int = _key(1, "completions sampled for each held-out problem")
    eval_temperature: float = _key(1.0, "sampling temperature when measuring; 0 is greedy")
    accelerate_config: str | None = _key(
        None, "a name in accelerate_configs/ or a file; empty: cpu, single_gpu or ddp, as the trainer's GPUs say"
    )
    server_gpus: int | None = _key(None, "GPUs for the policy server; empty: 1 where the recipe has a dedicated server")
    trainer_gpus: int | None = _key(None, "GPUs for the trainer, one process each; empty: all that the server leaves")
    server_ready_timeout: float = _key(600.0, "give up when the policy server has not made a token by then; seconds")
    runs_dir: str = _key(
        "runs", "where run folders go, one per run, named by recipe and time; output_dir names one exactly"
    )


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
    hints = typing.get_type_hints(OwnKeys)
    keys = {}
    for item in dataclasses.fields(OwnKeys):
        hint = hints[item.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple("none" if member is type(None) else member.__name__ for member in members)
        keys[item.name] = LibraryKey(
            name=item.name,
            kinds=kinds,
            default=item.default,
            choices=item.metadata["choices"],
            owner="r1zero",
            help=item.metadata["help"],
        )
    return keys


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay the overrides over it, check every key and every combination.

    Args:
        path: a YAML file of flat ``key: value`` pairs.
        overrides: command-line words, ``--key value`` or ``--key=value``; a bare ``--flag`` means true.

    Raises:
        RecipeError: with every fault found.
    """
    path = Path(path)
    given = _read_yaml(path)
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
        return library_keys.check(key, words)
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
    elif (_looks_like_a_path(model) or Path(model).is_dir()) and not (
        Path(model).expanduser() / "config.json"
    ).is_file():
        inside = Path(model).expanduser() / "model"
        remedy = f"did you mean {inside}?" if (inside / "config.json").is_file() else "mend the path"
        yield Fault("model_name_or_path", model, "no such model folder (no config.json in it)", remedy)
    data = recipe["dataset_name"]
    if data and _looks_like_a_path(data) and not Path(data).expanduser().exists():
        yield Fault("dataset_name", data, "no such file or folder", "mend the path, or give a hub id")
    elif data and Path(data).expanduser().is_file():
        remedy = f"give its folder, {Path(data).parent}, with train and test in it"
        yield Fault("dataset_name", data, "is a file", remedy)
    if own.task == "arithmetic" and data:
        yield Fault("dataset_name", data, "task arithmetic makes its own problems", "leave dataset_name out")
    for key, least in (("max_prompt_tokens", 1), ("eval_count", 0), ("eval_samples", 1), ("server_gpus", 1)):
        value = getattr(own, key)
        if value is not None and value < least:
            yield Fault(key, value, f"must be at least {least}", "raise it, or leave it out for the default")
    if own.trainer_gpus is not None and own.trainer_gpus < 0:
        yield Fault("trainer_gpus", own.trainer_gpus, "cannot be negative", "0 trains on the CPU")
    if own.eval_temperature < 0:
        yield Fault("eval_temperature", own.eval_temperature, "cannot be negative", "0 is greedy, 1 samples as trained")
    if own.server_ready_timeout <= 0:
        yield Fault("server_ready_timeout", own.server_ready_timeout, "must be positive", "600 seconds is the default")
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
        if recipe[key] and own.accelerate_config is not None and "zero3" in Path(own.accelerate_config).stem:
            why = "ZeRO-3 shards weights, bitsandbytes' quantized ones cannot be sharded"
            yield Fault(key, True, f"{why} (accelerate_config {own.accelerate_config})", "use zero2 or ddp, or drop it")
    if own.method == "grpo":
        yield from _impossible_grpo(recipe)


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
    if recipe["reward_weights"] is not None and len(recipe["reward_weights"]) != 1:
        why = "the task has one reward, the exact answer"
        yield Fault("reward_weights", recipe["reward_weights"], why, "give one weight, or leave it out")
    if recipe.dedicated_server and (recipe["load_in_4bit"] or recipe["load_in_8bit"]):
        why = "TRL's server mode merges the adapter into the base, which quantized weights do not allow (trl#4973)"
        yield Fault("vllm_mode", "server", why, "use vllm_mode: colocate or use_vllm: false")
    if not recipe.dedicated_server and recipe.own.server_gpus is not None:
        why = "this recipe starts no policy server"
        yield Fault("server_gpus", recipe.own.server_gpus, why, "add use_vllm: true and vllm_mode: server, or drop it")
    if recipe["vllm_server_base_url"] is not None and not recipe.dedicated_server:
        why = "without use_vllm: true and vllm_mode: server nothing would talk to it"
        yield Fault("vllm_server_base_url", recipe["vllm_server_base_url"], why, "add both keys, or drop this one")
    if recipe["eval_strategy"] not in ("no", "steps"):
        why = "held-out accuracy is measured by steps"
        yield Fault("eval_strategy", recipe["eval_strategy"], why, "use steps with eval_steps, or no")


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1
