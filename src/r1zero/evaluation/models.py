"""What is evaluated: a model of the hub or a folder, or what a run made of one, with the run's own way of asking."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1zero import recipe as recipes
from r1zero.checkpoints import by_step, step_of
from r1zero.evaluation.protocol import Protocol, messages
from r1zero.recipe import TINY_MODEL, OwnKeys, Recipe
from r1zero.run_folder import RunFolder, read_json

ROLES = ("baseline", "trained")
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# Of a config.json: what may differ between two models whose weights fit into the same server.
_NOT_THE_SHAPE = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
DEFAULT_TOKENS = 1024  # of a completion, where a run's recipe has no limit


class ModelError(Exception):
    """Something that cannot be evaluated; the message says what was looked for, and what to give instead."""


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate.

    >>> Candidate("base", "Qwen/Qwen2.5-3B", role="baseline").adapter is None
    True

    Attributes:
        label: what tables call it.
        base: whole weights: a folder or a hub id.
        adapter: a LoRA adapter's folder on top of them; None for none.
        tokenizer: folder or hub id.
        role: "trained" for what a run made, else "baseline".
        step: optimizer steps of its run; None for a final model or one of no run.
        revision: of `base` on the hub.
        trust_remote_code: run code that comes with the model.
        run: the run's folder.
        recipe: of that run.
    """

    label: str
    base: str
    adapter: Path | None = None
    tokenizer: str = ""
    role: str = "baseline"
    step: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    run: Path | None = None
    recipe: Recipe | None = field(default=None, compare=False)

    @property
    def weights(self) -> str:
        """What makes it another model than those of the same base."""
        return str(self.adapter or self.base)

    @property
    def rounded(self) -> bool:
        """Whether it was trained on a base in 4 bits: then that rounded base is what its adapter belongs to."""
        return self.recipe is not None and bool(self.recipe["load_in_4bit"])

    def written(self) -> dict[str, Any]:
        """As a result keeps it."""
        return {
            "label": self.label,
            "role": self.role,
            "base": self.base,
            "adapter": None if self.adapter is None else str(self.adapter),
            "revision": self.revision,
            "run": None if self.run is None else str(self.run),
            "step": self.step,
            "rounded_base": self.rounded,
            "weights_sha256": fingerprint(Path(self.weights)),
        }


