"""r1zero against stock TRL's GRPOTrainer: the same GPUs, model, prompts, lengths, batch and numerics, in turns.

    python benchmarks/against_trl.py MODEL_FOLDER --out FOLDER [--modes r1zero trl-server trl-colocate]
        [--case fixed|spread|natural] [--completions 512] [--group 8] [--rounds 3] [--steps 6]
    python benchmarks/against_trl.py MODEL_FOLDER --out FOLDER --modes trl-server --rounds 1
        --sweep per_device_train_batch_size=8,16,32        # which of stock's settings are its best
    R1ZERO_CPU_SERVER_PYTHON=... python benchmarks/against_trl.py --small --out FOLDER      # a rehearsal without a GPU

Each turn starts everything anew: for stock its server (`vllm serve` with the flags that TRL documents; `trl vllm-serve`
is a deprecated wrapper of it) and its trainer at once; for r1zero launch/run.py with a recipe that is written here. The
sides take turns, another one first in each round. FOLDER keeps a JSON file for each turn, with settings, versions,
machine and seed; the same command with the same FOLDER makes the turns that are missing, a larger `--rounds` adds some,
other keys of `--stock` and `--ours` add a side, and `--rounds 0` only writes table and picture anew.
docs/performance.md says what the columns mean.

Cases: fixed and spread force each completion's length on both sides by the same means (side_by_side/lengths.py);
natural lets the model end by itself, so the two sides' lengths differ by chance.

What is the same on both sides: number format (weights `--dtype`, autocast to bf16 on GPUs), optimizer, learning rate,
loss, importance-sampling correction (TRL's defaults), and, unless `--stock` or `--ours` say otherwise, completions a
forward and gradient checkpointing. What stock is given besides, as its best known settings, each a key to sweep:

    vllm_gpu_memory_utilization 0.9 of the server's GPU, 0.3 of a shared one (TRL's default)
    gradient_checkpointing      false where it fits (--gradient-checkpointing turns it on for both)
    steps_per_generation        one generation a step, as r1zero
    vllm_enable_sleep_mode      false: waking costs time, and memory is no bound here
    vllm_tensor_parallel_size   1: more does not pay for models that fit one GPU
    use_liger_kernel            false (--stock use_liger_kernel=true)
    server.max-num-seqs         all completions at once, where vLLM's default would queue them
    server and trainer load at the same time, which TRL leaves to the user

`--stock KEY=VALUE` is a key of GRPOConfig; `--stock server.FLAG=VALUE` a flag of `vllm serve`; `--ours KEY=VALUE` a key
of the recipe.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.side_by_side import gpus, results  # noqa: E402 - found by the line above
from benchmarks.side_by_side.drawing import phases_svg  # noqa: E402
from benchmarks.side_by_side.lengths import LAW, Law  # noqa: E402
from benchmarks.side_by_side.results import Turn  # noqa: E402

from r1zero import hardware, model_facts, run_folder  # noqa: E402
from r1zero.tasks import prompts as templates  # noqa: E402

SIDE = "benchmarks.side_by_side"
VLLM = "vllm.entrypoints.cli.main"
MODES = ("r1zero", "trl-server", "trl-colocate", "trl-transformers")
GOLD = re.compile(r"####\s*(-?[\d,.]+)\s*$")  # of GSM8K
SHARE_ALONE, SHARE_SHARED = 0.9, 0.3  # of a GPU for vLLM: vLLM's default and TRL's
SHOWN_LINES = 15
ERROR = re.compile(r"\b\w*(Error|Exception): ")

# Dimensions of Qwen2.5 (its config.json on the hub), for weights at random.
SHAPES = {
    "tiny": (256, 2, 4, 4, 512, 512),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936),
    "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064),
}


@dataclass(frozen=True)
class Machine:
    """Where this runs.

    Attributes:
        gpus: indices or UUIDs of those that are used.
        name: of each.
        python: that starts every process; on a CPU the one that has vLLM's CPU build.
    """

    gpus: tuple[str, ...]
    name: str | None
    python: str


@dataclass(frozen=True)
class Work:
    """What both sides are asked to do.

    Attributes:
        model: folder.
        rows: question, answer and prompt of each problem, in the order of the steps.
        law: of the lengths; None: natural.
        longest: max_tokens.
        context: of the longest prompt and completion.
        completions: of a step.
        group: of a prompt.
        steps: with those that warm up.
        warmup: steps that do not count.
    """

    model: Path
    rows: list[dict[str, str]]
    law: Law | None
    longest: int
    context: int
    completions: int
    group: int
    steps: int
    warmup: int


class TurnFailed(Exception):
    """A process of a turn failed, or it took too long."""


def main() -> int:
    # Asked to end, as by timeout, it ends what it has started, which has sessions of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asked = _arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    machine = _machine(asked)
    if asked.random_shape and not (asked.model / "config.json").is_file():
        make_model(asked.random_shape, asked.model, asked.tokenizer, asked.seed)
    work = _work(asked)
    began, failed = time.monotonic(), 0
    if asked.ceiling_rounds and not (asked.out / "ceiling.json").is_file():
        failed += not _ceiling(asked, machine, work)
    sides = [(mode, variant) for mode in asked.modes for variant in _variants(mode, asked.sweep)]
    done = {(turn.name, turn.round) for turn in results.load(asked.out)}
    for number in range(asked.rounds):
        turned = number % len(sides)
        for mode, variant in (*sides[turned:], *sides[:turned]):
            if (f"{mode} {_words(asked, mode, variant)}".strip(), number) in done:
                continue
            if asked.seconds and time.monotonic() - began > asked.seconds:
                print(f"no further turn, {asked.seconds:g} s are over; the same command goes on", flush=True)
                break
            failed += not _turn(asked, machine, work, mode, variant, number)
    _conclude(asked, machine)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="a folder with config, weights and tokenizer")
    add("--out", type=Path, required=True, help="where results are kept; turns found there are not made again")
    add("--modes", nargs="+", choices=MODES, default=["r1zero", "trl-server"])
    add("--case", choices=("fixed", "spread", "natural"), default="spread")
    add("--mean", type=float, default=400, help="of the spread, before it is cut; tokens")
    add("--longest", type=int, default=1024, help="where completions are cut; all have it in the case fixed; tokens")
    add("--completions", type=int, default=512, help="a step")
    add("--group", type=int, default=8, help="completions of a prompt")
    add("--rounds", type=int, default=3, help="in all, with those in FOLDER")
    add("--steps", type=int, default=6, help="of each turn that count")
    add("--warmup", type=int, default=2, help="steps before these")
    add("--seed", type=int, default=0, help="of lengths, synthetic prompts, random weights and both trainers")
    add("--gpus", type=int, help="how many to use; default: all visible")
    add("--dataset", type=Path, help="JSON lines with question and answer, as GSM8K's; default: synthetic sums")
    add("--prompt-template", default="none", help="of r1zero's templates; stock gets the text that it gives")
    add("--prompt-tokens", type=int, default=128, help="of a synthetic prompt, about")
    add("--per-device-batch", type=int, default=16, help="completions in a forward, both sides")
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add("--dtype", default="float32", help="of the weights that are trained, both sides; float32 is TRL's default")
    add("--learning-rate", type=float, default=1e-6)
    add("--stock", nargs="+", default=[], metavar="KEY=VALUE", help="for stock alone")
    add("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="for r1zero alone")
    add("--sweep", nargs="+", default=[], metavar="KEY=V1,V2", help="of stock: a side for each combination")
    add("--ceiling-rounds", type=int, default=3, help="of vLLM alone; 0: none")
    add("--random-shape", choices=sorted(SHAPES), help="make MODEL_FOLDER with random weights where it is not there")
    add("--tokenizer", type=Path, help="folder, for --random-shape; default: the embedded model's characters")
    add("--peak-tflops", type=float, help="of one GPU, dense, in bf16; default: by its name")
    add("--turn-timeout", type=float, default=1800, help="seconds")
    add("--seconds", type=float, help="start no turn after so long; the same command goes on")
    add("--small", action="store_true", help="a rehearsal: tiny random model, 16 completions of at most 24 tokens")
    asked = parser.parse_args()
    if asked.small:
        given = vars(parser.parse_args(["--out", "x"]))
        small = {
            **{"random_shape": "tiny", "completions": 16, "group": 4, "longest": 24, "mean": 10.0, "rounds": 1},
            **{"steps": 2, "warmup": 1, "prompt_tokens": 32, "per_device_batch": 8, "ceiling_rounds": 1},
        }
        for name, value in small.items():
            if getattr(asked, name) == given[name]:
                setattr(asked, name, value)
        asked.model = asked.model or asked.out / "model"
    if asked.model is None:
        parser.error("name a MODEL_FOLDER, or --small")
    if asked.completions % asked.group:
        parser.error(f"--completions {asked.completions} is no multiple of --group {asked.group}")
    return asked


def _machine(asked: argparse.Namespace) -> Machine:
    node = hardware.this_node()
    count = len(node.gpus) if asked.gpus is None else asked.gpus
    if count > len(node.gpus):
        sys.exit(f"--gpus {count}: {len(node.gpus)} are visible")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(len(node.gpus))]
    python = sys.executable if node.gpus else os.environ.get("R1ZERO_CPU_SERVER_PYTHON", sys.executable)
    if not count and "trl-server" in asked.modes:
        sys.exit(
            "--modes trl-server: stock TRL sends weights over NCCL alone and needs a GPU; trl-transformers rehearses"
        )
    return Machine(tuple(names[:count]), node.gpus[0].name if node.gpus else None, python)


def make_model(shape: str, folder: Path, tokenizer: Path | None, seed: int) -> None:
    """A model of `shape` with weights at random.

    A Qwen3 and not a Qwen2: the same matrices, and for Qwen2 transformers 5 replaces the tokenizer by Qwen2's own.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from r1zero import tiny

    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[shape]
    words = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else tiny.make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape != "qwen2.5-7b",
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id if words.pad_token_id is not None else words.eos_token_id,
    )
    words.model_max_length = 32768
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    print(f"{folder}: {sum(each.numel() for each in model.parameters()) / 1e6:.0f}M random parameters", flush=True)


