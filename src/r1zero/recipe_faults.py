"""What is wrong with a recipe as a whole: combinations that no hardware can run, each with its remedy.

Single keys, their types and spelling are `recipe.load`'s to check; what depends on the hardware is the plan's.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1zero import library_keys
from r1zero.hardware import MOST_SERVERS_PER_GPU
from r1zero.policy_server import LORA_RANKS
from r1zero.recipe import (
    TINY_MODEL,
    Fault,
    MixtureEntry,
    Recipe,
    checked_entry,
    looks_like_a_path,
    own_keys,
)
from r1zero.reporting import ailments
from r1zero.tasks import prompts, rewards, rows, sources
from r1zero.tasks.decontamination import DEFAULT_NGRAM
from r1zero.tasks.prompts import TemplateError
from r1zero.tasks.rewards import RewardError
from r1zero.tasks.sources import TASKS

UNSERVED_MODULES = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out")  # with an adapter
# Keys of TRL that would be read by nobody here: a run that ignored them would not be the run that was asked for.
WITHOUT_EFFECT = {
    "resume_from_checkpoint": "--resume RUN goes on with a run; --model_name_or_path RUN/model begins with its model",
    "load_best_model_at_end": "keep_best: true keeps the model that measured best",
    "dataset_streaming": "leave it out: the data is read whole",
}
# Keys that only one reward reads.
REWARD_KEYS = {
    "correctness_scale": "correctness",
    "overlong_cache_tokens": "soft_overlong",
    "repetition_ngram": "repetition",
}
# Keys of TRL whose loss depends on which sequences go through the model together: packing would change it.
UNPACKABLE = {
    "use_adaptive_entropy": "the entropy bonus is a mean over the tokens of a pass",
    "use_liger_kernel": "its kernels were not compared with packed rows",
    "router_aux_loss_coef": "the load of experts is balanced over the tokens of a pass",
    "torch_compile": "nearly every packed row has other lengths, for which the model would be compiled anew",
}
PACKABLE_ATTENTION = (None, "sdpa", "flash_attention_2", "flash_attention_3")


def impossible(recipe: Recipe) -> Iterable[Fault]:
    """Combinations that no hardware can run. What depends on the hardware is the plan's to refuse."""
    own = recipe.own
    model = recipe["model_name_or_path"]
    if not model:
        yield Fault("model_name_or_path", model, "is missing", "name a hub model, a local folder, or " + TINY_MODEL)
    elif (looks_like_a_path(model) or Path(model).is_dir()) and not (
        Path(model).expanduser() / "config.json"
    ).is_file():
        inside = Path(model).expanduser() / "model"
        remedy = f"did you mean {inside}?" if (inside / "config.json").is_file() else "mend the path"
        yield Fault("model_name_or_path", model, "no such model folder (no config.json in it)", remedy)
    yield from _impossible_data(recipe)
    for key, least in (("max_prompt_tokens", 1), ("eval_count", 0), ("eval_samples", 1), ("server_gpus", 0)):
        value = getattr(own, key)
        if value is not None and value < least:
            yield Fault(key, value, f"must be at least {least}", "raise it, or leave it out for the default")
    if own.trainer_gpus is not None and own.trainer_gpus < 0:
        yield Fault("trainer_gpus", own.trainer_gpus, "cannot be negative", "0 trains on the CPU")
    if own.eval_temperature < 0:
        yield Fault("eval_temperature", own.eval_temperature, "cannot be negative", "0 is greedy, 1 samples as trained")
    for key in ("server_ready_timeout", "server_silence_timeout", "generation_timeout", "publish_timeout"):
        if getattr(own, key) <= 0:
            default = own_keys()[key].default
            yield Fault(key, getattr(own, key), "must be positive", f"{default:g} seconds is the default")
    alarms = ailments.stoppable(own.method)
    for name in own.stop_on or ():
        if name not in alarms:
            why = "is not an alarm" if own.method == "grpo" else f"is not an alarm of method {own.method}"
            remedy = f"one of: {', '.join(alarms)}"
            if "," in name:
                remedy = f"several are words of their own: --stop_on {name.replace(',', ' ')}; {remedy}"
            yield Fault("stop_on", name, why, remedy)
    if own.max_restarts < 0:
        yield Fault("max_restarts", own.max_restarts, "cannot be negative", "0 never starts them again")
    if own.probe_tolerance <= 0:
        why = "must be positive: two programs never agree to the last bit"
        yield Fault("probe_tolerance", own.probe_tolerance, why, f"{own_keys()['probe_tolerance'].default} is usual")
    if own.gpu_memory_limit is not None and own.gpu_memory_limit <= 0:
        yield Fault("gpu_memory_limit", own.gpu_memory_limit, "must be positive", "leave it out for all of the GPU")
    try:
        prompts.template(own.prompt_template)
    except TemplateError as error:
        yield Fault("prompt_template", own.prompt_template, error.why, error.remedy)
    for key, remedy in WITHOUT_EFFECT.items():
        if recipe.library.get(key) not in (None, False, library_keys.load(own.method)[key].default):
            yield Fault(key, recipe[key], "would have no effect here", remedy)
    if recipe["max_steps"] == 0 or recipe["max_steps"] < -1:
        yield Fault("max_steps", recipe["max_steps"], "must be positive", "-1 trains for num_train_epochs")
    if recipe["seed"] < 0:
        yield Fault("seed", recipe["seed"], "cannot be negative", "give 0 or more")
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if recipe[key] < 1:
            yield Fault(key, recipe[key], "must be at least 1", "the smallest batch is 1")
    if recipe["bf16"] and recipe["fp16"]:
        yield Fault("fp16", True, "bf16 is true as well", "keep one of the two; bf16 from Ampere GPUs on")
    if recipe["learning_rate"] <= 0:
        yield Fault("learning_rate", recipe["learning_rate"], "must be positive", "GRPO full fine-tuning: about 1e-6")
    if recipe["load_in_4bit"] and recipe["load_in_8bit"]:
        yield Fault("load_in_8bit", True, "load_in_4bit is true as well", "keep one of the two")
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe[key] and not recipe["use_peft"]:
            yield Fault(
                key, True, "quantized weights cannot be trained themselves", "add use_peft: true for an adapter"
            )
    yield from _impossible_packing(recipe)
    yield from _refused_by_the_trainer(recipe)
    if own.method == "grpo":
        yield from _impossible_grpo(recipe)


