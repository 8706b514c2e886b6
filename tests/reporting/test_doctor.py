"""The doctor: each ailment is the first that it names in a run that really had it, and healthy runs hear nothing."""

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from r1zero import library_keys, recipe
from r1zero.reporting import ailments, doctor
from r1zero.reporting.ailments import AILMENTS, BY_NAME, RECENT, SEVERITIES, Signs
from r1zero.reporting.run_reader import read_run
from r1zero.run_folder import RunFolder, write_parquet
from r1zero.training.recorder import ROLLOUT_SCHEMA
from tests.conftest import PROJECT
from tests.reporting import provoking
from tests.reporting.provoking import RECORDED, RUNS

ILL = [name for name, run in RUNS.items() if run.finding]
WELL = [name for name, run in RUNS.items() if not run.finding]
QUICK = ("clipped", "too_cold")  # seconds of training each
SIMULATED = {"logprob_mismatch", "memory_unused"}
KEYS = {**library_keys.load("grpo"), **recipe.own_keys()}


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDED / name / "metrics.jsonl").read_text().splitlines()]


def copy(name: str, folder: Path, lines: list[dict[str, Any]]) -> Path:
    """A recorded run with other metrics."""
    made = folder / name
    shutil.copytree(RECORDED / name, made, dirs_exist_ok=True)
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def names(signs: Signs) -> list[str]:
    return [finding.name for finding in doctor.examine(signs)]


# --- real runs


@pytest.mark.parametrize("name", ILL)
def test_what_a_run_really_had_is_named_first(name: str) -> None:
    findings = doctor.diagnose(read_run(RECORDED / name))
    assert findings and findings[0].name == RUNS[name].finding, findings
    assert [SEVERITIES.index(each.severity) for each in findings] == sorted(
        SEVERITIES.index(each.severity) for each in findings
    )


@pytest.mark.parametrize(
    ("name", "finding", "remedy"),
    [
        ("sinking", "learning_rate_too_high", "learning_rate: 0.0001 -> 2e-05"),
        ("moving_and_not_learning", "no_progress", "twice the completions a step, or learning_rate: 5e-05 -> "),
    ],
)
def test_a_learning_rate_that_was_too_high_on_a_gpu_is_named(name: str, finding: str, remedy: str) -> None:
    """SmolLM2-135M on an H200; the commands are in docs/log.md, "learning rates of SmolLM2-135M"."""
    first = doctor.diagnose(read_run(RECORDED.with_name("recorded_on_h200") / name))[0]
    assert (first.name, first.remedy[: len(remedy)]) == (finding, remedy)


@pytest.mark.parametrize("name", WELL)
def test_healthy_runs_hear_nothing(name: str) -> None:
    assert doctor.diagnose(read_run(RECORDED / name)) == ()


def test_there_are_five_healthy_runs_and_every_ailment_was_provoked_or_is_said_to_be_simulated() -> None:
    assert len(WELL) >= 5
    provoked = {RUNS[name].finding for name in ILL}
    assert provoked | SIMULATED == set(BY_NAME) and not provoked & SIMULATED


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_has_just_begun_hears_of_no_more_than_a_number_that_is_none(name: str, tmp_path: Path) -> None:
    for steps in (0, 1, RECENT - 1):
        lines = [line for line in recorded(name) if line["step"] <= steps]
        found = [each.name for each in doctor.diagnose(read_run(copy(name, tmp_path, lines)))]
        assert set(found) <= ({"nan"} if RUNS[name].finding == "nan" else set())


@pytest.mark.parametrize("name", RUNS)
def test_a_metric_that_is_absent_makes_no_rule_stumble_and_no_healthy_run_ill(name: str) -> None:
    lines, flat = recorded(name), read_run(RECORDED / name).recipe
    steps = [line for line in lines if line["kind"] == "step"]
    for absent in sorted({key for line in steps for key in line} - {"step"}):
        found = names(Signs(flat, [{k: v for k, v in line.items() if k != absent} for line in steps]))
        assert name in ILL or not found, absent
    assert names(Signs({}, [{"step": line["step"]} for line in steps])) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are made anew; some start from the model that another one left."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.soak] * (each not in QUICK)) for each in RUNS])
