"""HAPO in one file: no verl, no Ray, no vLLM, the functions of `hapo_verl.algo` and a loop around them.

    python recipes/plain_loop/plain_loop.py                                    as in the paper
    python recipes/plain_loop/plain_loop.py --gate annealed --mode append
    python recipes/plain_loop/plain_loop.py --gate never                       GRPO

The file to read first, and the quick look before a run of the real trainer: the same task, model, gate, injection,
advantages and loss as `make quickstart`, some 0.15 s a step on one core.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import digits
import tiny_model
from hapo_verl.algo.advantage import appended_advantage, group_advantage
from hapo_verl.algo.demonstration import Refusal, demonstration_tokens
from hapo_verl.algo.gate import Situation, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, worst_rollout
from hapo_verl.algo.policy_loss import Aggregation, Clip, hapo_policy_loss
from hapo_verl.algo.posterior import PromptPosterior, prompt_key
from hapo_verl.algo.schedule import RunningSuccess, adaptive, annealed


@dataclass(frozen=True)
class Settings:
    """A run. The task is to write `digits` digits backwards.

    With a `detour` of D the demonstration writes D dots first. Dots earn nothing, and each question has a length limit
    of its own, 0 to D dots above the answer: the demonstration's way is right where it fits, no dots are right
    everywhere.
    """

    gate: str = "paper"
    mode: str = "replace"
    scale_by_std: bool = True
    threshold: float = 0.8
    digits: int = 4
    detour: int = 0
    prompts: int = 16
    rollouts: int = 8
    steps: int = 180
    lr: float = 2e-3
    hidden: int = 128
    shaping: float = 0.1
    seed: int = 0
    test_every: int = 10


class Rows(NamedTuple):
    """A batch: what was asked, what was answered, what it was worth."""

    prompt_BS: Tensor
    response_BT: Tensor
    mask_BT: Tensor
    score_B: Tensor
    group_B: Tensor
    demonstration_B: Tensor


class Demonstration(NamedTuple):
    """The tokens of a solution, end of sequence included, and the score that verified it."""

    tokens: list[int]
    score: float


# --- HAPO ------------------------------------------------------------


def decide(gate: str, situation: Situation, successes: int, rollouts: int, rng: random.Random) -> bool:
    """Is this group to be injected?"""
    return fires(firing_probabilities(gate, rollouts, situation), successes, rng) and situation.admitted


def inject(rows: Rows, group: Sequence[int], demonstration: Demonstration, mode: str, rng: random.Random) -> Rows:
    """The batch with a demonstration in the place of the group's worst rollout, or as one row more.

    Args:
        rows: the batch.
        group: positions of the group's rollouts in it.
        demonstration: the prompt's.
        mode: replace or append.
        rng: of the last choice among equally bad rollouts.
    """
    width = rows.response_BT.size(1)
    padding = width - len(demonstration.tokens)
    response_T = torch.tensor(demonstration.tokens + demonstration.tokens[-1:] * padding)
    mask_T = torch.tensor([1] * len(demonstration.tokens) + [0] * padding)
    lengths = rows.mask_BT.sum(1).tolist()
    candidates = [
        Rollout(
            score=float(rows.score_B[i]),
            success=bool(rows.score_B[i] >= 1),
            truncated=rows.response_BT[i, lengths[i] - 1].item() != demonstration.tokens[-1],
            length=lengths[i],
        )
        for i in group
    ]
    worst = group[worst_rollout(candidates, rng)]
    new = Rows(
        rows.prompt_BS[worst],
        response_T,
        mask_T,
        torch.tensor(demonstration.score),
        rows.group_B[worst],
        torch.tensor(True),
    )
    if mode == "append":
        return Rows(*(torch.cat([old, value.unsqueeze(0)]) for old, value in zip(rows, new, strict=True)))
    replaced = Rows(*(column.clone() for column in rows))
    for column, value in zip(replaced, new, strict=True):
        column[worst] = value
    return replaced


def advantages(rows: Rows, mode: str, *, scale_by_std: bool) -> Tensor:
    """(B,) advantages of the rows that the injection left."""
    if mode == "append":
        return appended_advantage(rows.score_B, rows.group_B, rows.demonstration_B, scale_by_std=scale_by_std)
    return group_advantage(rows.score_B, rows.group_B, scale_by_std=scale_by_std)


def loss_of(model: Any, rows: Rows, advantage_B: Tensor, *, shaping: float) -> Tensor:
    """The policy loss of one on-policy update: the policy in training is the policy that sampled."""
    logp_BT = token_logp(model, rows.prompt_BS, rows.response_BT)
    return hapo_policy_loss(
        logp_BT,
        logp_BT.detach(),
        advantage_B,
        rows.mask_BT,
        rows.demonstration_B,
        shaping=shaping,
        clip=Clip(low=0.2, high=0.2, dual=3.0),
        aggregation=Aggregation(mode="token-mean"),
    ).loss


class Retraction:
    """What the gates know besides the group at hand: the step, the running success, the prompts' earlier visits."""

    def __init__(self, settings: Settings, questions: Sequence[str]) -> None:
        self._settings = settings
        self._running = RunningSuccess()
        distinct = sorted(set(questions))
        self._posterior = PromptPosterior([prompt_key(q) for q in distinct], ["task"] * len(distinct))

    def situations(self, step: int, questions: Sequence[str]) -> list[Situation]:
        """Of each prompt of step 0, 1, 2, ..."""
        gamma = self._settings.threshold
        if self._settings.gate == "annealed":
            gamma = annealed(gamma, step, horizon=self._settings.steps)
        if self._settings.gate == "adaptive":
            gamma = adaptive(gamma, self._running)
        if self._settings.gate not in ("posterior", "thompson"):
            return [Situation(threshold=gamma)] * len(questions)
        priors = self._posterior.priors([prompt_key(q) for q in questions], strength=2.0, discount=0.5)
        return [Situation(gamma, a, b) for a, b in zip(*priors, strict=True)]

    def observe(self, questions: Sequence[str], successes: Sequence[int], rollouts: int) -> None:
        """Learn from a step's on-policy outcomes."""
        self._running = self._running.after(sum(successes) / (len(successes) * rollouts), memory=0.9)
        keys = [prompt_key(q) for q in questions]
        self._posterior.observe(keys, successes, [rollouts] * len(keys), discount=0.5, memory=0.9)