def _refused_by_the_trainer(recipe: Recipe) -> Iterable[Fault]:
    """What TRL or transformers refuse themselves, or do otherwise than it reads, but only once the servers are up."""
    if recipe["save_strategy"] == "best":
        why = "the trainer measures nothing by itself, so it knows of no best"
        yield Fault("save_strategy", "best", why, "use steps or epoch; keep_best: true keeps the best model")
    if recipe["auto_find_batch_size"]:
        why = "another batch would be another run: a batch holds whole groups, and a checkpoint continues its own"
        yield Fault("auto_find_batch_size", True, why, "drop it; the plan says what fits")
    if recipe["fsdp"]:
        why = "is not supported: weights are published and saved as DeepSpeed's ZeRO shards them"
        yield Fault("fsdp", recipe["fsdp"], why, "use accelerate_config: zero3")
    if recipe.own.method != "grpo":
        return
    if recipe["log_completions_hub_repo"] is not None and not recipe["log_completions"]:
        why = "without log_completions no table of them is made"
        yield Fault(
            "log_completions_hub_repo", recipe["log_completions_hub_repo"], why, "add log_completions: true, or drop it"
        )
    if recipe["sync_ref_model"] and (recipe["beta"] == 0 or recipe["use_peft"]):
        why = (
            "with beta: 0 there is no reference model" if recipe["beta"] == 0 else "an adapter's reference is its base"
        )
        yield Fault("sync_ref_model", True, f"{why}, and so nothing to follow the policy", "drop sync_ref_model")
    if not (recipe["use_vllm"] and recipe["vllm_importance_sampling_correction"]):
        return
    mode = recipe["vllm_importance_sampling_mode"]
    least, most = (recipe[f"vllm_importance_sampling_clip_{end}"] for end in ("min", "max"))
    if recipe["loss_type"] == "vespo" and not mode.startswith("token_"):
        why = "loss_type: vespo takes a ratio for each token"
        yield Fault("vllm_importance_sampling_mode", mode, why, "use token_truncate")
    if least is not None and most is not None and least >= most:
        why = f"is not below vllm_importance_sampling_clip_max, {most:g}"
        yield Fault("vllm_importance_sampling_clip_min", least, why, "lower it, or drop it: no ratio is raised then")
    if mode.endswith("_truncate") and least is None and most is None:
        why = f"vllm_importance_sampling_mode: {mode} truncates ratios at it"
        yield Fault("vllm_importance_sampling_clip_max", None, why, "3.0 is TRL's default")