def test_made_anew_it_hears_the_same(name: str, runs: Path) -> None:
    before = RUNS[name].starts_from
    if RUNS[name].keys.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    if before and not (runs / before / "model").is_dir():
        provoking.make(before, runs)
    found = [each.name for each in doctor.diagnose(read_run(provoking.make(name, runs).path))]
    assert found[:1] == [RUNS[name].finding] * (name in ILL), found


# --- what the tiny recipe on a CPU cannot have


GPU = {"learning_rate": 1e-6, "use_vllm": True, "vllm_mode": "server"}


def steps_of(count: int = RECENT, **metrics: Any) -> list[Mapping[str, Any]]:
    return [{"step": number, **metrics} for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("keys", "metrics", "remedy"),
    [
        ({"load_in_4bit": True, "server_base": "unrounded"}, {"probe/difference": 0.095}, "server_base: unrounded -> "),
        ({"lora_dropout": 0.1, "use_peft": True}, {"probe/difference": 0.095}, "lora_dropout: 0.1 -> 0"),
        ({"fp16": True}, {"sampling/sampling_logp_difference/mean": 0.2}, "fp16: true -> false"),
        ({}, {"sampling/sampling_logp_difference/mean": 0.2}, "bf16: true -> false"),
        # A 7B shape on four H200s, whose positions were rounded to bf16; and what rounding alone may come to.
        (
            {},
            {"sampling/sampling_logp_difference/mean": 0.374, "sampling/importance_sampling_ratio/mean": 2e-7},
            "bf16: true -> false",
        ),
        (
            {},
            {
                "sampling/sampling_logp_difference/mean": 0.03,
                "sampling/importance_sampling_ratio/mean": 0.01,
                "completions/mean_length": 8000.0,
            },
            "vllm_importance_sampling_mode: sequence_mask -> token_truncate",
        ),
    ],
)
def test_server_and_trainer_that_differ(keys: dict[str, Any], metrics: dict[str, float], remedy: str) -> None:
    found = doctor.examine(Signs({**GPU, **keys}, steps_of(**metrics)))
    assert [each.name for each in found] == ["logprob_mismatch"] and found[0].remedy.startswith(remedy)
    ignored = metrics.get("sampling/importance_sampling_ratio/mean", 1.0) < ailments.UNLEARNT_RATIO
    assert found[0].severity == ("broken" if ignored else "hindered")


def test_server_and_trainer_as_healthy_gpu_runs_had_them() -> None:
    metrics = {"probe/difference": 0.064, "sampling/sampling_logp_difference/mean": 0.037}
    assert names(Signs(GPU, steps_of(**metrics))) == []


def test_a_run_that_the_guard_stopped_before_its_first_step() -> None:
    reason = (
        "trainer: exited with code 3: the policy server does not have version 0 of the trainer's policy: it differs"
    )
    found = doctor.examine(Signs({**GPU, "load_in_4bit": True, "server_base": "unrounded"}, [], reason=reason))
    assert [(each.name, each.severity) for each in found] == [("logprob_mismatch", "broken")]


def test_memory_that_a_larger_batch_would_use() -> None:
    memory = {"memory/peak_gib": 20.0, "memory/total_gib": 80.0}
    keys = {**GPU, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "gradient_checkpointing": False}
    found = doctor.examine(Signs(keys, steps_of(**memory), gpus=["H100", "H100"]))
    assert [each.name for each in found] == ["memory_unused"]
    assert found[0].remedy == "per_device_train_batch_size: 2 -> 4, with gradient_accumulation_steps: 8 -> 4"
    # The server fills the rest of the one GPU; or there is nothing to gather into one pass.
    assert names(Signs(keys, steps_of(**memory), gpus=["H100"])) == []
    assert names(Signs({**keys, "gradient_accumulation_steps": 1}, steps_of(**memory), gpus=["H100"] * 2)) == []
    full = {**memory, "memory/peak_gib": 60.0}
    assert names(Signs(keys, steps_of(**full), gpus=["H100"] * 2)) == []
    packed = doctor.examine(Signs({**keys, "micro_batch_tokens": 8192}, steps_of(**memory), gpus=["H100"] * 2))
    assert [each.remedy for each in packed] == ["micro_batch_tokens: 8192 -> 16384"]


