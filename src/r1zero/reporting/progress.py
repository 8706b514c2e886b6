"""How a run says where it is: one line a step, the same in the trainer's log and from the launcher. No torch."""

from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(7.31), duration(135), duration(7300)
    ('7.3 s', '2 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def step_line(metrics: Mapping[str, Any]) -> str:
    """The line of one optimizer step. What matters most is in its first 80 columns.

    Args:
        metrics: a line of metrics.jsonl with ``kind`` "step".
    """
    step = f"step {metrics['step']:>{len(str(metrics['steps']))}}/{metrics['steps']}"
    return "  ".join([step, *_figures(metrics), f"left {duration(metrics['seconds_left'])}", *_seconds(metrics)])


def figures_line(metrics: Mapping[str, Any]) -> str:
    """What `step_line` says beside the progress, which a bar may show instead."""
    return "  ".join([*_figures(metrics), *_seconds(metrics)])


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    words = []
    if metrics.get("reward") is not None:
        words.append(f"reward {metrics['reward']:.3f}")
    elif metrics.get("loss") is not None:
        words.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("completions/mean_length") is not None:
        words.append(f"length {metrics['completions/mean_length']:.0f}")
    return words


def _seconds(metrics: Mapping[str, Any]) -> list[str]:
    phases = ("publish", "probe", "generate", "wait", "save", "train")
    return [f"{name} {metrics[f'seconds/{name}']:.2f} s" for name in phases if metrics.get(f"seconds/{name}")]


def phase_line(status: Mapping[str, Any]) -> str:
    """The line of a phase that is not made of steps, such as measuring: name, progress, seconds so far."""
    line = str(status["phase"])
    if status.get("total"):
        line += f"  {status['done']}/{status['total']}"
        if status.get("seconds_left") is not None:
            line += f"  left {duration(status['seconds_left'])}"
    return line


def alert_line(metrics: Mapping[str, Any]) -> str:
    """The line of something that a person should look at."""
    return f"ALERT at step {metrics['step']}: {metrics['message']}"


def restart_line(metrics: Mapping[str, Any]) -> str:
    """The line of a failure after which policy server and trainer are started again.

    Args:
        metrics: a line of metrics.jsonl with ``kind`` "restart".
    """
    goes_on = f"from {metrics['checkpoint']}" if metrics["checkpoint"] else "from the beginning, there is no checkpoint"
    which = f"restart {metrics['restart']} of at most {metrics['most']}"
    return f"FAILED at step {metrics['step']}: {metrics['cause']}; {which} goes on {goes_on}"


def resume_line(metrics: Mapping[str, Any]) -> str:
    """The line of a run that goes on from a checkpoint, or from the beginning.

    Args:
        metrics: a line of metrics.jsonl with ``kind`` "resume".
    """
    return f"going on after step {metrics['step']}" if metrics["checkpoint"] else "beginning anew"


def evaluation_line(metrics: Mapping[str, Any]) -> str:
    """The line of one measurement on held-out problems."""
    return (
        f"held-out accuracy at step {metrics['step']}: {100 * metrics['mean']:.1f} % "
        f"[{100 * metrics['low']:.1f}, {100 * metrics['high']:.1f}]  "
        f"({metrics['questions']} questions x {metrics['samples']}, {duration(metrics['seconds'])})"
    )