def _work(asked: argparse.Namespace) -> Work:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    steps = asked.steps + asked.warmup
    count = asked.completions // asked.group * steps
    template = templates.template(asked.prompt_template)
    rows = _questions(asked, tokenizer, count)
    for row in rows:
        built = template.build(row["question"])
        if not isinstance(built, str):
            sys.exit(f"--prompt-template {asked.prompt_template}: take one that gives a text, not chat messages")
        row["prompt"] = built
    longest_prompt = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)
    law = Law(asked.case, asked.mean, asked.longest, asked.group, asked.seed) if asked.case != "natural" else None
    return Work(
        model=asked.model.resolve(),
        rows=rows,
        law=law,
        longest=asked.longest,
        context=longest_prompt + asked.longest,
        completions=asked.completions,
        group=asked.group,
        steps=steps,
        warmup=asked.warmup,
    )


def _questions(asked: argparse.Namespace, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """`count` questions with their answers; those of a dataset are taken again where they run out."""
    if asked.dataset:
        read = [json.loads(line) for line in asked.dataset.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [{"question": row["question"], "answer": _gold(row["answer"])} for row in read]
        return [dict(row) for row in itertools.islice(itertools.cycle(found), count)]
    draw = random.Random(asked.seed)
    made = []
    for _ in range(count):
        numbers = [draw.randrange(10, 1000)]
        text = f"Add {numbers[0]}"
        while len(tokenizer(text)["input_ids"]) < asked.prompt_tokens:
            numbers.append(draw.randrange(10, 1000))
            text += f" and {numbers[-1]}"
        made.append({"question": text, "answer": str(sum(numbers))})
    return made


def _gold(answer: str) -> str:
    found = GOLD.search(answer)
    return (found[1] if found else answer).replace(",", "")


def _variants(mode: str, sweep: Sequence[str]) -> list[dict[str, Any]]:
    """What `--sweep` makes of a mode; r1zero is not swept."""
    if mode == "r1zero" or not sweep:
        return [{}]
    axes = [[(key, value) for value in values.split(",")] for key, _, values in (each.partition("=") for each in sweep)]
    return [_keys([f"{key}={value}" for key, value in each]) for each in itertools.product(*axes)]


def _keys(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words, values read as YAML."""
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}


def _words(asked: argparse.Namespace, mode: str, variant: Mapping[str, Any]) -> str:
    """The keys by which a side differs from its usual settings: part of its name, so that turns are never mixed up."""
    given = _keys(asked.ours if mode == "r1zero" else asked.stock)
    return ",".join(f"{key}={value}" for key, value in {**given, **variant}.items())


def _turn(
    asked: argparse.Namespace, machine: Machine, work: Work, mode: str, variant: Mapping[str, Any], number: int
) -> bool:
    """One turn of one side, kept as JSON; whether it went well."""
    words = _words(asked, mode, variant)
    label = f"round {number} {mode} {words}".strip()
    room = asked.out / "work" / re.sub(r"[^\w.=-]+", "_", label)
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    print(f"{time.strftime('%H:%M:%S')} {label} ...", flush=True)
    began = time.time()
    start = _ours if mode == "r1zero" else _stock
    try:
        with gpus.Watch(machine.gpus) as watch:
            lines, trainers, settings = start(asked, machine, work, mode, dict(variant), room)
        notes = [json.loads(line) for file in room.glob("notebook.*") for line in file.read_text().splitlines()]
        steps = results.steps_of(lines, notes, work.completions, work.warmup)
    except (TurnFailed, ValueError) as error:
        print(f"{label} FAILED: {error}", flush=True)
        return False
    counted = [look for look in watch.looks if lines[work.warmup - 1]["time"] < look.time <= lines[-1]["time"]]
    turn = Turn(
        mode,
        words,
        number,
        steps,
        idle={name: 1 - _mean(each.busy for each in counted if each.gpu == gpu) for name, gpu in _seen(counted)},
        memory_gib={name: max(e.memory_gib for e in watch.looks if e.gpu == gpu) for name, gpu in _seen(watch.looks)},
        trainer_gpus=trainers if machine.gpus else 0,
        gpus=len(machine.gpus),
        started_s=lines[0]["time"] - began,
        settings={
            **{"given": settings, "command": sys.argv, "seed": asked.seed, "case": asked.case, "gpu": machine.name},
            **{"law": work.law.dump() if work.law else None, "versions": _versions(), "time": began},
        },
    )
    results.save(turn, asked.out / f"turn-{number:02d}-{re.sub(r'[^A-Za-z0-9.=-]+', '_', turn.name)}.json")
    shares = ", ".join(f"{phase} {turn.phase(phase):.3g}" for phase in results.PHASES)
    print(f"         {turn.seconds:.3g} s a step ({shares}), {turn.tokens_per_second:,.0f} tokens/s", flush=True)
    return True


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _seen(looks: Sequence[gpus.Look]) -> list[tuple[str, int]]:
    return [(str(gpu), gpu) for gpu in sorted({look.gpu for look in looks})]


def _shared_keys(asked: argparse.Namespace, work: Work, trainers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that mean the same in a recipe and in GRPOConfig; `given` wins, and the batch stays what it is."""
    per_device = int(given.get("per_device_train_batch_size", asked.per_device_batch))
    if work.completions % (per_device * trainers):
        raise TurnFailed(f"{work.completions} completions are no multiple of {per_device} on {trainers} processes")
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": work.completions // (per_device * trainers),
        "num_generations": work.group,
        "max_completion_length": work.longest,
        "max_steps": work.steps,
        "learning_rate": asked.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": asked.gradient_checkpointing,
        "temperature": 1.0,
        "shuffle_dataset": False,
        "seed": asked.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        **given,
    }


def _environment(machine: Machine, work: Work, room: Path) -> dict[str, str]:
    paths = (str(PROJECT), str(PROJECT / "src"), os.environ.get("PYTHONPATH", ""))
    lengths = {LAW: work.law.dump()} if work.law else {"R1ZERO_BENCHMARK_NATURAL": "1"}
    # Without GPUs vLLM's CPU build shares the cores with the trainer, as r1zero sets it up; nothing is compiled.
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
    return {
        **os.environ,
        **lengths,
        **({} if machine.gpus else {**cpu, "TORCHDYNAMO_DISABLE": "1"}),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "R1ZERO_BENCHMARK_NOTEBOOK": str((room / "notebook").resolve()),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it cannot give the logprobs that both sides ask for
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _ours(
    asked: argparse.Namespace, machine: Machine, work: Work, mode: str, variant: dict[str, Any], room: Path
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """r1zero: a recipe and one command."""
    given = _keys(asked.ours)
    count = len(machine.gpus)
    servers = int(given.get("server_gpus", 0 if count == 1 else 1)) if count else 0
    trainers = int(given.get("trainer_gpus", max(1, count - servers)))
    data = room / "data"
    data.mkdir()
    _write_lines(data / "train.jsonl", [{key: row[key] for key in ("question", "answer")} for row in work.rows])
    recipe = {
        **_shared_keys(asked, work, trainers, {}),
        **{"method": "grpo", "task": "dataset", "dataset_name": str(data.resolve())},
        **{"prompt_template": asked.prompt_template, "model_name_or_path": str(work.model), "dtype": asked.dtype},
        **{"reward_funcs": [f"{SIDE}.reward:reward"], "use_vllm": True, "vllm_mode": "server"},
        **({"server_gpus": servers, "trainer_gpus": trainers} if count else {}),
        **{"eval_count": 0, "eval_on_start": False, "decontaminate_ngram": 0},
        "max_prompt_tokens": work.context - work.longest,  # of which r1zero makes the server's --max-model-len
        **given,
    }
    per_device = recipe["per_device_train_batch_size"]
    recipe["gradient_accumulation_steps"] = work.completions // (per_device * trainers)
    file, run = room / "recipe.yaml", run_folder.RunFolder(room / "run")
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    start = ("-m", f"{SIDE}.ours") if work.law else (str(PROJECT / "launch" / "run.py"),)
    env = {**_environment(machine, work, room), **({"CUDA_VISIBLE_DEVICES": ",".join(machine.gpus)} if count else {})}
    _run({"r1zero": ([machine.python, *start, str(file), "--output_dir", str(run.path)], env)}, room, asked)
    return [line for line in run.read_metrics() if line["kind"] == "step"], trainers, recipe


def _stock(
    asked: argparse.Namespace, machine: Machine, work: Work, mode: str, variant: dict[str, Any], room: Path
) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
    """Stock TRL, as its documentation has it."""
    given = {**_keys(asked.stock), **variant}
    flags = {key.removeprefix("server."): given.pop(key) for key in list(given) if key.startswith("server.")}
    count, cpu = len(machine.gpus), not machine.gpus
    for_server = int(flags.get("tensor-parallel-size", 1)) if mode == "trl-server" else 0
    trainers = 1 if cpu else count - for_server
    if trainers < 1:
        raise TurnFailed(f"trl-server needs a GPU beside the server's; {count} are used")
    config = {
        **_shared_keys(asked, work, trainers, given),
        **{"output_dir": str(room / "output"), "disable_tqdm": True, "bf16": not cpu, "use_cpu": cpu},
        **{"model_init_kwargs": {"dtype": asked.dtype}, "use_vllm": mode != "trl-transformers"},
    }
    share = config.pop("vllm_gpu_memory_utilization", None)
    processes: dict[str, tuple[list[str], dict[str, str]]] = {}
    env = {**_environment(machine, work, room), "VLLM_HOST_IP": hardware.LOOPBACK}
    if mode == "trl-server":
        port, group_port = hardware.free_ports(2)
        flags = {
            **{"host": hardware.LOOPBACK, "port": port, "dtype": "bfloat16", "max-model-len": work.context},
            **{"gpu-memory-utilization": share or SHARE_ALONE, "max-num-seqs": work.completions},
            # As TRL's documentation starts it.
            **{"weight-transfer-config": '{"backend":"nccl"}', "logprobs-mode": "processed_logprobs"},
            **{"max-logprobs": -1, **flags},
        }
        serve = [machine.python, "-m", f"{SIDE}.serve" if work.law else VLLM, "serve", str(work.model)]
        serve += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        on = {"CUDA_VISIBLE_DEVICES": ",".join(machine.gpus[:for_server]), "VLLM_SERVER_DEV_MODE": "1"}
        processes["server"] = (serve, {**env, **on})
        config |= {"vllm_mode": "server", "vllm_server_base_url": f"http://{hardware.LOOPBACK}:{port}"}
        config |= {"vllm_group_port": group_port, "vllm_server_timeout": 600}
    elif mode == "trl-colocate":
        config |= {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": share or SHARE_SHARED}
        config.setdefault("vllm_max_model_length", work.context)
    data, steps_file = room / "prompts.jsonl", room / "steps.jsonl"
    _write_lines(data, [{key: row[key] for key in ("prompt", "answer")} for row in work.rows])
    settings = {"config": config, "model": str(work.model), "data": str(data), "steps_file": str(steps_file)}
    (room / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    launch = [machine.python]
    if trainers > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
        launch += [str(trainers), "--main_process_port", str(hardware.free_ports(1)[0]), "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no"]
    on = {} if cpu else {"CUDA_VISIBLE_DEVICES": ",".join(machine.gpus[for_server:])}
    processes["trainer"] = ([*launch, "-m", f"{SIDE}.stock", str(room / "settings.json")], {**env, **on})
    _run(processes, room, asked)
    return [json.loads(line) for line in steps_file.read_text().splitlines()], trainers, {"config": config, **flags}


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _run(processes: Mapping[str, tuple[list[str], dict[str, str]]], room: Path, asked: argparse.Namespace) -> None:
    """Start all at once and wait for the last named; then the others are ended.

    Raises:
        TurnFailed: where one fails, with the last lines of its log, or at the turn's deadline.
    """
    deadline = time.monotonic() + asked.turn_timeout
    with contextlib.ExitStack() as ending:
        started = {}
        for name, (argv, env) in processes.items():
            log = ending.enter_context((room / f"{name}.log").open("wb"))
            # From the project folder, as a user would; in a session of its own, so that all of it can be ended.
            process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=PROJECT, start_new_session=True)
            ending.callback(_end, process)
            started[name] = process
        last = name
        while started[last].poll() is None:
            time.sleep(0.2)
            gone = [name for name, process in started.items() if name != last and process.poll() is not None]
            if gone:
                raise TurnFailed(f"the {gone[0]} ended meanwhile\n{_tail(room / f'{gone[0]}.log')}")
            if time.monotonic() > deadline:
                raise TurnFailed(f"not over after {asked.turn_timeout:g} s\n{_tail(room / f'{last}.log')}")
        if started[last].returncode:
            raise TurnFailed(f"exit code {started[last].returncode}\n{_tail(room / f'{last}.log')}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its whole session."""
    for how, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if how is signal.SIGTERM:
                time.sleep(1)  # its children, such as vLLM's engine, end after it


def _tail(log: Path) -> str:
    """Where a log is and its last lines; before them the first that names an error, which is mostly the cause."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next((line for line in lines[:-SHOWN_LINES] if ERROR.search(line)), None)
    return "\n".join([str(log), *([first, "..."] if first else []), *lines[-SHOWN_LINES:]])


def _ceiling(asked: argparse.Namespace, machine: Machine, work: Work) -> bool:
    """vLLM alone on one GPU; whether it went well."""
    room = asked.out / "work" / "ceiling"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    engine: dict[str, Any] = {"dtype": "bfloat16" if machine.gpus else "float32", "max_model_len": work.context}
    engine |= {"gpu_memory_utilization": SHARE_ALONE if machine.gpus else SHARE_SHARED}
    engine |= {} if machine.gpus else {"enforce_eager": True}
    settings = {
        **{"model": str(work.model), "group": work.group, "longest": work.longest, "rounds": asked.ceiling_rounds},
        "prompts": [row["prompt"] for row in work.rows[: work.completions // work.group]],
        "engine": {**engine, "max_num_seqs": work.completions},
        "out": str((asked.out / "ceiling.json").resolve()),
    }
    (room / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    env = _environment(machine, work, room) | ({"CUDA_VISIBLE_DEVICES": machine.gpus[0]} if machine.gpus else {})
    print(f"{time.strftime('%H:%M:%S')} vLLM alone ...", flush=True)
    try:
        _run({"offline": ([machine.python, "-m", f"{SIDE}.offline", str(room / "settings.json")], env)}, room, asked)
    except TurnFailed as error:
        print(f"vLLM alone FAILED: {error}", flush=True)
        return False
    return True


def _conclude(asked: argparse.Namespace, machine: Machine) -> None:
    """Table and picture of all turns that the folder holds."""
    turns = results.load(asked.out)
    if not turns:
        return
    gpu = next((turn.settings["gpu"] for turn in turns if turn.settings.get("gpu")), machine.name)
    shape = model_facts.read(str(asked.model), None, download=False)
    peak = asked.peak_tflops or (results.peak_tflops(gpu) if gpu else None)
    file = asked.out / "ceiling.json"
    ceiling = json.loads(file.read_text())["tokens_per_second"] if file.is_file() else []
    text = results.table(turns, shape.shape if shape else None, peak, ceiling)
    where = f"{turns[0].gpus} x {gpu}" if gpu else "CPU"
    title = f"{asked.model.name}, {where}, {asked.completions} completions, {asked.case}"
    (asked.out / "summary.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    (asked.out / "phases.svg").write_text(phases_svg(turns, title), encoding="utf-8")
    print(f"\n{title}\n\n{text}\n\nkept in {asked.out}", flush=True)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in run_folder.PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # a copy without git
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
        found["commit"] = commit.stdout.strip()
    return {**found, "host": os.uname().nodename}


if __name__ == "__main__":
    sys.exit(main())