def test_a_packed_step_has_no_passes_to_save() -> None:
    times = {"seconds/train": 9.5, "seconds/generate": 0.3, "seconds/step": 10.0}
    keys = {**GPU, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    (padded,) = doctor.examine(Signs(keys, steps_of(**times)))
    (packed,) = doctor.examine(Signs({**keys, "micro_batch_tokens": 8192}, steps_of(**times)))
    assert padded.remedy.startswith("per_device_train_batch_size: 2 -> ")
    assert packed.remedy == "trainer_gpus: 1 -> 2"


def test_publishes_that_do_not_move_the_policy() -> None:
    metrics = {"learning_rate": 1e-6, "grad_norm": 0.1, "frac_reward_zero_std": 0.2}
    assert names(Signs(GPU, steps_of(**metrics, **{"probe/moved": 1e-6}))) == ["frozen"]
    assert names(Signs(GPU, steps_of(**metrics, **{"probe/moved": 0.02}))) == []


def test_no_gradient_where_there_is_spread() -> None:
    metrics = {"learning_rate": 1e-6, "grad_norm": 0.0}
    assert names(Signs(GPU, steps_of(**metrics, frac_reward_zero_std=0.2))) == ["frozen"]
    assert names(Signs(GPU, steps_of(**metrics, frac_reward_zero_std=1.0))) == ["zero_spread"]


def test_a_policy_that_is_sure_is_ill_only_where_it_is_not_right() -> None:
    sure = {"frac_reward_zero_std": 0.6, "learning_rate": 1e-6}
    lines = [*steps_of(10, entropy=0.5, **sure), *steps_of(10, entropy=0.01, **sure)]
    found = doctor.examine(Signs({"learning_rate": 1e-6}, [{**line, "verdict/correct": 0.4} for line in lines]))
    assert [each.name for each in found] == ["entropy_collapse"]
    assert found[0].remedy == "learning_rate: 1e-06 -> 3.33333e-07; epsilon_high: 0.2 -> 0.28 (DAPO)"
    learned = [{**line, "verdict/correct": 0.4 if line["entropy"] > 0.1 else 0.95} for line in lines]
    assert names(Signs({}, learned)) == []


def test_a_server_that_is_ahead() -> None:
    """The trainer's waiting counts, and what sampled is another policy by design: the probe compares the same two."""
    keys = {**GPU, "max_staleness": 1, "use_vllm": True, "server_gpus": 1}
    waits = steps_of(**{"seconds/wait": 0.8, "seconds/train": 0.2, "seconds/step": 1.0})
    (found,) = doctor.examine(Signs(keys, waits))
    assert (found.name, found.remedy[:21]) == ("server_bound", "server_gpus: 1 -> 2; ")
    assert names(Signs(keys, steps_of(**{"seconds/wait": 0.1, "seconds/step": 1.0}))) == []
    apart = steps_of(**{"sampling/sampling_logp_difference/mean": 0.3, "probe/difference": 0.02})
    (found,) = doctor.examine(Signs(keys, apart))
    assert (found.name, found.remedy) == ("stale", "max_staleness: 1 -> 0")
    assert names(Signs({**keys, "max_staleness": 0}, apart)) == ["logprob_mismatch"]


def idling(server: float, trainer: float, train: float, generated: str = "generate") -> list[Mapping[str, Any]]:
    """Steps of ten seconds, of which these shares."""
    seconds = {"seconds/step": 10.0, "seconds/train": 10 * train, f"seconds/{generated}": 10 * trainer}
    # The trainer has waited for the first window at least.
    return steps_of(**{"seconds/generate": 0.1} | seconds | {"idle/server": server, "idle/trainer": trainer})


OVERLAP = "max_staleness: 0 -> 1, with which both work at once and a step takes about "
AHEAD = {**GPU, "max_staleness": 1}


@pytest.mark.parametrize(
    ("keys", "idle", "name", "remedy"),
    [
        # By turns: what costs no GPU is first, and the slower side gets the next one.
        ({}, (0.55, 0.45, 0.4), "server_bound", f"{OVERLAP}6.0 s (docs/overlap.md); then server_gpus: 1 -> 2"),
        ({"server_gpus": 2}, (0.4, 0.6, 0.3), "server_bound", f"{OVERLAP}7.0 s (docs/overlap.md); then server_gpus: 2"),
        ({}, (0.65, 0.35, 0.6), "trainer_bound", f"{OVERLAP}6.5 s (docs/overlap.md); then trainer_gpus: 1 -> 2"),
        ({"num_iterations": 2}, (0.65, 0.35, 0.6), "trainer_bound", f"{OVERLAP}6.5 s (docs/overlap.md); then num_iter"),
        # There is too little to overlap.
        ({}, (0.15, 0.85, 0.1), "server_bound", "server_gpus: 1 -> 2; a step then takes about 5.8 s"),
        ({}, (0.9, 0.1, 0.8), "trainer_bound", "trainer_gpus: 1 -> 2"),
        ({"trainer_gpus": 0}, (0.9, 0.1, 0.8), "trainer_bound", "trainer_gpus: 0 -> 1 on a machine with a GPU"),
        ({"num_iterations": 2}, (0.9, 0.1, 0.8), "trainer_bound", "num_iterations: 2 -> 1: the same rollouts are "),
        ({}, (0.78, 0.22, 0.2), None, ""),  # the trainer does something else most of the time
        # The recipe would not take it, or has one GPU for both.
        ({"vllm_importance_sampling_correction": False}, (0.5, 0.5, 0.4), None, ""),
        ({"vllm_enable_sleep_mode": True}, (0.5, 0.5, 0.4), None, ""),
        ({"server_gpus": 0}, (0.5, 0.5, 0.4), None, ""),
        ({"server_gpus": 0}, (0.2, 0.8, 0.15), "server_bound", "server_gpus: 1 or more on a machine with another GPU"),
        # Servers that somebody else has started.
        ({"vllm_server_base_url": "http://a"}, (0.5, 0.5, 0.4), None, ""),
        (
            {"vllm_server_base_url": "http://a"},
            (0.1, 0.9, 0.1),
            "server_bound",
            "vllm_server_base_url: add the address",
        ),
    ],
)
def test_of_two_that_take_turns(keys: dict[str, Any], idle: tuple[float, ...], name: str | None, remedy: str) -> None:
    found = doctor.examine(Signs({**GPU, "gradient_checkpointing": False, **keys}, idling(*idle), gpus=["H200"] * 2))
    assert [each.name for each in found] == [name] * (name is not None)
    for each in found:
        assert each.remedy.startswith(remedy)
        assert (
            f"of 10.0 s a step the policy server is idle for {100 * idle[0]:.0f} %, the trainer for " in each.evidence
        )


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({}, "1 -> 2"),
        ({"server_gpus": 0, "servers_per_gpu": 2}, "2 -> 4"),
        ({"server_gpus": 0}, "2 -> 4"),  # two are what the plan gives so small a model on a shared GPU
        ({"servers_per_gpu": 4}, ""),
        ({"vllm_tensor_parallel_size": 2, "server_gpus": 2}, ""),
        ({"vllm_server_base_url": "http://a"}, ""),
    ],
)
def test_a_server_may_be_bound_by_its_engines_processor(keys: dict[str, Any], more: str) -> None:
    (found,) = doctor.examine(Signs({**GPU, **keys}, idling(0.1, 0.85, 0.1), gpus=["H200"] * 2))
    assert found.name == "server_bound"
    assert found.remedy.partition("; for a model of up to half a billion weights also servers_per_gpu: ")[2] == more


