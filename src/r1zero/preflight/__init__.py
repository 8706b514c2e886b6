"""What is looked at before training: golds, prompts, and, with a server up, one batch of rollouts.

Each check is a function that returns findings. A fault stops the run; a warning says in plain words what will go wrong
and names the key that mends it.
"""
