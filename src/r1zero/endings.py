"""How a run ended: written into its folder, and said, with what to look at next.

The launcher's last line is where a log is looked at: it tells the cause. Before it come the report's place and what the
doctor has to say.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

from r1zero import preemption
from r1zero.reporting.display import ending
from r1zero.reporting.doctor import last_lines
from r1zero.reporting.progress import duration
from r1zero.reporting.refresher import Refresher
from r1zero.restarts import Failure
from r1zero.run_folder import RunFolder, read_json, write_json
from r1zero.slurm import Job
from r1zero.training import alarm

if TYPE_CHECKING:
    from rich.console import Console


def stopped(folder: RunFolder, why: str, most: int, job: Job | None, errors: "Console") -> int:
    """All processes have ended. Put the job back into the queue, where there is one and it still gets on.

    Args:
        folder: of the run.
        why: it stopped.
        most: requeues in a row that may save no step.
        job: to put back; None where nobody but a person will start the run again.
        errors: takes what is said.

    Returns:
        The exit code.
    """
    summary = preemption.write_stopped(folder, why)
    by_hand = f"launch/run.py --resume {folder.path}"
    where = f"at step {summary['step']}, {summary['checkpoint'] or 'no checkpoint'}"
    if job is not None and (count := preemption.in_vain(folder)) >= most:
        reason = f"{why}; {count} requeue(s) in a row have saved no step (max_requeues: {most}), so it is given up"
        return badly(folder, "failed", reason, 1, errors)
    not_done = preemption.requeue(job, folder) if job is not None else None
    if job is None or not_done:
        _look_next(folder, errors)
    errors.print(f"run folder: {folder.path}")
    if job is None:
        errors.print(f"stopped: {why}; {where}; goes on with {by_hand}")
        return preemption.STOPPED
    if not_done:
        errors.print(f"stopped: {why}; {where}; scontrol requeue failed ({not_done}); goes on with {by_hand}")
        return preemption.STOPPED
    errors.print(f"stopped: {why}; {where}; job {job.id} is in the queue again and goes on from there")
    return 0


def alarmed(folder: RunFolder, errors: "Console") -> int:
    """The run has stopped by itself (``stop_on``). Nothing starts it again, no queue either: a person has to look."""
    summary = read_json(folder.summary)
    where = f"at step {summary['step']}, {summary['checkpoint'] or 'no checkpoint'}"
    _look_next(folder, errors)
    errors.print(f"run folder: {folder.path}")
    errors.print(f"stopped: {summary['why']}; {where}; goes on with launch/run.py --resume {folder.path}")
    return alarm.EXIT_CODE


def well(folder: RunFolder, seconds: float, console: "Console") -> None:
    """The trainers are done."""
    summary = {
        **(read_json(folder.summary) or {}),
        "seconds_in_all": round(seconds, 1),
        "restarts": sum(line["kind"] == "restart" for line in folder.read_metrics()),
        "requeues": len(read_json(preemption.requeues_file(folder)) or []),
    }
    write_json(folder.summary, summary)
    console.print()
    console.print(ending(summary))
    console.print(f"finished after {duration(seconds)}; look next at")
    for what, where in (
        ("the final model", folder.model),
        ("the best one so far", folder.best),
        ("every completion", folder.path / "rollouts"),
        ("every step's metrics", folder.metrics),
        ("what ran", folder.recipe),
    ):
        if where.exists():
            console.print(f"  {what:<22}{where}", markup=False, soft_wrap=True)
    _look_next(folder, console)


def badly(
    folder: RunFolder,
    outcome: str,
    reason: str,
    code: int,
    errors: "Console",
    failures: tuple[Failure, ...] = (),
) -> int:
    """Something failed, or somebody interrupted it; returns `code`."""
    said = {"outcome": outcome, "reason": reason}
    write_json(folder.summary, {**said, "failures": [asdict(each) for each in failures]} if failures else said)
    if len(failures) > 1:
        for number, failure in enumerate(failures, 1):
            errors.print(f"attempt {number} came to step {failure.step}: {failure.cause}")
    if outcome != "interrupted":  # then somebody wants it to end now
        _look_next(folder, errors)
    errors.print(f"run folder: {folder.path}")
    errors.print(f"error: the run {'was interrupted' if outcome == 'interrupted' else 'failed'}: {reason}")
    return code


def _look_next(folder: RunFolder, console: "Console") -> None:
    """The report, made now, and what the doctor finds."""
    try:
        page = Refresher(folder.path).finish()
    except KeyboardInterrupt:  # the run is over; only its page is not waited for
        page = f"no report; `python launch/report.py {folder.path}` makes one"
    console.print(f"  {'the report':<22}{page}", markup=False, soft_wrap=True)
    for line in last_lines(folder.path):
        console.print(line, markup=False, soft_wrap=True)
