"""What runs inside of `vllm serve`, and the names that both sides know it by.

The trainer and the launcher import this module alone; the others import vLLM or run in its processes.

Attributes:
    TOKEN: the environment variable that holds the run's token, in the server's process and in its clients'.
    PUBLISH_FOLDER: the environment variable that names the folder in which the trainer lays down adapters and weights
        for the server. The server reads nothing from anywhere else.
    MEMORY_FOLDER: Linux's file system in memory, where that folder is made if there is room.
    VERSION_HEADER: the HTTP header that says a policy version, in a publishing request and in an answer of completions.
    POLICY_ROUTE: GET answers {"version": int or null, "updating": bool, "in_flight": int}.
    SHARED_MEMORY: the name of our weight transfer engine that takes all weights.
    FOLDED: the name of the one that takes an adapter and adds it to the server's own weights.
    CLEAN_COPY: the environment variable that says where that one keeps its clean copy of the base: "gpu" or "host".
"""

from pathlib import Path

TOKEN = "R1ZERO_SERVER_TOKEN"
PUBLISH_FOLDER = "R1ZERO_PUBLISH_FOLDER"
MEMORY_FOLDER = Path("/dev/shm")
VERSION_HEADER = "X-Policy-Version"
POLICY_ROUTE = "/policy"
SHARED_MEMORY = "r1zero_shared_memory"
FOLDED = "r1zero_folded"
CLEAN_COPY = "R1ZERO_CLEAN_COPY"
