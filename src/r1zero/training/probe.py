"""The guard: after each publish, do the policy servers and the trainer have the same policy?

Both say how likely the tokens of a few fixed sequences are, and two things can be wrong.

- They differ: the mean absolute difference of the logprobs is beyond the recipe's tolerance.
- A server stayed behind. One publish changes a policy by far less than the tolerance, so this shows in what has
  *changed* since an earlier publish, the anchor: the trainer's logprobs by dt, the server's by ds. A server that
  follows has ds = dt but for rounding; one that stayed behind has ds = 0 but for rounding. So share = <ds,dt> / <dt,dt>
  is about 1 or about 0, and the server's answers are nearer to the old policy than to the new where share < 1/2.

The second needs care, because dt is in part rounding itself: in bfloat16 any change of the weights makes logprobs jump
by some 0.02 nats, independently in trainer and server, which draws a healthy share towards 0 while the policy has
hardly moved. How large those jumps are is seen at the anchor, where both had the same policy and differed by rounding
alone. With noise the size of that difference, rounding makes up at most 2 noise^2 of dt^2, so a healthy share is at
least 1 - 2 noise^2 / dt^2. A share is judged only where dt is `JUDGED` times the noise: there a healthy one is 7/9 or
more. Until then the anchor stays, so that small steps add up. And where a server's arithmetic repeats itself none of
this is needed: answers that are the same to the last bit, although the trainer's moved, come from unchanged weights.

Two kinds of token are left out of all this. What the first token of a sequence predicts: no completion has a token that
one token alone predicts, and at that place trained models keep activations hundreds of times as large as elsewhere (Sun
et al. 2024, "Massive Activations in Large Language Models", arXiv 2402.17762), beside which bf16 loses the rest. And a
beginning that an earlier sequence had too, as prompts of one template do: it says the same again, and would count as
often as there are sequences.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1zero.restarts import Refusal
from r1zero.run_folder import write_json
from r1zero.training.policy_sync import on_main_process

MOVED = 1e-4  # root mean square, nats; what float32 makes of the same weights in another order stays far below
JUDGED = 3.0  # times the noise; see above
STANDARD_ERRORS = 4.0  # one in 30,000, for each publish that is judged

Logprobs = list[list[float]]  # of each sequence, of each token but the first; nats


class PolicyMismatch(Refusal):
    """Server and trainer have not the same policy; the message says how that showed."""


@dataclass(frozen=True)
class _Seen:
    """What both sides said after one publish.

    Attributes:
        said: by "trainer" and "server".
        trainer, server: float64, one value for each token that is judged.
    """

    version: int
    said: dict[str, Logprobs]
    trainer: torch.Tensor
    server: torch.Tensor


@dataclass(frozen=True)
class Movement:
    """How far a server followed the trainer between two publishes.

    Attributes:
        trainer: how much the trainer's logprobs changed; root mean square, nats.
        noise: what rounding alone can make of it; root mean square, nats.
        share: how much of that change the server's logprobs made too; 1 all of it, 0 nothing.
        error: the standard error of `share`.
        repeated: the server's answers are the same to the last bit, although most of the trainer's are not.
    """

    trainer: float
    noise: float
    share: float
    error: float
    repeated: bool

    @property
    def told(self) -> bool:
        """Whether the change is large enough to tell a server that followed from one that did not."""
        return self.trainer > max(MOVED, JUDGED * self.noise)

    @property
    def stayed_behind(self) -> bool:
        """Whether the server certainly has an older policy."""
        if self.trainer > MOVED and self.repeated:
            return True
        return self.told and self.share + STANDARD_ERRORS * self.error < 0.5

    @property
    def followed(self) -> bool:
        """Whether the server certainly has the newer policy; in between more has to change before it can be told."""
        return self.told and self.share - STANDARD_ERRORS * self.error > 0.5


class Probe:
    """Compares the servers with the trainer on fixed sequences, after each publish.

    Attributes:
        sequences: those.

    Args:
        sequences: token ids, at least two each and three in one; the same in every process and for the whole run.
        tolerance: of the mean absolute difference, nats: the recipe's probe_tolerance.
        evidence: the JSON file that keeps both sides' answers when they do not agree.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], tolerance: float, evidence: Path) -> None:
        self.sequences = [list(each) for each in sequences]
        if not self.sequences or min(map(len, self.sequences)) < 2:
            raise ValueError("the probe needs sequences of at least two tokens each")
        self._judged = torch.tensor([flag for each in _judged(self.sequences) for flag in each])
        if not self._judged.any():
            raise ValueError("the probe needs sequences of at least two tokens each, and one of three")
        self._tolerance, self._evidence = tolerance, evidence
        self._anchors: dict[int, _Seen] = {}  # by server
        self._last: dict[int, _Seen] = {}

    def check(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        version: int,
        answers: Sequence[Logprobs],
    ) -> dict[str, float]:
        """Compare what the servers answer with the trainer's own forward pass. A collective.

        Args:
            model: the policy, as it is trained.
            accelerator: of the trainer.
            version: the one that was published last.
            answers: the servers' logprobs of `sequences`, for each server.

        Returns:
            Metrics, of the server that is farthest off: probe/difference and probe/difference_max (nats, over tokens),
            probe/moved (nats, root mean square: the trainer's change since the anchor), probe/followed (the share of it
            that the server made too, where that can be told), probe/seconds.

        Raises:
            PolicyMismatch: on the main process; the evidence has been written.
            PublishError: on the other ranks, with the same message.
        """
        began = time.monotonic()
        own = trainer_logprobs(model, accelerator, self.sequences)
        found = on_main_process(accelerator, lambda: self.compare(version, own, answers))
        return {**found, "probe/seconds": time.monotonic() - began}

    def compare(self, version: int, trainer: Logprobs, servers: Sequence[Logprobs]) -> dict[str, float]:
        """Judge both sides' answers for one version and remember them. Metrics and errors are those of `check`."""
        metrics: dict[str, float] = {}
        for index, answer in enumerate(servers):
            where = f"policy server {index + 1} of {len(servers)}" if len(servers) > 1 else "the policy server"
            self._require_shape(where, version, trainer, answer)
            said = {"trainer": trainer, "server": answer}
            seen = _Seen(version, said, *(_flat(each)[self._judged] for each in said.values()))
            difference = (seen.server - seen.trainer).abs()
            mean = float(difference.mean())
            if not mean <= self._tolerance:  # also where it is not a number
                why = (
                    f"its log-probabilities differ from the trainer's by {mean:.4g} nats on average and "
                    f"{float(difference.max()):.4g} at most, and probe_tolerance = {self._tolerance:g}"
                )
                self._stop(where, index, seen, why)
            of_server = {
                "probe/difference": mean,
                "probe/difference_max": float(difference.max()),
                **self._followed(where, index, seen),
            }
            for name, value in of_server.items():
                worse = min if name == "probe/followed" else max
                metrics[name] = worse(metrics.get(name, value), value)
        return metrics

    def _followed(self, where: str, index: int, seen: _Seen) -> dict[str, float]:
        """Compare with the anchor and with the publish before this one; move the anchor on where that was telling."""
        last, anchor = self._last.get(index), self._anchors.get(index)
        self._last[index] = seen
        if last is None or anchor is None:
            self._anchors[index] = seen
            return {}
        for before in (last, anchor):
            movement = moved(before.trainer, before.server, seen.trainer, seen.server)
            if movement.stayed_behind:
                same = "answers the same to the last bit" if movement.repeated else "has not followed"
                why = (
                    f"it {same}, although the trainer's log-probabilities have moved by {movement.trainer:.4g} nats "
                    f"since version {before.version}: it made {movement.share:.2f} +- {movement.error:.2f} of that "
                    f"change, with rounding of {movement.noise:.4g} nats. The publish of {seen.version} did not arrive"
                )
                self._stop(where, index, seen, why)
        if movement.followed:
            self._anchors[index] = seen
        told = {"probe/followed": movement.share} if movement.told else {}
        return {"probe/moved": movement.trainer, **told}

    def _require_shape(self, where: str, version: int, trainer: Logprobs, answer: Logprobs) -> None:
        expected = [len(each) for each in trainer]
        if [len(each) for each in answer] != expected:
            raise PolicyMismatch(
                f"{where} gave log-probabilities of {[len(each) for each in answer]} tokens where version {version} of "
                f"the trainer has {expected}: it reads other tokens than it was sent"
            )

    def _stop(self, where: str, index: int, seen: _Seen, why: str) -> None:
        anchor = self._anchors.get(index)
        before = {} if anchor is None else {"anchor": {"version": anchor.version, **anchor.said}}
        write_json(
            self._evidence,
            {
                "version": seen.version,
                "server_index": index,
                "why": why,
                "probe_tolerance": self._tolerance,
                "tokens": self.sequences,
                **seen.said,
                **before,
            },
        )
        raise PolicyMismatch(
            f"{where} does not have version {seen.version} of the trainer's policy: {why}. "
            f"Both sides' answers are in {self._evidence}"
        )


