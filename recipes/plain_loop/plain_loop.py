"""HAPO in one file: a training loop around the functions of `hapo_verl.algo`, without verl, Ray and vLLM.

    python recipes/plain_loop/plain_loop.py                                    reverse digits; HAPO as in the paper
    python recipes/plain_loop/plain_loop.py --gate annealed --mode append      the recommended gate and mode
    python recipes/plain_loop/plain_loop.py --gate never                       GRPO
    python recipes/plain_loop/plain_loop.py --source own                       the policy's own successes, no teacher
    python recipes/plain_loop/plain_loop.py --task words                       a language model, for more see README.md

Read this file first. It has the same gate, injection, advantages and loss as the real trainer, so it also serves for a
quick experiment before a run. With the digits a step takes about 0.15 s on one core.

A step: sample a group of rollouts for each prompt; let the gate decide which groups get a demonstration; inject the
demonstrations; compute group-relative advantages; make one update. `train` is the loop.

A task is an object with questions, a reward and demonstrations (`task.py`). The model can be any causal language model
of Hugging Face (`--model`). `--objective real` and other options turn the loop into a baseline; `bench/study.py` has
the settings of each.

Shape suffixes: B rows of the batch, S tokens of a prompt, T tokens of a response, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from hapo_verl.algo.advantage import appended_advantage, group_advantage
from hapo_verl.algo.allocation import allocate
from hapo_verl.algo.demonstration import Refusal, Response, demonstration_tokens
from hapo_verl.algo.gate import Situation, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, worst_rollout
from hapo_verl.algo.objectives import Rows as ObjectiveRows
from hapo_verl.algo.objectives import objectives
from hapo_verl.algo.own_successes import MIB, OwnSuccesses, unpacked
from hapo_verl.algo.policy_loss import (
    UNCLIPPED,
    Aggregation,
    Clip,
    DemonstrationShape,
    EntropyBonus,
    hapo_policy_loss,
    likelihood_loss,
)
from hapo_verl.algo.posterior import PromptPosterior, prompt_key
from hapo_verl.algo.schedule import RunningSuccess, adaptive, annealed
from hapo_verl.config import RolloutsConfig
from task import Problem, Task


@dataclass(frozen=True)
class Settings:
    """The settings of a run; each field is an option of the command line."""

    task: str = "digits"  # digits, words, gsm_symbolic: see `make_task`
    model: str = ""  # folder or name of a Hugging Face model; empty for the task's own model
    gate: str = "paper"  # a name of `hapo_verl.config.GATES`
    mode: str = "replace"  # replace the worst rollout by the demonstration, or append it as an extra row
    statistics: str = ""  # rows of the advantages' mean and deviation: all, on_policy; empty for the mode's default
    scale_by_std: bool = True  # divide advantages by the group's standard deviation
    objective: str = "surrogate"  # a name of `hapo_verl.algo.objectives`
    clip: bool = True  # clip the importance ratio
    aggregation: str = "token-mean"  # verl's loss_agg_mode
    entropy: float = 0.0  # coefficient of the entropy bonus
    filter_groups: bool = False  # DAPO: replace groups with equal scores by new ones, in at most four rounds a step
    threshold: float = 0.8  # γ of the gate
    shaping: float = 0.1  # λ of the demonstration's loss
    exponent: float = 1.0  # κ of the demonstration's loss
    shape: str = "power"  # weight of the demonstration's tokens: power, trsft, chord
    source: str = "column"  # demonstrations: the task's (column), the policy's own successes (own), column_or_own
    imitate: float = 0.0  # share of the steps, at the beginning, that are supervised fine-tuning without rollouts
    warm: float = 0.0  # before the run, imitate demonstrations until sampled answers reach this success rate
    digits: int = 4  # task digits: length of a string
    detour: int = 0  # task digits: dots that the demonstration writes first, see `digits_task.py`
    hidden: int = 128  # task digits: hidden size of the model
    prompts: int = 16  # prompts per step
    rollouts: int = 8  # rollouts per prompt
    allocate: str = "uniform"  # of these rollouts; posterior: by the posteriors of the gates posterior and thompson
    steps: int = 180
    lr: float = 2e-3
    lr_after: float = 0.0  # learning rate after the supervised steps, with a new optimizer; 0 goes on with the old one
    weight_decay: float = 0.01
    dtype: str = "float32"  # dtype of matrix products; weights and sums are float32
    device: str = "cpu"
    seed: int = 0
    heldout: int = 100  # number of held-out problems
    test_first: bool = False  # also measure held-out success before the first step
    test_every: int = 10  # steps between two measurements of held-out success
    deviation: bool = True  # at each of these, compare the gradient with that of the rollouts alone; costs a second one


def make_task(settings: Settings) -> Task:
    """Make the task that the settings name."""
    problems = settings.prompts * settings.steps * (4 if settings.filter_groups else 1)
    common: dict[str, Any] = {"problems": problems, "heldout": settings.heldout, "seed": settings.seed}
    if settings.task == "digits":
        from digits_task import DigitsTask

        return DigitsTask(length=settings.digits, detour=settings.detour, hidden=settings.hidden, **common)
    if settings.task == "words":
        from word_task import WordTask

        return WordTask(**common)
    if settings.task == "gsm_symbolic":
        from gym_task import GymTask

        return GymTask(settings.task, **common)
    raise SystemExit(f"--task {settings.task}: no such task. Use one of digits, words, gsm_symbolic.")


class Rows(NamedTuple):
    """A batch of prompts, responses and scores; prompts are padded on the left, responses on the right."""

    prompt_BS: Tensor  # token ids
    prompt_mask_BS: Tensor  # 0 on padding
    response_BT: Tensor  # token ids
    mask_BT: Tensor  # 1 on the response's tokens, end of sequence included; 0 on padding
    score_B: Tensor  # reward, 0 or 1
    group_B: Tensor  # id of the row's prompt
    demonstration_B: Tensor  # bool, True on demonstrations


class Demonstration(NamedTuple):
    """A verified solution: its tokens, end of sequence included, and its score."""

    tokens: list[int]
    score: float


# --- HAPO ------------------------------------------------------------


def decide(gate: str, situation: Situation, successes: int, rollouts: int, rng: random.Random) -> bool:
    """Decide whether a group with this number of successes gets a demonstration."""
    return fires(firing_probabilities(gate, rollouts, situation), successes, rng) and situation.admitted


def inject(rows: Rows, group: Sequence[int], demonstration: Demonstration, mode: str, rng: random.Random) -> Rows:
    """Put a demonstration into the batch: it replaces the group's worst rollout, or is added as an extra row.

    Args:
        rows: the batch.
        group: positions of the group's rollouts in the batch.
        demonstration: the demonstration of the group's prompt.
        mode: replace or append.
        rng: generator for the choice among equally bad rollouts.

    Returns:
        The new batch; `rows` is not changed.
    """
    width, device = rows.response_BT.size(1), rows.response_BT.device
    padding = width - len(demonstration.tokens)
    response_T = torch.tensor(demonstration.tokens + demonstration.tokens[-1:] * padding, device=device)
    mask_T = torch.tensor([1] * len(demonstration.tokens) + [0] * padding, device=device)
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
        rows.prompt_mask_BS[worst],
        response_T,
        mask_T,
        torch.tensor(demonstration.score, device=device),
        rows.group_B[worst],
        torch.tensor(True, device=device),
    )
    if mode == "append":
        return Rows(*(torch.cat([old, value.unsqueeze(0)]) for old, value in zip(rows, new, strict=True)))
    replaced = Rows(*(column.clone() for column in rows))
    for column, value in zip(replaced, new, strict=True):
        column[worst] = value
    return replaced


def advantages(rows: Rows, statistics: str, *, scale_by_std: bool) -> Tensor:
    """The advantages (B,) after the injection, relative to all rows of the group or to its rollouts only."""
    if statistics == "on_policy":
        return appended_advantage(rows.score_B, rows.group_B, rows.demonstration_B, scale_by_std=scale_by_std)
    return group_advantage(rows.score_B, rows.group_B, scale_by_std=scale_by_std)


def loss_of(policy: Policy, rows: Rows, advantage_B: Tensor, settings: Settings) -> Tensor:
    """The loss of one on-policy update, in which the policy in training is the policy that sampled.

    Rows without a gradient are left out of the computation, but the loss is still divided by the size of the whole
    batch.
    """
    objective = objectives()[settings.objective]
    aggregation = Aggregation(
        mode=settings.aggregation,
        batch_num_tokens=rows.mask_BT.sum(),
        global_batch_size=len(rows.mask_BT),
        loss_scale_factor=rows.mask_BT.size(1),
    )
    advantage_B = objective.advantage(advantage_B, rows.demonstration_B, rows.mask_BT.sum(1))
    batch_size, groups = len(rows.mask_BT), rows.group_B.unique().numel()
    if objective.idle_rows and not settings.entropy:
        trains_B = objective.has_gradient(advantage_B, rows.score_B, rows.group_B)
        rows, advantage_B = Rows(*(column[trains_B] for column in rows)), advantage_B[trains_B]
        if not len(advantage_B):
            return torch.zeros((), device=advantage_B.device)
    with_entropy = bool(settings.entropy) or "entropy" in objective.reads
    logp_BT, entropy_BT = policy.token_scores(rows, with_entropy=with_entropy)
    loss = hapo_policy_loss(
        logp_BT,
        logp_BT.detach(),
        advantage_B,
        rows.mask_BT,
        rows.demonstration_B,
        shape=DemonstrationShape(settings.shape, settings.shaping, settings.exponent),
        clip=Clip(low=0.2, high=0.2, dual=3.0) if settings.clip else UNCLIPPED,
        aggregation=aggregation,
        entropy=EntropyBonus(entropy_BT, settings.entropy) if with_entropy else None,
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
            log_ratio_B=torch.zeros_like(advantage_B),
            entropy_B=(entropy_BT.detach() * rows.mask_BT).sum(1) / tokens_B,
            batch_size=batch_size,
            groups=groups,
        )
    )
    return loss + likelihood_loss(logp_BT, weight_B, rows.mask_BT, aggregation)


def imitation_loss(policy: Policy, rows: Rows) -> Tensor:
    """The loss of supervised fine-tuning: the mean cross-entropy of the demonstrations' tokens."""
    logp_BT, _ = policy.token_scores(rows, with_entropy=False)
    return -(logp_BT * rows.mask_BT).sum() / rows.mask_BT.sum()