def test_a_server_of_somebody_elses_is_beside_a_trainer_that_has_a_gpu() -> None:
    lines = [{**line, "memory/total_gib": 80.0} for line in idling(0.5, 0.5, 0.4)]
    (found,) = doctor.examine(Signs({**GPU, "vllm_server_base_url": "http://a"}, lines))
    assert found.remedy.startswith(OVERLAP) and found.remedy.endswith(
        "; then vllm_server_base_url: add the address of another server"
    )


@pytest.mark.parametrize(
    ("keys", "idle", "name", "remedy"),
    [
        # The server does for 9 s what twice as many do in 4.5; then the trainer, which waited for 4, is the slower one.
        ({}, (0.1, 0.4, 0.5), "server_bound", "server_gpus: 1 -> 2; a step then takes about 6.0 s"),
        ({"server_gpus": 4}, (0.4, 0.4, 0.3), "server_bound", "server_gpus: 4 -> 8; a step then takes about 7.0 s"),
        ({}, (0.4, 0.02, 0.8), "trainer_bound", "trainer_gpus: 1 -> 2"),
        ({"num_iterations": 2}, (0.4, 0.02, 0.8), "trainer_bound", "num_iterations: 2 -> 1: the same rollouts are "),
        ({}, (0.2, 0.05, 0.8), None, ""),
        ({}, (0.3, 0.15, 0.6), None, ""),  # a quicker trainer would only wait longer
        ({}, (0.5, 0.0, 0.4), None, ""),  # publishing or grading takes the time
    ],
)
def test_of_two_that_work_at_once(keys: dict[str, Any], idle: tuple[float, ...], name: str | None, remedy: str) -> None:
    ahead = {**AHEAD, "gradient_checkpointing": False, **keys}
    found = doctor.examine(Signs(ahead, idling(*idle, "wait"), gpus=["H200"] * 2))
    assert [each.name for each in found] == [name] * (name is not None)
    assert all(each.remedy.startswith(remedy) for each in found)
    for each in found:
        assert ("trainer_gpus: 1 -> 2" in each.remedy) == (name == "trainer_bound")


