"""The places where TRL is wrapped or called by a private name: each fails here when TRL moves it."""

import inspect

from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration


def parameters(method: object) -> list[str]:
    assert callable(method)
    return list(inspect.signature(method).parameters)


def test_the_methods_of_the_trainer_that_are_wrapped_or_called() -> None:
    single_turn = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"]
    assert parameters(GRPOTrainer._generate_single_turn) == single_turn
    rewards = ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters(GRPOTrainer._calculate_rewards) == rewards
    assert parameters(GRPOTrainer._tokenize_prompts) == ["self", "prompts"]


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
