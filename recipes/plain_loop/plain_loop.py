"""HAPO in one file: no verl, no Ray, no vLLM, the functions of `hapo_verl.algo` and a loop around them.

    python recipes/plain_loop/plain_loop.py                                    as in the paper
    python recipes/plain_loop/plain_loop.py --gate annealed --mode append
    python recipes/plain_loop/plain_loop.py --gate never                       GRPO

The file to read first, and the quick look before a run of the real trainer: the same task, model, gate, injection,
advantages and loss as `make quickstart`, some 0.15 s a step on one core. `--objective real` and the other options
make it a baseline; `bench/study.py` names the settings of each.
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
from hapo_verl.algo.objectives import Rows as ObjectiveRows
from hapo_verl.algo.objectives import objectives
from hapo_verl.algo.policy_loss import (
    UNCLIPPED,
    Aggregation,
    Clip,
    EntropyBonus,
    hapo_policy_loss,
    likelihood_loss,
)
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
    statistics: str = ""  # all or on_policy; nothing: what goes with the mode
    scale_by_std: bool = True
    objective: str = "surrogate"
    clip: bool = True
    aggregation: str = "token-mean"
    entropy: float = 0.0
    filter_groups: bool = False  # DAPO: groups of equal scores are sampled anew, four times a step at most
    threshold: float = 0.8
    digits: int = 4
    detour: int = 0
    warm: float = 0.0  # success rate to which imitation brings the model before the run
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


def advantages(rows: Rows, statistics: str, *, scale_by_std: bool) -> Tensor:
    """(B,) advantages of the rows that the injection left, relative to all rows of the group or to its rollouts."""
    if statistics == "on_policy":
        return appended_advantage(rows.score_B, rows.group_B, rows.demonstration_B, scale_by_std=scale_by_std)
    return group_advantage(rows.score_B, rows.group_B, scale_by_std=scale_by_std)


def loss_of(model: Any, rows: Rows, advantage_B: Tensor, settings: Settings) -> Tensor:
    """The loss of one on-policy update: the policy in training is the policy that sampled."""
    objective = objectives()[settings.objective]
    logp_BT, entropy_BT = token_scores(model, rows.prompt_BS, rows.response_BT)
    aggregation = Aggregation(mode=settings.aggregation, loss_scale_factor=rows.mask_BT.size(1))
    loss = hapo_policy_loss(
        logp_BT,
        logp_BT.detach(),
        objective.advantage(advantage_B, rows.demonstration_B),
        rows.mask_BT,
        rows.demonstration_B,
        shaping=settings.shaping,
        clip=Clip(low=0.2, high=0.2, dual=3.0) if settings.clip else UNCLIPPED,
        aggregation=aggregation,
        entropy=EntropyBonus(entropy_BT, settings.entropy),
    ).loss
    if not objective.weighs_likelihood:
        return loss
    tokens_B = rows.mask_BT.sum(1)
    weight_B = objective.likelihood_weight(
        ObjectiveRows(
            rows.score_B,
            rows.group_B,
            rows.demonstration_B,
            tokens_B,
            log_ratio_B=torch.zeros(len(tokens_B)),
            entropy_B=(entropy_BT.detach() * rows.mask_BT).sum(1) / tokens_B,
            batch_size=len(tokens_B),
        )
    )
    return loss + likelihood_loss(logp_BT, weight_B, rows.mask_BT, aggregation)


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
    warm_up(model, task, settings)
    retraction = Retraction(settings, task.questions)

    history, asked = [], 0
    for step in range(settings.steps):
        rounds: list[Round] = []
        # One round, unless groups without signal are to be sampled anew.
        for _ in range(4 if settings.filter_groups else 1):
            wanted = settings.prompts - sum(len(part.kept) for part in rounds)
            if not wanted:
                break
            questions, asked = task.questions[asked : asked + wanted], asked + wanted
            situations = retraction.situations(step, questions)
            rounds.append(sample_round(model, task, questions, situations, settings, generator, rng))
            retraction.observe(questions, rounds[-1].successes, settings.rollouts)
        rows, sampled = (merge([getattr(part, name) for part in rounds]) for name in ("rows", "sampled"))
        successes = [count for part in rounds for count in part.successes]
        fired = [flag for part in rounds for flag in part.fired]

        statistics = settings.statistics or ("on_policy" if settings.mode == "append" else "all")
        advantage_B = advantages(rows, statistics, scale_by_std=settings.scale_by_std)
        if len(advantage_B):
            gradient = torch.autograd.grad(loss_of(model, rows, advantage_B, settings), parameters)
        else:  # no group of any round had a signal
            gradient = tuple(torch.zeros_like(parameter) for parameter in parameters)
        record = {
            "step": step + 1,
            "on_policy_success": sum(successes) / (len(successes) * settings.rollouts),
            "firing_rate": sum(fired) / len(fired),
            "teacher_share": rows.demonstration_B.sum().item() / max(len(rows.demonstration_B), 1),
            "generated_tokens": sum(part.tokens for part in rounds),
        }
        if (step + 1) % settings.test_every == 0 and len(advantage_B):
            own_B = advantages(sampled, "all", scale_by_std=settings.scale_by_std)
            own = torch.autograd.grad(loss_of(model, sampled, own_B, settings), parameters)
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


def warm_up(model: Any, task: Task, settings: Settings) -> None:
    """Imitate demonstrations until sampled answers succeed at the rate `settings.warm`: a policy with some ability."""
    generator, rng = torch.Generator().manual_seed(settings.seed), random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    succeeded = 0.0
    while succeeded < settings.warm:
        for _ in range(2):
            questions = rng.choices(task.questions, k=32)
            rows = demonstration_rows(task, questions)
            logp_BT, _ = token_scores(model, rows.prompt_BS, rows.response_BT)
            optimizer.zero_grad()
            (-(logp_BT * rows.mask_BT).sum() / rows.mask_BT.sum()).backward()
            optimizer.step()
        succeeded = task.rollouts(model, rng.choices(task.questions, k=512), 1, generator).score_B.mean().item()


def demonstration_rows(task: Task, questions: Sequence[str]) -> Rows:
    """One row a question, its demonstration."""
    demonstrations = [task.demonstration(question) for question in questions]
    pairs = [(q, d) for q, d in zip(questions, demonstrations, strict=True) if d is not None]
    width = max(len(d.tokens) for _, d in pairs)
    return Rows(
        task.encode([q for q, _ in pairs]),
        torch.tensor([d.tokens + d.tokens[-1:] * (width - len(d.tokens)) for _, d in pairs]),
        torch.tensor([[1] * len(d.tokens) + [0] * (width - len(d.tokens)) for _, d in pairs]),
        torch.tensor([d.score for _, d in pairs]),
        torch.arange(len(pairs)),
        torch.ones(len(pairs), dtype=torch.bool),
    )


class Round(NamedTuple):
    """Groups of one generation: of those that are kept the rows, before and after injection."""

    rows: Rows
    sampled: Rows
    kept: list[int]
    successes: list[int]
    fired: list[bool]
    tokens: int


def sample_round(
    model: Any,
    task: Task,
    questions: Sequence[str],
    situations: Sequence[Situation],
    settings: Settings,
    generator: torch.Generator,
    rng: random.Random,
) -> Round:
    """Sample a group a question, gate and inject; with `filter_groups` keep the groups whose scores differ."""
    per_group = settings.rollouts
    sampled = rows = task.rollouts(model, questions, per_group, generator)
    successes = (sampled.score_B >= 1).view(-1, per_group).sum(1).tolist()
    fired = [decide(settings.gate, *of, per_group, rng) for of in zip(situations, successes, strict=True)]
    for prompt, wanted in enumerate(fired):
        demonstration = task.demonstration(questions[prompt]) if wanted else None
        if demonstration is not None:
            group = range(prompt * per_group, (prompt + 1) * per_group)
            rows = inject(rows, group, demonstration, settings.mode, rng)
    kept, tokens = list(range(len(questions))), int(sampled.mask_BT.sum())
    if settings.filter_groups:
        kept = [prompt for prompt in kept if rows.score_B[rows.group_B == prompt].unique().numel() > 1]
        rows, sampled = (
            Rows(*(column[torch.isin(part.group_B, torch.tensor(kept))] for column in part)) for part in (rows, sampled)
        )
    return Round(rows, sampled, kept, successes, fired, tokens)


def merge(parts: Sequence[Rows]) -> Rows:
    """The groups of all rounds in one batch, each group with an id of its own."""
    whole = Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    apart = [part.group_B + 1_000_000 * number for number, part in enumerate(parts)]
    return whole._replace(group_B=torch.cat(apart))


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
        total = settings.prompts * settings.steps * (4 if settings.filter_groups else 1)
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


def token_scores(model: Any, prompt_BS: Tensor, response_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log-probabilities of the response's tokens, and entropies of their distributions."""
    logits = model(torch.cat([prompt_BS, response_BT], dim=1)).logits[:, prompt_BS.size(1) - 1 : -1]
    logp_BTV = logits.log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    return logp_BTV.gather(-1, response_BT.unsqueeze(-1)).squeeze(-1), entropy_BT


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
