"""A plan becomes processes: preparations, policy servers, trainers, to the run's end; and how that end is told.

Whatever ends a run ends here: the trainer is done, something failed for good, a signal came, or its time is over.
`endings` tells of it.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from r1zero import checkpoints, endings, hardware, nodes, owned_servers, preemption, restarts, run_folder, slurm
from r1zero.agent import MeetingFailed, meeting_env
from r1zero.policy_client import PolicyClient
from r1zero.preemption import Notice, Preempted
from r1zero.reporting.display import Display
from r1zero.reporting.refresher import Refresher
from r1zero.restarts import Failure, RunFailed
from r1zero.run_folder import STOPPED_OUTCOME, RunFolder, read_json, write_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.supervisor import SIGNALS, Interrupted, ProcessFailed, Supervisor, visible_gpus
from r1zero.training import alarm
from r1zero.training.main import BEGIN

if TYPE_CHECKING:
    from rich.console import Console

    from r1zero.plan import Plan, Process

PREPARATION_TIMEOUT_S = 900.0
LOOK = "preflight"  # the one preparation that makes nothing


class Alarmed(Exception):
    """An alarm that the recipe asked for (``stop_on``) has ended the run; its summary says which."""


@dataclass(frozen=True)
class Place:
    """Where a run is carried out.

    Attributes:
        folder: the run folder; it exists.
        project: the checkout.
        others: the nodes other than this one, in the plan's order from its second on.
        job: of Slurm; None outside of one.
        notice: of SIGUSR1.
        console: for what a person sees.
        errors: for what went wrong.
    """

    folder: RunFolder
    project: Path
    others: tuple[nodes.RemoteNode, ...]
    job: slurm.Job | None
    notice: Notice
    console: "Console"
    errors: "Console"


def carry_out(planned: "Plan", place: Place) -> int:
    """Start what the plan says, watch it to its end, stop everything; say how it ended.

    Returns:
        The exit code: 0, 1, 2 or `restarts.REFUSED` after a process that ended so, 128 + a signal's number, 0 after a
        requeue, `preemption.STOPPED` where the run was stopped and nothing will start it again, `alarm.EXIT_CODE` after
        an alarm.
    """
    folder, errors = place.folder, place.errors
    began = time.monotonic()
    try:
        with Supervisor(folder.path, others=place.others) as supervisor:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            for other in place.others:
                other.begin(folder.path)
            folder.summary.unlink(missing_ok=True)  # of an attempt before this one
            run_folder.write_yaml(folder.recipe, planned.recipe.resolved())
            run_folder.write_text(folder.plan, planned.render())
            gpus = tuple(gpu.name for node in planned.hardware.nodes for gpu in node.gpus)
            write_json(folder.versions, run_folder.versions(place.project, gpus))
            place.console.print(planned.render(), markup=False, soft_wrap=True)
            with Display(place.console, folder) as display, Refresher(folder.path) as refresher:
                display.pass_over_what_is_there()
                _Attempt(planned, place, supervisor, display, refresher).run()
    except RunFailed as error:
        errors.print(error.error.log_end)
        return endings.badly(folder, "failed", str(error), restarts.exit_code(error.error), errors, error.failures)
    except ProcessFailed as error:
        errors.print(error.log_end)
        return endings.badly(folder, "failed", str(error), restarts.exit_code(error), errors)
    except MeetingFailed as error:
        return endings.badly(folder, "failed", str(error), 1, errors)
    except Interrupted as error:
        return endings.badly(folder, "interrupted", str(error), 128 + error.signum, errors)
    except Alarmed:
        return endings.alarmed(folder, errors)
    except Preempted as error:
        job = None if place.notice.at is None else place.job
        return endings.stopped(folder, str(error), planned.recipe.own.max_requeues, job, errors)
    except BaseException as error:  # a full disk, or a bug of ours: the folder still says how the run ended
        endings.badly(folder, "failed", f"the launcher: {type(error).__name__}: {error}", 1, errors)
        raise
    endings.well(folder, time.monotonic() - began, place.console)
    return 0


class _Attempt:
    """Preparations to their end; then policy servers and trainers, again after a failure, to the trainers' end."""

    def __init__(
        self, planned: "Plan", place: Place, supervisor: Supervisor, display: Display, refresher: Refresher
    ) -> None:
        self._planned, self._place, self._supervisor, self._display = planned, place, supervisor, display
        self._refresher = refresher
        self._folder, self._notice, self._own = place.folder, place.notice, planned.recipe.own

    def run(self) -> None:
        """To the end.

        Raises:
            RunFailed, ProcessFailed: when something failed, and nothing of it is to be tried again.
            Interrupted: after a signal.
            Preempted: when its time is over.
        """
        planned, supervisor, display = self._planned, self._supervisor, self._display
        found = self._newest_checkpoint()
        for process in planned.preparations:
            if found is None or process.name != LOOK:  # what it would say it said before the run began
                self._run_to_its_end(process)
        self._shared = _shared_secrets(planned, supervisor)
        pair = (*planned.servers, *planned.trainers)
        used = self._memory_of(pair)
        before = used()
        counted = restarts.Restarts(self._own.max_restarts if planned.servers else 0)
        rehearsal = planned.rehearsal
        trainers = planned.trainers
        if found is not None:
            trainers = restarts.resuming(trainers, found, hardware.free_ports(2))
            display.say(f"going on from {found.relative_to(self._folder.path)}")
        while True:
            try:
                begin = self._start_servers(trainers)
                if rehearsal and found is None:
                    with _watched(planned, self._shared, supervisor) as check:
                        self._run_to_its_end(rehearsal, self._shared, check)
                self._train(trainers, begin)
            except ProcessFailed as error:
                if self._notice.at is not None and not restarts.is_final(error):
                    raise Preempted(f"SIGUSR1 received, and then {error.cause}") from error
                failure = counted.after(error, restarts.last_step(self._folder))
                supervisor.end([each.name for each in pair])
                found = self._newest_checkpoint()
                _record_restart(self._folder, failure, len(counted.failures), counted.most, found)
                display.finish()
                if not restarts.wait_until_released(used, before, self._check):
                    display.say("GPU memory of the processes that ended is still in use; going on all the same")
                trainers = restarts.resuming(planned.trainers, found, hardware.free_ports(2))
                rehearsal = None  # it has told what it had to tell
            else:
                display.finish()
                return

    def _check(self) -> None:
        """Look at every process, and whether there is still time: before the trainer runs there is nothing to save."""
        self._supervisor.check()
        self._notice.check()

    def _newest_checkpoint(self) -> Path | None:
        found = checkpoints.newest(self._folder)
        for path, why in found.passed_over:
            self._display.say(f"passed over {path.relative_to(self._folder.path)}: {why}")
        return found.path

    def _memory_of(self, processes: Sequence["Process"]) -> Callable[[], tuple[int, ...]]:
        """What tells the memory in use on the GPUs of `processes`, on every node."""
        gpus = {
            number: sorted({gpu for each in processes if each.node == number for gpu in each.gpus})
            for number in sorted({each.node for each in processes if each.gpus})
        }

        def used() -> tuple[int, ...]:
            found: tuple[int, ...] = ()
            for number, indices in gpus.items():
                if number:
                    found += self._place.others[number - 1].memory_used(tuple(indices))
                else:
                    found += restarts.memory_used(visible_gpus(tuple(indices), os.environ.get("CUDA_VISIBLE_DEVICES")))
            return found

        return used

    def _start_servers(self, trainers: Sequence["Process"]) -> Path | None:
        """Start the policy servers and return once each has generated a token; at once where there are none.

        Returns:
            The file that `trainers` wait for, which were started too and import meanwhile. None where they were not:
            on a GPU that they share vLLM measures its memory while it starts, and nobody else may take any; and on
            another node a file is seen late.
        """
        planned, supervisor, display = self._planned, self._supervisor, self._display
        if not planned.servers:
            return None
        for server in planned.servers:
            display.say(f"starting the policy {server.name}, log {planned.run_folder / server.log}")
            self._start(server)
        begin = None
        served = {gpu for each in planned.servers for gpu in each.gpus}
        if not self._place.others and not any(served.intersection(each.gpus) for each in trainers):
            begin = supervisor.temporary_folder((Path(tempfile.gettempdir()),)) / "begin"
            for trainer in trainers:
                self._start(trainer, {BEGIN: str(begin)})
        owned_servers.wait_until_all_ready(
            planned.urls_of_servers,
            supervisor,
            token=self._shared[TOKEN],
            deadline_s=self._own.server_ready_timeout,
            check=self._check,
            say=display.say,
            now=display.now,
        )
        return begin

    def _train(self, trainers: Sequence["Process"], begin: Path | None) -> None:
        """Let the trainers train and wait until they are done, with an eye on the policy servers.

        Args:
            trainers: who.
            begin: the file that they wait for, where they have been started.

        Raises:
            Preempted: when they were asked to stop, and did or did not.
            Alarmed: when they stopped by themselves.
        """
        planned, supervisor, display = self._planned, self._supervisor, self._display
        self._notice.check()
        self._folder.stop.unlink(missing_ok=True)
        stop = preemption.StopRequest(self._folder, self._notice, self._own.preemption_grace, display.say)
        for trainer in trainers:
            display.say(f"starting the {trainer.name}, log {planned.run_folder / trainer.log}")
            if begin is None:
                self._start(trainer)
        if begin is not None:
            begin.touch()
        with _watched(planned, self._shared, supervisor) as check:

            def tick() -> None:
                check()
                stop.tick()
                display.tick()
                self._refresher.tick()

            for trainer in trainers:
                supervisor.wait(trainer.name, on_tick=tick)
        summary = read_json(self._folder.summary) or {}
        if summary.get("outcome") == alarm.OUTCOME:
            raise Alarmed
        if summary.get("outcome") == STOPPED_OUTCOME:
            raise Preempted(str(summary.get("why")))

    def _start(self, process: "Process", more_env: Mapping[str, str] | None = None) -> None:
        env = {**self._shared, **(more_env or {})}
        if self._place.others and process.node == 0:
            env = {**meeting_env(process, self._planned.hardware.nodes[0].address), **env}
        self._supervisor.start(process, env)

    def _run_to_its_end(
        self,
        process: "Process",
        shared: dict[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a preparation, and say what a check found; `check` is called meanwhile, and may raise."""
        log = self._planned.run_folder / process.log
        self._display.now(f"{process.name}: {log}")
        before = log.stat().st_size if log.exists() else 0  # of an attempt before this one

        def tick() -> None:
            check()
            self._notice.check()
            self._display.tick()

        self._supervisor.run(process, PREPARATION_TIMEOUT_S, on_tick=tick, more_env=shared)
        if process.name != "model":
            for line in log.read_bytes()[before:].decode(errors="replace").splitlines():
                self._display.say(line)


def _shared_secrets(planned: "Plan", supervisor: Supervisor) -> dict[str, str]:
    """What servers, rehearsal and trainer know of each other, for their environment alone: no file and no argv has it.

    The token and the folder are made here for servers of ours; for one that runs already, whoever started it puts its
    own into the launcher's environment, from where no other process inherits them.
    """
    given = {name: os.environ.pop(name) for name in (TOKEN, PUBLISH_FOLDER) if name in os.environ}
    if not planned.servers:
        return given if planned.server_urls else {}
    return owned_servers.environment(supervisor, planned.run_folder, one_node=not planned.publish_in_run_folder)


@contextmanager
def _watched(planned: "Plan", shared: dict[str, str], supervisor: Supervisor) -> Iterator[Callable[[], None]]:
    """What raises ProcessFailed when a policy server of ours has gone silent."""
    if not planned.servers:
        yield lambda: None
        return
    own = planned.recipe.own
    client = PolicyClient(
        planned.server_urls,
        shared[TOKEN],
        generation_timeout_s=own.server_silence_timeout,
        control_timeout_s=own.server_silence_timeout / 3,
    )
    silence_s, publish_s = own.server_silence_timeout, own.publish_timeout
    with client, owned_servers.watched(planned.urls_of_servers, client, supervisor, silence_s, publish_s) as check:
        yield check


def _record_restart(folder: RunFolder, failure: Failure, number: int, most: int, checkpoint: Path | None) -> None:
    """Into metrics.jsonl, from where the display reads it, and status.json."""
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
    write_json(folder.status, {**status, "restarts": number, "time": time.time()})
