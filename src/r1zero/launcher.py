"""The one command: a recipe and the hardware become a plan, a run folder is made, and `attempt` carries the plan out.

``launch/run.py`` only calls `main`. Over several nodes it is started once on each (``srun``): the first one leads, the
others only serve it (`nodes`).
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1zero import recipe as recipes
from r1zero.library_keys import LibraryKey
from r1zero.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from r1zero.hardware import Hardware
    from r1zero.model_facts import ModelFacts
    from r1zero.nodes import RemoteNode
    from r1zero.plan import Plan
    from r1zero.preemption import Notice
    from r1zero.preflight.findings import Finding
    from r1zero.slurm import Job
    from r1zero.tasks.selection import Selection

HEAD_SAYS_IT_S = 10.0


def main(project: Path) -> int:
    """Run the command line.

    Args:
        project: the checkout that holds launch/, recipes/ and accelerate_configs/.

    Returns:
        The exit code: 0 when the run finished, or was put back into the queue; 1 when a process failed, 2 when the
        recipe cannot run, 3 when going on would have been wrong; 130, 143 and 129 after Ctrl-C, SIGTERM and SIGHUP; 138
        after SIGUSR1 where nothing will start it again by itself.
    """
    arguments, overrides = _parser(_names_a_run(sys.argv[1:])).parse_known_args()
    # Imported after parsing, so that --help is instant. None of these imports torch.
    if arguments.status is not None or arguments.list is not None:
        from r1zero.reporting import status

        return status.main(arguments.status, arguments.list, overrides)
    from rich.console import Console

    from r1zero import preemption, slurm

    if project == Path.cwd():
        project = Path()  # so that the plan's lines are as short as a person would type them
    console = Console(highlight=False)
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    job = None
    try:
        with preemption.Notice() as notice:
            job = slurm.job()
            return _lead_or_serve(arguments, overrides, project, job, notice, console, errors)
    except slurm.SlurmError as error:
        errors.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print("error: SIGINT received before anything was started")
        return 130
    except preemption.Preempted as error:
        return _stopped_before_anything(job, str(error), errors)


def _lead_or_serve(
    arguments: argparse.Namespace,
    overrides: list[str],
    project: Path,
    job: "Job | None",
    notice: "Notice",
    console: "Console",
    errors: "Console",
) -> int:
    """The command line on this node, to its end. What it does not catch, `main` does."""
    from r1zero import agent, hardware, model_facts, plan, resumption, run_folder
    from r1zero.attempt import Place, carry_out
    from r1zero.tasks.problem import DatasetError

    leads = job is None or job.node == 0
    looks_only = arguments.dry_run or arguments.check or arguments.hardware
    if not leads and looks_only:
        return 0
    with ExitStack() as stack:
        try:
            if arguments.resume:
                recipe = resumption.recipe(arguments.resume, overrides)
            else:
                recipe = recipes.load(arguments.recipe, overrides)
            if job is not None and not leads:
                return agent.serve(_meeting_file(recipe, job), job.node, job.nodes, errors.print)
            again = resumption.folder(recipe, arguments.resume, job)
            if again is not None and not arguments.resume:
                recipe = resumption.recipe(again, [])
            if recipe.own.method == "grpo":
                recipe.reward_functions()  # what cannot be imported must not be found out after a server has started
            path = again or _new_path(recipe, job)
            if again is None:
                _refuse_overwriting(recipe, path)
            here, others = _hardware(arguments, recipe, job, notice, stack)
            facts = _model_facts(recipe, download=not arguments.dry_run)
            planned = plan.make(recipe, here, path, project, facts)
            if not arguments.hardware:
                _check_packages(planned)
            selection = _check_data(recipe, download=not arguments.dry_run)
            findings = _check_golds(recipe, selection)
        except (RecipeError, DatasetError, hardware.HardwareError, model_facts.ModelNotFound) as error:
            return _cannot_run(str(error), leads, errors)
        except agent.MeetingFailed as error:
            errors.print(f"error: {error}")
            return 1
        if arguments.dry_run:
            console.print(planned.render(), end="", markup=False, soft_wrap=True)
            _print_notes(selection, findings, console)
            data = _counts(selection)
            seen = f"recipe, {_plan_checked(planned)}, {data}"
            console.print(f"Checked: {seen}. Dry run: nothing was started or written.", soft_wrap=True)
            return 0
        if arguments.hardware:
            errors.print("error: --hardware describes a machine that this one is not: it goes with --dry-run")
            return 2
        _print_notes(selection, findings, console)
        if arguments.check:
            return _preflight_only(planned, console)
        notice.interrupts = False  # from here on there is a folder that says how the run ends
        with _signals_held():
            try:
                folder = run_folder.RunFolder(path) if again else run_folder.RunFolder(path).create()
            except OSError as error:
                why = f"{path} cannot be made: {error.strerror}"
                errors.print(f"error: {why}; name another place with --runs_dir FOLDER")
                return 2
            if folder.path != path:
                planned = plan.make(recipe, here, folder.path, project, facts)
            return carry_out(planned, Place(folder, project, others, job, notice, console, errors))


def _hardware(
    arguments: argparse.Namespace, recipe: Recipe, job: "Job | None", notice: "Notice", stack: ExitStack
) -> "tuple[Hardware, tuple[RemoteNode, ...]]":
    """What the plan is made for, and the nodes other than this one, which stay until `stack` is left.

    Raises:
        HardwareError: when it cannot be read.
        MeetingFailed: when a node is missing.
        SlurmError: when this was started once, and the job has several nodes.
    """
    from r1zero import hardware, nodes, slurm

    if arguments.hardware:
        return hardware.assumed(arguments.hardware), ()
    if job is None or job.nodes == 1:
        return hardware.detect(), ()
    if arguments.dry_run or arguments.check:  # the nodes of a job are alike, as far as one of them can tell
        here = hardware.this_node()
        alike = (replace(here, host=host, address=host) for host in slurm.hosts())
        return hardware.of_nodes(tuple(alike)), ()
    if job.step is None:
        raise slurm.SlurmError(f"the job has {job.nodes} nodes, and this was started on one: {slurm.srun(job.nodes)}")
    meeting = nodes.gathered(_meeting_file(recipe, job), hardware.this_node(), job.nodes, notice.check)
    first, others = stack.enter_context(meeting)
    return hardware.of_nodes((first, *(each.node for each in others))), others


def _meeting_file(recipe: Recipe, job: "Job") -> Path:
    """Where the nodes find each other; of this start of the job alone."""
    return Path(recipe.own.runs_dir).absolute() / f".meeting-{job.name}-{job.restarts}.json"


def _new_path(recipe: Recipe, job: "Job | None") -> Path:
    """Where a fresh run goes. Under Slurm the name says the job's number, by which a requeued job finds it again."""
    from r1zero import run_folder

    if job is not None and not recipe["output_dir"]:
        return Path(recipe.own.runs_dir) / f"{recipe.name}-{job.name}"
    return run_folder.default_path(recipe.own.runs_dir, recipe.name, recipe["output_dir"])


