"""The same completions give the same results in TRL's trainer, the plain loop and verl's trainer (`golden_step.json`)."""

import random

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
import torch

from hapo_verl.algo.advantage import session_advantage
from hapo_verl.algo.policy_loss import Aggregation, Clip, DemonstrationShape, hapo_policy_loss
from hapo_verl.trl.trainer import DEMONSTRATION
from tests.trl import golden_step
from tests.trl.conftest import PER_GROUP, rows
from tests.trl.test_trainer import generated, writes

# A success among failures, and only failures. Each group has one worst completion.
WRITTEN = (
    *("000<|im_end|>", "12<|im_end|>", "123456", "1234<|im_end|>"),
    *("9<|im_end|>", "12345<|im_end|>", "987654", "123<|im_end|>"),
)
SHAPES = {"paper": {}, "log": {"exponent": 0.0}, "trsft": {"shape": "trsft"}}


class Digits:
    """The tests' task with the plain loop's interface."""

    tokens = 6

    def is_right(self, problem, text):
        return text == problem.answer


def in_the_plain_loop(model, tokenizer, statistics, shape):
    """Rows, advantages and loss of the plain loop; the gradient is left in the model."""
    import plain_loop
    from task import Problem

    policy = plain_loop.Policy(model, tokenizer, Digits())
    problems = [Problem(row["prompt"][0]["content"], row["demonstration"], row["answer"]) for row in rows(2)]
    repeated = [problem for problem in problems for _ in range(PER_GROUP)]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in WRITTEN]
    response_BT = torch.tensor([row + [tokenizer.eos_token_id] * (6 - len(row)) for row in ids])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in ids])
    score_B = policy.scores(repeated, response_BT, mask_BT)
    batch = plain_loop.Rows(
        *policy.encode([problem.question for problem in repeated]),
        response_BT,
        mask_BT,
        score_B,
        torch.arange(2).repeat_interleave(PER_GROUP),
        torch.zeros(len(ids), dtype=torch.bool),
    )
    for number, problem in enumerate(problems):
        group = range(number * PER_GROUP, (number + 1) * PER_GROUP)
        batch = plain_loop.inject(batch, group, policy.demonstration(problem), "replace", random.Random(0))
    advantage_B = plain_loop.advantages(batch, statistics, scale_by_std=True)
    shaped = plain_loop.Settings(**shape)
    loss = plain_loop.loss_of(policy, batch, advantage_B, shaped)
    loss.backward()
    return batch, advantage_B, loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistics", ["on_policy", "all"])
def test_rows_advantages_loss_and_gradient_equal_those_of_the_plain_loop(trainer, tiny, monkeypatch, statistics, shape):
    hapo = trainer({"advantage": {"statistics": statistics}, "loss": SHAPES[shape]}, gradient_checkpointing=False)
    writes(hapo, monkeypatch, *WRITTEN)
    output = generated(hapo)
    hapo.current_gradient_accumulation_steps = 1
    loss = hapo.compute_loss(hapo.model, output)
    loss.backward()

    model, tokenizer = tiny()
    batch, advantage_B, expected = in_the_plain_loop(model, tokenizer, statistics, SHAPES[shape])
    assert output[DEMONSTRATION].tolist() == batch.demonstration_B.tolist()
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
    ] == [ids[mask.bool()].tolist() for ids, mask in zip(batch.response_BT, batch.mask_BT, strict=True)]
    assert torch.equal(output["advantages"], advantage_B)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for (name, ours), theirs in zip(hapo.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [("dapo", "token-mean"), ("grpo", "seq-mean-token-mean"), ("dr_grpo", "seq-mean-token-sum-norm")],
)
def test_advantages_and_loss_equal_those_of_verls_adapter(trainer, monkeypatch, loss_type, mode):
    hapo = trainer(loss_type=loss_type)
    writes(hapo, monkeypatch, *WRITTEN)
    output = generated(hapo)
    hapo.current_gradient_accumulation_steps = 1
    number, mask_BT, demonstration_B = len(output["advantages"]), output["completion_mask"], output[DEMONSTRATION]
    score_B = torch.zeros(number).masked_fill(demonstration_B, 1.0)
    score_B[0] = 1.0
    advantage_B = session_advantage(
        score_B,
        torch.arange(number) // PER_GROUP,
        torch.arange(number),
        torch.zeros(number, dtype=torch.int64),
        scale_by_std=True,
        apart_B=demonstration_B,
    )
    assert torch.equal(output["advantages"], advantage_B)
    logp_BT, _, _ = hapo._get_per_token_logps_and_entropies(
        hapo.model,
        torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
        torch.cat([output["prompt_mask"], mask_BT], dim=1),
        mask_BT.size(1),
    )
    expected = hapo_policy_loss(
        logp_BT,
        logp_BT.detach(),
        advantage_B,
        mask_BT,
        demonstration_B,
        shape=DemonstrationShape("power", 0.1, 1.0),
        clip=Clip(low=0.2, high=0.2, dual=3.0),
        aggregation=Aggregation(
            mode,
            batch_num_tokens=int(mask_BT.sum()),
            global_batch_size=number,
            loss_scale_factor=hapo.max_completion_length,
        ),
    )
    torch.testing.assert_close(hapo.compute_loss(hapo.model, output), expected.loss, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_loss_does_not_depend_on_gradient_accumulation(trainer, monkeypatch, loss_type):
    """Two passes with half of the rows each, as in gradient accumulation, add up to one pass with all rows."""
    losses = []
    for passes in (1, 2):
        hapo = trainer(
            loss_type=loss_type,
            gradient_accumulation_steps=passes,
            per_device_train_batch_size=2 * PER_GROUP // passes,
        )
        writes(hapo, monkeypatch, *WRITTEN)
        output = generated(hapo)
        hapo.current_gradient_accumulation_steps = passes
        width = len(output["advantages"]) // passes
        parts = [
            {key: value[i * width : (i + 1) * width] if value.ndim else value for key, value in output.items()}
            for i in range(passes)
        ]
        losses.append(sum(hapo.compute_loss(hapo.model, part).detach() for part in parts))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("name", golden_step.CASES)
def test_the_recorded_step_is_what_trls_trainer_does(name, tmp_path):
    """`tests/driver/test_trl.py` compares verl's worker, driver and actor with the same file."""
    recorded = golden_step.recorded()[name]
    found = golden_step.step(golden_step.CASES[name], tmp_path)
    assert found["written"] == recorded["written"]
    golden_step.assert_same(found, recorded)
