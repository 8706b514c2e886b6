"""Whole runs, by their one command, whose real policy server dies, hangs, dawdles or refuses, whose disk is full or
whose port is taken: in each phase. A run goes on as if nothing had been, or ends in time and says why; nothing of it
is left.
"""

import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from r1zero.run_folder import read_json
from r1zero.serving import POLICY_ROUTE
from tests.serving.launched import LORA, RESTARTING, STARTING, Launched, Met, launch

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(3600)]
SEED = 20261121
# As close to what a healthy run needs as a loaded machine of two cores bears.
SILENCE_S, GENERATION_S, PUBLISH_S, READY_S = 12, 40, 25, 150
LATEST_S = GENERATION_S + 20.0  # of what is noticed by a deadline, on a machine that does other things too
NOTICED_S = {"SIGKILL": SILENCE_S + 15.0}  # an engine that is killed amid an update leaves a server that stays up
ENDED_S = 30.0  # after it was noticed
ALL_WEIGHTS = {"learning_rate": 3e-4}
LIMITS = {
    "server_silence_timeout": SILENCE_S,
    "generation_timeout": GENERATION_S,
    "publish_timeout": PUBLISH_S,
}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
MEASURED = {"eval_count": 4, "eval_strategy": "steps", "eval_steps": 2}  # a step is recorded after it was measured
COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
WEIGHTS_ROUTES = ("/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache")


@dataclass(frozen=True)
class Case:
    """One run and what it meets.

    Attributes:
        accidents: one for each attempt, in order.
        keys: of the recipe.
        disk: its publish folder is on a file system of 8 MiB.
    """

    accidents: tuple[str, ...]
    keys: dict[str, Any]
    disk: bool = False

    def __str__(self) -> str:
        return ", ".join(self.accidents).replace("/", "")


def recovering(*accidents: str, route: str = "adapter", disk: bool = False) -> Case:
    """A run that goes on after each of these, at another step each time."""
    keys = {**(LORA if route == "adapter" else ALL_WEIGHTS), **LIMITS, **CHECKPOINTS, **MEASURED}
    steps = 3 * len(accidents) + 1
    return Case(accidents, {**keys, "max_steps": steps, "max_restarts": len(accidents)}, disk)


def ending(accident: str, route: str = "adapter") -> Case:
    """A run that ends before its first step, which is not tried again."""
    given = {**(LORA if route == "adapter" else ALL_WEIGHTS), **LIMITS}
    _, what, phase, *_ = accident.split()
    ready = {"server_ready_timeout": READY_S} if phase == STARTING and what != "SIGKILL" else {}
    return Case((accident,), {**given, **ready})


def every_case() -> list[Case]:
    """Each accident in each phase; those after which a run goes on share runs, in an order of this seed's choice."""
    rng = random.Random(SEED)
    struck = [f"{who} {name}" for who in ("api", "engine") for name in ("SIGKILL", "SIGSTOP")]
    phases = ("generating", "training", "publishing", "probing", "measuring", "saving")
    faults = ("error", "loris")
    of_processes = [f"{each} {phase}" for each in struck for phase in phases]
    of_answers = [
        *(
            f"proxy {fault} {phase} {COMPLETIONS}"
            for fault in faults
            for phase in ("generating", "probing", "measuring")
        ),
        *(f"proxy {fault} publishing {path}" for fault in faults for path in (LOAD, UNLOAD)),
        *(f"proxy {fault} training {POLICY_ROUTE}" for fault in faults),
    ]
    of_weights = [
        *(f"{each} publishing" for each in struck),
        *(f"proxy {fault} publishing {path}" for fault in faults for path in WEIGHTS_ROUTES),
    ]
    alone = _shared(of_processes, rng)
    cases = [recovering(*each, f"{last} ending") for each, last in zip(alone, struck, strict=False)]
    cases += [recovering(*each) for each in (*alone[len(struck) :], *_shared(of_answers, rng))]
    cases += [recovering(*each, route="shared_memory") for each in _shared(of_weights, rng)]
    for route in ("adapter", "shared_memory"):
        cases.append(recovering("disk full publishing", "disk fills publishing", route=route, disk=True))
    cases.append(recovering("engine SIGKILL generating", f"port taken {RESTARTING}"))
    cases += [ending(f"{each} {phase}") for each in struck for phase in ("starting", "rehearsing")]
    cases += [ending(f"proxy {fault} starting /health") for fault in faults]
    cases += [ending(f"proxy {fault} rehearsing {COMPLETIONS}") for fault in faults]
    cases += [ending(f"proxy {fault} joining /v1/models") for fault in faults]
    cases.append(ending("proxy error joining /init_weight_transfer_engine", "shared_memory"))
    cases.append(ending("port taken starting"))
    rng.shuffle(cases)
    return cases