def test_idle_shares_are_weighed_by_the_time_of_their_steps_the_newer_ones() -> None:
    old = steps_of(30, **{"seconds/step": 99.0, "seconds/wait": 0.0, "idle/server": 0.1, "idle/trainer": 0.0})
    new = [
        {"step": 31 + at, "seconds/step": seconds, "idle/server": 0.0, "idle/trainer": share}
        for at in range(15)
        for seconds, share in ((9.0, 0.4), (1.0, 0.9))
    ]
    (found,) = doctor.examine(Signs({**AHEAD, "server_gpus": 1}, [*old, *new]))
    assert "the policy server is idle for 0 %, the trainer for 45 %" in found.evidence


def test_a_guard_that_takes_longer_than_the_publish() -> None:
    times = {"seconds/publish": 0.1, "seconds/probe": 0.3, "seconds/generate": 0.3, "seconds/step": 1.0}
    found = doctor.examine(Signs(GPU, steps_of(**times)))
    assert [each.name for each in found] == ["publish_slow"]
    assert found[0].remedy.startswith("steps_per_generation: 1 -> 2")
    slower = doctor.examine(Signs(GPU, steps_of(**{**times, "seconds/publish": 0.4})))
    assert slower[0].remedy.startswith("use_peft: false -> true")


def test_fp16_may_skip_steps_while_its_scale_finds_its_place() -> None:
    skipped = steps_of(ailments.EARLY - 1, grad_norm=None)
    assert names(Signs({"fp16": True}, skipped)) == [] and names(Signs({}, skipped)) == ["nan"]
    assert names(Signs({"fp16": True}, steps_of(ailments.EARLY, grad_norm=None))) == ["nan"]
    assert names(Signs({}, [*skipped, {"step": 5, "grad_norm": 0.5}])) == []  # over


def test_a_run_in_which_torch_could_not_sample() -> None:
    reason = "trainer: RuntimeError: probability tensor contains either `inf`, `nan` or element < 0"
    assert names(Signs({"learning_rate": 1.0}, steps_of(3, grad_norm=0.1), reason=reason)) == ["nan"]


@pytest.mark.parametrize(
    ("before", "after", "found", "remedy"),
    [
        ((0.30, 0.27, 0.33), (0.60, 0.57, 0.63), [], ""),
        (
            (0.30, 0.20, 0.40),
            (0.34, 0.24, 0.44),
            ["evaluation_flat"],
            "eval_count: 50 -> 650, which would show a gain of 4.0 %",
        ),
        ((0.60, 0.57, 0.63), (0.30, 0.27, 0.33), ["evaluation_flat"], "learning_rate: 1e-06 -> 3.33333e-07"),
    ],
    ids=["better", "cannot tell", "worse"],
)
def test_evaluations_by_their_intervals(
    before: tuple[float, ...], after: tuple[float, ...], found: list[str], remedy: str
) -> None:
    lines = [
        {"step": step, "mean": mean, "low": low, "high": high, "questions": 50}
        for step, (mean, low, high) in ((0, before), (20, after))
    ]
    findings = doctor.examine(Signs({"learning_rate": 1e-6}, [], lines))
    assert [each.name for each in findings] == found
    assert not remedy or findings[0].remedy == remedy


# --- what is said, and where


