"""The one command, top to bottom: recipe, plan, run folder, processes, end. ``launch/run.py`` only calls `main`."""

import argparse
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from r1zero import recipe as recipes
from r1zero.library_keys import LibraryKey
from r1zero.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from r1zero.model_facts import ModelFacts
    from r1zero.plan import Plan, Process
    from r1zero.preflight.findings import Finding
    from r1zero.reporting.display import Display
    from r1zero.restarts import Failure
    from r1zero.run_folder import RunFolder
    from r1zero.supervisor import Supervisor
    from r1zero.tasks.selection import Selection

PREPARATION_TIMEOUT_S = 900.0
MEMORY_FOLDER = Path("/dev/shm")
LEAST_MEMORY_BYTES = 2**30  # a container gets 64 MiB by default, which weights do not fit into


def main(project: Path) -> int:
    """Run the command line.

    Args:
        project: the checkout that holds launch/, recipes/ and accelerate_configs/.

    Returns:
        The exit code: 0 when the run finished, 1 when a process failed, 2 when the recipe cannot run (then nothing was
        started or written), 130, 143 and 129 after Ctrl-C, SIGTERM and SIGHUP.
    """
    arguments, overrides = _parser().parse_known_args()
    # Imported after parsing, so that --help is instant. None of these imports torch.
    from rich.console import Console

    from r1zero import hardware, model_facts, plan, run_folder
    from r1zero.tasks.problem import DatasetError

    if project == Path.cwd():
        project = Path()  # so that the plan's lines are as short as a person would type them
    console = Console(highlight=False)
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        recipe = recipes.load(arguments.recipe, overrides)
        if recipe.own.method == "grpo":
            recipe.reward_functions()  # what cannot be imported must not be found out after a server has started
        here = hardware.assumed(arguments.hardware) if arguments.hardware else hardware.detect()
        path = run_folder.default_path(recipe.own.runs_dir, recipe.name, recipe["output_dir"])
        _refuse_overwriting(recipe, path)
        facts = _model_facts(recipe, download=not arguments.dry_run)
        planned = plan.make(recipe, here, path, project, facts)
        if not arguments.hardware:
            _check_packages(planned)
        selection = _check_data(recipe, download=not arguments.dry_run)
        findings = _check_golds(recipe, selection)
    except (RecipeError, DatasetError, hardware.HardwareError, model_facts.ModelNotFound) as error:
        errors.print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        errors.print("error: SIGINT received before anything was started")
        return 130
    if arguments.dry_run:
        console.print(planned.render(), end="", markup=False, soft_wrap=True)
        _print_notes(selection, findings, console)
        data = _counts(selection)
        console.print(f"Checked: recipe, plan, {data}. Dry run: nothing was started or written.", soft_wrap=True)
        return 0
    if arguments.hardware:
        errors.print("error: --hardware describes a machine that this one is not: it goes with --dry-run")
        return 2
    _print_notes(selection, findings, console)
    if arguments.check:
        return _preflight_only(recipe, console)
    with _signals_held():
        try:
            folder = run_folder.RunFolder(path).create()
        except OSError as error:
            errors.print(f"error: {path} cannot be made: {error.strerror}; name another place with --runs_dir FOLDER")
            return 2
        if folder.path != path:
            planned = plan.make(recipe, here, folder.path, project, facts)
        return _carry_out(planned, folder, project, console, errors)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until the supervisor has its handlers, so that no run folder stays without its ending."""
    from r1zero.supervisor import SIGNALS

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _carry_out(planned: "Plan", folder: "RunFolder", project: Path, console: "Console", errors: "Console") -> int:
    """Start what the plan says, watch it to its end, stop everything; say how it ended."""
    from r1zero import run_folder
    from r1zero.reporting.display import Display
    from r1zero.restarts import RunFailed
    from r1zero.supervisor import SIGNALS, Interrupted, ProcessFailed, Supervisor

    began = time.monotonic()
    try:
        with Supervisor(folder.path) as supervisor:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            run_folder.write_yaml(folder.recipe, planned.recipe.resolved())
            run_folder.write_text(folder.plan, planned.render())
            gpus = tuple(gpu.name for gpu in planned.hardware.nodes[0].gpus)
            run_folder.write_json(folder.versions, run_folder.versions(project, gpus))
            console.print(planned.render(), markup=False, soft_wrap=True)
            with Display(console, folder) as display:
                _run_processes(planned, folder, supervisor, display)
    except RunFailed as error:
        errors.print(error.error.log_end)
        return _ended_badly(folder, "failed", str(error), 1, errors, error.failures)
    except ProcessFailed as error:
        errors.print(error.log_end)
        return _ended_badly(folder, "failed", str(error), 1, errors)
    except Interrupted as error:
        return _ended_badly(folder, "interrupted", str(error), 128 + error.signum, errors)
    except BaseException as error:  # a full disk, or a bug of ours: the folder still says how the run ended
        _ended_badly(folder, "failed", f"the launcher: {type(error).__name__}: {error}", 1, errors)
        raise
    _ended_well(folder, time.monotonic() - began, console)
    return 0


def _run_processes(planned: "Plan", folder: "RunFolder", supervisor: "Supervisor", display: "Display") -> None:
    """Preparations to their end; then policy servers and trainer, again after a failure, to the trainer's end."""
    from r1zero import hardware, restarts, run_folder
    from r1zero.supervisor import ProcessFailed, visible_gpus

    for process in planned.preparations:
        _run_to_its_end(process, planned, supervisor, display)
    shared = _shared_secrets(planned, supervisor)
    pair = (*planned.servers, planned.trainer)
    gpus = visible_gpus(
        tuple(sorted({gpu for each in pair for gpu in each.gpus})), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    memory = restarts.memory_used(gpus) if gpus else ()
    counted = restarts.Restarts(planned.recipe.own.max_restarts if planned.servers else 0)
    rehearsal, trainer = planned.rehearsal, planned.trainer
    while True:
        try:
            _start_servers(planned, shared, supervisor, display)
            if rehearsal:
                _run_to_its_end(rehearsal, planned, supervisor, display, shared)
            _train(trainer, planned, shared, supervisor, display)
        except ProcessFailed as error:
            failure = counted.after(error, restarts.last_step(folder))
            supervisor.end([each.name for each in pair])
            checkpoint = run_folder.newest_checkpoint(folder)
            _record_restart(folder, failure, len(counted.failures), counted.most, checkpoint)
            display.finish()
            if not restarts.wait_until_released(gpus, memory, supervisor.check):
                display.say("GPU memory of the processes that ended is still in use; going on all the same")
            trainer = restarts.resuming(planned.trainer, checkpoint, hardware.free_ports(1)[0])
            rehearsal = None  # it has told what it had to tell
        else:
            display.finish()
            return


def _shared_secrets(planned: "Plan", supervisor: "Supervisor") -> dict[str, str]:
    """What servers, rehearsal and trainer know of each other, for their environment alone: no file and no argv has it.

    The token and the folder are made here for servers of ours; for one that runs already, whoever started it puts its
    own into the launcher's environment, from where no other process inherits them.
    """
    from r1zero.serving import PUBLISH_FOLDER, TOKEN

    given = {name: os.environ.pop(name) for name in (TOKEN, PUBLISH_FOLDER) if name in os.environ}
    if not planned.servers:
        return given if planned.server_urls else {}
    roomy = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free >= LEAST_MEMORY_BYTES
    places = (MEMORY_FOLDER, planned.run_folder) if roomy else (planned.run_folder,)
    return {TOKEN: secrets.token_hex(32), PUBLISH_FOLDER: str(supervisor.temporary_folder(places))}


def _start_servers(planned: "Plan", shared: dict[str, str], supervisor: "Supervisor", display: "Display") -> None:
    """Start the policy servers and return once each has generated a token; at once where there are none."""
    from r1zero.policy_server import ServerNotReady, wait_until_ready
    from r1zero.reporting.progress import duration
    from r1zero.serving import TOKEN

    began = time.monotonic()
    for server in planned.servers:
        display.say(f"starting the policy {server.name}, log {planned.run_folder / server.log}")
        supervisor.start(server, shared)
    for server, url in zip(planned.servers, planned.server_urls if planned.servers else (), strict=True):
        try:
            wait_until_ready(
                url,
                token=shared[TOKEN],
                deadline_s=planned.recipe.own.server_ready_timeout,
                check=supervisor.check,
                on_tick=lambda _: display.now(f"policy server is starting, {duration(time.monotonic() - began)}"),
            )
        except ServerNotReady as error:
            raise supervisor.failed(server.name, str(error)) from error
        display.say(f"policy {server.name} ready after {duration(time.monotonic() - began)}")


def _train(
    trainer: "Process", planned: "Plan", shared: dict[str, str], supervisor: "Supervisor", display: "Display"
) -> None:
    """Start the trainer and wait until it is done, with an eye on the policy servers."""
    display.say(f"starting the trainer, log {planned.run_folder / trainer.log}")
    supervisor.start(trainer, shared)
    with _watched(planned, shared, supervisor) as check:

        def tick() -> None:
            check()
            display.tick()

        supervisor.wait(trainer.name, on_tick=tick)


@contextmanager
def _watched(planned: "Plan", shared: dict[str, str], supervisor: "Supervisor") -> "Iterator[Callable[[], None]]":
    """What raises ProcessFailed when a policy server of ours has gone silent."""
    if not planned.servers:
        yield lambda: None
        return
    from r1zero.policy_client import PolicyClient
    from r1zero.serving import TOKEN
    from r1zero.watch import Silent, Watch

    own = planned.recipe.own
    urls = {server.name: url for server, url in zip(planned.servers, planned.server_urls, strict=True)}
    client = PolicyClient(
        planned.server_urls,
        shared[TOKEN],
        generation_timeout_s=own.server_silence_timeout,
        control_timeout_s=own.server_silence_timeout / 3,
    )
    with client, Watch(urls, client, own.server_silence_timeout, own.publish_timeout) as watch:

        def check() -> None:
            try:
                watch.check()
            except Silent as error:
                raise supervisor.failed(error.name, str(error)) from error

        yield check


def _record_restart(folder: "RunFolder", failure: "Failure", number: int, most: int, checkpoint: Path | None) -> None:
    """Into metrics.jsonl, from where the display reads it, and status.json."""
    from r1zero import run_folder

    line = {
        "kind": "restart",
        "time": time.time(),
        "restart": number,
        "most": most,
        "step": failure.step,
        "cause": failure.cause,
        "checkpoint": None if checkpoint is None else str(checkpoint.relative_to(folder.path)),
    }
    run_folder.drop_half_line(folder.metrics)
    run_folder.append_json_line(folder.metrics, line)
    status = {"phase": "restarting server and trainer", "done": 0, "total": 0, "seconds_left": None}
    run_folder.write_json(folder.status, {**status, "restarts": number, "time": time.time()})


def _run_to_its_end(
    process: "Process",
    planned: "Plan",
    supervisor: "Supervisor",
    display: "Display",
    shared: dict[str, str] | None = None,
) -> None:
    """Run a preparation, and say what a check found."""
    log = planned.run_folder / process.log
    display.now(f"{process.name}: {log}")
    supervisor.run(process, PREPARATION_TIMEOUT_S, on_tick=display.tick, more_env=shared)
    if process.name != "model":
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            display.say(line)


def _ended_well(folder: "RunFolder", seconds: float, console: "Console") -> None:
    from r1zero.reporting.display import ending
    from r1zero.reporting.progress import duration
    from r1zero.run_folder import read_json, write_json

    restarts = sum(line["kind"] == "restart" for line in folder.read_metrics())
    summary = {**(read_json(folder.summary) or {}), "seconds_in_all": round(seconds, 1), "restarts": restarts}
    write_json(folder.summary, summary)
    console.print()
    console.print(ending(summary))
    console.print(f"finished after {duration(seconds)}; look next at")
    for what, where in (
        ("the final model", folder.model),
        ("every completion", folder.path / "rollouts"),
        ("every step's metrics", folder.metrics),
        ("what ran", folder.recipe),
    ):
        if where.exists():
            console.print(f"  {what:<22}{where}", markup=False, soft_wrap=True)


def _ended_badly(
    folder: "RunFolder",
    outcome: str,
    reason: str,
    code: int,
    errors: "Console",
    failures: "tuple[Failure, ...]" = (),
) -> int:
    """Write the reason into the run folder, and say it in the very last line, which is where a log is looked at."""
    from dataclasses import asdict

    from r1zero.run_folder import write_json

    ending = {"outcome": outcome, "reason": reason}
    write_json(folder.summary, {**ending, "failures": [asdict(each) for each in failures]} if failures else ending)
    if len(failures) > 1:
        for number, failure in enumerate(failures, 1):
            errors.print(f"attempt {number} came to step {failure.step}: {failure.cause}")
    errors.print(f"run folder: {folder.path}")
    errors.print(f"error: the run {'was interrupted' if outcome == 'interrupted' else 'failed'}: {reason}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/run.py",
        description="Train with a recipe: plan it, start the policy server and the trainer, watch them, stop them.",
        epilog=_keys_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="launch/run.py RECIPE [--check | --dry-run [--hardware NxG[:GIB]]] [--key value ...]",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/tiny/arithmetic_grpo.yaml")
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

    from r1zero.reporting import trackers

    recipe, gpu_extra = planned.recipe, "pip install -e '.[gpu]'"
    needed = {name: ("report_to", f"pip install {name}") for name in trackers.chosen(recipe.library.get("report_to"))}
    if recipe.uses_vllm and not recipe.running_server:
        needed["vllm"] = ("use_vllm", f"{gpu_extra}, or --use_vllm false")
    if recipe.own.server_base == "vllm_4bit" and planned.servers and _vllm_needs_a_plugin():
        needed["vllm_bnb_plugin"] = ("server_base", "pip install vllm-bnb-plugin, or server_base: rounded")
    if planned.accelerate_config.stem.startswith("zero"):
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


def _preflight_only(recipe: Recipe, console: "Console") -> int:
    """What --check looks at besides the data: prompts, and rollouts where a server is up."""
    import subprocess
    import sys

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
    console.print("Checked: recipe, plan, data, golds, prompts. Nothing was started or written.", soft_wrap=True)
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
