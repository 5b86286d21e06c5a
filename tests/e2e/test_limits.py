"""When the gate stops firing, the run is verl's GRPO; and the plain loop gives the results of the trainer.

Sessions are scripted and the optimizer is plain SGD, so every run has the same rollouts. In step 1 of the annealed run,
`+hapo=plus`, the gate is the paper's, and its threshold is 0 from step 2 on; verl's own GRPO and `+hapo=grpo` continue
from its first checkpoint. The annealed run leaves out rows without a gradient, the other two train on every row.
"""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from hapo_verl.algo.gate import Situation
from tests.e2e.agent_loops import scripted_answer
from tests.e2e.conftest import PROMPTS, QUICKSTART, ROLLOUTS
from tests.recipes.plain import plain_loop

pytestmark = [pytest.mark.e2e, pytest.mark.long]

# The optimizer is plain SGD, because Adam would make differences in the last bits larger.
SCRIPTED = [
    "actor_rollout_ref.rollout.agent.default_agent_loop=scripted",
    "actor_rollout_ref.actor.optim.optimizer=SGD",
    "actor_rollout_ref.actor.optim.lr=0.1",
    # The learning rate does not depend on the number of steps.
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    "actor_rollout_ref.actor.optim.weight_decay=0",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
]
GRPO = [
    "algorithm.adv_estimator=grpo",
    f"trainer.v1.sampler.custom_sampler.path={QUICKSTART / 'eager_replay_buffer.py'}",
    "trainer.v1.sampler.custom_sampler.name=EagerReplayBuffer",
]
HAPO = [
    "trainer.v1.trainer_mode=hapo_sync",
    "hapo.poll_interval=0.05",
    "hapo.trace_dir={folder}/trace",
]
ANNEALED = ["+hapo=plus", *HAPO, "hapo.gate.horizon=1"]


@pytest.fixture(scope="module")
def annealed(trainer):
    return trainer("annealed", *ANNEALED, *SCRIPTED, steps=4, whole=False)


def parameters(run, step):
    (path,) = (run.folder / "checkpoints" / f"global_step_{step}" / "actor").glob("model_world_size_1_rank_0.pt")
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in torch.load(path, weights_only=False).items()
    }