@pytest.mark.parametrize("name", ILL)
def test_the_remedy_names_a_key_that_exists(name: str) -> None:
    for finding in doctor.diagnose(read_run(RECORDED / name)):
        for key in re.split(r" or ", finding.remedy.partition(":")[0]):
            assert key in KEYS, finding


def test_the_last_lines_of_a_run() -> None:
    lines = doctor.last_lines(RECORDED / "clipped")
    assert lines[0].startswith("doctor: clipped (hindered): completions are cut off before they end")
    assert lines[1].startswith("    -> max_completion_length: 12 -> 24")
    assert doctor.last_lines(RECORDED / WELL[0]) == []


@pytest.mark.parametrize(
    ("name", "verdict", "said"),
    [
        ("unparsed", "unparsed", "; one ends 'and so it is twelve'"),
        ("never_right", "wrong", "; one answers '57' where the gold is '9999'"),
        ("verifier_timeouts", "timed_out", "; one answers '57' where the gold is '9999'"),
    ],
)
def test_a_completion_is_shown_where_it_says_more_than_a_share(
    name: str, verdict: str, said: str, tmp_path: Path
) -> None:
    made = RunFolder(copy(name, tmp_path, recorded(name)))
    row = {"step": 12, "completion": "and so it is twelve", "answer": "57", "gold": "9999"}
    write_parquet(made.rollouts(11), [{**row, "verdict": verdict, "completion": "older"}], ROLLOUT_SCHEMA)
    write_parquet(made.rollouts(12), [{**row, "verdict": "correct"}, {**row, "verdict": verdict}], ROLLOUT_SCHEMA)
    assert doctor.diagnose(read_run(made.path))[0].evidence.endswith(said)
    made.rollouts(12).write_bytes(b"torn")
    assert not doctor.diagnose(read_run(made.path))[0].evidence.endswith(said)


def test_of_many_findings_the_rest_is_named(tmp_path: Path) -> None:
    slow = [
        {**line, "seconds/generate": 0.1, "seconds/grade": 0.4, "seconds/publish": 0.4, "seconds/step": 1.0}
        for line in recorded("clipped")
    ]
    lines = doctor.last_lines(copy("clipped", tmp_path, slow), most=1)
    assert len(lines) == 3 and lines[-1].startswith("doctor: and publish_slow, grading_slow;")


@pytest.mark.parametrize("broken", ["metrics.jsonl", "recipe.yaml", "summary.json"])
def test_a_folder_that_cannot_be_read_keeps_no_run_from_telling_its_end(broken: str, tmp_path: Path) -> None:
    made = copy("clipped", tmp_path, recorded("clipped"))
    (made / broken).write_text('{"kind": "step", "step": "?"}\n{]')
    assert doctor.last_lines(made) == [] and doctor.last_lines(tmp_path / "none") == []


# --- what the documents say


def test_the_page_has_every_ailment_and_every_threshold_as_they_are() -> None:
    page = (PROJECT / "docs" / "doctor.md").read_text()
    sections = re.split(r"^### ", page, flags=re.MULTILINE)
    titles = [section.partition("\n")[0] for section in sections[1:]]
    assert titles == [each.name for each in AILMENTS]
    for ailment, section in zip(AILMENTS, sections[1:], strict=True):
        marks = re.match(r"\w+\n\*([^*]+)\.\*", section)
        assert marks is not None
        said = marks[1].replace(" (simulated)", "").split(", ")
        assert said == [ailment.severity, *(["alarm"] if ailment.stops else [])]
        assert ("(simulated)" in marks[1]) == (ailment.name in SIMULATED)
        assert all(part in section for part in ("**Looks like**", "**Why**", "**Change**"))
        changed = re.findall(r"`(\w+)`", section.partition("**Change**")[2])
        assert all(key in KEYS or key.isupper() or key == "soft_overlong" for key in changed), changed
    told = {name: float(value) for name, value in re.findall(r"`([A-Z_]+)`[ \n]+([0-9.e-]*[0-9])", page)}
    constants = {
        name: float(value)
        for name, value in vars(ailments).items()
        if name.isupper() and isinstance(value, int | float) and not name.startswith("_")
    }
    assert told == constants


def test_the_recorded_runs_say_how_they_were_made() -> None:
    assert (RECORDED / "README.md").read_text() == provoking.readme()
    assert sorted(path.name for path in RECORDED.iterdir() if path.is_dir()) == sorted(RUNS)
