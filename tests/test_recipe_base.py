"""A recipe laid over another: `base`."""

from pathlib import Path

import pytest
import yaml

from r1zero import hardware, plan, recipe, run_folder
from r1zero.model_facts import ModelFacts, ModelShape
from tests.conftest import PROJECT

BASE = {"model_name_or_path": recipe.TINY_MODEL, "task": "arithmetic", "max_steps": 7, "learning_rate": 1e-5}


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def write(path: Path, **keys: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(keys))
    return path


def test_the_recipe_is_laid_over_its_base_and_overrides_over_both(tmp_path: Path) -> None:
    write(tmp_path / "family" / "base.yaml", **BASE)
    write(tmp_path / "family" / "middle.yaml", base="base.yaml", max_steps=8, seed=5)
    child = write(tmp_path / "models" / "small.yaml", base="../family/middle.yaml", learning_rate=2e-5)
    loaded = recipe.load(child, ["--seed", "6"])
    assert (loaded.name, loaded["max_steps"], loaded["learning_rate"], loaded["seed"]) == ("models-small", 8, 2e-5, 6)
    assert loaded.own.task == "arithmetic"


def test_what_is_written_is_flat(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **BASE)
    loaded = recipe.load(write(tmp_path / "small.yaml", base="base.yaml", seed=5))
    assert "base" not in loaded.resolved()
    (tmp_path / "run").mkdir()
    run_folder.write_yaml(tmp_path / "run" / "recipe.yaml", loaded.resolved())
    again = recipe.load(tmp_path / "run" / "recipe.yaml")
    assert (again.own, again.library) == (loaded.own, loaded.library)


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("gone.yaml", "base = 'gone.yaml': no such file, seen from "),
        ("", "base = '': is not the path of a recipe"),
        (["a.yaml", "b.yaml"], "is not the path of a recipe"),
        ("small.yaml", "leads in a circle: "),
        ("other.yaml", "leads in a circle: "),
    ],
)
def test_a_base_that_cannot_be_read_is_refused_by_name(base: object, why: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", base="small.yaml")
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(write(tmp_path / "small.yaml", **{**BASE, "base": base}))
    assert why in str(caught.value) and "nothing was started" in str(caught.value)


def test_a_fault_in_the_base_is_found_and_a_base_is_no_override(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **{**BASE, "learnin_rate": 1})
    with pytest.raises(recipe.RecipeError, match="did you mean learning_rate"):
        recipe.load(write(tmp_path / "small.yaml", base="base.yaml"))
    with pytest.raises(recipe.RecipeError, match="it cannot be overridden"):
        recipe.load(write(tmp_path / "alone.yaml", **BASE), ["--base", "base.yaml"])


def _qwen(*shape: int, tied: bool = False) -> ModelFacts:
    return ModelFacts(131072, "qwen2", ModelShape(*shape, tied))


ZOO = {
    "base": ("1x8:80", _qwen(3584, 28, 28, 4, 128, 18944, 152064)),
    "qwen2.5-0.5b": ("1x8:40", _qwen(896, 24, 14, 2, 64, 4864, 151936, tied=True)),
    "qwen2.5-1.5b": ("1x8:80", _qwen(1536, 28, 12, 2, 128, 8960, 151936, tied=True)),
    "qwen2.5-7b": ("1x8:80", _qwen(3584, 28, 28, 4, 128, 18944, 152064)),
    "qwen2.5-14b": ("4x8:80", _qwen(5120, 48, 40, 8, 128, 13824, 152064)),
    "qwen2.5-32b": ("4x8:80", _qwen(5120, 64, 40, 8, 128, 27648, 152064)),
    "qwen2.5-math-7b": ("1x8:80", ModelFacts(4096, "qwen2", ModelShape(3584, 28, 28, 4, 128, 18944, 152064, False))),
    "llama-3.1-8b": ("1x8:80", ModelFacts(131072, "llama", ModelShape(4096, 32, 32, 8, 128, 14336, 128256, False))),
    "mistral-7b-v0.1": ("1x8:80", ModelFacts(32768, "mistral", ModelShape(4096, 32, 32, 8, 128, 14336, 32000, False))),
    "mistral-small-24b": (
        "4x8:80",
        ModelFacts(32768, "mistral", ModelShape(5120, 40, 32, 8, 128, 32768, 131072, False)),
    ),
    "deepseek-math-7b": ("1x8:80", ModelFacts(4096, "llama", ModelShape(4096, 30, 32, 32, 128, 11008, 102400, False))),
}


def test_the_whole_ladder_is_there() -> None:
    assert {path.stem for path in Path("recipes/simplerl-zoo").glob("*.yaml")} == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_is_planned_for_its_hardware_and_shares_the_familys_facts(name: str) -> None:
    machine, facts = ZOO[name]
    loaded = recipe.load(f"recipes/simplerl-zoo/{name}.yaml")
    ports = tuple(range(41001, 41041))
    planned = plan.make(loaded, hardware.assumed(machine, ports), Path("runs/run"), Path(), facts)
    assert planned.servers and planned.memory
    assert (planned.batch.group, loaded["learning_rate"], loaded["temperature"]) == (8, 5e-7, 1.0)
    assert (loaded["beta"], loaded["entropy_coef"]) == (
        1e-3 if name in ("qwen2.5-32b", "mistral-small-24b") else 1e-4,
        1e-3,
    )
    assert loaded.template.name in ("qwen_boxed", "abel") and loaded.answer_format == "boxed"
    assert 60 <= planned.batch.prompts_per_step <= 66