def _shared(accidents: list[str], rng: random.Random) -> list[list[str]]:
    """Four to a run."""
    rng.shuffle(accidents)
    return [accidents[at : at + 4] for at in range(0, len(accidents), 4)]


@contextmanager
def small_disk(folder: Path) -> Iterator[dict[str, str]]:
    """A file system of 8 MiB at `folder`, and what makes a run publish there."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield {"R1ZERO_MEMORY_FOLDER": str(folder)}
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def carry_out(case: Case, place: Path, model: Path) -> Launched:
    if not case.disk:
        return launch(place, model, case.keys, *case.accidents)
    with small_disk(place / "small") as environment:
        return launch(place, model, case.keys, *case.accidents, **environment)


def assert_ended_in_time(met: Met) -> None:
    who, what, phase, *path = met.accident.split()
    assert met.noticed < (READY_S + 20.0 if phase in (STARTING, RESTARTING) else NOTICED_S.get(what, LATEST_S)), met
    if met.outcome == "finished":
        assert phase in ("ending", "closing"), met
        return
    assert met.ended - met.noticed < ENDED_S, met
    named = {
        "disk": r"policy-\d+ takes .* MiB free|weights-\d+\S* takes .* MiB free|cannot be written: .*No space left",
        "port": r"server: exited with code 1: .*[Aa]ddress already in use",
        "proxy": rf"{path[0] if path else ''}\b|made no token for|did not (finish an update|answer)|not ready after",
    }
    assert re.search(named.get(who, "server"), met.cause), met
    if met.outcome == "ended":
        assert met.cause.startswith("error: the run failed: ") and "its log: " in met.cause, met


def assert_went_well(case: Case, run: Launched) -> None:
    assert [each.accident for each in run.met] == list(case.accidents), run.err
    for met in run.met:
        assert_ended_in_time(met)
    run.assert_nothing_is_left()
    if "max_restarts" not in case.keys:
        assert run.code == 1
        assert (read_json(run.folder.summary) or {})["outcome"] == "failed"
        return
    assert run.code == 0, run.err
    # A batch that is scored a second time is of the same step; what is recorded last is what was learnt from.
    steps = {step["step"]: step for step in run.lines("step")}
    assert sorted(steps) == list(range(1, case.keys["max_steps"] + 1))
    assert max(step["probe/difference"] for step in steps.values() if "probe/difference" in step) < 1e-3
    run.assert_rollouts_are_of_their_step(case.keys["max_steps"])


def test_a_killed_engine_is_started_again_with_its_trainer(tmp_path: Path, model_folder: Path) -> None:
    keys = {**LORA, **LIMITS, **CHECKPOINTS, "max_steps": 3, "max_restarts": 1}
    case = Case(("engine SIGKILL generating",), keys)
    run = carry_out(case, tmp_path, model_folder)
    assert_went_well(case, run)
    (restart,) = run.lines("restart")
    # The second step's completions are few: they may be there before the engine is hit.
    assert restart["step"] in (1, 2) and restart["checkpoint"].endswith(f"checkpoint-{restart['step']}")


CASES = every_case()


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=[f"{at}" for at in range(len(CASES))])
def test_accidents_in_each_phase(case: Case, tmp_path: Path, model_folder: Path) -> None:
    run = carry_out(case, tmp_path, model_folder)
    lines = [json.dumps(asdict(each)) for each in run.met]
    print("\n".join(["", str(case), *lines]))
    if table := os.environ.get("R1ZERO_ACCIDENTS_TABLE"):  # a long soak may be ended before its end
        with Path(table).open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    assert_went_well(case, run)


@pytest.mark.soak
def test_without_a_restart_left_the_last_line_names_the_cause(tmp_path: Path, model_folder: Path) -> None:
    case = Case(("engine SIGKILL training",), {**LORA, **LIMITS, **CHECKPOINTS, "max_steps": 4, "max_restarts": 0})
    run = carry_out(case, tmp_path, model_folder)
    (met,) = run.met
    assert met.outcome == "ended"
    assert_ended_in_time(met)
    assert run.code == 1
    run.assert_nothing_is_left()


@pytest.mark.soak
def test_a_disk_that_stays_full_ends_the_run(tmp_path: Path, model_folder: Path) -> None:
    """The same error at the same step as before."""
    keys = {**LORA, **LIMITS, **CHECKPOINTS, "max_steps": 4, "max_restarts": 3}
    run = carry_out(Case(("disk stays-full publishing",), keys, disk=True), tmp_path, model_folder)
    assert run.code == 1
    assert re.search(r"policy-\d+ takes .* MiB free.*the same error at step 1 as before", run.last_line)
    run.assert_nothing_is_left()