class Retraction:
    """The state of the gates that change over a run: the running success and the prompts' earlier visits."""

    def __init__(self, settings: Settings, questions: Sequence[str]) -> None:
        self._settings = settings
        self._running = RunningSuccess()
        distinct = sorted(set(questions))
        self._posterior = PromptPosterior([prompt_key(q) for q in distinct], ["task"] * len(distinct))

    def situations(self, step: int, questions: Sequence[str]) -> list[Situation]:
        """What the gate knows of each prompt of a step (counted from 0) before its rollouts are scored."""
        gamma = self._settings.threshold
        if self._settings.gate == "annealed":
            gamma = annealed(gamma, step, horizon=self._settings.steps)
        if self._settings.gate == "adaptive":
            gamma = adaptive(gamma, self._running)
        if self._settings.gate not in ("posterior", "thompson"):
            return [Situation(threshold=gamma)] * len(questions)
        priors = self._posterior.priors([prompt_key(q) for q in questions], strength=2.0, discount=0.5)
        return [Situation(gamma, a, b) for a, b in zip(*priors, strict=True)]

    def rollouts(self, situations: Sequence[Situation]) -> list[int]:
        """The number of rollouts of each prompt of a step."""
        n = self._settings.rollouts
        if self._settings.allocate == "uniform":
            return [n] * len(situations)
        priors = [(situation.prior_success, situation.prior_failure) for situation in situations]
        least, most = RolloutsConfig().bounds(n)
        return allocate(priors, total=n * len(priors), least=least, most=most)

    def observe(self, questions: Sequence[str], successes: Sequence[int], rollouts: Sequence[int]) -> None:
        """Update the state with the numbers of successes of a step's groups, demonstrations not counted."""
        self._running = self._running.after(sum(successes) / sum(rollouts), memory=0.9)
        keys = [prompt_key(q) for q in questions]
        self._posterior.observe(keys, successes, rollouts, discount=0.5, memory=0.9)


