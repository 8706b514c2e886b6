"""The embedded model through its own door: `ensure`, and what transformers loads from the folder it names.

The model itself comes from the user's cache and is made there by the first run; builds that are compared are short.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1zero import tiny
from r1zero.tasks import arithmetic
from r1zero.tasks.prompts import R1RL_SYSTEM

SHORT = tiny.Pretraining(hidden_size=32, steps=3, batch_size=4)


@pytest.fixture(scope="session")
def folder() -> Path:
    return tiny.ensure()


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_any_text_of_its_characters_comes_back_from_the_tokenizer(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices([*tiny.CHARACTERS, *tiny.TAGS, R1RL_SYSTEM], k=rng.randrange(60)))
        assert decode(tokenizer, tokenizer(text)["input_ids"]) == text


def test_a_prompt_comes_back_and_its_system_text_is_one_token(tokenizer: Any) -> None:
    prompt = tiny.PROMPT.build("What is 47 + 38?")
    ids = tokenizer(prompt)["input_ids"]
    assert decode(tokenizer, ids) == prompt
    assert decode(tokenizer, ids[:1]) == R1RL_SYSTEM
    assert len(ids) == 1 + len("\nQuestion: What is 47 + 38?\n") + 1


@pytest.mark.parametrize("tag", tiny.TAGS)
def test_a_tag_is_one_token_that_survives_decoding(tokenizer: Any, tag: str) -> None:
    ids = tokenizer(f"a {tag}b")["input_ids"]
    assert len(ids) == 4
    assert decode(tokenizer, ids) == f"a {tag}b"


def test_padding_and_the_end_are_two_tokens_that_do_not_survive_decoding(tokenizer: Any, model: Any) -> None:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert pad != eos
    assert decode(tokenizer, [pad, *tokenizer("42")["input_ids"], eos]) == "42"
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (pad, eos)


def test_a_worked_solution_with_its_end_fits_into_forty_tokens(tokenizer: Any) -> None:
    longest = max(len(tokenizer(p.solution + tiny.EOS)["input_ids"]) for p in arithmetic.load("train"))
    assert longest <= 40


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_base_model_is_right_often_enough_to_learn_and_seldom_enough_to_need_to(
    tokenizer: Any, model: Any, split: str
) -> None:
    problems = arithmetic.load(split)[:400]
    prompts = tokenizer([tiny.PROMPT.build(p.question) for p in problems], return_tensors="pt")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ids = model.generate(**prompts, max_new_tokens=40, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    right = 0
    for problem, completion in zip(problems, ids[:, prompts["input_ids"].shape[1] :], strict=True):
        match = re.search(r"<answer>(.*?)</answer>", decode(tokenizer, completion.tolist()), re.DOTALL)
        right += match is not None and match[1].strip() == problem.gold
    assert 0.20 <= right / len(problems) <= 0.45


def test_the_second_call_finds_what_the_first_one_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path))
    steps: list[int] = []
    made = tiny.ensure(SHORT, progress=lambda done, total, loss: steps.append(done))
    assert steps == [1, 2, 3]
    assert made.parent == tmp_path
    assert tiny.ensure(SHORT, progress=lambda done, total, loss: pytest.fail("made again")) == made


def test_two_who_ask_at_once_get_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path))
    steps: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(tiny.ensure, SHORT, lambda done, total, loss: steps.append(done)) for _ in range(2)]
        folders = {a.result() for a in asked}
    assert len(folders) == 1
    assert steps == [1, 2, 3]


def test_an_interrupted_build_leaves_no_model_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path))

    def interrupt(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.ensure(SHORT, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (tiny.ensure(SHORT) / "model.safetensors").is_file()


def test_the_same_constants_give_the_same_bits_and_other_ones_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    for name in ("one", "two"):
        monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path / name))
        built.append(tiny.ensure(SHORT))
        torch.rand(7)  # what the caller does with its own random numbers changes nothing
    assert built[0].name == built[1].name
    first, second = ((path / "model.safetensors").read_bytes() for path in built)
    assert first == second
    other = tiny.ensure(tiny.Pretraining(hidden_size=32, steps=3, batch_size=4, seed=1))
    assert other.name != built[0].name
    assert (other / "model.safetensors").read_bytes() != first


def test_making_it_leaves_the_callers_random_numbers_and_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path))
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    tiny.ensure(SHORT)
    assert torch.equal(state, torch.random.get_rng_state())
    assert threads == torch.get_num_threads()
