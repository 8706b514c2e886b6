"""The places where TRL is wrapped or called by a private name: each fails here when TRL moves it."""

import inspect

from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import add_fused_lm_head

from r1zero.training.correction import CorrectedWhileLearning
from r1zero.training.packing import PackedPasses
from r1zero.training.trainer import PolicyTrainer


def parameters(method: object) -> list[str]:
    assert callable(method)
    return list(inspect.signature(method).parameters)


def test_the_methods_of_the_trainer_that_are_wrapped_or_called() -> None:
    single_turn = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"]
    assert parameters(GRPOTrainer._generate_single_turn) == single_turn
    rewards = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters(GRPOTrainer._calculate_rewards) == rewards
    assert parameters(GRPOTrainer._tokenize_prompts) == ["self", "prompts"]


def test_what_packing_takes_from_the_trainers() -> None:
    asked = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[: len(asked)] == asked
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert parameters(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]
    step = ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters(GRPOTrainer.training_step) == parameters(Trainer.training_step) == step
    # It lies between TRL's, which counts and measures, and transformers', which goes through the model.
    order = PolicyTrainer.__mro__
    assert order.index(GRPOTrainer) < order.index(PackedPasses) == order.index(Trainer) - 1
    assert "output = super().training_step(model, inputs, num_items_in_batch)" in inspect.getsource(
        GRPOTrainer.training_step
    )
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    assert "batch_size" not in loss  # how the loss is told from scoring
    scoring = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert scoring.count("self._get_per_token_logps_and_entropies(") == scoring.count("batch_size=batch_size,")
    assert {"shift_labels", "fused_lm_head"} <= set(inspect.getsource(add_fused_lm_head).replace("=", " ").split())


def test_what_correcting_while_learning_takes_from_the_trainers() -> None:
    scoring, loss = (
        inspect.getsource(each) for each in (GRPOTrainer._generate_and_score_completions, GRPOTrainer._compute_loss)
    )
    # Without the correction nothing is scored where a window is one step, and the sampler's values are handed on.
    assert "self.args.gradient_accumulation_steps % generate_every != 0 or (" in scoring
    assert "if sampling_per_token_logps is not None:\n            output[" in scoring
    # The loss looks for the ratio after it has asked for log-probabilities.
    asked, used = (loss.index(each) for each in ("_get_per_token_logps_and_entropies(", "importance_sampling_ratio"))
    assert asked < used
    order = PolicyTrainer.__mro__
    assert order.index(CorrectedWhileLearning) < order.index(GRPOTrainer)


def test_what_resuming_takes_from_the_trainers() -> None:
    assert parameters(GRPOTrainer._get_train_sampler) == ["self", "dataset"]
    assert (
        parameters(Trainer._save_checkpoint) == parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    )
    assert parameters(Trainer._get_output_dir) == ["self", "trial"]
    assert {"train_dataloader", "epoch"} <= set(parameters(Trainer._run_epoch))
    loop, save = inspect.getsource(Trainer._inner_training_loop), inspect.getsource(Trainer._save_checkpoint)
    assert "self._run_epoch(\n                model=model," in loop  # by name
    before, after = loop.split("self.callback_handler.on_train_begin(")
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        assert f"self.{name} =" in before and f"self.{name} =" not in after, name
    assert "run_dir = self._get_output_dir(trial=trial)" in save
    assert 'checkpoint_folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in save
    source = inspect.getsource(GRPOTrainer)
    for name in ("_step = 0", "_buffered_inputs = None", "_total_train_tokens = 0"):
        assert f"self.{name}" in source, name
    window = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in window
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in window


def test_the_methods_of_vllm_generation_that_are_wrapped_or_called() -> None:
    assert parameters(VLLMGeneration.generate) == ["self", "prompts", "images", "num_generations", "profiler"]
    assert parameters(VLLMGeneration.sync_weights) == ["self"]
    assert {"temperature", "logprobs", "generation_kwargs"} <= set(parameters(VLLMGeneration.__init__))


def test_sampling_parameters_of_ours_reach_a_server_and_an_engine_alike() -> None:
    assert "sampling_params.update(generation_kwargs" in inspect.getsource(VLLMClient.generate)
    engine = inspect.getsource(VLLMGeneration.generate)
    assert "generation_kwargs.update(self.generation_kwargs)" in engine
    assert '"generation_kwargs": self.generation_kwargs' in engine


def test_the_attributes_of_the_trainer_that_are_read() -> None:
    source = inspect.getsource(GRPOTrainer)
    names = ("_last_loaded_step", "eos_token_ids", "reward_weights", "generation_config", "reward_func_names")
    for name in (*names, "_metrics", "chat_template_kwargs"):
        assert f"self.{name} =" in source or f"self.{name}:" in source, name
    for name in ("clipped_ratio", "mean_terminated_length", "min_terminated_length", "max_terminated_length"):
        assert f'self._metrics[mode]["completions/{name}"].append(' in source, name
    assert "self._tokenizer" in source
    assert "self.vllm_generation = VLLMGeneration(" in source