def largest(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def rows_of(run, groups):
    """The rows with an advantage that is not 0."""
    uids = {group["uid"] for group in groups}
    return [row for row in run.loss_rows if row["uid"] in uids and any(row["advantages"])]


def test_the_threshold_falls_to_zero_and_with_it_every_injection(annealed):
    first = [group for group in annealed.groups if group["step"] == 1]
    later = [group for group in annealed.groups if group["step"] > 1]
    assert {group["outcome"] for group in first} == {"injected"}
    assert {group["outcome"] for group in later} == {"not_fired"}
    assert len(later) == 3 * PROMPTS
    assert [logged["hapo/gate/threshold"] for logged in annealed.steps] == pytest.approx([0.8, 0.0, 0.0, 0.0])


def test_after_that_the_rows_and_advantages_are_those_of_verls_grpo_exactly(annealed, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    later = [group for group in annealed.groups if group["step"] > 1]
    left_out = 0
    for group in later:
        rows = rows_of(annealed, [group])
        assert not any(row["hapo_demonstration"] for row in rows)
        scores = torch.tensor([[score] for score in group["scores"]])
        verls, _ = compute_grpo_outcome_advantage(scores, torch.ones_like(scores), np.zeros(len(scores)))
        by_response = sorted((row["responses"], row["advantages"]) for row in rows)
        sessions = [session_tokens(annealed, tokenizer, group["index"], session)[0] for session in range(ROLLOUTS)]
        expected = [
            (tokens, [value] * len(tokens))
            for tokens, value in zip(sessions, verls[:, 0].tolist(), strict=True)
            if value
        ]
        assert by_response == sorted(expected)
        left_out += ROLLOUTS - len(expected)
    assert left_out > 0


def test_only_rows_with_a_gradient_and_rows_that_fill_micro_batches_are_computed(annealed):
    rows = [row for row in annealed.loss_rows if any(row["response_mask"])]
    moving = [row for row in rows if any(row["advantages"])]
    assert len(rows) < len(moving) + 4 * 16
    batches = [PROMPTS * (ROLLOUTS + 1), *[PROMPTS * ROLLOUTS] * 3]
    shares = [logged["hapo/trained/row_share"] for logged in annealed.steps]
    assert sum(share * size for share, size in zip(shares, batches, strict=True)) == pytest.approx(len(rows))
    assert min(shares) < 1
    for logged in annealed.steps:
        # Each step is one update, so old log-probs are not computed.
        assert logged["timing_s/old_log_prob"] < 0.1
        assert not any(name.startswith(("actor/entropy", "training/rollout", "rollout_corr")) for name in logged)


@pytest.mark.parametrize("preset", ["verl's own", "+hapo=grpo"])
def test_three_steps_without_an_injected_row_give_the_parameters_of_grpo(annealed, trainer, preset):
    resume = f"trainer.resume_from_path={annealed.folder / 'checkpoints' / 'global_step_1'}"
    chosen = GRPO if preset == "verl's own" else [preset, *HAPO]
    grpo = trainer("grpo", *chosen, *SCRIPTED, "trainer.resume_mode=resume_path", resume, steps=4)
    if preset != "verl's own":
        assert {group["outcome"] for group in grpo.groups} == {"not_fired"}
    start, ours, theirs = parameters(annealed, 1), parameters(annealed, 4), parameters(grpo, 4)
    assert ours.keys() == theirs.keys()
    moved = largest(ours, start)
    # Rows are in another order, so gradients are summed in another order: only the last bits of fp32 differ.
    assert moved > 1e-3
    assert largest(ours, theirs) < 1e-6 * max(1, moved)


def session_tokens(run, tokenizer, index, session):
    """Response and score of a scripted session."""
    answer = answers(run)[index]
    text = scripted_answer(answer, session)
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], float(text == answer)


def answers(run):
    return {info["index"]: text for info, text in zip(run.train["extra_info"], run.train["demonstration"], strict=True)}


def test_the_plain_loop_gives_the_trainers_rows_advantages_and_gradient(annealed, model):
    """For the same rollouts, rows after injection, advantages and the first step's gradient are compared."""
    groups = [group for group in annealed.groups if group["step"] == 1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = plain_loop.Settings(digits=3, exponent=0.0, shaping=1.0)
    task = plain_loop.make_task(settings)
    tiny = AutoModelForCausalLM.from_pretrained(model)
    policy = plain_loop.Policy(tiny, tokenizer, task)
    problems = [task.problem(answers(annealed)[group["index"]][::-1]) for group in groups]
    sessions = [
        session_tokens(annealed, tokenizer, group["index"], session) for group in groups for session in range(ROLLOUTS)
    ]
    prompt_BS, prompt_mask_BS = policy.encode([problem.question for problem in problems for _ in range(ROLLOUTS)])
    rows = plain_loop.Rows(
        prompt_BS=prompt_BS,
        prompt_mask_BS=prompt_mask_BS,
        response_BT=torch.tensor([tokens for tokens, _ in sessions]),
        mask_BT=torch.ones(len(sessions), 4, dtype=torch.int64),
        score_B=torch.tensor([score for _, score in sessions]),
        group_B=torch.arange(PROMPTS).repeat_interleave(ROLLOUTS),
        demonstration_B=torch.zeros(len(sessions), dtype=torch.bool),
    )
    for number, (group, problem) in enumerate(zip(groups, problems, strict=True)):
        rng = random.Random(f"0/1/{group['index']}")
        successes = sum(group["successes"])
        assert plain_loop.decide("paper", Situation(), successes, ROLLOUTS, rng)
        members = range(number * ROLLOUTS, (number + 1) * ROLLOUTS)
        rows = plain_loop.inject(rows, members, policy.demonstration(problem), "append", rng)
    advantage_B = plain_loop.advantages(rows, "on_policy", scale_by_std=True)

    for number, group in enumerate(groups):
        members = rows.group_B == number
        plain = [
            row
            for row in zip(
                rows.response_BT[members].tolist(),
                rows.demonstration_B[members].tolist(),
                advantage_B[members].tolist(),
                strict=True,
            )
            if row[2]
        ]
        trained = [
            (row["responses"], row["hapo_demonstration"], row["advantages"][0]) for row in rows_of(annealed, [group])
        ]
        assert sorted(plain) == sorted(trained)

    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    plain_loop.loss_of(policy, rows, advantage_B, settings).backward()
    gradient = {name: parameter.grad for name, parameter in tiny.named_parameters()}
    norm = torch.cat([value.flatten() for value in gradient.values()]).norm().item()
    assert annealed.steps[0]["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)
    after = parameters(annealed, 1)
    moved = {name: start[name] - after[name] for name in gradient}
    length = torch.cat([value.flatten() for value in moved.values()]).norm().item()
    for name, value in gradient.items():
        assert (moved[name] / length - value / norm).abs().max() < 1e-5, name
