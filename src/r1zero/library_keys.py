"""The libraries' own recipe keys, known without importing torch.

Where TRL's `TrlParser` learns its keys from the dataclasses at run time, which costs seconds of imports, this reads a
table that was generated from them and is committed beside it. ``python -m r1zero.library_keys`` writes it anew after an
upgrade of TRL; a test holds it against the installed TRL.
"""

import dataclasses
import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_suffix(".json")
OWNERS = {
    "grpo": ("GRPOConfig", "ModelConfig", "ScriptArguments"),
    "sft": ("SFTConfig", "ModelConfig", "ScriptArguments"),
}
# What a config takes beyond its annotation: GRPOConfig.__post_init__ reads scale_rewards true as group, false as none.
BEYOND_ANNOTATION = {"scale_rewards": ("bool",)}
# Sets that TRL states only in a help text's prose; left to TRL, a wrong loss_type would be noticed in the first step.
CHOICES_IN_PROSE: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers"),
}
_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "none"}
_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MISFIT = object()


@dataclass(frozen=True)
class LibraryKey:
    """One key of a recipe: what it may hold and what it means.

    >>> load("grpo")["save_total_limit"].kinds
    ('int', 'none')

    Attributes:
        name: the key.
        kinds: what a value may be, of bool, int, float, str, list, dict and none.
        default: the dataclass's default as a JSON value, before any ``__post_init__``.
        choices: the legal values, or None where any value of the right kind is legal.
        owner: the dataclass the key belongs to.
        help: its help text's first sentence.
        items: what the members of a list may be; empty: anything.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any
    choices: tuple[Any, ...] | None
    owner: str
    help: str
    items: tuple[str, ...] = ()


@functools.lru_cache
def load(method: str) -> dict[str, LibraryKey]:
    """The keys that a recipe of this method, grpo or sft, may take from TRL."""
    tables = _read()["keys"]
    return {
        name: LibraryKey(
            name=name,
            kinds=tuple(entry["kinds"]),
            default=entry["default"],
            choices=tuple(entry["choices"]) if "choices" in entry else None,
            owner=owner,
            help=entry["help"],
            items=tuple(entry.get("items", ())),
        )
        for owner in OWNERS[method]
        for name, entry in tables[owner].items()
    }


@functools.lru_cache
def _read() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def check(key: LibraryKey, value: Any) -> Any:
    """The value as the key holds it, converted only where nothing can be lost.

    An int becomes a float, ``1e-5`` (text to PyYAML, which wants ``1.0e-5``) becomes a float, one word becomes a list
    of one, and a bare ``no`` (false to PyYAML) becomes the choice ``no``.

    Raises:
        ValueError: "expects <kind>, got <repr> (<type>)"; the caller knows the key's name.
    """
    if value is False and "bool" not in key.kinds and "no" in (key.choices or ()):
        value = "no"
    fitted = _fit(key.kinds, key.items, value)
    if fitted is _MISFIT:
        raise ValueError(f"expects {_spoken(key)}, got {value!r} ({type(value).__name__})")
    if key.choices is not None and fitted is not None and fitted not in key.choices:
        legal = ", ".join(str(choice) for choice in key.choices)
        raise ValueError(f"expects one of {legal}, got {value!r} ({type(value).__name__})")
    return fitted


def parse_text(key: LibraryKey, text: str) -> Any:
    """The value that one command-line word stands for, by what the key may hold.

    Raises:
        ValueError: as `check`.
    """
    word = text.strip().lower()
    # report_to's "none" is a value of its own (report nowhere), not the absence of one.
    if "none" in key.kinds and (word == "null" or (word == "none" and key.default != "none")):
        return None
    if "bool" in key.kinds and word in ("true", "false"):
        return word == "true"
    if "int" in key.kinds and _WHOLE.fullmatch(word):
        return check(key, int(word))
    if "float" in key.kinds and _is_number(word):
        return check(key, float(word))
    # A text may begin with a brace, "{question} ...", where the key takes texts and no mapping.
    a_text = word.startswith("{") and "str" in key.kinds and "dict" not in key.kinds
    if word.startswith(("[", "{")) and not {"list", "dict"}.isdisjoint(key.kinds) and not a_text:
        try:
            return check(key, yaml.safe_load(text))
        except yaml.YAMLError:
            raise ValueError(f"expects {_spoken(key)}, got {text!r}, which is neither JSON nor YAML") from None
    if "list" in key.kinds and "str" not in (*key.kinds, *key.items):
        return parse_texts(key, [text])
    return check(key, text)


def parse_texts(key: LibraryKey, texts: Sequence[str]) -> Any:
    """The list that command-line words stand for, each a member by itself.

    Raises:
        ValueError: as `check`.
    """
    member = dataclasses.replace(key, kinds=key.items or ("str",), items=(), choices=None)
    try:
        return check(key, [parse_text(member, text) for text in texts])
    except ValueError:
        raise ValueError(f"expects {_spoken(key)}, got {' '.join(texts)!r}") from None


def _fit(kinds: Sequence[str], items: Sequence[str], value: Any) -> Any:
    """The value as one of the kinds, or `_MISFIT`. A bool is no int here, though Python says so."""
    if value is None:
        return None if "none" in kinds else _MISFIT
    if isinstance(value, bool):
        return value if "bool" in kinds else _MISFIT
    if isinstance(value, int) and "int" not in kinds:
        return float(value) if "float" in kinds else _MISFIT
    if isinstance(value, str) and "str" not in kinds:
        if "float" in kinds and _is_number(value):
            return float(value)
        return _fit(kinds, items, [value]) if "list" in kinds else _MISFIT
    if isinstance(value, list | tuple) and "list" in kinds:
        members = [_fit(items, (), member) if items else member for member in value]
        return _MISFIT if any(member is _MISFIT for member in members) else members
    return value if type(value).__name__ in kinds else _MISFIT


def _is_number(text: str) -> bool:
    """Whether the text is a plain decimal that a float can hold: not nan, not inf, not 1e999."""
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _spoken(key: LibraryKey) -> str:
    list_of = f"list of {' or '.join(key.items)}" if key.items else "list"
    return " or ".join({"none": "null", "list": list_of}.get(kind, kind) for kind in key.kinds)


def generate() -> dict[str, Any]:
    """The table from the installed TRL. Imports torch, so nothing but `main` and the test calls it."""
    import transformers
    import trl

    owners = dict.fromkeys(owner for names in OWNERS.values() for owner in names)
    keys = {owner: _describe(getattr(trl, owner)) for owner in owners}
    for names in OWNERS.values():
        every = [key for name in names for key in keys[name]]
        shared = {key for key in every if every.count(key) > 1}
        if shared:
            raise ValueError(f"two of {', '.join(names)} share a key: {', '.join(sorted(shared))}")
    return {"trl": trl.__version__, "transformers": transformers.__version__, "keys": keys}


def _describe(config: type[Any]) -> dict[str, dict[str, Any]]:
    hints = typing.get_type_hints(config)
    return {item.name: _entry(item, hints[item.name]) for item in dataclasses.fields(config) if item.init}


def _entry(item: "dataclasses.Field[Any]", hint: Any) -> dict[str, Any]:
    members = _members(hint)
    kinds = [kind for member in members for kind in _kinds(member)]
    entry: dict[str, Any] = {"kinds": list(dict.fromkeys([*kinds, *BEYOND_ANNOTATION.get(item.name, ())]))}
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    if default is dataclasses.MISSING:
        raise ValueError(f"{item.name} has no default; `LibraryKey` cannot say so")
    entry["default"] = default.value if isinstance(default, enum.Enum) else default
    choices = item.metadata.get("choices") or _choices(members) or CHOICES_IN_PROSE.get(item.name)
    if choices:
        entry["choices"] = [choice.value if isinstance(choice, enum.Enum) else choice for choice in choices]
    items = [kind for m in members if typing.get_origin(m) is list for a in typing.get_args(m) for kind in _kinds(a)]
    if items:
        entry["items"] = items
    entry["help"] = _first_sentence(item.metadata.get("help", ""))
    return entry


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _kinds(member: Any) -> Iterable[str]:
    """The kinds of one member of a union. A class that YAML cannot write (ParallelismConfig) has none."""
    bare = typing.get_origin(member) or member
    if bare is typing.Literal:
        return [_SCALARS[type(value)] for value in typing.get_args(member)]
    if bare in _SCALARS:
        return [_SCALARS[bare]]
    if bare in (list, dict):
        return [bare.__name__]
    return ["str"] if isinstance(bare, type) and issubclass(bare, enum.Enum) else []


def _choices(members: Iterable[Any]) -> list[Any]:
    """An enum closes the set although HF writes ``SomeEnum | str``; a Literal closes it only with no str beside it."""
    members = list(members)
    for member in members:
        if isinstance(member, type) and issubclass(member, enum.Enum):
            return list(member)
        if typing.get_origin(member) is typing.Literal and str not in members:
            return list(typing.get_args(member))
    return []


def _first_sentence(text: str) -> str:
    text = " ".join(text.split())
    return re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<=\.) (?=[A-Z`'(])", text, maxsplit=1)[0]


def render(table: dict[str, Any]) -> str:
    """The table as JSON with one key a line, so that an upgrade of TRL reads well as a diff."""
    owners = []
    for owner, keys in table["keys"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in keys.items())
        owners.append(f"  {json.dumps(owner)}: {{\n{lines}\n  }}")
    versions = "".join(f" {json.dumps(name)}: {json.dumps(table[name])},\n" for name in ("trl", "transformers"))
    return "{\n" + versions + ' "keys": {\n' + ",\n".join(owners) + "\n }\n}\n"


def main() -> None:
    """Write the table anew from the installed TRL."""
    from rich.console import Console

    table = generate()
    TABLE.write_text(render(table), encoding="utf-8")
    counts = ", ".join(f"{owner} {len(keys)}" for owner, keys in table["keys"].items())
    Console(soft_wrap=True).print(f"{TABLE}: TRL {table['trl']}, transformers {table['transformers']}; {counts}")


if __name__ == "__main__":
    main()
