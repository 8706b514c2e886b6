"""The plan is a pure value: the same recipe on the same hardware gives the same text, held whole by golden files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from r1zero import accelerate_config, hardware, memory, plan, recipe, server_plan, serving
from r1zero.model_facts import PROJECTIONS, ModelFacts, ModelShape
from r1zero.tasks import verifier
from tests.conftest import PROJECT

GOLDEN = Path(__file__).parent / "golden"
# Without those of a series, which share a base.yaml and have tests of their own.
RECIPES = [path for path in (PROJECT / "recipes").rglob("*.yaml") if not (path.parent / "base.yaml").exists()]
PORTS = tuple(range(41001, 41011))
TINY, MATH_7B = "recipes/tiny/arithmetic_grpo.yaml", "recipes/qwen2.5-math-7b/math_zero3.yaml"
GRPO, QLORA = "recipes/smollm2-135m/gsm8k_grpo.yaml", "recipes/qwen2.5-3b/gsm8k_qlora.yaml"
LORA = ("--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj")
PADDED = ("--micro_batch_tokens", "null")  # GRPO packs
SMOLLM2 = ModelFacts(8192, "llama", ModelShape(576, 30, 9, 3, 64, 1536, 49152, tied_embeddings=True))
QWEN = ModelFacts(32768, "qwen2", ModelShape(2048, 36, 16, 2, 128, 11008, 151936, tied_embeddings=True))


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The project's folder, and a hub cache with nothing in it: what is not local is not known."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def plan_of(path: str | Path, machine: str, *overrides: str, model: ModelFacts | None = None) -> plan.Plan:
    loaded = recipe.load(path, overrides)
    here = hardware.assumed(machine.removesuffix(" cpu server"), PORTS)
    return plan.make(loaded, replace(here, cpu_server=machine.endswith("cpu server")), Path("runs/run"), Path(), model)


# The hardware that each recipe is for, and what is known of its model.
SHAPES = {
    "smollm2-135m": SMOLLM2,
    "qwen2.5-3b": QWEN,
    "qwen2.5-0.5b": ModelFacts(32768, "qwen2", ModelShape(896, 24, 14, 2, 64, 4864, 151936, tied_embeddings=True)),
    "qwen2.5-1.5b": ModelFacts(131072, "qwen2", ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied_embeddings=True)),
    "qwen2.5-7b": ModelFacts(131072, "qwen2", ModelShape(3584, 28, 28, 4, 128, 18944, 152064, tied_embeddings=False)),
    "qwen2.5-math-7b": ModelFacts(4096, "qwen2", ModelShape(3584, 28, 28, 4, 128, 18944, 152064, False)),
}
MADE_FOR = {
    "tiny/arithmetic_grpo": ("1x0", "1x2:80", "2x0", "4x8:80"),
    "smollm2-135m/gsm8k_sft": ("1x1:24", "1x8:80", "2x8:80"),
    "smollm2-135m/gsm8k_grpo": ("1x1:80", "1x2:80"),
    "qwen2.5-3b/gsm8k_qlora": ("1x1:22.5", "1x2:80"),
    "qwen2.5-3b/gsm8k_qlora_a100": ("1x1:40", "1x1:80"),
    "qwen2.5-0.5b/gsm8k_grpo": ("1x1:24", "1x1:80"),
    "qwen2.5-0.5b/math_grpo": ("1x2:24", "1x2:80"),
    "qwen2.5-1.5b/gsm8k_grpo": ("1x2:40", "1x2:80"),
    "qwen2.5-1.5b/math_zero2": ("1x4:40", "1x4:80"),
    "qwen2.5-7b/gsm8k_lora": ("1x2:40", "1x2:80"),
    "qwen2.5-7b/math_zero3": ("1x8:80",),
    "qwen2.5-math-7b/math_zero3": ("4x8:80",),
    "qwen2.5-math-7b/math_zero3_1x8": ("1x8:80",),
}


def test_every_recipe_that_is_made_for_some_hardware_is_in_the_readme() -> None:
    readme = (PROJECT / "recipes/README.md").read_text()
    assert [name for name in MADE_FOR if f"`{name}`" not in readme] == []


NAMES = sorted(f"{path.parent.name}/{path.stem}" for path in RECIPES)


@pytest.mark.parametrize(
    ("name", "machine"), [(name, each) for name in NAMES for each in MADE_FOR.get(name, ("1x8:80",))]
)
def test_every_recipe_is_parsed_and_planned_for_its_hardware(name: str, machine: str) -> None:
    path = f"recipes/{name}.yaml"
    loaded = recipe.load(path)
    planned = plan_of(path, machine, model=SHAPES.get(name.partition("/")[0]))
    assert planned.processes[-1].name.startswith("trainer")
    assert bool(planned.servers) == loaded.launches_server
    assert path in planned.render()
    assert bool(planned.memory) == (loaded.own.method == "grpo" and loaded.model != recipe.TINY_MODEL)


def test_the_cold_start_that_was_measured_is_the_same_on_several_gpus() -> None:
    path = "recipes/smollm2-135m/gsm8k_sft.yaml"
    batches = {plan_of(path, machine).batch.samples_per_step for machine in ("1x1:80", "1x8:80", "2x8:80")}
    assert batches == {64}


CASES: dict[str, tuple[str, str, tuple[str, ...], ModelFacts | None]] = {
    "tiny_cpu": ("recipes/tiny/arithmetic_grpo.yaml", "1x0", (), None),
    "smollm2_sft_1gpu": ("recipes/smollm2-135m/gsm8k_sft.yaml", "1x1:24", (), SMOLLM2),
    "smollm2_grpo_2gpus": (GRPO, "1x2:80", (), SMOLLM2),
    "smollm2_grpo_1gpu": (GRPO, "1x1:80", (), SMOLLM2),
    "smollm2_grpo_cpu_server": (GRPO, "1x0 cpu server", ("--trainer_gpus", "null"), SMOLLM2),
    "smollm2_grpo_8gpus_zero3": (
        GRPO,
        "1x8:80",
        ("--server_gpus", "2", "--trainer_gpus", "6", "--accelerate_config", "zero3", "--num_generations", "16"),
        None,
    ),
    "smollm2_grpo_colocate": (GRPO, "1x1:80", ("--vllm_mode", "colocate"), SMOLLM2),
    "smollm2_grpo_running_server": (GRPO, "1x1:80", ("--vllm_server_base_url", "http://127.0.0.1:8000"), SMOLLM2),
    "qwen_qlora_24gb": (QLORA, "1x1:24", (), QWEN),
    "qwen_qlora_a100": ("recipes/qwen2.5-3b/gsm8k_qlora_a100.yaml", "1x1:80", (), QWEN),
    "qwen_full_8gpus": (
        GRPO,
        "1x8:80",
        (
            *("--model_name_or_path", "Qwen/Qwen2.5-3B", "--per_device_train_batch_size", "8", "--trainer_gpus", "4"),
            *("--server_gpus", "4", "--vllm_tensor_parallel_size", "2", "--accelerate_config", "zero3", *PADDED),
        ),
        QWEN,
    ),
    "tiny_2_processes": (TINY, "1x0", ("--cpu_processes", "2", "--accelerate_config", "zero2"), None),
    "tiny_2_cpu_nodes": (TINY, "2x0", (), None),
    "smollm2_3_cpu_nodes": (GRPO, "3x0 cpu server", ("--trainer_gpus", "null", "--cpu_processes", "2"), SMOLLM2),
    "lora_7b_2gpus": ("recipes/qwen2.5-7b/gsm8k_lora.yaml", "1x2:80", (), SHAPES["qwen2.5-7b"]),
    "full_1.5b_4gpus": ("recipes/qwen2.5-1.5b/math_zero2.yaml", "1x4:80", (), SHAPES["qwen2.5-1.5b"]),
    "full_1.5b_6gpus": (
        "recipes/qwen2.5-1.5b/math_zero2.yaml",
        "1x6:80",
        ("--trainer_gpus", "null", "--vllm_tensor_parallel_size", "2", "--accelerate_config", "ddp"),
        SHAPES["qwen2.5-1.5b"],
    ),
    "full_7b_8gpus": ("recipes/qwen2.5-7b/math_zero3.yaml", "1x8:80", (), SHAPES["qwen2.5-7b"]),
    "full_7b_2x8": (
        "recipes/qwen2.5-7b/math_zero3.yaml",
        "2x8:80",
        ("--trainer_gpus", "8", "--vllm_tensor_parallel_size", "2"),
        SHAPES["qwen2.5-7b"],
    ),
    "full_math_7b_4x8": ("recipes/qwen2.5-math-7b/math_zero3.yaml", "4x8:80", (), SHAPES["qwen2.5-math-7b"]),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_text(name: str, request: pytest.FixtureRequest) -> None:
    path, machine, overrides, model = CASES[name]
    text = plan_of(path, machine, *overrides, model=model).render().replace(sys.executable, "python")
    golden = GOLDEN / f"plan_{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_a_plan_is_pure() -> None:
    assert plan_of(GRPO, "1x2") == plan_of(GRPO, "1x2")


def flag(process: plan.Process, name: str) -> str:
    return process.argv[process.argv.index(name) + 1]


def test_servers_and_trainer_have_gpus_of_their_own_and_the_addresses_agree() -> None:
    words = ("--server_gpus", "4", "--vllm_tensor_parallel_size", "2", "--trainer_gpus", "4")
    planned = plan_of(GRPO, "1x8", *words)
    assert [each.name for each in planned.servers] == ["server-0", "server-1"]
    assert [each.gpus for each in planned.servers] == [(4, 5), (6, 7)]
    assert [each.log for each in planned.servers] == ["logs/server-0.log", "logs/server-1.log"]
    assert planned.trainers[0].gpus == (0, 1, 2, 3)
    urls = tuple(f"http://127.0.0.1:{flag(each, '--port')}" for each in planned.servers)
    assert planned.server_urls == urls and len(set(urls)) == 2
    assert flag(planned.trainers[0], "--vllm_server_base_url") == ",".join(urls)
    ports = {flag(planned.trainers[0], "--vllm_group_port"), flag(planned.trainers[0], "--main_process_port")}
    assert len({*ports, *(url.rpartition(":")[2] for url in urls)}) == 4
    for each in planned.servers:
        assert flag(each, "--tensor-parallel-size") == "2"
        assert flag(each, "--max-model-len") == str(384 + 192 + 1)


def test_nodes_of_their_own_for_servers_and_addresses_that_agree() -> None:
    planned = plan_of(MATH_7B, "4x8:80", "--vllm_tensor_parallel_size", "4", model=SHAPES["qwen2.5-math-7b"])
    assert [(each.name, each.node, each.gpus) for each in planned.servers] == [
        ("server-0", 3, (0, 1, 2, 3)),
        ("server-1", 3, (4, 5, 6, 7)),
    ]
    assert planned.server_urls == ("http://node3:41001", "http://node3:41004")
    assert [flag(each, "--host") for each in planned.servers] == ["node3", "node3"]
    assert [(each.name, each.node, each.gpus) for each in planned.trainers] == [
        (f"trainer-{node}", node, tuple(range(8))) for node in range(3)
    ]
    assert (planned.trainer_processes, planned.nodes) == (24, (0, 1, 2, 3))
    assert planned.publish == "nccl" and planned.publish_in_run_folder
    for rank, each in enumerate(planned.trainers):
        assert flag(each, "--machine_rank") == str(rank)
        assert (flag(each, "--num_machines"), flag(each, "--num_processes")) == ("3", "24")
        assert (flag(each, "--main_process_ip"), flag(each, "--main_process_port")) == ("node0", "41003")
        assert flag(each, "--deepspeed_multinode_launcher") == "standard"
        assert flag(each, "--vllm_server_base_url") == ",".join(planned.server_urls)
        assert dict(each.env)[plan.GROUP_ADDRESS] == "node0"
        assert each.log == f"logs/trainer-{rank}.log"


@pytest.mark.parametrize(
    ("machine", "words", "servers", "trainers"),
    [
        ("2x8", ("--server_gpus", "8"), [(1, 8)], [(0, 8)]),
        ("2x8", ("--server_gpus", "4"), [(0, 2), (1, 2)], [(0, 6), (1, 6)]),
        ("3x4", ("--server_gpus", "6"), [(0, 2), (1, 2), (2, 2)], [(0, 2), (1, 2), (2, 2)]),
        ("4x8", ("--server_gpus", "16", "--trainer_gpus", "8"), [(2, 8), (3, 8)], [(0, 8)]),
        ("4x8", ("--server_gpus", "16", "--trainer_gpus", "12"), [(2, 8), (3, 8)], [(0, 6), (1, 6)]),
        ("2x1", (), [(1, 1)], [(0, 1)]),
        ("2x3", ("--vllm_tensor_parallel_size", "2"), [(0, 2), (1, 2)], [(0, 1), (1, 1)]),
    ],
)
def test_gpus_of_several_nodes(
    machine: str, words: tuple[str, ...], servers: list[tuple[int, int]], trainers: list[tuple[int, int]]
) -> None:
    common = ("--trainer_gpus", "null", "--num_generations", "2", "--accelerate_config", "null")
    planned = plan_of(GRPO, machine, *common, *words)
    gpus: dict[int, int] = {}
    for each in planned.servers:
        gpus[each.node] = gpus.get(each.node, 0) + len(each.gpus)
    assert sorted(gpus.items()) == servers
    assert [(each.node, len(each.gpus)) for each in planned.trainers] == trainers
    used = [(each.node, gpu) for each in (*planned.servers, *planned.trainers) for gpu in each.gpus]
    assert len(set(used)) == len(used)
    assert len(set(planned.server_urls)) == len(planned.servers)


def test_the_last_cpu_node_serves_and_the_others_train() -> None:
    words = ("--trainer_gpus", "null", "--cpu_processes", "2")
    alone, three = plan_of(GRPO, "1x0 cpu server", *words), plan_of(GRPO, "3x0 cpu server", *words)
    assert [each.node for each in (*alone.servers, *alone.trainers)] == [0, 0]
    assert alone.server_urls == ("http://127.0.0.1:41001",) and not alone.publish_in_run_folder
    assert [each.node for each in three.servers] == [2] and [each.node for each in three.trainers] == [0, 1]
    assert three.server_urls == ("http://node2:41001",) and three.publish_in_run_folder
    assert (alone.trainer_processes, three.trainer_processes) == (2, 4)
    assert {alone.accelerate_config.stem, three.accelerate_config.stem} == {"ddp"}
    assert plan.GROUP_ADDRESS not in dict(three.trainers[0].env)


@pytest.mark.parametrize(
    ("machine", "words", "precision", "env"),
    [
        ("1x0", ("--accelerate_config", "zero2"), "no", {"DS_ACCELERATOR": "cpu"}),
        ("1x0", ("--accelerate_config", "zero3", "--bf16", "true"), "bf16", {"DS_ACCELERATOR": "cpu"}),
        ("1x2", ("--trainer_gpus", "2"), "bf16", {}),
        ("1x2", ("--trainer_gpus", "2", "--bf16", "false"), "no", {}),
        ("1x2", ("--trainer_gpus", "2", "--fp16", "true"), "fp16", {}),
    ],
)
def test_the_precision_is_the_recipes(
    machine: str, words: tuple[str, ...], precision: str, env: dict[str, str]
) -> None:
    trainer = plan_of(TINY, machine, *words).trainers[0]
    assert flag(trainer, "--mixed_precision") == precision
    assert {name: value for name, value in trainer.env if name.startswith("DS_")} == env


@pytest.mark.parametrize(
    ("version", "config", "refused"),
    [
        ("0.17.5", "zero2", False),
        ("0.17.6", "zero2", True),
        ("0.18.2+cu129", "zero2", True),
        ("0.18.3", "zero2", False),
        ("0.18.2", "zero3", False),
        ("0.18.2", "ddp", False),
        ("0.19.8", "zero2", False),
        (None, "zero2", False),
    ],
)
def test_a_deepspeed_that_loses_gradients_is_refused(version: str | None, config: str, refused: bool) -> None:
    loaded = recipe.load(TINY, ["--cpu_processes", "2", "--accelerate_config", config])
    here = replace(hardware.assumed("1x0", PORTS), deepspeed=version)
    if not refused:
        assert plan.make(loaded, here, Path("runs/run"), Path())
        return
    with pytest.raises(recipe.RecipeError, match=r"installed here, loses the gradients .*\n.*deepspeed==0.19.8"):
        plan.make(loaded, here, Path("runs/run"), Path())


def test_an_accelerate_config_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    for name, content in (
        ("mine", {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}),
        (
            "file",
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")},
            },
        ),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        words = ("--trainer_gpus", "2", "--accelerate_config", str(tmp_path / f"{name}.yaml"))
        planned = plan_of(GRPO, "2x2:80", *words, model=SMOLLM2)
        assert planned.accelerate_config == tmp_path / f"{name}.yaml"
    loaded = recipe.load(GRPO)
    assert accelerate_config.read(tmp_path / "mine.yaml", loaded).zero_stage == 1
    read = accelerate_config.read(tmp_path / "file.yaml", loaded)
    assert (read.zero_stage, read.offload) == (3, True)
    (tmp_path / "broken.yaml").write_text("- a\n")
    with pytest.raises(recipe.RecipeError, match="cannot be read"):
        accelerate_config.read(tmp_path / "broken.yaml", loaded)
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    with pytest.raises(recipe.RecipeError, match="distributed_type FSDP, which is not supported"):
        accelerate_config.read(tmp_path / "fsdp.yaml", loaded)


def test_collectives_wait_as_long_as_another_process_may_take() -> None:
    assert "--ddp_timeout" not in plan_of(GRPO, "1x2").trainers[0].argv  # one process waits for nobody
    planned = plan_of(GRPO, "1x3", "--trainer_gpus", "2")
    needed = 900 + 300 + 64 * 8 * verifier.WALL_SECONDS
    assert flag(planned.trainers[0], "--ddp_timeout") == str(int(needed) + 1)
    assert "Because: ddp_timeout 2481: generation_timeout 900 + publish_timeout 300 + grading 1280" in planned.render()
    given = plan_of(GRPO, "1x3", "--trainer_gpus", "2", "--ddp_timeout", "3000")
    assert "--ddp_timeout" not in given.trainers[0].argv  # the recipe's own, in its file


def test_assumed_hardware_has_ports_enough_for_all_servers() -> None:
    loaded = recipe.load(GRPO, ["--server_gpus", "3", "--trainer_gpus", "1", "--servers_per_gpu", "4"])
    planned = plan.make(loaded, hardware.assumed("1x4:80"), Path("runs/run"), Path(), SMOLLM2)
    assert len(set(planned.server_urls)) == len(planned.servers) == 12


@pytest.mark.parametrize(
    ("machine", "words", "gpu", "route"),
    [("1x1:80", (), 0, "shared_memory"), ("1x2:80", (), 1, "shared_memory"), ("1x2:80", LORA, 1, "folded")],
)
def test_several_servers_on_one_gpu(machine: str, words: tuple[str, ...], gpu: int, route: str) -> None:
    planned = plan_of(GRPO, machine, "--servers_per_gpu", "2", *words, model=SMOLLM2)
    one = plan_of(GRPO, machine, "--servers_per_gpu", "1", *words, model=SMOLLM2)
    assert [each.gpus for each in planned.servers] == [(gpu,)] * 2 and planned.publish == route
    assert len(set(planned.server_urls)) == 2 and flag(planned.trainers[0], "--publish") == route
    assert {flag(each, "--max-num-seqs") for each in planned.servers} == {"260"}, "half of the 512, and what looks on"
    # The same memory as one would have: vLLM cannot measure it, as the other one starts at the same time.
    share = sum(float(flag(each, "--gpu-memory-utilization")) for each in planned.servers)
    assert share <= 0.9 and "--kv-cache-memory-bytes" not in one.servers[0].argv
    each_gib = int(flag(planned.servers[0], "--kv-cache-memory-bytes")) / 2**30
    assert 260 * (384 + 192 + 1) * SMOLLM2.shape.kv_bytes_per_token(2) / 2**30 <= each_gib + 0.1
    assert each_gib < share * 80 / 2


@pytest.mark.parametrize(
    ("machine", "words", "model", "servers"),
    [
        ("1x1:80", (), SMOLLM2, 2),
        ("1x2:80", ("--server_gpus", "0"), SMOLLM2, 2),
        ("1x1:80", LORA, SMOLLM2, 2),
        ("1x1:80", ("--servers_per_gpu", "1"), SMOLLM2, 1),
        ("1x1:16", ("--micro_batch_tokens", "4096"), SMOLLM2, 1),  # which does not fit twice
        ("1x2:80", (), SMOLLM2, 1),  # a GPU of its own, to which weights go over NCCL
        ("1x1:80", (*LORA, "--micro_batch_tokens", "4096"), QWEN, 1),
        ("1x1:80", (), None, 1),
        ("1x1:80", ("--vllm_enable_sleep_mode", "true"), SMOLLM2, 1),
        ("1x1:80", ("--vllm_gpu_memory_utilization", "0.3"), SMOLLM2, 1),
    ],
)
def test_a_small_model_that_shares_its_gpu_has_two_servers(
    machine: str, words: tuple[str, ...], model: ModelFacts | None, servers: int
) -> None:
    planned = plan_of(GRPO, machine, *words, model=model)
    assert len(planned.servers) == len(set(planned.server_urls)) == servers
    chosen = (
        "2 servers on the GPU: what bounds a model of 0.13 billion weights is the processor thread of vLLM's engine"
    )
    assert (chosen in planned.reasons) == (servers == 2)
    if servers == 2:
        asked = plan_of(GRPO, machine, "--servers_per_gpu", "2", *words, model=model)
        assert (planned.servers, planned.memory, planned.publish) == (asked.servers, asked.memory, asked.publish)


def test_each_server_on_a_gpu_of_24_gib_leaves_room_for_the_others_graphs_and_context() -> None:
    planned = plan_of(GRPO, "1x2:22.5", "--servers_per_gpu", "4", model=SMOLLM2)
    share = sum(float(flag(each, "--gpu-memory-utilization")) for each in planned.servers)
    assert share * 22.5 + 4 * memory.SERVER_BEYOND_SHARE_GIB <= 22.5
    assert "each of 4 servers" in planned.render()


@pytest.mark.parametrize(
    ("machine", "words", "model", "key", "named"),
    [
        ("2x2:80", (), SMOLLM2, "servers_per_gpu", "on several nodes"),
        ("1x0 cpu server", ("--trainer_gpus", "0"), SMOLLM2, "servers_per_gpu", "no GPU is here"),
        ("1x2:80", ("--vllm_server_base_url", "http://h:1"), SMOLLM2, "servers_per_gpu", "runs already"),
        ("1x2:80", ("--vllm_tensor_parallel_size", "2"), SMOLLM2, "servers_per_gpu", "needs 2 GPUs"),
        ("1x2:80", ("--publish", "nccl"), SMOLLM2, "publish", "NCCL cannot join two servers on one GPU"),
        ("1x2:80", PADDED, ModelFacts(8192, "other", None), "servers_per_gpu", "cannot be divided"),
        ("1x1:22.5", (), SMOLLM2, "micro_batch_tokens", "4 servers and trainer do not fit"),
        ("1x2:8", ("--micro_batch_tokens", "1024"), SMOLLM2, "servers_per_gpu", "a server needs"),
    ],
)
def test_where_several_servers_on_one_gpu_are_impossible(
    machine: str, words: tuple[str, ...], model: ModelFacts, key: str, named: str
) -> None:
    with pytest.raises(recipe.RecipeError) as caught:
        plan_of(GRPO, machine, "--servers_per_gpu", "4", *words, model=model)
    assert named in str(caught.value) and f"  {key} = " in str(caught.value)


@pytest.mark.parametrize("words", [(), ("--servers_per_gpu", "2"), ("--server_gpus", "0")])
def test_what_a_trainer_is_given_is_a_recipe_without_faults(words: tuple[str, ...]) -> None:
    """It loads the recipe anew, with the addresses of servers that run by then."""
    planned = plan_of(GRPO, "1x2:80", *words, model=SMOLLM2)
    argv = planned.trainers[0].argv
    given = argv[argv.index("--run_folder") + 2 :]
    assert "--vllm_server_base_url" in given
    again = recipe.load(GRPO, (*words, *given))
    assert not again.launches_server and again.running_server == ",".join(planned.server_urls)


@pytest.mark.parametrize(
    ("machine", "words", "route"),
    [
        ("1x2", (), "nccl"),
        ("1x1", (), "shared_memory"),
        ("1x8", ("--server_gpus", "0"), "shared_memory"),
        ("1x0 cpu server", ("--trainer_gpus", "null"), "shared_memory"),
        ("1x2", ("--use_peft", "true"), "folded"),
        ("1x1", ("--use_peft", "true"), "folded"),
        ("1x1", ("--use_peft", "true", "--publish", "adapter"), "adapter"),
        ("1x1", ("--use_peft", "true", "--vllm_server_base_url", "http://127.0.0.1:1"), "adapter"),
        ("1x0 cpu server", ("--trainer_gpus", "null", "--use_peft", "true", "--publish", "folded"), "folded"),
        ("1x0 cpu server", ("--trainer_gpus", "null", "--use_peft", "true"), "adapter"),
        ("1x2", ("--publish", "shared_memory"), "shared_memory"),
        ("1x1", ("--vllm_server_base_url", "http://127.0.0.1:1,http://127.0.0.1:2"), "nccl"),
        ("1x1", ("--vllm_mode", "colocate"), None),
    ],
)
def test_the_route_of_new_policy_versions(machine: str, words: tuple[str, ...], route: str | None) -> None:
    planned = plan_of(GRPO, machine, *words, model=SMOLLM2)
    assert planned.publish == route
    assert ("--publish" in planned.trainers[0].argv) == (route is not None)
    if route is None:
        assert "TRL's colocate" in planned.render()
        return
    assert flag(planned.trainers[0], "--publish") == route
    assert f"Because: publish {route}" in planned.render()
    engines = {"nccl": "nccl", "shared_memory": "r1zero_shared_memory", "folded": "r1zero_folded"}
    expected = f'{{"backend":"{engines[route]}"}}' if route in engines else None
    for each in planned.servers:
        assert ("--weight-transfer-config" in each.argv) == (expected is not None)
        assert expected is None or flag(each, "--weight-transfer-config") == expected
        assert ("--enable-lora" in each.argv) == (route == "adapter")
        env = dict(each.env)
        assert ("VLLM_ALLOW_RUNTIME_LORA_UPDATING" in env) == (route == "adapter")
        assert env.get(serving.CLEAN_COPY) == (None if route != "folded" else "gpu" if each.gpus else "host")


PROJECTED_GIB = QWEN.shape.projection_parameters * 2 / memory.GIB if QWEN.shape else 0


def with_host(machine: str, gib: float | None, *words: str, recipe_file: str = QLORA) -> plan.Plan:
    """A plan for a machine whose hosts have so much memory."""
    here = hardware.assumed(machine, PORTS)
    nodes = tuple(replace(node, memory_gib=gib) for node in here.nodes)
    return plan.make(recipe.load(recipe_file, words), replace(here, nodes=nodes), Path("runs/run"), Path(), QWEN)


def clean_copy(planned: plan.Plan) -> str | None:
    (found,) = {dict(each.env).get(serving.CLEAN_COPY) for each in planned.servers}
    return found


@pytest.mark.parametrize(
    ("machine", "host_gib", "words", "place"),
    [
        ("1x1:24", None, (), "gpu"),
        ("1x1:22.5", 32, (), "host"),
        ("1x1:22.5", 29, (), None),  # 7.4 of 29 GiB is more than a quarter
        ("1x1:22.5", None, (), None),
        ("1x1:22.5", None, ("--publish", "folded"), "host"),
        ("1x2:24", None, (), "gpu"),
        ("1x2:16", 64, (), "host"),
        ("1x2:16", 16, (), None),
        ("1x2:24", None, ("--vllm_gpu_memory_utilization", "0.8"), None),
        ("1x2:24", 64, ("--vllm_gpu_memory_utilization", "0.8"), "host"),
        ("1x1:40", None, ("--vllm_enable_sleep_mode", "true"), "gpu"),
        ("1x1:24", None, ("--lora_target_modules", "q_proj", "v_proj"), "gpu"),
        ("1x1:24", None, ("--server_base", "vllm_4bit"), None),
        ("1x1:24", None, ("--publish", "adapter"), None),
    ],
)
def test_where_the_clean_copy_of_the_base_is(
    machine: str, host_gib: float | None, words: tuple[str, ...], place: str | None
) -> None:
    planned = with_host(machine, host_gib, *words)
    assert clean_copy(planned) == place
    assert planned.publish == ("folded" if place else "adapter")
    (why,) = [each for each in planned.reasons if each.startswith("publish")]
    size = f"{PROJECTED_GIB:.1f} GiB"
    if words == ("--lora_target_modules", "q_proj", "v_proj"):
        size = "0.3 GiB"  # 36 layers of 2048 x (2048 + 256) in bf16
    if place == "host":
        size = "7.4 GiB"  # torch pins a power of two for each piece: 64 MiB instead of 43 for each of the MLP's
    assert (size in why) == (place is not None or not words or "--vllm_gpu_memory_utilization" in words)


def test_the_clean_copy_lies_beyond_the_servers_share() -> None:
    """vLLM measures its memory before the copy is made, and would give what the copy needs to the KV cache."""
    planned = with_host("1x2:24", None)
    share = float(flag(planned.servers[0], "--gpu-memory-utilization"))
    beyond = PROJECTED_GIB + memory.FOLDING_GIB + memory.SERVER_BEYOND_SHARE_GIB
    assert 0.97 * 24 < share * 24 + beyond <= 24 * memory.USABLE
    (line,) = [each for each in planned.memory if "server" in each]
    assert f"clean copy and workspace {PROJECTED_GIB + memory.FOLDING_GIB:.1f}" in line
    roomy = with_host("1x2:140", None)
    assert flag(roomy.servers[0], "--gpu-memory-utilization") == "0.9", "the copy fits beside the usual share"


def test_each_rank_of_a_tensor_parallel_server_copies_its_own_part() -> None:
    one = memory.clean_copy(QWEN.shape, None, tensor_parallel=1, pinned=False)
    assert one == 36 * 2 * 2048 * (2048 + 256) / memory.GIB
    every = [memory.clean_copy(QWEN.shape, PROJECTIONS, tensor_parallel=ranks, pinned=False) for ranks in (1, 2, 4)]
    assert every[0] == pytest.approx(PROJECTED_GIB) and every[1] == every[0] / 2
    assert every[2] > every[0] / 4, "two key and value heads are held twice by four ranks"
    planned = with_host("1x4:24", None, "--vllm_tensor_parallel_size", "2", "--server_gpus", "2", "--trainer_gpus", "1")
    assert clean_copy(planned) == "gpu" and f"{every[1]:.1f} GiB" in "".join(planned.reasons)


def test_on_one_gpu_server_and_trainer_share_it() -> None:
    planned = plan_of(QLORA, "1x1:24", model=QWEN)
    assert planned.servers[0].gpus == planned.trainers[0].gpus == (0,)
    assert planned.trainer_processes == 1
    share = float(flag(planned.servers[0], "--gpu-memory-utilization"))
    assert 0.3 < share < 0.5
    assert flag(planned.servers[0], "--max-num-seqs") == str(16 + server_plan.SPARE_SEQUENCES)
    assert plan.TRAINER_MEMORY not in dict(planned.trainers[0].env)
    assert "--enable-sleep-mode" not in planned.servers[0].argv


def test_a_limit_holds_server_and_trainer_together() -> None:
    planned = plan_of(QLORA, "1x1:140.4", "--gpu_memory_limit", "24", model=QWEN)
    share = float(flag(planned.servers[0], "--gpu-memory-utilization"))
    trainer = float(dict(planned.trainers[0].env)[plan.TRAINER_MEMORY])
    beyond = memory.SERVER_BEYOND_SHARE_GIB + memory.TRAINER_CONTEXT_GIB + PROJECTED_GIB + memory.FOLDING_GIB
    assert 23 < share * 140.4 + trainer + beyond < 24.2
    assert any(plan.TRAINER_MEMORY in line for line in planned.by_hand)


def test_a_limit_with_a_share_of_the_recipes_own() -> None:
    words = ("--gpu_memory_limit", "24", "--vllm_gpu_memory_utilization", "0.07")
    for model in (QWEN, None):
        planned = plan_of(QLORA, "1x1:140.4", *words, model=model)
        assert flag(planned.servers[0], "--gpu-memory-utilization") == "0.07"
        trainer = float(dict(planned.trainers[0].env)[plan.TRAINER_MEMORY])
        beyond = memory.SERVER_BEYOND_SHARE_GIB + memory.TRAINER_CONTEXT_GIB
        assert trainer == pytest.approx(24 - 0.07 * 140.4 - beyond, abs=0.01)


@pytest.mark.parametrize(
    ("machine", "model", "why"),
    [
        ("1x1:80", None, "before it is downloaded"),
        ("1x1:80", ModelFacts(8192, "gpt2"), "a model of type gpt2 are not counted"),
        ("1x1:0", SMOLLM2, "does not say how much memory"),
    ],
)
def test_a_shared_gpu_of_which_something_is_not_known_is_shared_as_trl_does(
    machine: str, model: ModelFacts | None, why: str
) -> None:
    planned = plan_of(GRPO, machine, *PADDED, model=model)
    assert flag(planned.servers[0], "--gpu-memory-utilization") == "0.3"
    assert planned.memory == ()
    assert why in planned.render()


@pytest.mark.parametrize(
    ("path", "machine", "model", "why"),
    [
        (GRPO, "1x1:24", None, "HuggingFaceTB/SmolLM2-135M-Instruct's config.json is not here: hf download Hugging"),
        (GRPO, "1x2:24", None, "config.json is not here: hf download HuggingFaceTB/SmolLM2-135M-Instruct config.json"),
        (GRPO, "1x2:24", ModelFacts(8192, "gpt2"), "the weights of a model of type gpt2 are not counted here"),
        (GRPO, "1x2:0", SMOLLM2, "the GPU does not say how much it has"),
        ("recipes/qwen2.5-math-7b/math_long_cot_sft.yaml", "1x1:24", None, "it is not estimated for a cold start"),
        (GRPO, "1x2:80", SMOLLM2, None),
        (TINY, "1x2:80", None, None),
        (TINY, "1x0", None, None),
    ],
)
def test_memory_that_nothing_was_said_of_is_named(
    path: str, machine: str, model: ModelFacts | None, why: str | None
) -> None:
    text = plan_of(path, machine, *(PADDED if path == GRPO else ()), model=model).render()
    lines = [line for line in text.splitlines() if line.startswith("Memory: NOT checked, ")]
    assert len(lines) == (why is not None)
    assert why is None or why in lines[0]


def test_the_revision_of_a_model_that_is_not_here_is_named() -> None:
    text = plan_of(GRPO, "1x2:24", "--model_revision", "v2").render()
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct config.json --revision v2" in text


def test_the_route_of_an_adapter_of_a_model_that_is_not_here_is_open() -> None:
    later = "whether it is folded is decided once the model is here"
    assert later in plan_of(QLORA, "1x2:24").render()
    for words in (("--server_base", "vllm_4bit"), ("--publish", "adapter"), ("--publish", "folded")):
        assert later not in plan_of(QLORA, "1x2:24", *words).render()
    assert later not in plan_of(QLORA, "1x2:24", model=QWEN).render()
    asked = plan_of(QLORA, "1x2:24", "--publish", "folded").render()
    assert "how large it is cannot be told before the model is downloaded" in asked


def test_a_copy_that_only_an_unknown_host_may_have_room_for_is_named() -> None:
    unknown = "on the GPU, and how much the host has is not known with --hardware"
    assert unknown in "".join(with_host("1x1:22.5", None).reasons)
    assert unknown not in "".join(with_host("1x1:22.5", 29).reasons), "the host is known to be too small"
    beyond = ("--server_gpus", "1", "--vllm_gpu_memory_utilization", "0.99")
    assert unknown not in "".join(with_host("1x2:24", None, *beyond).reasons), "on the GPU the rest has no room either"


def test_the_copy_is_named_alike_in_route_and_memory() -> None:
    small = ("--use_peft", "true", "--lora_r", "8", "--servers_per_gpu", "1")
    text = plan_of(GRPO, "1x1:80", *small, model=SMOLLM2).render()
    assert "; a clean copy of the adapted layers, 25 MiB, is on the GPU: it fits" in text
    assert "clean copy and workspace 0.3" in text
    asked = plan_of(GRPO, "1x2:80", *small, "--publish", "folded", model=SMOLLM2).render()
    assert "publish folded: the recipe says so; a clean copy of the adapted layers, 25 MiB, is on the GPU" in asked
    host = with_host("1x2:16", 64)
    assert "a clean copy of the adapted layers, 7.4 GiB for each GPU, is in pinned host memory" in host.render()
    assert "workspace of the copy in host memory 0.2" in host.render()


def test_a_tight_gpu_is_named_close_and_sleep_gives_room() -> None:
    tight = plan_of(QLORA, "1x1:16", model=QWEN)
    assert "Because: close: server and trainer need" in tight.render()
    asleep = plan_of(QLORA, "1x1:16", "--vllm_enable_sleep_mode", "true", model=QWEN)
    assert "close" not in asleep.render()
    assert "--enable-sleep-mode" in asleep.servers[0].argv
    assert float(flag(asleep.servers[0], "--gpu-memory-utilization")) > float(
        flag(tight.servers[0], "--gpu-memory-utilization")
    )


def test_a_trainer_close_to_its_own_gpus_memory_is_named() -> None:
    text = plan_of(GRPO, "1x2:36", *PADDED, model=SMOLLM2).render()
    assert "Because: close: the trainer needs" in text and "gradient_checkpointing: true" in text
    over = plan_of(GRPO, "1x2:33", *PADDED, model=SMOLLM2).render()
    assert "close" not in over and "Because: over: the trainer needs" in over
    assert "it is tried, since the estimate is good to a tenth or so; if it fails: gradient_checkpointing: true" in over


def test_a_server_with_less_room_for_keys_and_values_than_usual_is_no_danger() -> None:
    few = plan_of("recipes/qwen2.5-math-7b/math_zero3.yaml", "4x8:80", model=SHAPES["qwen2.5-math-7b"]).render()
    assert "GiB for keys and values, a quarter of its completions at full length would take" in few
    assert "close" not in few and "over:" not in few
    words = ("--max_prompt_tokens", "64", "--max_completion_length", "32", "--publish", "adapter")
    over = plan_of(QLORA, "1x2:8.2", *words, model=QWEN).render()
    assert "Because: over: a server needs" in over and "more GPUs for each server" in over


def test_a_base_that_the_guard_will_not_take_is_named() -> None:
    said = "server_base unrounded: the server's weights are not the trainer's 4-bit ones"
    unrounded = ("--server_base", "unrounded")
    assert said in plan_of(QLORA, "1x2:80", *unrounded, model=QWEN).render()
    assert said not in plan_of(QLORA, "1x2:80", *unrounded, "--probe_tolerance", "0.7", model=QWEN).render()
    assert said not in plan_of(QLORA, "1x2:80", model=QWEN).render()


def test_a_budget_below_a_sequence_is_named() -> None:
    said = "is less than one sequence may have (256 prompt + 750 completion = 1006 tokens)"
    for budget, named in (("16", True), ("1005", True), ("1006", False)):
        assert (said in plan_of(QLORA, "1x1:24", "--micro_batch_tokens", budget, model=QWEN).render()) == named


@pytest.mark.parametrize(
    ("words", "served", "prepared"),
    [
        ((), "the rounded base", True),
        (("--server_base", "unrounded"), "Qwen/Qwen2.5-3B", False),
        (("--server_base", "vllm_4bit"), "Qwen/Qwen2.5-3B", False),
        (("--load_in_4bit", "false"), "Qwen/Qwen2.5-3B", False),
    ],
)
def test_what_the_server_serves_beneath_the_adapter(words: tuple[str, ...], served: str, prepared: bool) -> None:
    planned = plan_of(QLORA, "1x2:80", *words, model=QWEN)
    server = planned.servers[0]
    model = server.argv[server.argv.index("serve") + 1]
    assert model == (server_plan.BASE_UNKNOWN if served == "the rounded base" else served)
    bases = [each for each in planned.preparations if each.name == "base"]
    assert bool(bases) == prepared
    for each in bases:
        assert each.argv[1:] == ("-m", "r1zero.quantized_base", "--config", "runs/run/recipe.yaml")
        assert each.gpus == planned.trainers[0].gpus
    assert ("--quantization" in server.argv) == ("vllm_4bit" in words)


@pytest.mark.parametrize(
    ("targets", "model", "covered"),
    [
        (("q_proj", "model.layers.*.v_proj"), QWEN, ("q_proj", "v_proj")),
        (("all-linear",), QWEN, PROJECTIONS),
        (("null",), SMOLLM2, PROJECTIONS),
        (("all-linear",), ModelFacts(8192, "gpt2"), ()),
    ],
)
def test_the_layers_that_the_servers_adapter_slots_cover(
    targets: tuple[str, ...], model: ModelFacts, covered: tuple[str, ...]
) -> None:
    words = ("--publish", "adapter", "--lora_target_modules", *targets)
    argv = plan_of(QLORA, "1x2:80", *words, model=model).servers[0].argv
    start = argv.index("--lora-target-modules") + 1 if covered else 0
    assert argv[start : start + len(covered)] == covered
    assert ("--lora-target-modules" in argv) == bool(covered)
    assert argv[start + len(covered)].startswith("--") or not covered


def test_the_rounded_base_of_a_local_model_is_named_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    planned = plan_of(QLORA, "1x1:24", "--model_name_or_path", str(tmp_path / "model"), model=QWEN)
    server = planned.servers[0]
    assert server.argv[server.argv.index("serve") + 1].startswith(str(tmp_path / "cache" / "model-nf4-"))


def test_no_token_is_in_a_plan() -> None:
    planned = plan_of(QLORA, "1x1:24", model=QWEN)
    told = [line for line in planned.render().splitlines() if serving.TOKEN in line]
    assert told == ['  export R1ZERO_SERVER_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")']
    assert planned.by_hand[1] == "export R1ZERO_PUBLISH_FOLDER=$(mktemp -d /dev/shm/r1zero-XXXXXX)"
    for process in planned.processes:
        assert serving.TOKEN not in dict(process.env)
        assert not any(serving.TOKEN in word for word in process.argv)


def test_a_server_of_its_own_measures_with_many_sequences_and_one_that_shares_has_few() -> None:
    assert flag(plan_of(QLORA, "1x2:80", model=QWEN).servers[0], "--max-num-seqs") == "260"
    assert flag(plan_of(QLORA, "1x1:80", model=QWEN).servers[0], "--max-num-seqs") == "20"


def test_the_servers_context_never_exceeds_the_models() -> None:
    planned = plan_of(GRPO, "1x2", *PADDED, model=ModelFacts(context_length=576))
    assert flag(planned.servers[0], "--max-model-len") == "576"


def test_batch_arithmetic() -> None:
    batch = plan_of(GRPO, "1x5", "--trainer_gpus", "4").batch
    assert (batch.samples_per_step, batch.prompts_per_step) == (64 * 4 * 8, 64 * 4 * 8 // 32)
    assert batch.completions_per_generation == 64 * 4 * 8


@pytest.mark.parametrize(
    ("machine", "words", "expected"),
    [
        ("1x2:80", (), "this one, which the policy of one window (1 optimizer step) before has made"),
        (
            "1x2:80",
            ("--num_iterations", "3"),
            "this one, which the policy of one window (3 optimizer steps) before has made",
        ),
        ("1x1:80", (), "has made; they share a GPU, where each slows the other down"),
    ],
)
def test_the_plan_says_what_overlaps(machine: str, words: tuple[str, ...], expected: str) -> None:
    planned = plan_of(GRPO, machine, "--max_staleness", "1", *words, model=SMOLLM2)
    (line,) = (each for each in planned.render().splitlines() if each.startswith("Overlap: "))
    assert line.endswith(expected)
    assert "the policy server makes the next window while the trainer learns from this one" in line
    assert "Overlap" not in plan_of(GRPO, machine, *words, model=SMOLLM2).render()


def test_generation_batch_size_sets_the_passes() -> None:
    batch = plan_of(GRPO, "1x2", "--generation_batch_size", "1024").batch
    assert batch.steps_per_generation == 16
    assert batch.completions_per_generation == 1024


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "512 completions at a time = 1 optimizer step, each learned from 1 time, "),
        (
            ("--steps_per_generation", "32"),
            "2048 completions at a time = 4 optimizer steps, each learned from 1 time, ",
        ),
        (("--num_iterations", "2"), "512 completions at a time = 2 optimizer steps, each learned from 2 times, "),
        (
            ("--steps_per_generation", "4"),
            "256 completions at a time = 0.5 optimizer steps, each learned from 1 time, ",
        ),
    ],
)
def test_the_plan_says_how_many_steps_a_generation_feeds(words: tuple[str, ...], expected: str) -> None:
    assert f"Generation: {expected}" in plan_of(GRPO, "1x2", *words).render()


def test_lengths_are_checked_against_the_model() -> None:
    path = "recipes/smollm2-135m/gsm8k_grpo.yaml"
    assert plan_of(path, "1x2", *PADDED, model=ModelFacts(context_length=576))
    with pytest.raises(recipe.RecipeError, match="576 tokens, the model has 575 positions"):
        plan_of(path, "1x2", *PADDED, model=ModelFacts(context_length=575))


def test_gpus_under_a_cpu_build_of_torch_are_not_used() -> None:
    loaded = recipe.load("recipes/tiny/arithmetic_grpo.yaml")
    here = replace(hardware.assumed("1x2", PORTS), torch_cpu_only=True)
    planned = plan.make(loaded, here, Path("runs/run"), Path())
    assert planned.trainers[0].gpus == ()
    assert planned.accelerate_config.stem == "cpu"
    assert "torch is a CPU build" in planned.render()


def test_recipe_hardware_and_plan_import_no_torch() -> None:
    code = (
        "import sys; from r1zero import recipe, hardware, memory, plan, model_facts, quantized_base, launcher;"
        "from r1zero import supervisor, policy_server;"
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
