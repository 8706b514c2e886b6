"""Keys that older recipes carry and that the pinned TRL and transformers do not know, each with what replaces it.

A public recipe from 2025 does not run unchanged on TRL 1.x. Where TRL's parser answers only that an argument is
unrecognized, a recipe with one of these keys is answered with the sentence beside it. The keys are those that TRL 0.12
to 1.14, transformers 4.40 to 5.0 and open-r1 declared; a test keeps every key that still exists out of here.
"""

_WANDB = "wandb reads its own environment variables: set {}"
_MIXTURE = "set task and dataset_name for one dataset, or list several, with their weights, in mixture"
_COSINE = "there is no cosine reward here; name another in reward_funcs, or module:function of your own"
_CODE = "code execution is not a task here; leave the key out, or name one of our tasks in task"
_TPU = "TPUs are not supported; leave the key out"
_FSDP = "FSDP is not supported: use accelerate_config: zero3"
_ACCELERATE = "it belongs to accelerate: leave it out, trainer_gpus says how many processes train"

REMOVED: dict[str, str] = {
    # --- TRL: GRPOConfig
    "max_prompt_length": "TRL 1.x no longer truncates prompts; set max_prompt_tokens, which leaves longer prompts out "
    "of the data and counts them",
    "vllm_device": "the policy server has GPUs of its own: set vllm_mode: server and, for more than one, server_gpus",
    "vllm_dtype": "generation follows the precision of the training; leave the key out",
    "vllm_max_model_len": "it is called vllm_max_model_length now",
    "vllm_enable_prefix_caching": "vLLM caches prefixes by default; leave the key out",
    "vllm_guided_decoding_regex": "it is called vllm_structured_outputs_regex now",
    "use_liger_loss": "it is called use_liger_kernel now",
    "wandb_log_unique_prompts": "it is called log_unique_prompts now",
    # --- TRL: SFTConfig
    "max_seq_length": "it is called max_length now, with method sft",
    "dataset_batch_size": "it has no effect any more; leave the key out",
    "num_of_sequences": "packing counts tokens, not sequences; set max_length, with method sft",
    "chars_per_token": "packing counts tokens, not characters; set max_length, with method sft",
    "use_liger": "it is called use_liger_kernel now",
    # --- TRL: ModelConfig and the scripts' own arguments
    "torch_dtype": "it is called dtype now",
    "gradient_checkpointing_use_reentrant": "write gradient_checkpointing_kwargs: {use_reentrant: false}",
    "model_code_revision": "one revision serves model and code; set model_revision",
    "use_flash_attention_2": "set attn_implementation: flash_attention_2",
    "tokenizer_name": "the tokenizer is the model's own; leave the key out",
    "tokenizer_name_or_path": "the tokenizer is the model's own; leave the key out",
    "config": "the recipe is the configuration: give its path as the first argument",
    "env": "set environment variables in the shell that starts the run",
    "datasets": _MIXTURE,
    "streaming": "it is called dataset_streaming now",
    "test_split_size": "set dataset_test_split, or eval_dataset_name; eval_count says how much of it is measured",
    "reward_model_name_or_path": "rewards are functions here, not models: name them in reward_funcs",
    # --- transformers: TrainingArguments
    "overwrite_output_dir": "every run gets a fresh run folder that is never overwritten; leave the key out",
    "evaluation_strategy": "it is called eval_strategy now",
    "per_gpu_train_batch_size": "it is called per_device_train_batch_size now",
    "per_gpu_eval_batch_size": "it is called per_device_eval_batch_size now",
    "warmup_ratio": "set warmup_steps: below 1 it is a share of all steps, so warmup_ratio: 0.1 is warmup_steps: 0.1",
    "logging_dir": "TensorBoard's folder is the environment variable TENSORBOARD_LOGGING_DIR; ours is the run folder",
    "save_safetensors": "weights are always saved as safetensors; leave the key out",
    "no_cuda": "set use_cpu: true, or trainer_gpus: 0",
    "use_mps_device": "an Apple GPU is used where there is one; leave the key out",
    "use_ipex": "the Intel extension is not supported any more; leave the key out",
    "jit_mode_eval": "evaluation is not traced any more; leave the key out, or set torch_compile",
    "fp16_opt_level": "Apex is not supported any more; set bf16 or fp16",
    "half_precision_backend": "Apex is not supported any more; set bf16 or fp16",
    "fp16_backend": "Apex is not supported any more; set bf16 or fp16",
    "torchdynamo": "it is called torch_compile_backend now",
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "past_index": "no model uses it any more; leave the key out",
    "fsdp_min_num_params": _FSDP,
    "fsdp_transformer_layer_cls_to_wrap": _FSDP,
    "adafactor": "set optim: adafactor",
    "group_by_length": "set train_sampling_strategy: group_by_length",
    "use_legacy_prediction_loop": "there is one evaluation loop now; leave the key out",
    "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
    "include_tokens_per_second": "set include_num_input_tokens_seen",
    "push_to_hub_model_id": "it is called hub_model_id now",
    "push_to_hub_organization": "write the organization into hub_model_id, as organization/name",
    "push_to_hub_token": "it is called hub_token now; better, set the environment variable HF_TOKEN",
    "mp_parameters": "SageMaker's model parallelism is not supported; leave the key out",
    "ray_scope": "there is no hyperparameter search here; leave the key out",
    "dispatch_batches": "write accelerator_config: {dispatch_batches: ...}",
    "split_batches": "write accelerator_config: {split_batches: ...}",
    "tp_size": "the trainer does not split layers; vllm_tensor_parallel_size splits the policy server's",
    # --- open-r1: its configs, and what its recipes carry for accelerate or Slurm
    "benchmarks": "measuring on benchmarks is not built yet; eval_count and eval_samples measure on the test split",
    "callbacks": "there are no callbacks to name; leave the key out",
    "chat_template": "prompt_template says how a question becomes the prompt; for method sft set chat_template_path",
    "system_prompt": "set prompt_template to a list of chat messages, the system's and the user's with {question}",
    "hub_model_revision": "it is called hub_revision now",
    "push_to_hub_revision": "set push_to_hub: true, and the branch in hub_revision",
    "overwrite_hub_revision": "pushing adds commits to hub_revision; name a fresh branch there instead",
    "wandb_entity": _WANDB.format("WANDB_ENTITY"),
    "wandb_project": _WANDB.format("WANDB_PROJECT"),
    "wandb_run_group": _WANDB.format("WANDB_RUN_GROUP"),
    "wandb_description": _WANDB.format("WANDB_NOTES"),
    "cosine_min_value_wrong": _COSINE,
    "cosine_max_value_wrong": _COSINE,
    "cosine_min_value_correct": _COSINE,
    "cosine_max_value_correct": _COSINE,
    "cosine_max_len": _COSINE,
    "repetition_n_grams": "it is called repetition_ngram now",
    "repetition_max_penalty": "name repetition in reward_funcs, and its weight, above 0, in reward_weights",
    "max_completion_len": "it shaped a length penalty; max_completion_length and overlong_cache_tokens do now",
    "soft_punish_cache": "it is called overlong_cache_tokens now",
    "code_language": _CODE,
    "code_eval_test_batch_size": _CODE,
    "code_eval_scoring_mode": _CODE,
    "parallel_code_exec_per_proc": _CODE,
    "code_provider": _CODE,
    "ioi_provider": _CODE,
    "e2b_router_url": _CODE,
    "morph_router_url": _CODE,
    "dataset_prompt_column": "it is called question_column here",
    "dataset_mixture": _MIXTURE,
    "dataset_mixer": _MIXTURE,
    "dataset_splits": "set dataset_train_split and dataset_test_split; in an entry of mixture, split",
    "dataset_configs": "set dataset_config, or in an entry of mixture dataset_config",
    "dataset_train_config": "it is called dataset_config now",
    "num_train_samples": "set max_steps to train for less than the whole dataset",
    "preprocessing_num_workers": "it is called dataset_num_proc now, with method sft",
    "num_processes": _ACCELERATE,
    "num_machines": _ACCELERATE,
}