def find(words: Sequence[str], checkpoints: str = "final", with_base: bool = False) -> list[Candidate]:
    """The models that the words of a command line name.

    Args:
        words: run folders, folders or hub ids; ``LABEL=MODEL`` says what tables call it.
        checkpoints: of each run: "final", "all", or steps such as "50,100,final".
        with_base: the model that each run began with comes before it.

    Raises:
        ModelError: there is no such model, checkpoint or run.
    """
    found: list[Candidate] = []
    for word in words:
        label, equals, place = word.partition("=")
        if not equals:
            label, place = "", word
        for candidate in _of(place, label, checkpoints, with_base):
            if not any((each.weights, each.base) == (candidate.weights, candidate.base) for each in found):
                found.append(candidate)
    labels = [each.label for each in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ModelError(f"two models would be called {', '.join(twice)}: name them, LABEL=MODEL")
    return found


def own_protocol(recipe: Recipe) -> Protocol:
    """How a recipe measures its own model."""
    own, grpo = recipe.own, recipe.own.method == "grpo"
    longest = recipe["max_completion_length"] if grpo else recipe["max_length"]
    return Protocol(
        prompt_template=messages(own.prompt_template),
        answer_format=recipe.answer_format,
        answer_choice=own.answer_choice,
        answer_match=own.answer_match,
        remove_commas=own.remove_commas,
        stop_strings=tuple(own.stop_strings or ()),
        samples=own.eval_samples,
        temperature=own.eval_temperature,
        top_p=float(recipe["top_p"]) if grpo else 1.0,
        max_tokens=int(longest or DEFAULT_TOKENS),
    )


def rounded_base(candidate: Candidate) -> str:
    """The base in the 4 bits that the adapter of a `rounded` candidate was trained on; made where it is not cached."""
    from r1zero import quantized_base

    assert candidate.recipe is not None  # noqa: S101 - `rounded` is the recipe's word
    return str(quantized_base.ensure(candidate.base, candidate.revision, quantized_base.Settings.of(candidate.recipe)))


def shape(place: str) -> str:
    """Equal for two models whose weights fit into the same server; a hub id fits itself only."""
    config = Path(place) / "config.json"
    if not config.is_file():
        return place
    content = {key: value for key, value in json.loads(config.read_text()).items() if key not in _NOT_THE_SHAPE}
    return json.dumps(content, sort_keys=True)


def fingerprint(folder: Path) -> str | None:
    """A hash over names, sizes and headers of a local model's weights; None for one of the hub.

    Not over all of the weights, which would take as long as loading them: the first and last megabyte of each file.
    """
    if not folder.is_dir():
        return None
    found = hashlib.sha256()
    for file in sorted(file for pattern in WEIGHTS for file in folder.glob(pattern)):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            found.update(content.read(2**20))
            content.seek(max(0, size - 2**20))
            found.update(content.read())
    return found.hexdigest()


def _of(place: str, label: str, checkpoints: str, with_base: bool) -> list[Candidate]:
    folder = Path(place).expanduser()
    if place == TINY_MODEL:
        from r1zero import model_facts

        made = model_facts.path_of(place)
        return [Candidate(label or "tiny-arithmetic", made, tokenizer=made)]
    if not folder.is_dir():
        return [_of_the_hub(place, label)]
    if (folder / "recipe.yaml").is_file():
        return _of_run(RunFolder(folder), label, checkpoints, with_base)
    if not _has_weights(folder):
        raise ModelError(
            f"{folder}: neither a run (no recipe.yaml) nor a model (no {WEIGHTS[0]} or {WEIGHTS[1]} in it)"
        )
    for run in folder.resolve().parents[:2]:
        if (run / "recipe.yaml").is_file():
            recipe = _recipe(run / "recipe.yaml")
            step = step_of(folder)
            which = "best" if folder.resolve() == RunFolder(run).best else step
            named = label or (run.name if which is None else f"{run.name}@{which}")
            base = [_base_of(recipe, "")] if with_base else []
            return [*base, _made_by(RunFolder(run), recipe, folder, named, step)]
    if (folder / "adapter_config.json").is_file():
        base_name = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
        return [Candidate(label or folder.name, base_name, folder, _tokenizer(folder, base_name))]
    return [Candidate(label or folder.name, str(folder), tokenizer=str(folder))]


def _of_the_hub(place: str, label: str) -> Candidate:
    from r1zero import model_facts

    if recipes.looks_like_a_path(place):
        raise ModelError(f"{place}: no such folder; give a run folder, a model's folder or a hub id")
    try:
        model_facts.read(place, None, download=True)
    except model_facts.ModelNotFound as error:
        raise ModelError(f"{place}: no folder of that name, and from the hub it cannot be had: {error}") from error
    return Candidate(label or place, place, tokenizer=place)


def _of_run(folder: RunFolder, label: str, checkpoints: str, with_base: bool) -> list[Candidate]:
    recipe, named = _recipe(folder.recipe), label or folder.path.name
    candidates = [_base_of(recipe, "")] if with_base else []
    for step in _steps(folder, checkpoints):
        place = folder.model if step is None else folder.checkpoints / f"checkpoint-{step}"
        if not _has_weights(place):
            there = ", ".join(map(str, _saved(folder))) or "none"
            what = "final model" if step is None else f"checkpoint {step}"
            raise ModelError(
                f"{folder.path}: has no {what} ({place} holds no weights); its checkpoints: {there}; --checkpoints "
                "names those to take"
            )
        candidates.append(_made_by(folder, recipe, place, named if step is None else f"{named}@{step}", step))
    return candidates


def _steps(folder: RunFolder, checkpoints: str) -> list[int | None]:
    """Those that were asked for in ascending order, None for the final model."""
    if checkpoints == "all":
        final: list[int | None] = [None] if _has_weights(folder.model) else []
        return [*_saved(folder), *final]
    steps: list[int | None] = []
    for word in checkpoints.split(","):
        if word != "final" and not word.isdecimal():
            raise ModelError(f"--checkpoints {checkpoints}: {word!r} is neither a step, nor all, nor final")
        steps.append(None if word == "final" else int(word))
    return steps


def _saved(folder: RunFolder) -> list[int]:
    return sorted(step for step, path in by_step(folder.checkpoints).items() if _has_weights(path))


def _has_weights(folder: Path) -> bool:
    configured = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return configured and any(True for pattern in WEIGHTS for _ in folder.glob(pattern))


def _made_by(folder: RunFolder, recipe: Recipe, place: Path, label: str, step: int | None) -> Candidate:
    adapter = (place / "adapter_config.json").is_file()
    base = _base_of(recipe, "")
    return Candidate(
        label=label,
        base=base.base if adapter else str(place),
        adapter=place.absolute() if adapter else None,
        tokenizer=_tokenizer(place, base.base),
        role="trained",
        step=step,
        revision=base.revision if adapter else None,
        trust_remote_code=base.trust_remote_code,
        run=folder.path,
        recipe=recipe,
    )


def _base_of(recipe: Recipe, label: str) -> Candidate:
    """The model that a run began with."""
    from r1zero import model_facts

    place = model_facts.path_of(recipe.model)
    named = label or (Path(place).name if Path(place).is_dir() else place)
    if named == "model":  # of another run, such as a cold start
        named = f"{Path(place).resolve().parent.name}/model"
    revision = recipe["model_revision"]
    return Candidate(
        label=named,
        base=place,
        tokenizer=place,
        revision=None if revision == "main" else revision,
        trust_remote_code=bool(recipe["trust_remote_code"]),
        recipe=recipe,
    )


def _tokenizer(folder: Path, base: str) -> str:
    return str(folder) if (folder / "tokenizer_config.json").is_file() else base


def _recipe(path: Path) -> Recipe:
    """The recipe of a run, which was checked when it ran: its data or its first model may be elsewhere by now."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {key: value for key, value in given.items() if key in recipes.own_keys()}
    library = {key: value for key, value in given.items() if key not in own}
    return Recipe(path.resolve().parent.name, path, (), OwnKeys(**own), library)
