"""The plan as a person reads it."""

import io
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from r1zero import budget
from r1zero.placement import counted

if TYPE_CHECKING:
    from r1zero.batch import Batch
    from r1zero.plan import Plan, Process

WIDTH = 110
# Processes that run to their end before the trainer starts.
WHAT = {
    "model": "makes the embedded model where it is not cached, then ends",
    "preflight": "checks prompts and end tokens, then ends",
    "base": "rounds the weights to the trainer's 4 bits where they are not cached, then ends",
    "rehearsal": "looks at one batch of rollouts, then ends",
}


def render(plan: "Plan") -> str:
    """The text of ``--dry-run`` and of the run folder's plan.txt."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False)
    recipe, batch = plan.recipe, plan.batch
    console.print(f"Plan for {recipe.path}: {recipe.own.method} of {recipe.model} on {recipe.own.task}", soft_wrap=True)
    console.print(f"Hardware: {_hardware(plan)}", soft_wrap=True)
    console.print(_table(plan))

    processes = counted(batch.processes, "process", "processes")
    arithmetic = f"{batch.per_device} per device x {processes} x {batch.accumulation} accumulation"
    if recipe.own.method == "grpo":
        console.print(
            f"Optimizer step: {arithmetic} = {batch.samples_per_step} completions "
            f"= {batch.prompts_per_step} prompts x {batch.group} generations",
            soft_wrap=True,
        )
        if recipe.own.micro_batch_tokens is not None:
            console.print(
                f"Packed: those of a step in micro-batches of up to {recipe.own.micro_batch_tokens} tokens, without "
                f"padding, equally many for each of {processes}",
                soft_wrap=True,
            )
        console.print(
            f"Generation: {batch.completions_per_generation} completions at a time = {_steps(batch)}, each learned "
            f"from {counted(batch.iterations, 'time')}, at most {recipe['max_completion_length']} tokens each",
            soft_wrap=True,
        )
        if recipe.own.max_staleness:
            console.print(f"Overlap: {_overlap(plan)}", soft_wrap=True)
    else:
        console.print(f"Optimizer step: {arithmetic} = {batch.samples_per_step} worked solutions")
    epochs = f"{recipe['num_train_epochs']:g} epoch{'' if recipe['num_train_epochs'] == 1 else 's'}"
    console.print(f"Length: {counted(recipe['max_steps'], 'step') if recipe['max_steps'] > 0 else epochs}")
    if plan.memory:
        console.print("Memory: expected on each GPU, GiB")
    for line in plan.memory:
        console.print(f"  {line}", soft_wrap=True)
    if plan.memory_unchecked:
        console.print(f"Memory: NOT checked, {plan.memory_unchecked}", soft_wrap=True)
    for reason in plan.reasons:
        console.print(f"Because: {reason}", soft_wrap=True)
    console.print(f"Everything goes to {plan.run_folder}", soft_wrap=True)
    console.print("  recipe.yaml plan.txt versions.json status.json metrics.jsonl summary.json")
    console.print("  logs/ rollouts/ checkpoints/ model/")
    console.print("The same by hand:")
    for line in plan.by_hand:
        console.print(f"  {line}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def shell(argv: Sequence[str], gpus: Sequence[int], env: Sequence[tuple[str, str]]) -> str:
    """A command as a person types it."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in env]
    if gpus:
        variables.insert(0, f"CUDA_VISIBLE_DEVICES={_list(gpus)}")
    words = ["python" if word == sys.executable else word for word in argv]
    return " ".join([*variables, shlex.join(words)])


def _steps(batch: "Batch") -> str:
    """The optimizer steps that one round of generation feeds."""
    steps = batch.steps_per_generation * batch.iterations / batch.accumulation
    return f"{steps:g} optimizer step{'' if steps == 1 else 's'}"


def _overlap(plan: "Plan") -> str:
    """What goes on at the same time, and how old what is learned from may be."""
    what = "the policy server makes the next window while the trainer learns from this one, which the policy of one"
    batch = plan.batch
    steps = -(-batch.steps_per_generation * batch.iterations // batch.accumulation)
    shared = {(each.node, gpu) for each in plan.servers for gpu in each.gpus} & {
        (each.node, gpu) for each in plan.trainers for gpu in each.gpus
    }
    slower = "; they share a GPU, where each slows the other down" if shared else ""
    return f"{what} window ({steps} optimizer step{'s' if steps > 1 else ''}) before has made{slower}"


def _hardware(plan: "Plan") -> str:
    nodes = plan.hardware.nodes
    node = nodes[0]
    gpus = f"{len(node.gpus)} x {node.gpus[0].name} ({node.gpus[0].memory_gib:g} GiB)" if node.gpus else "no GPU"
    if len(nodes) == 1:
        return f"{node.host}, {gpus}"
    return f"{len(nodes)} nodes ({budget.hosts(plan.hardware, range(len(nodes)))}), each {gpus}"


def _table(plan: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("process", "node", "GPUs", "port", "what"):
        table.add_column(column, overflow="fold")
    for process in plan.processes:
        port = plan.server_urls[plan.servers.index(process)].rpartition(":")[2] if process in plan.servers else "-"
        host = plan.hardware.nodes[process.node].host
        table.add_row(process.name, host, _list(process.gpus) or "none", port, _what(plan, process))
    for url in plan.server_urls if not plan.servers else ():
        table.add_row("server", "-", "-", "-", f"already running at {url}, not ours to stop")
    return table


def _what(plan: "Plan", process: "Process") -> str:
    if process in plan.servers:
        reach = "this machine only" if len(plan.nodes) == 1 else plan.hardware.nodes[process.node].address
        return f"vllm serve, {reach}"
    if process.name in WHAT:
        return WHAT[process.name]
    machines = len(plan.trainers)
    count = counted(plan.trainer_processes, "process", "processes")
    if machines > 1:
        count = f"{plan.trainer_processes // machines} of {count}"
    return f"{count}, accelerate {plan.accelerate_config.stem}"


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