# --- the loop ------------------------------------------------------------


def train(
    settings: Settings, report: Callable[[dict[str, float]], None] = lambda record: None
) -> list[dict[str, float]]:
    """Train a fresh tiny model.

    Args:
        settings: of the run.
        report: called with each step's record.

    Returns:
        One record a step: on-policy success, firing rate, teacher's share of the rows, relative deviation of the
        gradient from that of the on-policy rows alone and, now and then, held-out success.
    """
    task = Task(settings)
    tokenizer = task.tokenizer
    model = tiny_model.make_model(tokenizer, hidden=settings.hidden, layers=2, seed=settings.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, eta_min=settings.lr / 10)
    generator, rng = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    retraction = Retraction(settings, task.questions)
    per_group = settings.rollouts

    history = []
    for step in range(settings.steps):
        questions = task.questions[step * settings.prompts :][: settings.prompts]
        rows = task.rollouts(model, questions, per_group, generator)
        successes = (rows.score_B >= 1).view(-1, per_group).sum(1).tolist()
        situations = retraction.situations(step, questions)
        sampled = rows
        fired = [decide(settings.gate, *of, per_group, rng) for of in zip(situations, successes, strict=True)]
        for prompt, wanted in enumerate(fired):
            demonstration = task.demonstration(questions[prompt]) if wanted else None
            if demonstration is not None:
                group = range(prompt * per_group, (prompt + 1) * per_group)
                rows = inject(rows, group, demonstration, settings.mode, rng)
        retraction.observe(questions, successes, per_group)

        advantage_B = advantages(rows, settings.mode, scale_by_std=settings.scale_by_std)
        gradient = torch.autograd.grad(loss_of(model, rows, advantage_B, shaping=settings.shaping), parameters)
        record = {
            "step": step + 1,
            "on_policy_success": sum(successes) / len(sampled.score_B),
            "firing_rate": sum(fired) / len(fired),
            "teacher_share": rows.demonstration_B.float().mean().item(),
        }
        if (step + 1) % settings.test_every == 0:
            own_B = advantages(sampled, "replace", scale_by_std=settings.scale_by_std)
            own = torch.autograd.grad(loss_of(model, sampled, own_B, shaping=settings.shaping), parameters)
            record["gradient_deviation"] = deviation(gradient, own)
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % settings.test_every == 0:
            record["heldout_success"] = task.heldout_success(model)
        report(record)
        history.append(record)
    return history