# --- the loop ------------------------------------------------------------


def train(
    settings: Settings,
    report: Callable[[dict[str, float]], None] = lambda record: None,
    probe: Callable[[Policy], dict[str, float]] = lambda policy: {},
    task: Task | None = None,
) -> list[dict[str, float]]:
    """Train a model: the task's own, or the one that the settings name.

    Args:
        settings: the settings of the run.
        report: called with the record of each step.
        probe: called once after the last step; its result is added to the last record.
        task: the task, if it is not one that the settings can name.

    Returns:
        One record per step: on-policy success, firing rate, share of demonstrations among the rows, generated tokens
        and demonstrations' tokens. Every `test_every` steps also held-out success, and the relative deviation of the
        gradient from that of the rollouts alone.
    """
    task = task or make_task(settings)
    policy = Policy.of(settings, task)
    parameters = list(policy.model.parameters())
    supervised = math.ceil(settings.imitate * settings.steps)
    first_part = supervised if settings.lr_after else settings.steps
    optimizer, schedule = optimizer_of(parameters, settings, settings.lr, first_part)
    generator, rng = torch.Generator(settings.device).manual_seed(settings.seed), random.Random(settings.seed)
    warm_up(policy, settings)
    retraction = Retraction(settings, [problem.question for problem in task.train])
    past = OwnSuccesses(256 * MIB)
    history: list[dict[str, float]] = []
    if settings.test_first:
        history.append({"step": 0, **policy.heldout_success()})
        report(history[0])

    asked = 0
    for step in range(settings.steps):
        tested = (step + 1) % settings.test_every == 0
        record: dict[str, float] = {"step": step + 1}
        if settings.lr_after and step == supervised:
            optimizer, schedule = optimizer_of(parameters, settings, settings.lr_after, settings.steps - step)
        optimizer.zero_grad()
        if step < supervised:
            problems, asked = task.train[asked : asked + settings.prompts], asked + settings.prompts
            rows = policy.demonstration_rows(problems)
            imitation_loss(policy, rows).backward()
            tokens = int(rows.mask_BT.sum())
            record |= {"teacher_share": 1.0, "generated_tokens": 0, "teacher_tokens": tokens}
        else:
            rounds: list[Round] = []
            # One round, or up to four if groups with equal scores are replaced by new ones.
            for _ in range(4 if settings.filter_groups else 1):
                wanted = settings.prompts - sum(len(part.kept) for part in rounds)
                if not wanted:
                    break
                problems, asked = task.train[asked : asked + wanted], asked + wanted
                questions = [problem.question for problem in problems]
                situations = retraction.situations(step, questions)
                counts = retraction.rollouts(situations)
                demonstrations = [demonstration_of(p, policy, past, step, settings.source) for p in problems]
                rounds.append(
                    sample_round(policy, problems, counts, situations, demonstrations, settings, generator, rng)
                )
                retraction.observe(questions, rounds[-1].successes, counts)
                past.observe(policy.solutions(problems, rounds[-1].sampled), step)
            rows, sampled = (merge([getattr(part, name) for part in rounds]) for name in ("rows", "sampled"))
            statistics = settings.statistics or ("on_policy" if settings.mode == "append" else "all")
            advantage_B = advantages(rows, statistics, scale_by_std=settings.scale_by_std)
            if len(advantage_B):  # else no group of any round had a signal
                loss = loss_of(policy, rows, advantage_B, settings)
                if loss.requires_grad:
                    loss.backward()
            record |= describe(rounds, rows)
            if tested and settings.deviation and len(advantage_B):
                own_B = advantages(sampled, "all", scale_by_std=settings.scale_by_std)
                own_loss = loss_of(policy, sampled, own_B, settings)
                own = (
                    torch.autograd.grad(own_loss, parameters)
                    if own_loss.requires_grad
                    else map(torch.zeros_like, parameters)
                )
                record["gradient_deviation"] = deviation([gradient_of(p) for p in parameters], list(own))
        for parameter in parameters:
            parameter.grad = gradient_of(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if tested:
            record |= policy.heldout_success()
        if step + 1 == settings.steps:
            record |= probe(policy)
        report(record)
        history.append(record)
    return history


def optimizer_of(
    parameters: list[torch.nn.Parameter], settings: Settings, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and a learning rate that falls to a tenth along a cosine over a number of steps."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient, or zeros if there is none, so that the optimizer's moments decay in every step."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def describe(rounds: Sequence[Round], rows: Rows) -> dict[str, float]:
    """The metrics of a step: success, firing rate, groups with a signal, and the shares of demonstrations."""
    successes = [count for part in rounds for count in part.successes]
    rollouts = [count for part in rounds for count in part.rollouts]
    fired = [flag for part in rounds for flag in part.fired]
    return {
        "on_policy_success": sum(successes) / sum(rollouts),
        "signal_share": sum(0 < s < n for s, n in zip(successes, rollouts, strict=True)) / len(rollouts),
        "firing_rate": sum(fired) / len(fired),
        "teacher_share": rows.demonstration_B.sum().item() / max(len(rows.demonstration_B), 1),
        "generated_tokens": sum(part.tokens for part in rounds),
        "teacher_tokens": int(rows.mask_BT[rows.demonstration_B].sum()),
    }


def warm_up(policy: Policy, settings: Settings) -> None:
    """Imitate demonstrations until sampled answers reach the success rate `settings.warm`.

    The learning rate is not the run's, so that runs at several rates begin with the same model. The success of a
    pretrained model is measured on fewer samples: they take longer.
    """
    generator, rng = torch.Generator(settings.device).manual_seed(settings.seed), random.Random(settings.seed)
    lr, samples = (1e-3, 512) if settings.task == "digits" and not settings.model else (1e-4, 128)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr)
    succeeded = 0.0
    while succeeded < settings.warm:
        for _ in range(2):
            rows = policy.demonstration_rows(rng.choices(policy.task.train, k=32))
            optimizer.zero_grad()
            imitation_loss(policy, rows).backward()
            optimizer.step()
        problems = rng.choices(policy.task.train, k=samples)
        succeeded = policy.rollouts(problems, [1] * samples, generator).score_B.mean().item()


class Round(NamedTuple):
    """The groups of one round of generation."""

    rows: Rows  # rows of the kept groups, after injection
    sampled: Rows  # rows of the kept groups, before injection
    kept: list[int]  # numbers of the kept groups
    rollouts: list[int]  # of every group, kept or not
    successes: list[int]  # of every group, kept or not
    fired: list[bool]  # of every group, whether the gate fired
    tokens: int  # generated tokens


def sample_round(
    policy: Policy,
    problems: Sequence[Problem],
    rollouts: list[int],
    situations: Sequence[Situation],
    demonstrations: Sequence[Demonstration | None],
    settings: Settings,
    generator: torch.Generator,
    rng: random.Random,
) -> Round:
    """Sample a group of `rollouts` for each problem, apply the gate and inject demonstrations.

    With `filter_groups` only groups with different scores are kept.
    """
    sampled = rows = policy.rollouts(problems, rollouts, generator)
    successes = [int(part.sum()) for part in (sampled.score_B >= 1).split(rollouts)]
    fired = [decide(settings.gate, *of, rng) for of in zip(situations, successes, rollouts, strict=True)]
    for prompt, wanted in enumerate(fired):
        demonstration = demonstrations[prompt]
        if wanted and demonstration is not None:
            end = sum(rollouts[: prompt + 1])
            rows = inject(rows, range(end - rollouts[prompt], end), demonstration, settings.mode, rng)
    kept, tokens = list(range(len(problems))), int(sampled.mask_BT.sum())
    if settings.filter_groups:
        kept = [prompt for prompt in kept if rows.score_B[rows.group_B == prompt].unique().numel() > 1]
        groups = torch.tensor(kept, device=rows.group_B.device)
        rows, sampled = (
            Rows(*(column[torch.isin(part.group_B, groups)] for column in part)) for part in (rows, sampled)
        )
    return Round(rows, sampled, kept, rollouts, successes, fired, tokens)


def demonstration_of(
    problem: Problem, policy: Policy, past: OwnSuccesses, step: int, source: str
) -> Demonstration | None:
    """The demonstration of a problem: the task's, or an earlier success of the policy itself; None without either."""
    demonstration = policy.demonstration(problem) if source != "own" else None
    own = past.recall(prompt_key(problem.question), step) if source != "column" else b""
    return Demonstration(unpacked(own).response.tokens, 1.0) if own and demonstration is None else demonstration


def merge(parts: Sequence[Rows]) -> Rows:
    """Join the groups of all rounds into one batch, with a unique id for each group."""
    width = max(part.prompt_BS.size(1) for part in parts)

    def wide(part: Rows) -> Rows:
        missing = (width - part.prompt_BS.size(1), 0)
        prompt_BS, mask_BS = (torch.nn.functional.pad(column, missing) for column in part[:2])
        return part._replace(prompt_BS=prompt_BS, prompt_mask_BS=mask_BS)

    whole = Rows(*(torch.cat(columns) for columns in zip(*map(wide, parts), strict=True)))
    apart = [part.group_B + 1_000_000 * number for number, part in enumerate(parts)]
    return whole._replace(group_B=torch.cat(apart))


def deviation(gradient: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """The relative deviation ‖g − g_on‖ / ‖g_on‖; infinite if only g is nonzero, and 0 if both are equal."""
    norm = torch.cat([g.flatten() for g in own]).norm()
    difference = torch.cat([(g - o).flatten() for g, o in zip(gradient, own, strict=True)]).norm()
    return (difference / norm).item() if difference > 0 else 0.0


# --- the model -------------------------------------------------------


class Policy:
    """A Hugging Face causal language model with its tokenizer, and the task that it learns."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, *, dtype: str = "float32") -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self._end, self._dtype = tokenizer.eos_token_id, dtype

    @classmethod
    def of(cls, settings: Settings, task: Task) -> Policy:
        """Load the model that the settings name, or else the task's own."""
        if settings.model:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(settings.model)
        else:
            model, tokenizer = task.fresh_model()
        return cls(model.to(settings.device), tokenizer, task, dtype=settings.dtype)

    def encode(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and masks of prompts, both (B, S), padded on the left."""
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        ids = [self.tokenizer.encode(str(text), add_special_tokens=False) for text in texts]
        width = max(map(len, ids))
        prompts = [[self._end] * (width - len(row)) + row for row in ids]
        masks = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
        return torch.tensor(prompts, device=self.model.device), torch.tensor(masks, device=self.model.device)

    def demonstration(self, problem: Problem) -> Demonstration | None:
        """The problem's demonstration as tokens; None if there is none or the reward function rejects it."""
        if problem.demonstration is None or not self.task.is_right(problem, problem.demonstration):
            return None
        tokens = demonstration_tokens(
            problem.demonstration,
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            generation_prompt="",
            end_token=self._end,
            end_tokens=[self._end],
            max_tokens=self.task.tokens,
        )
        return None if isinstance(tokens, Refusal) else Demonstration(tokens, 1.0)

    def demonstration_rows(self, problems: Sequence[Problem]) -> Rows:
        """A batch of the problems' demonstrations, one row each; problems without one are left out."""
        pairs = [(p.question, d) for p in problems if (d := self.demonstration(p)) is not None]
        width = max(len(d.tokens) for _, d in pairs)
        device = self.model.device
        return Rows(
            *self.encode([question for question, _ in pairs]),
            torch.tensor([d.tokens + d.tokens[-1:] * (width - len(d.tokens)) for _, d in pairs], device=device),
            torch.tensor([[1] * len(d.tokens) + [0] * (width - len(d.tokens)) for _, d in pairs], device=device),
            torch.tensor([d.score for _, d in pairs], device=device),
            torch.arange(len(pairs), device=device),
            torch.ones(len(pairs), dtype=torch.bool, device=device),
        )

    def rollouts(self, problems: Sequence[Problem], rollouts: Sequence[int], generator: torch.Generator) -> Rows:
        """Sample and score responses, as many for each problem as `rollouts` says."""
        repeated = [problem for problem, count in zip(problems, rollouts, strict=True) for _ in range(count)]
        prompt_BS, prompt_mask_BS = self.encode([problem.question for problem in repeated])
        device = prompt_BS.device
        response_BT, mask_BT = self.sample(prompt_BS, prompt_mask_BS, generator)
        return Rows(
            prompt_BS,
            prompt_mask_BS,
            response_BT,
            mask_BT,
            self.scores(repeated, response_BT, mask_BT),
            torch.arange(len(problems), device=device).repeat_interleave(torch.tensor(rollouts, device=device)),
            torch.zeros(len(repeated), dtype=torch.bool, device=device),
        )

    def solutions(self, problems: Sequence[Problem], rows: Rows) -> Iterator[tuple[int, Response]]:
        """The successes among rollouts with their end of sequence, by the key of their problem: one problem a group."""
        for i, length in enumerate(rows.mask_BT.sum(1).tolist()):
            tokens = rows.response_BT[i, :length].tolist()
            if rows.score_B[i] >= 1 and tokens[-1] == self._end:
                yield prompt_key(problems[int(rows.group_B[i])].question), Response(tokens, [1] * length, 1)

    def texts(self, response_BT: Tensor, mask_BT: Tensor) -> list[str]:
        """The texts of responses, without the end of sequence."""
        return self.tokenizer.batch_decode(
            torch.where(mask_BT.bool(), response_BT, self._end), skip_special_tokens=True
        )

    def scores(self, problems: Sequence[Problem], response_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The scores (B,) of responses: 1 for a right answer, else 0."""
        texts = self.texts(response_BT, mask_BT)
        right = [float(self.task.is_right(p, text)) for p, text in zip(problems, texts, strict=True)]
        return torch.tensor(right, device=response_BT.device)

    def answers(self, problems: Sequence[Problem]) -> list[str]:
        """The model's greedy answers."""
        return self.texts(*self.sample(*self.encode([problem.question for problem in problems]), None))

    def heldout_success(self) -> dict[str, float]:
        """The success rate of greedy answers on each set of held-out problems, by the name of its metric."""
        return {
            name: sum(map(self.task.is_right, problems, self.answers(problems))) / len(problems)
            for name, problems in self.task.heldout.items()
        }

    @torch.no_grad()
    def sample(
        self, prompt_BS: Tensor, prompt_mask_BS: Tensor, generator: torch.Generator | None, tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample responses; returns token ids and masks, both (B, T). Without a generator decoding is greedy."""
        mask_BS, state, inputs, response = prompt_mask_BS, None, prompt_BS, []
        going_B = torch.ones(len(prompt_BS), dtype=torch.bool, device=prompt_BS.device)
        with self._autocast():
            for _ in range(tokens or self.task.tokens):
                positions = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -inputs.size(1) :]
                output = self.model(
                    inputs,
                    attention_mask=mask_BS,
                    position_ids=positions,
                    past_key_values=state,
                    use_cache=True,
                    logits_to_keep=1,
                )
                state, logits_BV = output.past_key_values, output.logits[:, -1].float()
                if generator is None:
                    inputs = logits_BV.argmax(-1, keepdim=True)
                else:
                    inputs = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
                response.append(inputs)
                mask_BS = torch.nn.functional.pad(mask_BS, (0, 1), value=1)
                going_B &= inputs[:, 0] != self._end
                if not going_B.any():
                    break
        response_BT = torch.cat(response, dim=1)
        # Pad to the full length, since an injected demonstration may be longer than the sampled responses.
        response_BT = torch.nn.functional.pad(
            response_BT, (0, (tokens or self.task.tokens) - response_BT.size(1)), value=self._end
        )
        return response_BT, mask_until(response_BT, self._end)

    def token_scores(self, rows: Rows, *, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the responses' tokens and entropies (0 if not asked for), nats, both (B, T)."""
        logp_BTV = self.log_probabilities(rows)
        logp_BT = logp_BTV.gather(-1, rows.response_BT.unsqueeze(-1)).squeeze(-1)
        if not with_entropy:
            return logp_BT, torch.zeros_like(logp_BT)
        return logp_BT, -(logp_BTV.exp() * logp_BTV).sum(-1)

    def log_probabilities(self, rows: Rows) -> Tensor:
        """Log-probabilities of all V tokens at each position of the responses, (B, T, V), nats."""
        mask = torch.cat([rows.prompt_mask_BS, rows.mask_BT], dim=1)
        with self._autocast():
            logits = self.model(
                torch.cat([rows.prompt_BS, rows.response_BT], dim=1),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=rows.response_BT.size(1) + 1,
            ).logits[:, :-1]
        return logits.float().log_softmax(-1)

    def _autocast(self) -> torch.autocast:
        """A context for matrix products in `dtype`; weights and sums stay in float32."""
        enabled = self._dtype != "float32"
        return torch.autocast(self.model.device.type, getattr(torch, self._dtype) if enabled else None, enabled=enabled)


def mask_until(response_BT: Tensor, end: int) -> Tensor:
    """A mask that is 1 up to and including the first end of sequence, and 0 after it."""
    ended_BT = (response_BT == end).cumsum(1)
    return ((ended_BT == 0) | ((ended_BT == 1) & (response_BT == end))).long()


def settings_of(argv: Sequence[str] | None = None) -> Settings:
    """Parse the command line, which has an option for every field of `Settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Settings()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return replace(Settings(), **vars(parser.parse_args(argv)))


def show(record: dict[str, float]) -> None:
    """Print a record that has a held-out success, as one line."""
    if "heldout_success" in record:
        print("  ".join(f"{name} {value:.3g}" for name, value in record.items()), flush=True)


if __name__ == "__main__":
    train(settings_of(), show)
