"""A policy server in a hundred lines of torch, for runs that are compared bit by bit: no vLLM, one request at a time.

python tests/stand_ins/sampling_server.py --log calls.jsonl serve MODEL --port 8000

It takes weights through shared memory and adapters by their files, as our servers do, and what it draws depends on
weights, prompt and seed alone. A call is a line of the log once it is done: path, version, the times when it came and
was done, and how many completions were under way as it came; for completions prompt, n and seed. Two files beside the
log make it worse: `delay`, seconds that each prompt takes longer, and `lag`: it says the version before its own.
"""

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1zero.serving import POLICY_ROUTE, PUBLISH_FOLDER, TOKEN, VERSION_HEADER


class Policy:
    """The weights, and what is drawn from them.

    Attributes:
        version: of all weights; None before the first came.
    """

    def __init__(self, folder: str) -> None:
        self.version: int | None = None
        self.adapters: dict[str, Any] = {}
        self._folder = folder
        self._model = self._base()
        self._end = AutoTokenizer.from_pretrained(folder).eos_token_id

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()

    def update(self, files: list[str]) -> None:
        for name in files:
            weights = load_file(Path(os.environ[PUBLISH_FOLDER]) / name)
            assert not self._model.load_state_dict(weights, strict=False).unexpected_keys

    def load(self, name: str, path: str) -> None:
        self.adapters[name] = PeftModel.from_pretrained(self._base(), path).eval()

    def model(self, name: str | None) -> Any:
        return self.adapters.get(name, self._model)

    @torch.no_grad()
    def prompt_logprobs(self, name: str | None, ids: list[int]) -> list[float]:
        logprobs = torch.log_softmax(self.model(name)(torch.tensor([ids])).logits[0, :-1], -1)
        return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    @torch.no_grad()
    def completion(self, request: dict[str, Any], number: int) -> dict[str, Any]:
        generator = torch.Generator()
        generator.manual_seed(request["seed"] + number) if "seed" in request else generator.seed()
        model, ids, logprobs = self.model(request.get("model")), [], []
        while len(ids) < request["max_tokens"] and ids[-1:] != [self._end]:
            logits = model(torch.tensor([request["prompt"] + ids])).logits[0, -1]
            told = torch.log_softmax(logits / (request["temperature"] or 1e-6), -1)
            ids.append(int(torch.multinomial(told.exp(), 1, generator=generator)))
            logprobs.append(float(told[ids[-1]]))
        return {
            **{"index": number, "text": "", "token_ids": ids},
            "logprobs": {"tokens": [f"token_id:{each}" for each in ids], "token_logprobs": logprobs},
            "finish_reason": "stop" if ids[-1] == self._end else "length",
        }


class Handler(BaseHTTPRequestHandler):
    policy: Policy
    log: Path
    alone, counting = threading.Lock(), threading.Lock()
    under_way = 0

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == POLICY_ROUTE:
            self._answer({"version": self.policy.version, "updating": False, "in_flight": type(self).under_way})
        else:
            self._answer({"data": [{"id": each} for each in ("base", *self.policy.adapters)]})

    def do_POST(self) -> None:
        came, length = time.time(), int(self.headers["Content-Length"] or 0)
        request = json.loads(self.rfile.read(length)) if length else {}
        if isinstance(request.get("prompt"), str):
            # Somebody looks whether it lives.
            return self._answer({"choices": [{"token_ids": [1]}], "usage": {"completion_tokens": 1}})
        assert self.headers["Authorization"] == f"Bearer {os.environ[TOKEN]}"
        line = {"path": self.path, "came": came, "under_way": type(self).under_way}
        if self.path == "/v1/completions" and "prompt_logprobs" not in request:
            with self.counting:
                type(self).under_way += 1
            line |= {name: request.get(name) for name in ("prompt", "n", "seed", "model")}
        try:
            with self.alone:
                answer = self._do(request)
        finally:
            if "n" in line:
                with self.counting:
                    type(self).under_way -= 1
        line |= {"version": self.policy.version, "done": time.time()}
        with self.counting, self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        return self._answer(answer)

    def _do(self, request: dict[str, Any]) -> Any:
        policy, model = self.policy, request.get("model")
        match self.path:
            case "/v1/completions" if "prompt_logprobs" in request:
                told = policy.prompt_logprobs(model, request["prompt"])
                each = [
                    {str(token): {"logprob": value}} for token, value in zip(request["prompt"][1:], told, strict=True)
                ]
                return {"model": model or "base", "choices": [{"prompt_logprobs": [None, *each]}]}
            case "/v1/completions":
                delay = self.log.with_name("delay")
                time.sleep(float(delay.read_text()) if delay.exists() else 0)
                choices = [policy.completion(request, number) for number in range(request["n"])]
                return {"model": model or "base", "choices": choices}
            case "/update_weights":
                policy.update(request["update_info"]["files"])
            case "/finish_weight_update":
                policy.version = int(self.headers[VERSION_HEADER])
            case "/v1/load_lora_adapter":
                policy.load(request["lora_name"], request["lora_path"])
            case "/v1/unload_lora_adapter":
                del policy.adapters[request["lora_name"]]
        return {"success": True}

    def _answer(self, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.policy.version is not None:
            self.send_header(VERSION_HEADER, str(max(0, self.policy.version - self.log.with_name("lag").exists())))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    Handler.policy, Handler.log = Policy(arguments.model), arguments.log
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