def deviation(gradient: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """‖g − g_on‖ / ‖g_on‖; infinite where the policy's own rows give no gradient."""
    norm = torch.cat([g.flatten() for g in own]).norm()
    difference = torch.cat([(g - o).flatten() for g, o in zip(gradient, own, strict=True)]).norm()
    return (difference / norm).item() if difference > 0 else 0.0


class Task:
    """Prompts, scores, demonstrations and held-out questions of a run."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = tiny_model.make_tokenizer("0123456789" + ("." if settings.detour else ""))
        self._end = self.tokenizer.encode("<|im_end|>")[0]
        self._detour = settings.detour
        self._tokens = settings.digits + settings.detour + 1
        total = settings.prompts * settings.steps
        self.questions, self._heldout = digits.problems(settings.digits, total, 100, settings.seed)

    def encode(self, questions: Sequence[str]) -> Tensor:
        """(B, S) prompts; all have one length."""
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        return torch.tensor([self.tokenizer.encode(str(text), add_special_tokens=False) for text in texts])

    def is_right(self, question: str, text: str) -> bool:
        """The reward: the answer, and no more dots before it than this question allows."""
        dots = len(text) - len(text.lstrip("."))
        return text[dots:] == question[::-1] and dots <= crc32(question.encode()) % (self._detour + 1)

    def demonstration(self, question: str) -> Demonstration | None:
        """The demonstrator's answer as tokens; None where the reward rejects it."""
        text = "." * self._detour + question[::-1]
        tokens = demonstration_tokens(
            text,
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            generation_prompt="",
            end_token=self._end,
            end_tokens=[self._end],
            max_tokens=self._tokens,
        )
        return None if isinstance(tokens, Refusal) or not self.is_right(question, text) else Demonstration(tokens, 1.0)

    def scores(self, questions: Sequence[str], response_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B,) 1 for a right answer, else 0."""
        ended_BT = torch.where(mask_BT.bool(), response_BT, self._end)
        texts = self.tokenizer.batch_decode(ended_BT, skip_special_tokens=True)
        return torch.tensor([float(self.is_right(q, text)) for q, text in zip(questions, texts, strict=True)])

    def rollouts(self, model: Any, questions: Sequence[str], rollouts: int, generator: torch.Generator) -> Rows:
        """N sampled responses a question."""
        repeated = [question for question in questions for _ in range(rollouts)]
        prompt_BS = self.encode(repeated)
        response_BT, mask_BT = sample(model, prompt_BS, self._tokens, self._end, generator)
        group_B = torch.arange(len(questions)).repeat_interleave(rollouts)
        score_B = self.scores(repeated, response_BT, mask_BT)
        return Rows(prompt_BS, response_BT, mask_BT, score_B, group_B, torch.zeros(len(repeated), dtype=torch.bool))

    def heldout_success(self, model: Any) -> float:
        """Success of greedy answers to questions that are never trained on."""
        response_BT, mask_BT = sample(model, self.encode(self._heldout), self._tokens, self._end, None)
        return self.scores(self._heldout, response_BT, mask_BT).mean().item()


@torch.no_grad()
def sample(
    model: Any, prompt_BS: Tensor, tokens: int, end: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Responses and their masks, both (B, T); greedy without a generator."""
    sequence, state, inputs = prompt_BS, None, prompt_BS
    for _ in range(tokens):
        output = model(inputs, past_key_values=state, use_cache=True)
        state, logits_BV = output.past_key_values, output.logits[:, -1]
        if generator is None:
            inputs = logits_BV.argmax(-1, keepdim=True)
        else:
            inputs = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        sequence = torch.cat([sequence, inputs], dim=1)
    response_BT = sequence[:, prompt_BS.size(1) :]
    return response_BT, mask_until(response_BT, end)


def mask_until(response_BT: Tensor, end: int) -> Tensor:
    """1 up to and including the first end of sequence."""
    ended_BT = (response_BT == end).cumsum(1)
    return ((ended_BT == 0) | ((ended_BT == 1) & (response_BT == end))).long()


def token_logp(model: Any, prompt_BS: Tensor, response_BT: Tensor) -> Tensor:
    """(B, T) log-probabilities of the response's tokens."""
    logits = model(torch.cat([prompt_BS, response_BT], dim=1)).logits[:, prompt_BS.size(1) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response_BT.unsqueeze(-1)).squeeze(-1)


def settings_of(argv: Sequence[str] | None = None) -> Settings:
    """The command line: every field of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Settings()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return replace(Settings(), **vars(parser.parse_args(argv)))


def show(record: dict[str, float]) -> None:
    """One line for every step with a held-out success."""
    if "heldout_success" in record:
        print("  ".join(f"{name} {value:.3g}" for name, value in record.items()), flush=True)


if __name__ == "__main__":
    train(settings_of(), show)
