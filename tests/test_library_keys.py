"""The committed table of TRL's keys: true to the installed TRL, quick, and strict about values."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import library_keys
from r1zero.library_keys import CHOICES_IN_PROSE, LibraryKey, check, load, parse_text
from r1zero.recipe import own_keys
from r1zero.removed_keys import REMOVED

PUBLIC_RECIPES = sorted((Path(__file__).parent / "recipes").glob("*.yaml"))
# Words in REMOVED's sentences that look like keys but are values or members of a dict.
NOT_KEYS = {"use_reentrant", "flash_attention_2"}


def key(
    *kinds: str, choices: tuple[Any, ...] | None = None, items: tuple[str, ...] = (), default: Any = None
) -> LibraryKey:
    return LibraryKey("key", kinds, default, choices, "Test", "", items)


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return library_keys.generate()


# --- the table


def test_table_is_that_of_the_installed_trl(fresh: dict[str, Any]) -> None:
    committed = json.loads(library_keys.TABLE.read_text())
    for owner, keys in json.loads(json.dumps(fresh["keys"])).items():
        assert committed["keys"][owner] == keys, (
            f"{owner}: run python -m r1zero.library_keys (table of TRL {committed['trl']}, transformers "
            f"{committed['transformers']}; installed {fresh['trl']}, {fresh['transformers']})"
        )
    assert committed["trl"] == fresh["trl"], "run python -m r1zero.library_keys"
    assert list(committed["keys"]) == list(fresh["keys"]), "run python -m r1zero.library_keys"


def test_rendered_table_reads_back_with_one_key_a_line(fresh: dict[str, Any]) -> None:
    text = library_keys.render(fresh)
    assert json.loads(text) == json.loads(json.dumps(fresh))
    assert sum(line.startswith("   ") for line in text.splitlines()) == sum(map(len, fresh["keys"].values()))


def test_load_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'trl', 'transformers', 'numpy', 'datasets'}"
    code = f"import sys; from r1zero.library_keys import load; load('grpo'); print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[]"


def test_load_is_quick() -> None:
    best = float("inf")
    for _ in range(5):
        library_keys._read.cache_clear()
        load.cache_clear()
        start = time.perf_counter()
        load("grpo")
        best = min(best, time.perf_counter() - start)
    assert best < 0.02


@pytest.mark.parametrize(
    ("method", "name", "owner", "kinds", "default"),
    [
        ("grpo", "learning_rate", "GRPOConfig", ("float",), 1e-6),
        ("sft", "learning_rate", "SFTConfig", ("float",), 2e-5),
        ("grpo", "bf16", "GRPOConfig", ("bool", "none"), None),
        ("grpo", "save_total_limit", "GRPOConfig", ("int", "none"), None),
        ("grpo", "gradient_checkpointing_kwargs", "GRPOConfig", ("dict", "str", "none"), None),
        ("grpo", "pad_to_multiple_of", "GRPOConfig", ("int", "str", "none"), "auto"),
        ("grpo", "trackio_static_space_id", "GRPOConfig", ("str", "none", "bool"), None),
        ("grpo", "parallelism_config", "GRPOConfig", ("none",), None),
        ("grpo", "include_for_metrics", "GRPOConfig", ("list",), []),
        ("grpo", "lora_target_modules", "ModelConfig", ("list", "none"), None),
        ("sft", "dataset_name", "ScriptArguments", ("str", "none"), None),
    ],
)
def test_kinds_owner_and_default(method: str, name: str, owner: str, kinds: tuple[str, ...], default: Any) -> None:
    entry = load(method)[name]
    assert (entry.owner, entry.kinds, entry.default) == (owner, kinds, default)


def test_choices_come_from_enum_metadata_and_prose() -> None:
    grpo, sft = load("grpo"), load("sft")
    assert grpo["eval_strategy"].choices == ("no", "steps", "epoch")
    assert grpo["dtype"].choices == ("auto", "bfloat16", "float16", "float32")
    assert grpo["vllm_mode"].choices == ("server", "colocate")
    assert "dr_grpo" in (grpo["loss_type"].choices or ())
    assert "nll" in (sft["loss_type"].choices or ()), "SFTConfig declares its own, they must win"
    assert grpo["output_dir"].choices is None


@pytest.mark.parametrize("name", CHOICES_IN_PROSE)
def test_choices_in_prose_are_those_of_the_help_text(name: str) -> None:
    from trl import GRPOConfig

    help_text = GRPOConfig.__dataclass_fields__[name].metadata["help"]
    words = {choice for choice in CHOICES_IN_PROSE[name] if isinstance(choice, str)}
    assert words <= set(re.findall(r"\w+", help_text))
    cited = {"sequence"} if name == "loss_type" else set()  # luspo's text cites another key's value
    assert set(re.findall(r"'(\w+)'", help_text)) - cited <= words, "TRL has a value that the table lacks"


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_every_default_is_legal_and_every_help_one_line(method: str) -> None:
    for entry in load(method).values():
        assert check(entry, entry.default) == entry.default, entry.name
        assert entry.kinds and entry.help and "\n" not in entry.help, entry.name


def test_help_is_the_first_sentence() -> None:
    assert library_keys._first_sentence("Use X (e.g. A) or\n Y. Then more.") == "Use X (e.g. A) or Y."


# --- check


@pytest.mark.parametrize(
    ("legal", "value", "expected"),
    [
        (key("float"), 1, 1.0),
        (key("float"), "1e-5", 1e-5),
        (key("float", "none"), None, None),
        (key("int", "float"), 3, 3),
        (key("int"), 3, 3),
        (key("bool"), False, False),
        (key("str"), "7", "7"),
        (key("str", "float"), "1e-5", "1e-5"),
        (key("list", items=("float",)), [1, "0.5"], [1.0, 0.5]),
        (key("list"), [1, {"a": None}], [1, {"a": None}]),
        (key("list", "none", items=("str",)), "all-linear", ["all-linear"]),
        (key("str", "list", items=("str",)), "wandb", "wandb"),
        (key("dict", "str"), {"a": 1}, {"a": 1}),
        (key("str", choices=("no", "steps")), False, "no"),
        (key("str", "none", choices=("a",)), None, None),
    ],
)
def test_check_accepts(legal: LibraryKey, value: Any, expected: Any) -> None:
    result = check(legal, value)
    assert result == expected and type(result) is type(expected)
    if isinstance(result, list):
        assert [type(member) for member in result] == [type(member) for member in expected]


@pytest.mark.parametrize(
    ("legal", "value", "message"),
    [
        (key("int"), True, "expects int, got True (bool)"),
        (key("float"), True, "expects float, got True (bool)"),
        (key("bool"), 1, "expects bool, got 1 (int)"),
        (key("bool"), "true", "expects bool, got 'true' (str)"),
        (key("int"), 1.0, "expects int, got 1.0 (float)"),
        (key("int", "none"), "8", "expects int or null, got '8' (str)"),
        (key("float"), "fast", "expects float, got 'fast' (str)"),
        (key("float"), "1e999", "expects float, got '1e999' (str)"),
        (key("float"), None, "expects float, got None (NoneType)"),
        (key("str"), 7, "expects str, got 7 (int)"),
        (key("str"), False, "expects str, got False (bool)"),
        (key("list", items=("float",)), ["a"], "expects list of float, got ['a'] (list)"),
        (key("list", items=("float",)), [True], "expects list of float, got [True] (list)"),
        (key("dict"), [1], "expects dict, got [1] (list)"),
        (key("str", choices=("no", "steps")), "never", "expects one of no, steps, got 'never' (str)"),
        (key("str", choices=("a",)), False, "expects str, got False (bool)"),
    ],
)
def test_check_refuses(legal: LibraryKey, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(legal, value)


# --- parse_text


@pytest.mark.parametrize(
    ("legal", "text", "expected"),
    [
        (key("bool"), "True", True),
        (key("bool", "none"), "false", False),
        (key("int"), "-3", -3),
        (key("float"), "1e-5", 1e-5),
        (key("float"), "3", 3.0),
        (key("int", "none"), "none", None),
        (key("str", "none"), "NULL", None),
        (key("str", "none", "list", default="none"), "none", "none"),
        (key("str"), "none", "none"),
        (key("str"), "12", "12"),
        (key("int", "str"), "auto", "auto"),
        (key("list", items=("float",)), "[1, 0.5]", [1.0, 0.5]),
        (key("list", items=("str",)), "q_proj", ["q_proj"]),
        (key("dict", "str", "none"), '{"use_reentrant": false}', {"use_reentrant": False}),
        (key("dict", "str"), "{min_lr_rate: 0.1}", {"min_lr_rate": 0.1}),
        (key("str"), "[text]", "[text]"),
        (key("str", choices=("no", "steps")), "no", "no"),
    ],
)
def test_parse_text_accepts(legal: LibraryKey, text: str, expected: Any) -> None:
    result = parse_text(legal, text)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("legal", "text", "message"),
    [
        (key("bool"), "yes", "expects bool, got 'yes' (str)"),
        (key("bool"), "1", "expects bool, got '1' (str)"),
        (key("int"), "1e3", "expects int, got '1e3' (str)"),
        (key("int"), "true", "expects int, got 'true' (str)"),
        (key("int"), "none", "expects int, got 'none' (str)"),
        (key("float"), "1e999", "expects float, got '1e999' (str)"),
        (key("float"), "", "expects float, got '' (str)"),
        (key("dict"), "{a: [", "expects dict, got '{a: [', which is neither JSON nor YAML"),
        (key("dict"), "[1]", "expects dict, got [1] (list)"),
        (key("int", choices=(4, 8)), "5", "expects one of 4, 8, got 5 (int)"),
    ],
)
def test_parse_text_refuses(legal: LibraryKey, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_text(legal, text)


def test_report_to_none_is_a_word() -> None:
    assert parse_text(load("grpo")["report_to"], "none") == "none"


# --- removed keys and public recipes


def test_no_removed_key_still_exists(fresh: dict[str, Any]) -> None:
    installed = {name for keys in fresh["keys"].values() for name in keys}
    assert sorted(set(REMOVED) & (installed | set(own_keys()))) == []


@pytest.mark.parametrize("name", REMOVED)
def test_removed_keys_point_to_keys_that_exist(name: str) -> None:
    sentence = REMOVED[name]
    assert sentence == sentence.strip() and "\n" not in sentence and len(sentence) > 10
    legal = {*load("grpo"), *load("sft"), *own_keys()}
    called = set(re.findall(r"it is called (\w+)", sentence))
    snake = set(re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", sentence)) - NOT_KEYS - {name}
    assert sorted((called | snake) - legal) == []


def test_there_are_four_public_recipes() -> None:
    assert len(PUBLIC_RECIPES) == 4


@pytest.mark.parametrize("path", PUBLIC_RECIPES, ids=lambda path: path.stem)
def test_public_recipe_keys_are_known_and_values_legal(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    legal = {**load("grpo"), **own_keys()}
    assert sorted(set(recipe) - set(legal) - set(REMOVED)) == []
    for name in set(recipe) & set(legal):
        check(legal[name], recipe[name])