def _cannot_run(why: str, leads: bool, errors: "Console") -> int:
    """Say it once: by the node that leads, unless it is another one alone that cannot read the recipe."""
    import time

    if not leads:
        time.sleep(HEAD_SAYS_IT_S)
    errors.print(f"error: {why}")
    return 2


def _stopped_before_anything(job: "Job | None", why: str, errors: "Console") -> int:
    """SIGUSR1 came before there was a run folder: nothing is lost, and the job goes back into the queue."""
    from r1zero import preemption

    if job is None or job.node:
        errors.print(f"stopped: {why} before anything was started")
        return preemption.STOPPED
    most = recipes.own_keys()["max_requeues"].default
    if job.restarts >= most:
        errors.print(f"error: {why} before anything was started, after {job.restarts} requeues: it is given up")
        return 1
    if not_done := preemption.requeue(job, None):
        errors.print(f"stopped: {why} before anything was started; scontrol requeue failed: {not_done}")
        return preemption.STOPPED
    errors.print(f"stopped: {why} before anything was started; job {job.id} is in the queue again")
    return 0


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until the supervisor has its handlers, so that no run folder stays without its ending."""
    from r1zero.supervisor import SIGNALS

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _names_a_run(words: list[str]) -> bool:
    """Whether a run folder is named instead of a recipe, or where runs lie."""
    return any(word.partition("=")[0] in ("--resume", "--status", "--list") for word in words)


def _parser(names_a_run: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/run.py",
        description="Train with a recipe: plan it, start the policy server and the trainer, watch them, stop them.",
        epilog=_keys_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="launch/run.py {RECIPE | --resume RUN_FOLDER} [--check | --dry-run [--hardware NxG[:GIB]]] "
        "[--key value ...]\n       launch/run.py {--status RUN_FOLDER | --list [RUNS_DIR]}",
    )
    if not names_a_run:
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/tiny/arithmetic_grpo.yaml")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN_FOLDER", help="go on with this run, from its newest complete checkpoint"
    )
    parser.add_argument("--status", type=Path, metavar="RUN_FOLDER", help="say where this run stands, and what to do")
    parser.add_argument(
        "--list",
        nargs="?",
        const=recipes.own_keys()["runs_dir"].default,
        metavar="RUNS_DIR",
        help="a line for each run in this folder (default: %(const)s), newest first",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, touch nothing")
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at data, golds, prompts and, with a running policy server, rollouts; then stop",
    )
    parser.add_argument(
        "--hardware",
        metavar="NxG[:GIB]",
        help="with --dry-run: plan for N nodes of G GPUs of GIB memory, for example 1x2:80",
    )
    return parser


def _keys_text() -> str:
    """The list of our keys, as --help prints it."""
    import textwrap

    lines = ["keys of ours (beside every key of TRL's GRPOConfig or SFTConfig, ModelConfig and ScriptArguments):"]
    for key in recipes.own_keys().values():
        lines.append(f"  {key.name}  [{_kind(key)}, default {_default(key)}]")
        lines += textwrap.wrap(key.help, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _kind(key: LibraryKey) -> str:
    return "|".join(key.choices) if key.choices else "|".join(kind for kind in key.kinds if kind != "none")


def _default(key: LibraryKey) -> str:
    return "null" if key.default is None else str(key.default)


def _refuse_overwriting(recipe: Recipe, path: Path) -> None:
    if recipe["output_dir"] and path.exists():
        why = "exists already, and a run never writes over another"
        raise recipe.fault(
            "output_dir", why, "name another folder, or leave the key out for a fresh one under runs_dir"
        )


def _model_facts(recipe: Recipe, download: bool) -> "ModelFacts | None":
    from r1zero import model_facts

    if recipe.model == recipes.TINY_MODEL:
        return None
    try:
        return model_facts.read(recipe.model, recipe["model_revision"], download=download)
    except model_facts.ModelNotFound as error:
        remedy = "mend the id, log in with `hf auth login`, or give a local folder"
        raise recipe.fault("model_name_or_path", f"cannot be had: {error}", remedy) from error


def _check_packages(planned: "Plan") -> None:
    """Name what must be installed on this machine and is not, before a server and a model have been loaded in vain."""
    from importlib.util import find_spec

    from r1zero import accelerate_config
    from r1zero.reporting import trackers

    recipe, gpu_extra = planned.recipe, "pip install -e '.[gpu]'"
    needed = {name: ("report_to", f"pip install {name}") for name in trackers.chosen(recipe.library.get("report_to"))}
    if recipe.uses_vllm and not recipe.running_server:
        needed["vllm"] = ("use_vllm", f"{gpu_extra}, or --use_vllm false")
    if recipe.own.server_base == "vllm_4bit" and planned.servers and _vllm_needs_a_plugin():
        needed["vllm_bnb_plugin"] = ("server_base", "pip install vllm-bnb-plugin, or server_base: rounded")
    if accelerate_config.read(planned.accelerate_config, recipe).zero_stage:
        needed["deepspeed"] = ("accelerate_config", f"{gpu_extra}, or another accelerate_config")
    if recipe["use_liger_kernel"]:
        needed["liger_kernel"] = ("use_liger_kernel", gpu_extra)
    if recipe["attn_implementation"] == "flash_attention_2":
        needed["flash_attn"] = ("attn_implementation", "pip install flash-attn, or attn_implementation: sdpa")
    if recipe["load_in_4bit"] or recipe["load_in_8bit"]:
        needed["bitsandbytes"] = ("load_in_4bit" if recipe["load_in_4bit"] else "load_in_8bit", gpu_extra)
    for package, (key, remedy) in needed.items():
        if find_spec(package) is None:
            raise recipe.fault(key, f"needs the package {package}, which is not installed here", remedy)


def _vllm_needs_a_plugin() -> bool:
    """Whether vLLM's own 4-bit weights have moved out of it, as they did in 0.28 (vllm#43529)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return tuple(int(part) for part in version("vllm").split(".")[:2]) >= (0, 28)
    except (PackageNotFoundError, ValueError):
        return False


