"""Every recipe that cannot run is refused with its own message: key, value, why, remedy; exit code 2, no file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import PROJECT

GOOD = {
    "method": "grpo",
    "task": "arithmetic",
    "model_name_or_path": "r1zero/tiny-arithmetic",
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 40,
    "max_steps": 2,
}
SERVER = {"use_vllm": True, "vllm_mode": "server"}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MODEL = {"model_name_or_path": "./model"}  # a folder with a config.json of 512 positions, made by the fixture

# name: (keys over GOOD, hardware, words that the message must hold)
BAD: dict[str, tuple[dict[str, object], str, list[str]]] = {
    "no budget to pack to": ({"micro_batch_tokens": 0}, "1x0", ["micro_batch_tokens = 0", "at least 1 token"]),
    "packing a mean over the tokens of a pass": (
        {"micro_batch_tokens": 4096, "loss_type": "bnpo"},
        "1x0",
        ["loss_type = 'bnpo'", "mean over the tokens of a pass", "dapo"],
    ),
    "packing with an entropy bonus": (
        {"micro_batch_tokens": 4096, "entropy_coef": 0.01},
        "1x0",
        ["entropy_coef = 0.01", "set entropy_coef: 0, or drop micro_batch_tokens"],
    ),
    "packing with the bonus that moves": (
        {"micro_batch_tokens": 4096, "use_adaptive_entropy": True},
        "1x0",
        ["use_adaptive_entropy = True", "entropy bonus", "set use_adaptive_entropy: false, or drop micro_batch_tokens"],
    ),
    "packing with a quantile of a pass": (
        {"micro_batch_tokens": 4096, "top_entropy_quantile": 0.2},
        "1x0",
        ["top_entropy_quantile = 0.2", "depends on the pass", "set top_entropy_quantile: 1.0"],
    ),
    "packing that is compiled": (
        {"micro_batch_tokens": 4096, "torch_compile": True},
        "1x0",
        ["torch_compile = True", "compiled anew", "set torch_compile: false"],
    ),
    "packing with attention that the model is given": (
        {"micro_batch_tokens": 4096, "model_init_kwargs": {"attn_implementation": "eager"}},
        "1x0",
        ["attn_implementation = 'eager'", "keep packed sequences apart"],
    ),
    "the best by transformers": (
        {"load_best_model_at_end": True},
        "1x0",
        ["load_best_model_at_end = True", "keep_best: true"],
    ),
    "saving the best by transformers": (
        {"save_strategy": "best"},
        "1x0",
        ["save_strategy = 'best'", "keep_best: true"],
    ),
    "a batch that is found": ({"auto_find_batch_size": True}, "1x0", ["auto_find_batch_size = True", "whole groups"]),
    "another way to shard": ({"fsdp": "full_shard"}, "1x0", ["fsdp = 'full_shard'", "accelerate_config: zero3"]),
    "a table that is not made": (
        {"log_completions_hub_repo": "me/table"},
        "1x0",
        ["log_completions_hub_repo = 'me/table'", "log_completions: true"],
    ),
    "no reference to follow the policy": (
        {"sync_ref_model": True, "beta": 0.0},
        "1x0",
        ["sync_ref_model = True", "with beta: 0 there is no reference model"],
    ),
    "an adapter's reference that follows it": (
        {"sync_ref_model": True, "beta": 0.1, "use_peft": True},
        "1x0",
        ["sync_ref_model = True", "an adapter's reference is its base"],
    ),
    "vespo with ratios of sequences": (
        {**SERVER, "loss_type": "vespo"},
        "1x2",
        ["vllm_importance_sampling_mode = 'sequence_mask'", "vespo", "token_truncate"],
    ),
    "bounds the wrong way round": (
        {**SERVER, "vllm_importance_sampling_clip_min": 4.0},
        "1x2",
        ["vllm_importance_sampling_clip_min = 4.0", "not below vllm_importance_sampling_clip_max, 3"],
    ),
    "truncating at nothing": (
        {
            **SERVER,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": None,
        },
        "1x2",
        ["vllm_importance_sampling_clip_max: ", "token_truncate truncates ratios at it"],
    ),
    "packing with Liger's layers": (
        {"micro_batch_tokens": 4096, "use_liger_kernel": True},
        "1x0",
        ["use_liger_kernel = True", "packed rows", "set use_liger_kernel: false"],
    ),
    "packing with experts": (
        {"micro_batch_tokens": 4096, "router_aux_loss_coef": 0.01},
        "1x0",
        ["router_aux_loss_coef = 0.01", "experts"],
    ),
    "packing with an attention nobody has looked at": (
        {"micro_batch_tokens": 4096, "attn_implementation": "flex_attention"},
        "1x0",
        ["attn_implementation = 'flex_attention'", "sdpa, flash_attention_2"],
    ),
    "packing a model of another kind": (
        {"micro_batch_tokens": 4096, **MODEL},
        "1x0",
        ["micro_batch_tokens = 4096", "llama, mistral, qwen2, qwen3", "leave micro_batch_tokens out"],
    ),
    "misspelt TRL key": (
        {"num_generation": 8},
        "1x0",
        ["num_generation = 8", "not a key", "did you mean num_generations?"],
    ),
    "misspelt own key": ({"eval_cuont": 5}, "1x0", ["eval_cuont = 5", "did you mean eval_count"]),
    "unknown key": ({"zzz_qqq": 1}, "1x0", ["zzz_qqq = 1", "not a key", "--help"]),
    "key of the other method": (
        {"max_length": 100},
        "1x0",
        ["max_length = 100", "belongs to method sft", "leave it out"],
    ),
    "removed TRL key": (
        {"max_prompt_length": 256},
        "1x0",
        ["max_prompt_length = 256", "no longer", "max_prompt_tokens"],
    ),
    "removed HF key": (
        {"overwrite_output_dir": True},
        "1x0",
        ["overwrite_output_dir", "no longer", "never overwritten"],
    ),
    "text for a number": ({"learning_rate": "fast"}, "1x0", ["learning_rate = 'fast'", "expects", "float"]),
    "number for a switch": ({"use_vllm": 3}, "1x0", ["use_vllm = 3", "expects bool"]),
    "fraction for a count": ({"num_generations": 2.5}, "1x0", ["num_generations = 2.5", "expects int"]),
    "list for a number": ({"max_steps": [1, 2]}, "1x0", ["max_steps = [1, 2]", "expects"]),
    "unknown method": ({"method": "ppo"}, "1x0", ["method = 'ppo'", "one of: grpo, sft"]),
    "unknown task": ({"task": "gsm9k"}, "1x0", ["task = 'gsm9k'", "gsm8k"]),
    "unknown template": ({"prompt_template": "r1"}, "1x0", ["prompt_template = 'r1'", "r1rl"]),
    "unknown vllm mode": ({**SERVER, "vllm_mode": "remote"}, "1x2", ["vllm_mode = 'remote'", "colocate"]),
    "no model": ({"model_name_or_path": None}, "1x0", ["model_name_or_path", "missing", "r1zero/tiny-arithmetic"]),
    "model folder absent": ({"model_name_or_path": "./nowhere"}, "1x0", ["'./nowhere'", "no such model folder"]),
    "data folder absent": (
        {"task": "gsm8k", "dataset_name": "./nowhere"},
        "1x0",
        ["dataset_name = './nowhere'", "no such file or folder"],
    ),
    "data without a gold": (
        {"task": "gsm8k", "dataset_name": "./nogold"},
        "1x0",
        ["nogold/train.jsonl, line 1", "no gold after ####"],
    ),
    "data of another shape": (
        {"task": "gsm8k", "dataset_name": "./badshape"},
        "1x0",
        ["badshape", "needs the columns question and answer", "problem"],
    ),
    "data folder without a split": (
        {"task": "gsm8k", "dataset_name": "./model"},
        "1x0",
        ["model: has no train.jsonl, train.json, train.parquet or train-*.parquet", "it holds config.json"],
    ),
    "data for a task that makes its own": (
        {"dataset_name": "openai/gsm8k"},
        "1x0",
        ["dataset_name = 'openai/gsm8k'", "task arithmetic makes its own problems"],
    ),
    "one generation": ({"num_generations": 1}, "1x0", ["num_generations = 1", "at least 2"]),
    "batch not whole groups": (
        {"per_device_train_batch_size": 10, "num_generations": 8},
        "1x0",
        [
            "num_generations = 8",
            "10 per device x 1 process x 1 pass a generation",
            "= 10 completions",
            "use num_generations 2 or 5 or 10",
        ],
    ),
    "generation batch uneven": (
        {"generation_batch_size": 24},
        "1x0",
        ["generation_batch_size = 24", "not a multiple of 16 per device", "use 32"],
    ),
    "step not whole groups": (
        {"per_device_train_batch_size": 4, "steps_per_generation": 2},
        "1x0",
        ["num_generations = 8", "an optimizer step takes 4 completions"],
    ),
    "batch given twice": (
        {"generation_batch_size": 32, "steps_per_generation": 2},
        "1x0",
        ["generation_batch_size = 32", "each fixes the other"],
    ),
    "more GPUs than exist": (
        {**SERVER, **MODEL, "server_gpus": 1, "trainer_gpus": 4},
        "1x2",
        ["trainer_gpus = 4", "server 1 + trainer 4 = 5 GPUs, 2 here"],
    ),
    "server without a GPU": (
        {**SERVER, **MODEL},
        "1x0",
        ["use_vllm", "no GPU is here", "python -m r1zero.serving.cpu_build", "--use_vllm false"],
    ),
    "servers that leave the trainer nothing": (
        {**SERVER, **MODEL, "server_gpus": 2},
        "1x2",
        ["server_gpus = 2", "servers take 2 GPUs, 2 here", "nothing is left", "server_gpus: 0 lets"],
    ),
    "one GPU for the trainer alone": (
        {**SERVER, **MODEL, "server_gpus": 1},
        "1x1",
        ["server_gpus = 1", "servers take 1 GPU, 1 here", "share one GPU"],
    ),
    "more servers than GPUs": (
        {**SERVER, **MODEL, "server_gpus": 8},
        "1x1",
        ["server_gpus = 8", "servers take 8 GPUs, 1 here", "nothing is left"],
    ),
    "a server over all GPUs, and a trainer": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 2, "trainer_gpus": 1},
        "1x2",
        ["vllm_tensor_parallel_size = 2", "server 2 + trainer 1 = 3 GPUs, 2 here", "lower vllm_tensor_parallel_size"],
    ),
    "a server over all GPUs": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 2},
        "1x2",
        ["vllm_tensor_parallel_size = 2", "servers take 2 GPUs, 2 here", "lower vllm_tensor_parallel_size"],
    ),
    "a trainer on the CPU beside a server on a GPU": (
        {**SERVER, **MODEL, "trainer_gpus": 0},
        "1x2",
        ["trainer_gpus = 0", "server 1 + trainer 0", "nothing is left"],
    ),
    "several trainer processes on a shared GPU": (
        {**SERVER, **MODEL, "server_gpus": 0, "trainer_gpus": 2},
        "1x2",
        ["trainer_gpus = 2", "share one GPU (server_gpus is 0)", "use trainer_gpus: 1"],
    ),
    "a server over two GPUs where there is one": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 2},
        "1x1",
        ["vllm_tensor_parallel_size = 2", "share one GPU (only one is here)"],
    ),
    "server GPUs that are not whole servers": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 2, "server_gpus": 3, "trainer_gpus": 1},
        "1x4",
        ["server_gpus = 3", "not a multiple of vllm_tensor_parallel_size, 2 GPUs for each", "use 4"],
    ),
    "a server over no GPU": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 0},
        "1x2",
        ["vllm_tensor_parallel_size = 0", "must be at least 1"],
    ),
    "heads that GPUs cannot share": (
        {**SERVER, "model_name_or_path": "./smollm2", "vllm_tensor_parallel_size": 2},
        "1x4",
        ["vllm_tensor_parallel_size = 2", "9 attention heads cannot be divided among 2 GPUs", "use 1"],
    ),
    "a server of the embedded model, which has no folder yet": (
        SERVER,
        "1x2",
        ["model_name_or_path = 'r1zero/tiny-arithmetic'", "no folder before it is made", "python -m r1zero.tiny"],
    ),
    "NCCL within one GPU": (
        {**SERVER, **MODEL, "publish": "nccl"},
        "1x1",
        ["publish = 'nccl'", "share one GPU", "trl#3158", "publish: shared_memory"],
    ),
    "an adapter to publish where there is none": (
        {**SERVER, **MODEL, "publish": "adapter"},
        "1x2",
        ["publish = 'adapter'", "without use_peft there is no adapter"],
    ),
    "an adapter to fold where there is none": (
        {**SERVER, **MODEL, "publish": "folded"},
        "1x2",
        ["publish = 'folded'", "without use_peft there is no adapter"],
    ),
    "an adapter to fold into 4 bits": (
        {**SERVER, **MODEL, "publish": "folded", "use_peft": True, "load_in_4bit": True, "server_base": "vllm_4bit"},
        "1x2",
        ["publish = 'folded'", "nothing can be added to weights that vLLM holds in 4 bits", "publish: adapter"],
    ),
    "all weights to publish where an adapter is trained": (
        {**SERVER, **MODEL, "publish": "shared_memory", "use_peft": True},
        "1x2",
        ["publish = 'shared_memory'", "with use_peft only those of the adapter change", "publish: folded, adapter"],
    ),
    "a route without a server": (
        {"publish": "nccl"},
        "1x2",
        ["publish = 'nccl'", "starts no policy server", "use_vllm: true"],
    ),
    "an unknown route": ({**SERVER, **MODEL, "publish": "ncl"}, "1x2", ["publish = 'ncl'", "did you mean nccl?"]),
    "a base for a server without 4 bits": (
        {**SERVER, **MODEL, "server_base": "unrounded"},
        "1x2",
        ["server_base = 'unrounded'", "no effect", "load_in_4bit: true"],
    ),
    "a memory limit that nobody shares": (
        {**SERVER, **MODEL, "gpu_memory_limit": 24},
        "1x2",
        ["gpu_memory_limit = 24.0", "share no GPU", "server_gpus: 0"],
    ),
    "a memory limit above the GPU": (
        {**SERVER, **MODEL, "gpu_memory_limit": 100},
        "1x1:80",
        ["gpu_memory_limit = 100.0", "the GPU has 80 GiB"],
    ),
    "a memory limit for a model of unknown shape": (
        {**SERVER, **MODEL, "gpu_memory_limit": 20},
        "1x1:80",
        ["gpu_memory_limit = 20.0", "it cannot be divided", "add vllm_gpu_memory_utilization"],
    ),
    "a memory limit that the server takes all of": (
        {**SERVER, **MODEL, "gpu_memory_limit": 20, "vllm_gpu_memory_utilization": 0.3},
        "1x1:80",
        ["gpu_memory_limit = 20.0", "the server takes all of it", "lower vllm_gpu_memory_utilization"],
    ),
    "a memory limit of nothing": ({"gpu_memory_limit": 0}, "1x0", ["gpu_memory_limit = 0", "must be positive"]),
    "a server that sleeps beside nobody": (
        {**SERVER, **MODEL, "vllm_enable_sleep_mode": True},
        "1x2",
        ["vllm_enable_sleep_mode = True", "share no GPU", "no effect"],
    ),
    "server and trainer that do not fit": (
        {**SERVER, "model_name_or_path": "./smollm2", "max_completion_length": 9000, "max_prompt_tokens": 1000},
        "1x1:24",
        [
            "per_device_train_batch_size = 16",
            "server and trainer do not fit on one GPU",
            "23.5 there",
            "server ",
            "KV cache",
            "trainer ",
            "activations",
            "as much more gradient_accumulation_steps",
        ],
    ),
    "a trainer that does not fit": (
        {
            "model_name_or_path": "./smollm2",
            "max_completion_length": 4000,
            "max_prompt_tokens": 1000,
            "gradient_checkpointing": False,
        },
        "1x1:24",
        ["the trainer needs", "23.5 are there", "gradient_checkpointing: true"],
    ),
    "packed passes that a GPU has no room for": (
        {
            "model_name_or_path": "./smollm2",
            "max_completion_length": 200,
            "max_prompt_tokens": 100,
            "micro_batch_tokens": 10**6,
        },
        "1x1:24",
        ["micro_batch_tokens = 1000000", "the trainer needs", "a smaller micro_batch_tokens"],
    ),
    "packed passes that a shared GPU has no room for": (
        {**SERVER, "model_name_or_path": "./smollm2", "max_prompt_tokens": 64, "micro_batch_tokens": 10**6},
        "1x1:24",
        ["micro_batch_tokens = 1000000", "do not fit on one GPU", "a smaller micro_batch_tokens"],
    ),
    "a server whose share is too small": (
        {**SERVER, "model_name_or_path": "./smollm2", "max_prompt_tokens": 64, "vllm_gpu_memory_utilization": 0.01},
        "1x1:80",
        ["vllm_gpu_memory_utilization = 0.01", "is 0.8 of 80 GiB, the server needs", "leave it out"],
    ),
    "a server of its own whose share is too small": (
        {**SERVER, "model_name_or_path": "./smollm2", "max_prompt_tokens": 64, "vllm_gpu_memory_utilization": 0.01},
        "1x2:80",
        ["vllm_gpu_memory_utilization = 0.01", "its share of 0.01 of 80 GiB is 0.8", "a larger share"],
    ),
    "an adapter of too high a rank": (
        {**SERVER, **MODEL, "use_peft": True, "lora_r": 1024},
        "1x2",
        ["lora_r = 1024", "vLLM serves adapters of ranks up to 512"],
    ),
    "an adapter on the embedding": (
        {**SERVER, **MODEL, "use_peft": True, "lora_target_modules": ["q_proj", "embed_tokens"]},
        "1x2",
        ["lora_target_modules", "vLLM cannot serve an adapter on embed_tokens"],
    ),
    "an adapter on what the model does not have": (
        {**SERVER, "model_name_or_path": "./smollm2", "use_peft": True, "lora_target_modules": ["c_attn"]},
        "1x2",
        ["lora_target_modules = ['c_attn']", "no projection of a llama model", "q_proj, k_proj"],
    ),
    "modules beside the adapter": (
        {**SERVER, **MODEL, "use_peft": True, "lora_modules_to_save": ["norm"]},
        "1x2",
        ["lora_modules_to_save = ['norm']", "whole modules beside the adapter"],
    ),
    "an adapter on parameters": (
        {**SERVER, **MODEL, "use_peft": True, "lora_target_parameters": ["experts.up"]},
        "1x2",
        ["lora_target_parameters", "vLLM cannot serve an adapter on single parameters"],
    ),
    "DoRA": (
        {**SERVER, **MODEL, "use_peft": True, "use_dora": True},
        "1x2",
        ["use_dora = True", "vLLM cannot serve DoRA"],
    ),
    "deadlines of nothing": (
        {"server_silence_timeout": 0, "generation_timeout": -1, "publish_timeout": 0},
        "1x0",
        [
            "3 faults",
            "server_silence_timeout = 0",
            "30 seconds is the default",
            "generation_timeout",
            "publish_timeout",
        ],
    ),
    "fewer restarts than none": ({"max_restarts": -1}, "1x0", ["max_restarts = -1", "0 never starts them again"]),
    "a probe that nothing passes": ({"probe_tolerance": 0}, "1x0", ["probe_tolerance = 0", "must be positive"]),
    "vLLM inside a trainer without a GPU": ({"use_vllm": True}, "1x0", ["use_vllm", "needs a GPU", "use_vllm: false"]),
    "server GPUs that no nodes add up to": (
        {**SERVER, **MODEL, "server_gpus": 5},
        "4x8",
        ["server_gpus = 5", "5 / 8 = 0.625", "each of 4 nodes (5 / 4 = 1.25)", "use 4 or 8"],
    ),
    "server GPUs that tensor parallelism does not divide on each node": (
        {**SERVER, **MODEL, "server_gpus": 12, "vllm_tensor_parallel_size": 4},
        "4x8",
        ["server_gpus = 12", "12 / 8 = 1.5", "12 / 4 = 3, in groups of 4", "use 8 or 16"],
    ),
    "server GPUs on all nodes": (
        {**SERVER, **MODEL, "server_gpus": 16},
        "2x8",
        ["server_gpus = 16", "2 nodes x 8 GPUs = 16", "nothing is left for the trainer", "use 14"],
    ),
    "one GPU shared by several nodes": (
        {**SERVER, **MODEL, "server_gpus": 0},
        "2x8",
        ["server_gpus = 0", "on one node only, and 2 are here", "use 2"],
    ),
    "a server across nodes": (
        {**SERVER, **MODEL, "vllm_tensor_parallel_size": 16},
        "2x8",
        ["vllm_tensor_parallel_size = 16", "a server lies on one node", "use 1 or 2 or 4 or 8"],
    ),
    "trainer GPUs that nodes do not share evenly": (
        {**SERVER, **MODEL, "server_gpus": 8, "trainer_gpus": 11},
        "4x8",
        ["trainer_gpus = 11", "there are 8 GPUs on each of 3 nodes", "use 10 or 12", "all 24"],
    ),
    "more GPUs than the nodes have": (
        {**SERVER, **MODEL, "server_gpus": 8, "trainer_gpus": 26},
        "4x8",
        ["trainer_gpus = 26", "server 8 + trainer 26 = 34 GPUs, 32 here", "use 24"],
    ),
    "processes on the CPU where there are GPUs": (
        {"cpu_processes": 2},
        "1x2",
        ["cpu_processes = 2", "the trainer runs on GPUs", "trainer_gpus: 0"],
    ),
    "no process on the CPU": ({"cpu_processes": 0}, "1x0", ["cpu_processes = 0", "at least 1"]),
    "trainer GPUs without a GPU": ({"trainer_gpus": 2}, "1x0", ["trainer_gpus = 2", "= 2 GPUs, 0 here"]),
    "waiting shorter than another may take": (
        {**SERVER, **MODEL, "server_gpus": 1, "ddp_timeout": 1000},
        "1x3",
        [
            "ddp_timeout = 1000",
            "generation_timeout 900 + publish_timeout 300 + grading 40 (16 answers x 2.5) = 1240 s",
            "leave it out",
        ],
    ),
    "overlap without a server": ({"max_staleness": 1}, "1x2", ["max_staleness = 1", "starts no policy server"]),
    "overlap inside of the trainer": (
        {"max_staleness": 1, "use_vllm": True, "vllm_mode": "colocate"},
        "1x2",
        ["max_staleness = 1", "starts no policy server", "vllm_mode: server"],
    ),
    "two windows ahead": ({**SERVER, **MODEL, "max_staleness": 2}, "1x2", ["max_staleness = 2", "must be 0 or 1"]),
    "overlap without a correction": (
        {**SERVER, **MODEL, "max_staleness": 1, "vllm_importance_sampling_correction": False},
        "1x2",
        ["max_staleness = 1", "what an older policy made", "correction: false, or max_staleness: 0"],
    ),
    "overlap with a server that sleeps": (
        {**SERVER, **MODEL, "max_staleness": 1, "vllm_enable_sleep_mode": True},
        "1x1",
        ["max_staleness = 1", "would sleep while the trainer works", "sleep_mode, or max_staleness: 0"],
    ),
    "server GPUs without a server": ({"server_gpus": 1}, "1x2", ["server_gpus = 1", "starts no policy server"]),
    "server address without a server": (
        {"vllm_server_base_url": "http://127.0.0.1:8000"},
        "1x1",
        ["vllm_server_base_url", "nothing would talk to it"],
    ),
    "longer than the model": (
        {**MODEL, "max_prompt_tokens": 300, "max_completion_length": 300},
        "1x0",
        ["max_completion_length = 300", "= 600 tokens, the model has 512 positions", "at most 212"],
    ),
    "4-bit without an adapter": ({"load_in_4bit": True}, "1x1", ["load_in_4bit = True", "add use_peft: true"]),
    "4-bit with ZeRO-3": (
        {"load_in_4bit": True, "use_peft": True, "accelerate_config": "zero3"},
        "1x2",
        ["load_in_4bit = True", "ZeRO-3 shards", "zero2 or ddp"],
    ),
    "4-bit and 8-bit": (
        {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True},
        "1x1",
        ["load_in_8bit = True", "keep one of the two"],
    ),
    "8-bit with a server": (
        {**SERVER, **MODEL, "load_in_8bit": True, "use_peft": True},
        "1x2",
        ["load_in_8bit = True", "cannot serve these 8-bit weights", "load_in_4bit: true"],
    ),
    "bf16 and fp16": ({"bf16": True, "fp16": True}, "1x1", ["fp16 = True", "bf16 is true as well"]),
    "temperature 0": ({"temperature": 0}, "1x0", ["temperature = 0", "completions that differ"]),
    "learning rate 0": ({"learning_rate": 0}, "1x0", ["learning_rate = 0", "must be positive"]),
    "batch of 0": ({"per_device_train_batch_size": 0}, "1x0", ["per_device_train_batch_size = 0", "at least 1"]),
    "no completion": ({"max_completion_length": 0}, "1x0", ["max_completion_length = 0", "at least 1 token"]),
    "negative count": ({"eval_count": -1}, "1x0", ["eval_count = -1", "at least 0"]),
    "evaluation by epoch": ({"eval_strategy": "epoch"}, "1x0", ["eval_strategy = 'epoch'", "use steps"]),
    "unknown accelerate config": (
        {"accelerate_config": "zero9"},
        "1x2",
        ["accelerate_config = 'zero9'", "one of: cpu, ddp, single_gpu, zero2, zero3, zero3_offload"],
    ),
    "CPU config with GPUs": (
        {"accelerate_config": "cpu"},
        "1x1",
        ["accelerate_config = 'cpu'", "hides the GPUs, and the trainer has 1 GPU", "trainer_gpus: 0"],
    ),
    "one-process config for several on the CPU": (
        {"accelerate_config": "cpu", "cpu_processes": 2},
        "1x0",
        ["accelerate_config = 'cpu'", "has 2 processes on CPUs", "ddp, zero2 or zero3, or cpu_processes: 1"],
    ),
    "accelerate config that is none": (
        {"accelerate_config": "recipe.yaml/x.yaml"},
        "1x0",
        ["accelerate_config = 'recipe.yaml/x.yaml'", "no such accelerate config"],
    ),
    "one-process config for four": (
        {"accelerate_config": "single_gpu"},
        "1x4",
        ["accelerate_config = 'single_gpu'", "has 4 GPUs", "ddp, zero2 or zero3"],
    ),
    "folder of another run": (
        {"output_dir": "./model"},
        "1x0",
        ["output_dir = './model'", "never writes over another"],
    ),
    "a key that nothing reads": (
        {"resume_from_checkpoint": "runs/x"},
        "1x0",
        ["resume_from_checkpoint = 'runs/x'", "no effect here", "--resume RUN"],
    ),
    "a split of a task that makes its own": (
        {"dataset_train_split": "test"},
        "1x0",
        ["dataset_train_split = 'test'", "arithmetic has its own split train"],
    ),
    "no step": ({"max_steps": 0}, "1x0", ["max_steps = 0", "-1 trains for num_train_epochs"]),
    "negative seed": ({"seed": -1}, "1x0", ["seed = -1", "cannot be negative"]),
    "weights of rewards that are not": ({"reward_weights": [1.0, 0.5]}, "1x0", ["reward_weights", "correctness"]),
    "data that is one file, with nothing to measure on": (
        {"task": "gsm8k", "dataset_name": "nogold/train.jsonl"},
        "1x0",
        ["dataset_name = 'nogold/train.jsonl'", "all of it is trained on", "set eval_dataset_name", "eval_count: 0"],
    ),
    "columns for a task that knows them": (
        {"task": "gsm8k", "question_column": "prompt"},
        "1x0",
        ["question_column = 'prompt'", "task gsm8k knows its columns", "task math or dataset"],
    ),
    "levels of a task without": ({"task": "gsm8k", "levels": [3]}, "1x0", ["levels = [3]", "has no levels"]),
    "levels of data without": (
        {"task": "math", "dataset_name": "badshape", "levels": [3], "answer_column": "problem", "eval_count": 0},
        "1x0",
        ["badshape/train.jsonl, line 1", "levels = [3] needs a column level", "leave levels out"],
    ),
    "no level": ({"task": "math", "levels": []}, "1x0", ["levels = []", "no level is left"]),
    "levels that are words": ({"task": "math", "levels": ["hard"]}, "1x0", ["levels = ['hard']", "list of int"]),
    "any dataset without a name": ({"task": "dataset"}, "1x0", ["dataset_name", "task dataset has none of its own"]),
    "a column that is not there": (
        {"task": "dataset", "dataset_name": "badshape", "eval_count": 0},
        "1x0",
        ["badshape/train.jsonl, line 1", "no question", "there are ['problem']", "question_column"],
    ),
    "GSM8K read as any dataset": (
        {"task": "dataset", "dataset_name": "sums", "eval_count": 0},
        "1x0",
        ["sums/train.jsonl, line 1", "GSM8K's form", "task gsm8k reads"],
    ),
    "trained on what is measured": (
        {"task": "gsm8k", "dataset_name": "sums", "dataset_test_split": "train"},
        "1x0",
        ["dataset_test_split = 'train'", "is what is trained on: sums, split train", "eval_dataset_name"],
    ),
    "trained on what is measured, by another path": (
        {"task": "gsm8k", "dataset_name": "sums", "eval_dataset_name": "./sums/train.jsonl"},
        "1x0",
        ["eval_dataset_name = './sums/train.jsonl'", "is what is trained on"],
    ),
    "trained on the hub's test split": (
        {"task": "gsm8k", "dataset_train_split": "test"},
        "1x0",
        ["dataset_test_split = 'test'", "is what is trained on: openai/gsm8k, split test"],
    ),
    "measured folder absent": (
        {"task": "gsm8k", "eval_dataset_name": "./nowhere"},
        "1x0",
        ["eval_dataset_name = './nowhere'", "no such file or folder"],
    ),
    "no test split to measure on": (
        {"task": "gsm8k", "dataset_name": "sums"},
        "1x0",
        ["sums: has no test.jsonl", "it holds train.jsonl", "dataset_test_split"],
    ),
    "data to measure on for a task that makes its own": (
        {"task": "gsm8k", "eval_task": "arithmetic", "eval_dataset_name": "openai/gsm8k"},
        "1x0",
        ["eval_dataset_name = 'openai/gsm8k'", "eval_task is arithmetic"],
    ),
    "nothing to measure on": (
        {"eval_task": "dataset"},
        "1x0",
        ["eval_dataset_name: is missing", "eval_count: 0 to measure nothing"],
    ),
    "negative n-gram": ({"decontaminate_ngram": -1}, "1x0", ["decontaminate_ngram = -1", "0 leaves nothing out"]),
    "kept apart by nothing": (
        {"decontaminate_ngram": 0, "decontaminate_against": ["openai/gsm8k"]},
        "1x0",
        ["decontaminate_against = ['openai/gsm8k']", "compares nothing", "set it to 13"],
    ),
    "kept apart from nothing": (
        {"decontaminate_against": ["./nowhere:train"]},
        "1x0",
        ["decontaminate_against = './nowhere'", "no such file or folder"],
    ),
    "a mixture of nothing": ({"task": "gsm8k", "mixture": []}, "1x0", ["mixture = []", "holds no dataset"]),
    "a mixture beside a task": (
        {"task": "math", "mixture": [{"task": "arithmetic"}]},
        "1x0",
        ["task = 'math'", "the mixture says what is trained on", "write task into the entries"],
    ),
    "a mixture beside a dataset": (
        {"task": "gsm8k", "dataset_name": "sums", "mixture": [{"task": "arithmetic"}]},
        "1x0",
        ["dataset_name = 'sums'", "the mixture says", "write dataset_name into the entries"],
    ),
    "a mixture beside a split": (
        {"task": "gsm8k", "dataset_train_split": "train", "mixture": [{"task": "arithmetic"}]},
        "1x0",
        ["dataset_train_split = 'train'", "write split into the entries"],
    ),
    "a mixture with a misspelt key": (
        {"task": "gsm8k", "mixture": [{"task": "arithmetic"}, {"task": "gsm8k", "wieght": 2}]},
        "1x0",
        ["mixture, entry 2: wieght = 2", "did you mean weight?"],
    ),
    "a mixture with a weight of nothing": (
        {"task": "gsm8k", "mixture": [{"task": "arithmetic", "weight": 0}]},
        "1x0",
        ["mixture, entry 1: weight = 0", "must be positive"],
    ),
    "a mixture with a weight that is no number": (
        {"task": "gsm8k", "mixture": [{"task": "arithmetic", "weight": "much"}]},
        "1x0",
        ["mixture, entry 1: weight = 'much'", "expects float"],
    ),
    "a mixture without a task": (
        {"task": "gsm8k", "mixture": [{"dataset_name": "sums"}]},
        "1x0",
        ["mixture, entry 1: task", "is missing", "one of: arithmetic, gsm8k, math, dataset"],
    ),
    "a mixture with an unknown task": (
        {"task": "gsm8k", "mixture": [{"task": "maths"}]},
        "1x0",
        ["mixture, entry 1: task = 'maths'", "did you mean math?"],
    ),
    "a mixture with a folder that is absent": (
        {"task": "gsm8k", "mixture": [{"task": "gsm8k", "dataset_name": "./nowhere"}]},
        "1x0",
        ["mixture, entry 1: dataset_name = './nowhere'", "no such file or folder"],
    ),
    "a mixture with a dataset that has no name": (
        {"task": "gsm8k", "mixture": [{"task": "dataset", "answer_column": "a"}]},
        "1x0",
        ["mixture, entry 1: dataset_name", "task dataset has none of its own"],
    ),
    "a mixture with a file, with nothing to measure on": (
        {"task": "gsm8k", "mixture": [{"task": "gsm8k", "dataset_name": "sums/train.jsonl"}]},
        "1x0",
        ["mixture = 'sums/train.jsonl'", "all of it is trained on"],
    ),
    "a mixture of names": ({"task": "gsm8k", "mixture": ["gsm8k"]}, "1x0", ["mixture = ['gsm8k']", "list of dict"]),
    "a mixture measured on data of an unknown kind": (
        {"task": "gsm8k", "mixture": [{"task": "arithmetic"}], "eval_dataset_name": "sums"},
        "1x0",
        ["eval_dataset_name = 'sums'", "leaves open how it is read", "set eval_task"],
    ),
    "open-r1's mixture": ({"dataset_mixture": {"datasets": []}}, "1x0", ["dataset_mixture", "no longer", "in mixture"]),
    "a run folder for its model": ({"model_name_or_path": "oldrun"}, "1x0", ["'oldrun'", "did you mean oldrun/model?"]),
    "what others call it": ({"lr": 1e-5}, "1x0", ["lr = 1e-05", "did you mean learning_rate?"]),
    "misspelt choice": ({"lr_scheduler_type": "cosin"}, "1x0", ["lr_scheduler_type = 'cosin'", "did you mean cosine?"]),
    "alarms in one word": (
        {"stop_on": ["nan,clipped"]},
        "1x0",
        ["stop_on = 'nan,clipped'", "several are words of their own: --stop_on nan clipped; one of"],
    ),
    "a run that is not there for a model": (
        {"model_name_or_path": "runs/cold"},
        "1x0",
        ["model_name_or_path = 'runs/cold'", "no such model folder"],
    ),
    "timeout of nothing": ({"server_ready_timeout": 0}, "1x0", ["server_ready_timeout = 0", "must be positive"]),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model of 512 positions, one of SmolLM2's shape, two broken datasets, and sums, which can
    be trained on."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 512}')
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / "oldrun" / "model").mkdir(parents=True)
    (tmp_path / "oldrun" / "model" / "config.json").write_text("{}")
    datasets = {
        "nogold": '{"question": "1+1?", "answer": "2"}',
        "badshape": '{"problem": "1+1?"}',
        "sums": '{"question": "1+1?", "answer": "#### 2"}',
    }
    for name, row in datasets.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(row + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe_is_refused_with_its_own_message(name: str, place: Path, run) -> None:
    keys, hardware, words = BAD[name]
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**GOOD, **keys}))
    before = listing(place)
    answer = run(recipe, "--dry-run", "--hardware", hardware)
    assert answer.code == 2, answer.out
    for word in words:
        assert word in answer.err
    assert listing(place) == before


def test_no_two_bad_recipes_share_a_message() -> None:
    messages = [tuple(words) for _, _, words in BAD.values()]
    assert len(set(messages)) == len(messages) >= 25


def test_the_good_recipe_under_them_all_is_accepted(place: Path, run) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    before = listing(place)
    answer = run("recipe.yaml", "--dry-run", "--hardware", "1x0")
    assert (answer.code, answer.err) == (0, "")
    assert listing(place) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: grpo\nmethod: sft\n", ["key 'method' is given twice"]),
        ("- a\n- b\n", ["holds a list", "key: value"]),
        ("method: [grpo\n", ["not valid YAML"]),
        ("!!python/object/apply:os.system ['touch hacked']\n", ["not valid YAML"]),
    ],
    ids=["key twice", "a list", "broken", "code"],
)
def test_a_file_that_is_no_recipe(text: str, words: list[str], place: Path, run) -> None:
    (place / "recipe.yaml").write_text(text)
    answer = run("recipe.yaml", "--dry-run")
    assert answer.code == 2
    for word in words:
        assert word in answer.err
    assert not (place / "hacked").exists()


def test_a_folder_names_the_recipes_in_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    answer = run("recipes/tiny", "--dry-run")
    assert answer.code == 2
    assert "give one of recipes/tiny/arithmetic_grpo.yaml" in answer.err


def test_a_recipe_that_is_not_there_names_the_nearest(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    answer = run("recipes/tiny/aritmetic_grpo.yaml", "--dry-run")
    assert answer.code == 2
    assert "did you mean recipes/tiny/arithmetic_grpo.yaml?" in answer.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--num_generation", "4"], ["num_generation = '4'", "did you mean num_generations?"]),
        (["--max_steps"], ["max_steps", "has no value"]),
        (["--max_steps", "1", "2"], ["max_steps = '1 2'", "takes one value"]),
        (["--max_steps", "many"], ["max_steps = 'many'", "expects"]),
        (["stray"], ["stray", "neither the recipe nor a --key"]),
        (["max_steps=3"], ["max_steps=3", "did you mean --max_steps 3?"]),
        (["--dry_run"], ["dry_run", "did you mean --dry-run"]),
        (["--hardware", "two"], ["--hardware two", "NODESxGPUS"]),
    ],
    ids=["misspelt", "no value", "two values", "wrong type", "stray word", "no hyphens", "underscore", "hardware"],
)
def test_bad_overrides(overrides: list[str], words: list[str], place: Path, run) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    answer = run("recipe.yaml", "--dry-run", *overrides)
    assert answer.code == 2
    for word in words:
        assert word in answer.err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"report_to": "clearml"}, ["report_to = 'clearml'", "package clearml", "pip install clearml"]),
        (
            {"load_in_8bit": True, "use_peft": True},
            ["load_in_8bit = True", "package bitsandbytes", "pip install -e '.[gpu]'"],
        ),
    ],
    ids=["tracker", "quantization"],
)
def test_a_package_that_is_missing_here_is_named(
    keys: dict[str, object], words: list[str], place: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (place / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, **keys}))
    answer = run("recipe.yaml", "--dry-run")
    assert answer.code == 2
    for word in words:
        assert word in answer.err


def test_a_place_that_cannot_be_written_is_named_before_anything_starts(place: Path, run) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, "runs_dir": "recipe.yaml/runs"}))
    answer = run("recipe.yaml")
    assert answer.code == 2
    assert "recipe.yaml/runs" in answer.err
    assert "--runs_dir FOLDER" in answer.err


def test_all_faults_are_listed_at_once(place: Path, run) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, "max_stepz": 1, "learning_rate": "fast"}))
    answer = run("recipe.yaml", "--dry-run")
    assert "2 faults, nothing was started" in answer.err
    assert "max_stepz" in answer.err
    assert "learning_rate" in answer.err


def test_a_dry_run_says_whether_memory_was_looked_at(place: Path, run) -> None:
    for model, seen in (("./smollm2", "plan, data"), ("nobody/no-such-model", "plan (not memory), data")):
        lengths = {"max_prompt_tokens": 64, "max_completion_length": 40}
        (place / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, **SERVER, **lengths, "model_name_or_path": model}))
        answer = run("recipe.yaml", "--dry-run", "--hardware", "1x1:80")
        assert answer.code == 0 and f"Checked: recipe, {seen}" in answer.out


def test_assumed_hardware_is_for_dry_runs_only(place: Path, run) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    before = listing(place)
    answer = run("recipe.yaml", "--hardware", "1x0")
    assert answer.code == 2
    assert "--dry-run" in answer.err
    assert listing(place) == before


def test_a_model_that_the_hub_does_not_have_is_refused_before_anything_starts(place: Path) -> None:
    """In a process of its own: the hub library reads HF_HUB_OFFLINE once, at import."""
    (place / "recipe.yaml").write_text(yaml.safe_dump({**GOOD, "model_name_or_path": "nobody/no-such-model"}))
    before = listing(place)
    done = subprocess.run(
        [sys.executable, PROJECT / "launch/run.py", "recipe.yaml"],
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    answer = SimpleNamespace(code=done.returncode, err=done.stderr)
    assert answer.code == 2
    assert "nobody/no-such-model" in answer.err
    assert "cannot be had" in answer.err
    assert listing(place) == before
