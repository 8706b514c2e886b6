"""``python -m r1zero.preflight``: the checks that need a tokenizer or a server, as a process of its own.

The launcher stays without torch, and a tokenizer that comes with code of its own runs where it can do no harm.
"""

import argparse
import sys
from pathlib import Path

from r1zero import recipe as recipes
from r1zero.policy_client import PolicyServerError
from r1zero.preflight import prompts, rollouts
from r1zero.preflight.findings import has_fault
from r1zero.recipe import RecipeError
from r1zero.tasks import selection
from r1zero.tasks.problem import DatasetError


def main(words: list[str] | None = None) -> int:
    """Run the command line: 0 where training can start, 2 where it cannot."""
    parser = argparse.ArgumentParser(prog="python -m r1zero.preflight", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE")
    parser.add_argument("--server", metavar="URL", help="a policy server: one batch of rollouts is looked at")
    arguments, overrides = parser.parse_known_args(words)
    try:
        recipe = recipes.load(arguments.config, overrides)
        problems = selection.of(recipe).train
        findings = (
            rollouts.look(recipe, problems, arguments.server) if arguments.server else prompts.look(recipe, problems)
        )
    except (RecipeError, DatasetError, PolicyServerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for finding in findings:
        sys.stdout.write(finding.line() + "\n")
    return 2 if has_fault(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