def _check_data(recipe: Recipe, download: bool) -> "Selection | None":
    """Choose the problems before anything starts: a missing file or a row without a gold must not cost a GPU minute.

    Returns:
        What the trainer will choose again; None where that needs the hub and `download` is false.
    """
    from r1zero.tasks import selection

    if not download and selection.needs_download(recipe):
        return None
    return selection.of(recipe)


def _check_golds(recipe: Recipe, selection: "Selection | None") -> "list[Finding]":
    """What `preflight.golds` finds.

    Raises:
        DatasetError: where it finds a fault.
    """
    from r1zero.preflight import golds

    if selection is None or recipe.own.method != "grpo":
        return []
    return golds.required(selection, recipe)


def _plan_checked(planned: "Plan") -> str:
    return "plan (not memory)" if planned.memory_unchecked else "plan"


def _preflight_only(planned: "Plan", console: "Console") -> int:
    """What --check looks at besides the data: prompts, and rollouts where a server is up."""
    import subprocess

    recipe = planned.recipe
    command = [sys.executable, "-m", "r1zero.preflight", "--config", str(recipe.path), *recipe.overrides]
    if recipe.own.method == "grpo":
        looks = [[]] if recipe.running_server is None else [[], ["--server", recipe.running_server]]
        for more in looks:
            sys.stdout.flush()
            code = subprocess.run([*command, *more], check=False).returncode
            if code:
                return 2
        if recipe.running_server is None:
            console.print(
                "note: rollouts were not looked at, no policy server is up; vllm_server_base_url names one, and a run "
                "with its own server looks at them before it trains",
                soft_wrap=True,
            )
    seen = f"recipe, {_plan_checked(planned)}, data, golds, prompts"
    console.print(f"Checked: {seen}. Nothing was started or written.", soft_wrap=True)
    return 0


def _print_notes(selection: "Selection | None", findings: "list[Finding]", console: "Console") -> None:
    for note in selection.notes if selection is not None else ():
        console.print(note, markup=False, soft_wrap=True)
    for finding in findings:
        console.print(finding.line(), markup=False, soft_wrap=True)


def _counts(selection: "Selection | None") -> str:
    if selection is None:
        return "data not looked at (no local folder or file of that name, so it is taken for a hub id)"
    measured = f", {len(selection.test)} test problems" if selection.test else ""
    return f"data: {len(selection.train)} train problems{measured}"