def moved(
    trainer_before: torch.Tensor, server_before: torch.Tensor, trainer: torch.Tensor, server: torch.Tensor
) -> Movement:
    """What trainer and server did between two publishes; logprobs in nats, float64, one value for each token.

    The standard error allows for noise that differs from token to token, as it does: unlikely tokens have more.
    """
    dt, ds = trainer - trainer_before, server - server_before
    square = float(dt @ dt)
    share = float(ds @ dt) / square if square else 0.0
    residual = ds - share * dt
    error = math.sqrt(float((dt * residual).square().sum())) / square if square else math.inf
    return Movement(
        trainer=_rms(dt),
        noise=_rms(server_before - trainer_before),
        share=share,
        error=error,
        repeated=bool((ds == 0).all()) and float((dt != 0).double().mean()) > 0.5,
    )


def trainer_logprobs(model: torch.nn.Module, accelerator: Any, sequences: Sequence[Sequence[int]]) -> Logprobs:
    """The trainer's logprob of each token given those before it, the first of each sequence left out. A collective.

    As in training (its autocast, its LM head), but without dropout, gradients and checkpointing, and the model is left
    as it was. One sequence at a time: the logits of 512 tokens and a vocabulary of 150,000 are 300 MB in float32.
    """
    answers: Logprobs = []
    with evaluating(model), torch.no_grad(), accelerator.autocast():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=accelerator.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            answers.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return answers


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Each module is in evaluation inside, and afterwards in the mode that it was in itself.

    All but 4-bit layers: on a CPU, bitsandbytes packs their weights anew for evaluation, and they have no dropout.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            if type(module).__name__ != "Linear4bit":
                module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _judged(sequences: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Of each sequence, of each token but the first: whether it is judged; the head of this file says which are not.

    >>> _judged([[7, 8, 9], [7, 8, 5, 6]])
    [[False, True], [False, True, True]]
    """
    beginnings: set[tuple[int, ...]] = set()
    flags = []
    for sequence in sequences:
        until = [tuple(sequence[: length + 1]) for length in range(1, len(sequence))]
        flags.append([length > 1 and each not in beginnings for length, each in enumerate(until, start=1)])
        beginnings.update(until)
    return flags


def _flat(logprobs: Logprobs) -> torch.Tensor:
    return torch.tensor([value for each in logprobs for value in each], dtype=torch.float64)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