def _impossible_data(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    yield from _absent("dataset_name", recipe["dataset_name"])
    yield from _absent("eval_dataset_name", own.eval_dataset_name)
    for name, _, _ in sources.kept_apart_from(recipe):
        yield from _absent("decontaminate_against", name)
    if own.decontaminate_ngram < 0:
        yield Fault("decontaminate_ngram", own.decontaminate_ngram, "cannot be negative", "0 leaves nothing out")
    if own.decontaminate_against and not own.decontaminate_ngram:
        why = "decontaminate_ngram is 0, which compares nothing"
        yield Fault("decontaminate_against", own.decontaminate_against, why, f"set it to {DEFAULT_NGRAM}, or drop this")
    faults = list(_impossible_training(recipe) if own.mixture is None else _impossible_mixture(recipe))
    yield from faults
    if not faults:  # what is measured follows from what is trained on
        yield from _impossible_measuring(recipe)


def _impossible_training(recipe: Recipe) -> Iterable[Fault]:
    given = _description(recipe)
    yield from _impossible_source(recipe.own.task, given)
    for key, split in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
        if recipe.own.task == "arithmetic" and recipe[key] != split:
            yield Fault(key, recipe[key], f"task arithmetic has its own split {split}", f"leave {key} out")


def _description(recipe: Recipe) -> dict[str, Any]:
    """The keys that describe the one dataset a recipe trains on."""
    ours = ("question_column", "answer_column", "solution_column", "levels")
    library = {key: recipe[key] for key in ("dataset_name", "dataset_config")}
    return library | {key: getattr(recipe.own, key) for key in ours}


def _impossible_source(task: str, given: Mapping[str, Any]) -> Iterable[Fault]:
    """What one dataset to train on cannot be; `given` holds the keys that describe it."""
    if task in ("arithmetic", "gsm8k"):
        what = "makes its own problems" if task == "arithmetic" else "knows its columns, and has no levels"
        legal = () if task == "arithmetic" else ("dataset_name", "dataset_config")
        for key, value in given.items():
            if value is not None and key not in legal:
                yield Fault(key, value, f"task {task} {what}", f"leave {key} out, or take task math or dataset")
    if task == "dataset" and not given["dataset_name"]:
        yield Fault("dataset_name", given["dataset_name"], "is missing: task dataset has none of its own", "name one")
    if given["levels"] == []:
        yield Fault("levels", [], "no level is left", "name some, such as [3, 4, 5], or leave levels out")


def _impossible_mixture(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    if not own.mixture:
        yield Fault("mixture", own.mixture, "holds no dataset", "name some, or leave mixture out")
    given = _description(recipe)
    given["task"] = own.task if own.task != own_keys()["task"].default else None
    given["dataset_train_split"] = recipe.library.get("dataset_train_split")
    for key, value in given.items():
        if value is not None:
            inside = "split" if key == "dataset_train_split" else key
            why = "the mixture says what is trained on"
            yield Fault(key, value, why, f"leave it out, and write {inside} into the entries of the mixture")
    for number, entry in enumerate(own.mixture or (), start=1):
        values, faults = checked_entry(entry)
        if not faults:
            faults = list(_impossible_entry(MixtureEntry(**values)))
        for fault in faults:
            yield Fault(f"mixture, entry {number}: {fault.key}", fault.value, fault.why, fault.remedy)


def _impossible_entry(entry: MixtureEntry) -> Iterable[Fault]:
    ours = ("dataset_name", "dataset_config", "question_column", "answer_column", "solution_column", "levels")
    yield from _impossible_source(entry.task, {key: getattr(entry, key) for key in ours})
    yield from _absent("dataset_name", entry.dataset_name)
    if entry.weight <= 0:
        yield Fault("weight", entry.weight, "must be positive", "leave the entry out for none of it")
    if entry.task == "arithmetic" and entry.split != "train":
        yield Fault("split", entry.split, "task arithmetic has its own split train", "leave split out")


def _impossible_measuring(recipe: Recipe) -> Iterable[Fault]:
    """What cannot be measured on, or must not be since it is trained on."""
    own = recipe.own
    if recipe.mixture is not None and own.eval_dataset_name and own.eval_task is None:
        why = "the mixture leaves open how it is read"
        yield Fault("eval_dataset_name", own.eval_dataset_name, why, f"set eval_task, one of: {', '.join(TASKS)}")
        return
    trained = sources.trained_on(recipe)
    for source in sources.measured_on(recipe):
        named = source.dataset_name
        if source.task == "arithmetic" and own.eval_dataset_name:
            why = "task arithmetic makes its own problems, and eval_task is arithmetic"
            yield Fault("eval_dataset_name", named, why, "leave it out, or set eval_task")
        elif source.task == "arithmetic" and source.split != "test":
            yield Fault("dataset_test_split", source.split, "task arithmetic has its own split test", "leave it out")
        elif source.task == "dataset" and named is None:
            why = "is missing: task dataset has none of its own"
            yield Fault("eval_dataset_name", None, why, "name one, or set eval_count: 0 to measure nothing")
        elif source.key != "eval_dataset_name" and named and Path(named).expanduser().is_file():
            remedy = "set eval_dataset_name to what is measured on, or eval_count: 0 to measure nothing"
            yield Fault(source.key, named, "is one file, and all of it is trained on", remedy)
        elif any(rows.same_rows(source.place, each.place) for each in trained):
            key = "eval_dataset_name" if own.eval_dataset_name else "dataset_test_split"
            value = own.eval_dataset_name or source.split
            why = f"is what is trained on: {named}, split {source.split}"
            yield Fault(key, value, why, "measure on another split (dataset_test_split) or dataset (eval_dataset_name)")


def _absent(key: str, name: str | None) -> Iterable[Fault]:
    if name and looks_like_a_path(name) and not rows.local(name):
        yield Fault(key, name, "no such file or folder", "mend the path, or give a hub id")


def _impossible_grpo(recipe: Recipe) -> Iterable[Fault]:
    group = recipe["num_generations"]
    if group is None or group < 2:
        why = "GRPO compares the completions of one prompt with each other"
        yield Fault("num_generations", group, why, "give at least 2; 8 is common")
    if recipe["max_completion_length"] is not None and recipe["max_completion_length"] < 1:
        yield Fault("max_completion_length", recipe["max_completion_length"], "must be at least 1 token", "raise it")
    if recipe["temperature"] <= 0:
        why = "training needs completions that differ"
        yield Fault("temperature", recipe["temperature"], why, "give a positive temperature; 1.0 is TRL's default")
    if recipe["generation_batch_size"] is not None and recipe["steps_per_generation"] is not None:
        why = "steps_per_generation is given as well, and each fixes the other"
        yield Fault("generation_batch_size", recipe["generation_batch_size"], why, "keep one of the two")
    yield from _impossible_rewards(recipe)
    if recipe.own.stop_strings is not None and not all(recipe.own.stop_strings):
        yield Fault("stop_strings", recipe.own.stop_strings, "an empty text stops everything", "leave that one out")
    if recipe.own.stop_strings and recipe["mask_truncated_completions"]:
        why = (
            "TRL takes a completion that ended with a stop string for one that was cut off, and would not learn from it"
        )
        yield Fault(
            "mask_truncated_completions", True, why, "leave out one of mask_truncated_completions, stop_strings"
        )
    for key in ("alert_unparsed", "alert_timed_out", "max_unreadable_golds"):
        if not 0 <= getattr(recipe.own, key) <= 1:
            yield Fault(
                key, getattr(recipe.own, key), "is a share, from 0 to 1", f"{own_keys()[key].default} is the default"
            )
    yield from _impossible_serving(recipe)
    if recipe["vllm_server_base_url"] is not None and not recipe.dedicated_server:
        why = "without use_vllm: true and vllm_mode: server nothing would talk to it"
        yield Fault("vllm_server_base_url", recipe["vllm_server_base_url"], why, "add both keys, or drop this one")
    if recipe["eval_strategy"] not in ("no", "steps"):
        why = "held-out accuracy is measured by steps"
        yield Fault("eval_strategy", recipe["eval_strategy"], why, "use steps with eval_steps, or no")
    if recipe.own.keep_best and (
        recipe["eval_strategy"] != "steps" or recipe.own.eval_count == 0 or recipe.own.method != "grpo"
    ):
        why = "nothing is measured on the way, so there is none to keep"
        yield Fault("keep_best", True, why, "add eval_strategy: steps and eval_steps, or drop keep_best")


def _impossible_packing(recipe: Recipe) -> Iterable[Fault]:
    """What would not be the same loss, or would be learnt across sequences, where batches are packed."""
    budget = recipe.own.micro_batch_tokens
    if budget is None:
        return
    if recipe.own.method != "grpo":
        why = "is for method grpo"
        yield Fault("micro_batch_tokens", budget, why, "the cold start has TRL's packing: true and padding_free: true")
        return
    if budget < 1:
        yield Fault("micro_batch_tokens", budget, "must be at least 1 token", "16384 is a start on a GPU of 80 GB")

    def or_without(what: str) -> str:
        """A value is named: what a base recipe gives cannot be left out."""
        return f"set {what}, or drop micro_batch_tokens"

    if recipe["loss_type"] == "bnpo":
        why = "is a mean over the tokens of a pass, and micro_batch_tokens divides passes anew"
        yield Fault("loss_type", "bnpo", why, "use dapo, a mean over all tokens of a generation, or drop it")
    if recipe["top_entropy_quantile"] < 1:
        why = "which tokens have most entropy depends on the pass, and micro_batch_tokens divides passes anew"
        yield Fault(
            "top_entropy_quantile", recipe["top_entropy_quantile"], why, or_without("top_entropy_quantile: 1.0")
        )
    if recipe["entropy_coef"]:
        why = UNPACKABLE["use_adaptive_entropy"]
        yield Fault("entropy_coef", recipe["entropy_coef"], why, or_without("entropy_coef: 0"))
    legal = library_keys.load("grpo")
    for key, why in UNPACKABLE.items():
        if recipe.library.get(key, legal[key].default) != legal[key].default:
            fine = or_without(f"{key}: {json.dumps(legal[key].default)}")
            yield Fault(key, recipe[key], f"with micro_batch_tokens: {why}", fine)
    # As the model gets it: TRL's own key for anything at all comes after ours.
    attention, init = recipe["attn_implementation"], recipe["model_init_kwargs"]
    if isinstance(init, dict):
        attention = init.get("attn_implementation", attention)
    if attention not in PACKABLE_ATTENTION:
        why = "was not shown to keep packed sequences apart"
        known = ", ".join(name for name in PACKABLE_ATTENTION if name)
        yield Fault("attn_implementation", attention, why, f"leave it out, or one of: {known}")


def _impossible_serving(recipe: Recipe) -> Iterable[Fault]:
    """What no policy server can do, or would do without effect."""
    own = recipe.own
    if recipe["vllm_tensor_parallel_size"] < 1:
        yield Fault(
            "vllm_tensor_parallel_size", recipe["vllm_tensor_parallel_size"], "must be at least 1", "1 is usual"
        )
    several = recipe.servers_per_gpu
    if not 1 <= several <= MOST_SERVERS_PER_GPU:
        why = f"must be 1 to {MOST_SERVERS_PER_GPU}"
        remedy = "2 or more are for models of up to half a billion weights"
        yield Fault("servers_per_gpu", several, why, remedy)
    elif several > 1 and recipe["vllm_tensor_parallel_size"] > 1:
        each = recipe["vllm_tensor_parallel_size"]
        why = f"a server that needs {each} GPUs (vllm_tensor_parallel_size) has them whole"
        yield Fault("servers_per_gpu", several, why, "1, or vllm_tensor_parallel_size: 1")
    if own.max_staleness not in (0, 1):
        yield Fault("max_staleness", own.max_staleness, "must be 0 or 1", "1 overlaps server and trainer, 0 does not")
    if not recipe.dedicated_server:
        for key in ("server_gpus", "servers_per_gpu", "publish", "server_base", "gpu_memory_limit", "max_staleness"):
            if getattr(own, key) != own_keys()[key].default:
                why = "this recipe starts no policy server"
                yield Fault(key, getattr(own, key), why, "add use_vllm: true and vllm_mode: server, or drop it")
        return
    if own.max_staleness:
        yield from _impossible_overlap(recipe)
    if recipe["load_in_8bit"]:
        why = "a policy server cannot serve these 8-bit weights, and any others would be another policy"
        yield Fault("load_in_8bit", True, why, "use load_in_4bit: true, or use_vllm: false")
    if own.server_base != own_keys()["server_base"].default and not recipe["load_in_4bit"]:
        why = "would have no effect: server and trainer have the same weights unless load_in_4bit rounds the trainer's"
        yield Fault("server_base", own.server_base, why, "leave it out, or add load_in_4bit: true and use_peft: true")
    if own.publish in ("adapter", "folded") and not recipe["use_peft"]:
        yield Fault("publish", own.publish, "without use_peft there is no adapter", "use auto, or add use_peft: true")
    if own.publish in ("nccl", "shared_memory") and recipe["use_peft"]:
        why = "sends all weights, and with use_peft only those of the adapter change"
        yield Fault("publish", own.publish, why, "use publish: folded, adapter or auto")
    if own.publish == "folded" and own.server_base == "vllm_4bit":
        why = "nothing can be added to weights that vLLM holds in 4 bits (server_base: vllm_4bit)"
        yield Fault("publish", own.publish, why, "use publish: adapter, or server_base: rounded")
    if recipe["use_peft"]:
        yield from _unservable_adapter(recipe)


def _impossible_overlap(recipe: Recipe) -> Iterable[Fault]:
    """What cannot be while the policy server is ahead of the trainer."""
    stale = recipe.own.max_staleness
    if not recipe["vllm_importance_sampling_correction"]:
        why = "what an older policy made is learned from as if the newest had made it, unless that is corrected for"
        remedy = "drop vllm_importance_sampling_correction: false, or max_staleness: 0"
        yield Fault("max_staleness", stale, why, remedy)
    if recipe["vllm_enable_sleep_mode"]:
        why = "the policy server would sleep while the trainer works (vllm_enable_sleep_mode), and so make nothing"
        yield Fault("max_staleness", stale, why, "drop vllm_enable_sleep_mode, or max_staleness: 0")


def _unservable_adapter(recipe: Recipe) -> Iterable[Fault]:
    """Adapters that PEFT can train and vLLM cannot serve."""
    most = LORA_RANKS[-1]
    if not 1 <= recipe["lora_r"] <= most:
        yield Fault("lora_r", recipe["lora_r"], f"vLLM serves adapters of ranks up to {most}", "16 to 64 is usual")
    targets = recipe["lora_target_modules"] or ()
    unserved = [name for name in targets if name.rpartition(".")[2] in UNSERVED_MODULES]
    if unserved:
        why = f"vLLM cannot serve an adapter on {', '.join(unserved)}"
        yield Fault("lora_target_modules", targets, why, "leave that out; the projections of the layers can have one")
    for key, what in (
        ("lora_modules_to_save", "whole modules beside the adapter"),
        ("lora_target_parameters", "an adapter on single parameters"),
        ("use_dora", "DoRA's magnitudes"),
    ):
        if recipe[key]:
            remedy = f"leave {key} out, or use_vllm: false"
            yield Fault(
                key, recipe[key], f"vLLM cannot serve {what}, the policy server would be another policy", remedy
            )


def _impossible_rewards(recipe: Recipe) -> Iterable[Fault]:
    own = recipe.own
    names = own.reward_funcs
    if not names:
        yield Fault(
            "reward_funcs", names, "without a reward there is nothing to learn", "name one, such as correctness"
        )
    for name in names:
        try:
            rewards.check_name(name)
        except RewardError as error:
            yield Fault("reward_funcs", name, error.why, error.remedy)
    metrics = [rewards.metric_name(name) for name in names]
    twice = sorted({name for name in metrics if metrics.count(name) > 1})
    if twice:
        why = f"two of them are called {', '.join(twice)} and would share one metric"
        yield Fault("reward_funcs", names, why, "leave one out, or rename it")
    weights = recipe["reward_weights"]
    if weights is not None and len(weights) != len(names):
        why = f"has {len(weights)} weights for the {len(names)} of reward_funcs: {', '.join(names)}"
        yield Fault("reward_weights", weights, why, "give one weight for each, in that order, or leave it out")
    for key, name in REWARD_KEYS.items():
        if name not in names and getattr(own, key) != own_keys()[key].default:
            yield Fault(key, getattr(own, key), "would have no effect here", f"add {name} to reward_funcs, or drop it")
    limit, cache = recipe["max_completion_length"], own.overlong_cache_tokens
    if cache is not None and limit is not None and not 1 <= cache <= limit:
        why = f"must be from 1 to max_completion_length, which is {limit}"
        yield Fault(
            "overlong_cache_tokens", cache, why, "a fifth of max_completion_length is usual; leave it out for that"
        )
    if limit is None and "soft_overlong" in names:
        why = "is null, and soft_overlong punishes what comes near it"
        yield Fault("max_completion_length", limit, why, "give the limit of a completion in tokens")
    if own.repetition_ngram < 1:
        yield Fault("repetition_ngram", own.repetition_ngram, "must be at least 1 word", "raise it")
    if "tag_count" in names:
        try:
            fitting = recipe.answer_format == "tagged" and recipe.template.reasoning_tag is not None
        except TemplateError:
            return  # said above
        if not fitting:
            why = "tag_count counts reasoning and answer tags, and this prompt_template or answer_format has none"
            yield Fault("reward_funcs", names, why, "leave tag_count out, or take a template with both, such as r1rl")
