"""A recipe through `load`: overrides, defaults, what is written down of it, and public recipes of other projects."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import hardware, library_keys, plan, recipe, recipe_faults, run_folder
from r1zero.removed_keys import REMOVED
from tests.conftest import PROJECT

TINY = "recipes/tiny/arithmetic_grpo.yaml"
RECIPES = sorted(path.relative_to(PROJECT) for path in (PROJECT / "recipes").rglob("*.yaml"))
PUBLIC = sorted((PROJECT / "tests" / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--max_steps", "3"], "max_steps", 3),
        (["--max_steps=3"], "max_steps", 3),
        (["--max-steps", "3"], "max_steps", 3),
        (["--max-steps=3"], "max_steps", 3),
        (["--max_steps", "3", "--max_steps", "4"], "max_steps", 4),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate", "2"], "learning_rate", 2.0),
        (["--epsilon_high", "-0.5"], "epsilon_high", -0.5),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
        (["--gradient_checkpointing", "--max_steps", "3"], "gradient_checkpointing", True),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "[tensorboard, wandb]"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "none"], "report_to", "none"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules", ["q_proj"]),
        (["--run_name", "a=b"], "run_name", "a=b"),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--run_name", "-"], "run_name", "-"),
        (["--max_completion_length", "null"], "max_completion_length", None),
        (["--model_init_kwargs", '{"a": 1}'], "model_init_kwargs", {"a": 1}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_override_in_each_form(words: list[str], key: str, value: Any) -> None:
    loaded = recipe.load(TINY, words)
    assert loaded[key] == value and type(loaded[key]) is type(value)
    assert loaded.overrides == tuple(words)


def test_an_override_of_our_own_keys() -> None:
    own = recipe.load(TINY, ["--eval-count", "null", "--eval_temperature", "0", "--remove_commas", "false"]).own
    assert (own.eval_count, own.eval_temperature, own.remove_commas) == (None, 0.0, False)


def test_the_overridden_value_of_the_file_is_not_even_looked_at(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {recipe.TINY_MODEL}\ntask: arithmetic\nmax_steps: many\n")
    assert recipe.load(tmp_path / "r.yaml", ["--max_steps", "3"])["max_steps"] == 3


def test_the_method_can_be_overridden_and_decides_which_keys_are_legal() -> None:
    with pytest.raises(recipe.RecipeError, match="num_generations = 8: belongs to method grpo"):
        recipe.load(TINY, ["--method", "sft"])


@pytest.mark.parametrize("words", [["--method"], ["--method", "grpo", "sft"]], ids=["no value", "two"])
def test_a_method_that_is_none(words: list[str]) -> None:
    with pytest.raises(recipe.RecipeError, match="is not a method\n    -> one of: grpo, sft"):
        recipe.load(TINY, words)


def test_what_the_recipe_leaves_open_is_trls_default() -> None:
    loaded = recipe.load(TINY)
    for key in ("epsilon", "loss_type", "save_strategy"):
        assert key not in loaded.library
        assert loaded[key] == library_keys.load("grpo")[key].default


@pytest.mark.parametrize(
    ("where", "name"),
    [("tiny/add.yaml", "tiny-add"), ("recipes/add.yaml", "add"), ("recipes/tiny/add.yaml", "tiny-add")],
)
def test_the_name_of_a_recipe_is_its_folder_and_file(where: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(f"model_name_or_path: {recipe.TINY_MODEL}\ntask: arithmetic\n")
    assert recipe.load(path).name == name


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_what_is_written_into_the_run_folder_loads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    first = recipe.load(path, ["--max_steps", "3", "--report_to", "none", "--learning_rate=1e-5"])
    run_folder.write_yaml(tmp_path / "recipe.yaml", first.resolved())
    again = recipe.load(tmp_path / "recipe.yaml")
    assert (again.own, again.library) == (first.own, first.library)
    assert again.resolved() == first.resolved()


def test_what_a_recipe_says_of_its_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["--model_name_or_path", str(tmp_path), "--use_vllm", "true", "--vllm_mode"]
    server, inside = recipe.load(TINY, [*words, "server"]), recipe.load(TINY, [*words, "colocate"])
    named = recipe.load(TINY, [*words, "server", "--vllm_server_base_url", "http://127.0.0.1:1"])
    without = recipe.load(TINY)
    facts = [
        (r.uses_vllm, r.dedicated_server, r.running_server, r.launches_server) for r in (server, inside, named, without)
    ]
    assert facts == [
        (True, True, None, True),
        (True, False, None, False),
        (True, True, "http://127.0.0.1:1", False),
        (False, False, None, False),
    ]


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_a_public_recipe_is_told_every_key_that_is_gone_at_once(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    gone = [key for key in given if key in REMOVED]
    assert gone
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(path)
    assert [fault.key for fault in error.value.faults] == gone
    for key in gone:
        assert REMOVED[key] in str(error.value)


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_a_public_recipe_loads_once_those_keys_are_out(path: Path, tmp_path: Path) -> None:
    out = {*REMOVED, *recipe_faults.WITHOUT_EFFECT, "reward_funcs", "reward_weights"}  # theirs have other names
    left = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in out}
    (tmp_path / "left.yaml").write_text(yaml.safe_dump(left))
    loaded = recipe.load(tmp_path / "left.yaml")
    assert loaded.model == left["model_name_or_path"]
    assert set(loaded.library) == set(left)


def test_what_a_run_writes_down_can_be_run_again() -> None:
    loaded = recipe.load(TINY, ["--output_dir", "somewhere"])
    assert loaded["output_dir"] == "somewhere"
    assert "output_dir" not in loaded.resolved()


def test_the_table_of_r1rls_arguments_says_what_the_recipe_has() -> None:
    text = (PROJECT / "recipes" / "README.md").read_text().partition("## R1RL's command line")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    loaded = recipe.load("recipes/qwen2.5-3b/gsm8k_qlora.yaml")
    legal = {**library_keys.load("grpo"), **recipe.own_keys()}
    compared = []
    for _, _, key, value in rows[1:]:
        name = re.match(r"`(\w+)`", key)
        quoted = re.match(r"`([^`]+)`", value)
        if name and quoted:
            given = getattr(loaded.own, name[1]) if name[1] in recipe.own_keys() else loaded[name[1]]
            assert library_keys.parse_text(legal[name[1]], quoted[1]) == given, key
            compared.append(name[1])
    assert len(rows) == 28 and len(compared) == 22


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_an_emptied_key_is_planned_or_refused_but_never_a_crash(path: Path) -> None:
    method = recipe.load(path).own.method
    tried = 0
    for key in {**library_keys.load(method), **recipe.own_keys()}.values():
        if "none" in key.kinds:
            tried += 1
            try:
                plan.make(recipe.load(path, [f"--{key.name}", "null"]), hardware.assumed("1x2"), Path("run"), Path())
            except recipe.RecipeError as error:
                assert error.faults[0].key
    assert tried > 50


def test_a_file_that_cannot_be_read_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(recipe.RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "latin.yaml")
    with pytest.raises(recipe.RecipeError, match="cannot be read"):
        recipe.load(tmp_path)


def test_an_empty_file_has_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(recipe.RecipeError, match="model_name_or_path: is missing"):
        recipe.load(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer_gpus", "-1"], "trainer_gpus = -1: cannot be negative"),
        (["--eval_temperature", "-1"], "eval_temperature = -1.0: cannot be negative"),
        (["--num_generations", "null"], "num_generations: GRPO compares the completions"),
        (["--prompt_template"], "prompt_template = '': has no value\n    -> give str or list: how a question becomes"),
        (["--report_to", "a", "b", "--run_name", "a", "b"], "run_name = 'a b': takes one value"),
    ],
)
def test_refused_overrides(words: list[str], message: str) -> None:
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(TINY, words)
    assert message in str(error.value)
    assert len(error.value.faults) == 1


def test_a_recipe_that_does_not_exist_lists_those_that_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(recipe.RecipeError, match=r"recipes that exist: .*arithmetic_grpo\.yaml"):
        recipe.load("zzz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipe.RecipeError, match="recipes that exist: none here"):
        recipe.load("zzz")
