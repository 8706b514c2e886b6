"""launch/grpo.py with completions that depend on the prompt and on nothing else, where a test compares ways to train.

What is drawn depends on how the prompts are shared among processes. Here each prompt has the same completions however
they are: the first half of each group answers rightly, the others wrongly and each at another length.
"""

import sys
from pathlib import Path
from typing import Any

from r1zero.training import main
from r1zero.training.trainer import PolicyTrainer


def completions(self: Any, prompt_ids: list[list[int]], group: int) -> tuple[list[list[int]], None]:
    made = []
    for place in range(len(prompt_ids)):
        number = place % group
        answer = "7" if number < group // 2 else str(number * 11 % 97)
        thought = " ".join(str(prompt_ids[place][-2 - each]) for each in range(number))
        text = f"{thought}\n</reasoning>\n<answer>\n{answer}\n</answer>"
        made.append([*self.processing_class(text, add_special_tokens=False)["input_ids"], self.eos_token_ids[0]])
    return made, None


if __name__ == "__main__":
    PolicyTrainer._generate_here = completions
    sys.exit(main.main("grpo", Path(__file__).parents[2]))
