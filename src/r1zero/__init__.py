"""r1zero: train a reasoning model with reinforcement learning, R1-Zero style, with one recipe and one command."""

__version__ = "0.1.0"
