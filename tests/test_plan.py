"""The plan is a pure value: the same recipe on the same hardware gives the same text, held whole by golden files."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1zero import hardware, plan, recipe
from r1zero.model_facts import ModelFacts
from tests.conftest import PROJECT

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(path.relative_to(PROJECT) for path in (PROJECT / "recipes").rglob("*.yaml"))
PORTS = (41001, 41002, 41003)


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def plan_of(path: str | Path, machine: str, *overrides: str, model: ModelFacts | None = None) -> plan.Plan:
    loaded = recipe.load(path, overrides)
    return plan.make(loaded, hardware.assumed(machine, PORTS), Path("runs/run"), Path(), model)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_is_parsed_and_planned(path: Path) -> None:
    loaded = recipe.load(path)
    machine = "1x2:80" if loaded.launches_server else "1x0" if loaded.model == recipe.TINY_MODEL else "1x1:24"
    planned = plan.make(loaded, hardware.assumed(machine, PORTS), Path("runs/run"), Path())
    assert planned.processes[-1].name == "trainer"
    assert (planned.server is not None) == loaded.launches_server
    assert str(path) in planned.render()


CASES = {
    "tiny_cpu": ("recipes/tiny/arithmetic_grpo.yaml", "1x0", ()),
    "smollm2_sft_1gpu": ("recipes/smollm2-135m/gsm8k_sft.yaml", "1x1:24", ()),
    "smollm2_grpo_2gpus": ("recipes/smollm2-135m/gsm8k_grpo.yaml", "1x2:80", ()),
    "smollm2_grpo_8gpus_zero3": (
        "recipes/smollm2-135m/gsm8k_grpo.yaml",
        "1x8:80",
        ("--server_gpus", "2", "--trainer_gpus", "6", "--accelerate_config", "zero3", "--num_generations", "16"),
    ),
    "smollm2_grpo_colocate": (
        "recipes/smollm2-135m/gsm8k_grpo.yaml",
        "1x1:24",
        ("--vllm_mode", "colocate", "--server_gpus", "null"),
    ),
    "smollm2_grpo_running_server": (
        "recipes/smollm2-135m/gsm8k_grpo.yaml",
        "1x1:24",
        ("--vllm_server_base_url", "http://127.0.0.1:8000", "--server_gpus", "null"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_text(name: str, request: pytest.FixtureRequest) -> None:
    path, machine, overrides = CASES[name]
    text = plan_of(path, machine, *overrides).render().replace(sys.executable, "python")
    golden = GOLDEN / f"plan_{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_plan_is_pure() -> None:
    assert plan_of("recipes/smollm2-135m/gsm8k_grpo.yaml", "1x2") == plan_of(
        "recipes/smollm2-135m/gsm8k_grpo.yaml", "1x2"
    )


def test_server_and_trainer_never_share_a_gpu_and_the_addresses_agree() -> None:
    planned = plan_of("recipes/smollm2-135m/gsm8k_grpo.yaml", "1x8", "--server_gpus", "2", "--trainer_gpus", "4")
    assert planned.server is not None
    assert not set(planned.server.gpus) & set(planned.trainer.gpus)
    assert (len(planned.server.gpus), len(planned.trainer.gpus)) == (2, 4)
    port = planned.server.argv[planned.server.argv.index("--port") + 1]
    url = planned.trainer.argv[planned.trainer.argv.index("--vllm_server_base_url") + 1]
    assert url == planned.server_url == f"http://127.0.0.1:{port}"
    assert planned.server.argv[planned.server.argv.index("--tensor-parallel-size") + 1] == "2"
    assert planned.server.argv[planned.server.argv.index("--max-model-len") + 1] == str(384 + 192)


def test_batch_arithmetic() -> None:
    batch = plan_of("recipes/smollm2-135m/gsm8k_grpo.yaml", "1x5", "--trainer_gpus", "4").batch
    assert (batch.samples_per_step, batch.prompts_per_step) == (64 * 4 * 8, 64 * 4 * 8 // 32)
    assert batch.completions_per_generation == 64 * 4 * 8


def test_generation_batch_size_sets_the_passes() -> None:
    batch = plan_of("recipes/smollm2-135m/gsm8k_grpo.yaml", "1x2", "--generation_batch_size", "1024").batch
    assert batch.steps_per_generation == 16
    assert batch.completions_per_generation == 1024


def test_lengths_are_checked_against_the_model() -> None:
    path = "recipes/smollm2-135m/gsm8k_grpo.yaml"
    assert plan_of(path, "1x2", model=ModelFacts(context_length=576))
    with pytest.raises(recipe.RecipeError, match="576 tokens, the model has 575 positions"):
        plan_of(path, "1x2", model=ModelFacts(context_length=575))


def test_gpus_under_a_cpu_build_of_torch_are_not_used() -> None:
    loaded = recipe.load("recipes/tiny/arithmetic_grpo.yaml")
    here = hardware.Hardware(hardware.assumed("1x2").nodes, PORTS, torch_cpu_only=True)
    planned = plan.make(loaded, here, Path("runs/run"), Path())
    assert planned.trainer.gpus == ()
    assert planned.accelerate_config.stem == "cpu"
    assert "torch is a CPU build" in planned.render()


def test_recipe_hardware_and_plan_import_no_torch() -> None:
    code = (
        "import sys; from r1zero import recipe, hardware, plan, model_facts, launcher, supervisor, policy_server;"
        "from r1zero.tasks import load_problems, rewards, verifier, prompts; load_problems('arithmetic', 'test', None);"
        "print([name for name in ('torch', 'transformers', 'trl', 'numpy', 'vllm') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_accelerate_config_is_what_its_name_says() -> None:
    kinds = {path.stem: yaml.safe_load(path.read_text()) for path in (PROJECT / "accelerate_configs").glob("*.yaml")}
    assert set(kinds) == {"cpu", "single_gpu", "ddp", "zero2", "zero3", "zero3_offload"}
    for name, stage in (("zero2", 2), ("zero3", 3), ("zero3_offload", 3)):
        assert kinds[name]["deepspeed_config"]["zero_stage"] == stage
    assert kinds["zero3_offload"]["deepspeed_config"]["offload_param_device"] == "cpu"
    assert kinds["ddp"]["distributed_type"] == "MULTI_GPU"
    assert kinds["cpu"]["use_cpu"] is True
