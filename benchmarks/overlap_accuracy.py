"""What overlap does to the accuracy at equal samples: one overlapped run beside synchronous ones of several seeds.

    python benchmarks/overlap_accuracy.py RECIPE --out FOLDER [--seeds 0 1 2] [-- --max_steps 60 --eval_samples 8 ...]

Each run is `launch/run.py RECIPE` with a GPU, and the processor cores that fall to it, of its own; as many at a time as
there are GPUs (without any, one at a time). What follows `--` goes to all of them. Prints for each run the accuracy on
held-out problems after training with its interval, the mean reward of its last ten steps, and the median seconds of a
step; and whether the overlapped run lies within the synchronous ones. A run that has finished is not made again.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from r1zero import hardware  # noqa: E402 - found by the line above, where it is not installed
from r1zero.run_folder import RunFolder, read_json  # noqa: E402
from r1zero.supervisor import visible_gpus  # noqa: E402

LAST_STEPS, WARMUP = 10, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the synchronous runs")
    own = sys.argv[1:]
    own, given = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    asked = parser.parse_args(own)
    runs = {"overlapped": (1, asked.seeds[0]), **{f"synchronous-{seed}": (0, seed) for seed in asked.seeds}}
    asked.out.mkdir(parents=True, exist_ok=True)
    left = [name for name in runs if not _finished(RunFolder(asked.out / name))]
    places = _places()
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    failed = []
    while left or running:
        for name, (process, _) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                failed += [name] if process.returncode else []
                print(f"{time.strftime('%H:%M:%S')} {name} ended with exit code {process.returncode}", flush=True)
        free = [place for place in range(len(places)) if place not in {taken for _, taken in running.values()}]
        for name, place in zip(list(left), free, strict=False):
            left.remove(name)
            staleness, seed = runs[name]
            running[name] = (_start(asked.recipe, asked.out / name, staleness, seed, given, places[place]), place)
            print(f"{time.strftime('%H:%M:%S')} {name} begins", flush=True)
        time.sleep(0.5)
    table = {name: _told(RunFolder(asked.out / name)) for name in runs if name not in failed}
    for name, told in table.items():
        print(f"{name}: {told['text']}")
    synchronous = [told["mean"] for name, told in table.items() if name != "overlapped"]
    if "overlapped" in table and len(synchronous) > 1:
        least, most, mean = min(synchronous), max(synchronous), table["overlapped"]["mean"]
        where = "inside of" if least <= mean <= most else "outside of"
        seeds = f"{100 * least:.2f} to {100 * most:.2f} % of {len(synchronous)} seeds"
        print(f"overlapped {100 * mean:.2f} %: {where} {seeds}")
    return 1 if failed else 0


def _places() -> list[tuple[str | None, list[int]]]:
    """A GPU as CUDA_VISIBLE_DEVICES names it, and processor cores; without GPUs one place with all cores."""
    cores, count = sorted(os.sched_getaffinity(0)), len(hardware.this_node().gpus)
    if not count:
        return [(None, cores)]
    visible, each = os.environ.get("CUDA_VISIBLE_DEVICES"), max(1, len(cores) // count)
    return [
        (visible_gpus((place,), visible), cores[each * place : each * (place + 1)] or cores) for place in range(count)
    ]


def _start(
    recipe: str, folder: Path, staleness: int, seed: int, given: list[str], place: tuple[str | None, list[int]]
) -> "subprocess.Popen[bytes]":
    gpu, cores = place
    argv = [sys.executable, str(PROJECT / "launch" / "run.py"), recipe, "--output_dir", str(folder)]
    argv += ["--max_staleness", str(staleness), "--seed", str(seed), *given]
    env = {**os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    with folder.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    os.sched_setaffinity(process.pid, cores)
    return process


def _finished(folder: RunFolder) -> bool:
    return (read_json(folder.summary) or {}).get("outcome") == "finished"


def _told(folder: RunFolder) -> dict[str, Any]:
    """The accuracy after training, and it in words beside reward and seconds."""
    score = read_json(folder.summary)["held_out"]["after"]
    steps = [line for line in folder.read_metrics() if line["kind"] == "step"]
    seconds = [line["seconds/step"] for line in steps[WARMUP:] or steps]
    reward = statistics.fmean(line["reward"] for line in steps[-LAST_STEPS:])
    text = (
        f"{100 * score['mean']:.2f} % [{100 * score['low']:.2f}, {100 * score['high']:.2f}] on {score['questions']} x "
        f"{score['samples']}, reward {reward:.3f}, {statistics.median(seconds):.2f} s a step "
        f"({min(seconds):.2f} to {max(seconds):.2f}, {len(steps)} steps)"
    )
    return {"mean": score["mean"], "text": text}


if __name__ == "__main__":
    sys.exit(main())
