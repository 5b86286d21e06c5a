"""What the trainer reads from a batch and writes back: verl's comparison and correction on the sampled rows only.

TransferQueue is a dictionary here, and log-probs are made up; verl's own methods are called unchanged.
"""

from types import SimpleNamespace

import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from hapo_verl.driver.idle_rows import Savings
from hapo_verl.driver.trainer import HapoTrainerSync
from hapo_verl.rollout.reward import RewardError

PROMPT, LENGTHS, DEMONSTRATIONS = 2, [3, 7, 1, 5, 6, 4], [False, False, True, False, True, False]
SAMPLED = [i for i, flag in enumerate(DEMONSTRATIONS) if not flag]


class Queue:
    """Rows by key, and records of what was read and written."""

    def __init__(self, rows):
        self.rows, self.read, self.written = rows, [], []

    def get(self, keys, partition_id, select_fields):
        self.read += select_fields
        names = [name for name in select_fields if all(name in self.rows[key] for key in keys)]
        return list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])

    def put(self, keys, partition_id, fields):
        self.written += list(fields.keys())
        for name in fields.keys():  # noqa: SIM118
            for key, row in zip(keys, fields[name].unbind(), strict=True):
                self.rows[key][name] = row
        return BATCH


KEYS = [f"u_{session}_0" for session in range(len(LENGTHS))]
BATCH = tq.KVBatchMeta(keys=KEYS, tags=[{} for _ in KEYS], partition_id="train", extra_info={})


@pytest.fixture
def queue(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for key, length, demonstration in zip(KEYS, LENGTHS, DEMONSTRATIONS, strict=True):
        mask = (torch.rand(length, generator=generator) < 0.8).long()
        mask[0] = 1
        log_probs = -torch.rand(PROMPT + length, generator=generator)
        sampled = -torch.rand(length, generator=generator)
        rows[key] = {
            "response_mask": mask,
            "responses": torch.zeros(length, dtype=torch.int64),
            "rollout_log_probs": torch.full_like(sampled, torch.nan) if demonstration else sampled,
            "log_probs": log_probs,
            "entropy": log_probs.abs(),
            "hapo_demonstration": torch.tensor(demonstration),
        }
    queue = Queue(rows)
    monkeypatch.setattr(tq, "kv_batch_get", queue.get)
    monkeypatch.setattr(tq, "kv_batch_put", queue.put)
    return queue


def a_trainer(calculate_log_probs=True, **correction):
    trainer = object.__new__(HapoTrainerSync)
    trainer._leaves_out = Savings(*["the whole batch is computed"] * 3)
    trainer.config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {"calculate_log_probs": calculate_log_probs, "temperature": 1.0},
                "actor": {"loss_agg_mode": "token-mean", "loss_scale_factor": None},
            },
            "algorithm": {"rollout_correction": {"rollout_is": None, "rollout_rs": None, **correction}},
        }
    )
    trainer.actor_rollout_wg = SimpleNamespace(compute_log_prob=lambda batch: batch)
    return trainer


def sampled_rows(queue, *names):
    """These fields of the sampled rows, padded."""
    rows = [queue.rows[KEYS[i]] for i in SAMPLED]
    padded = {name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True) for name in names}
    return DataProto(batch=TensorDict(padded, batch_size=len(rows)))


def old_log_probs(queue, trainer):
    metrics = {}
    trainer._compute_old_log_prob(BATCH, metrics)
    return metrics


def test_rollout_and_actor_are_compared_on_the_sampled_rows_like_in_verl(queue):
    metrics = old_log_probs(queue, a_trainer())
    verls = calculate_debug_metrics(
        sampled_rows(queue, "response_mask", "responses", "rollout_log_probs", "old_log_probs")
    )
    assert {name: metrics[name] for name in verls} == verls


def test_only_a_demonstrations_rollout_log_probs_become_its_old_log_probs(queue):
    before = {key: row["rollout_log_probs"].clone() for key, row in queue.rows.items()}
    old_log_probs(queue, a_trainer())
    for key, demonstration in zip(KEYS, DEMONSTRATIONS, strict=True):
        row = queue.rows[key]
        assert torch.equal(row["rollout_log_probs"], row["old_log_probs"] if demonstration else before[key])


def test_each_token_of_a_rollout_is_read_once(queue):
    trainer = a_trainer()
    old_log_probs(queue, trainer)
    assert queue.read.count("rollout_log_probs") == 1
    assert "responses" not in queue.read
    assert trainer.config.actor_rollout_ref.rollout.calculate_log_probs


def test_without_rollout_log_probs_nothing_is_compared(queue):
    metrics = old_log_probs(queue, a_trainer(calculate_log_probs=False))
    assert list(metrics) == ["actor/entropy"]


def corrected(queue, **correction):
    """The fields that rollout correction changes, its metrics, and verl's correction of the sampled rows only."""
    trainer = a_trainer(**correction)
    old_log_probs(queue, trainer)
    names = ["response_mask", "rollout_log_probs", "old_log_probs"]
    metrics = {}
    fields = trainer._correct_rollouts(queue.get(KEYS, "train", names), ~torch.tensor(DEMONSTRATIONS), metrics)
    verls, verls_metrics = compute_rollout_correction_and_add_to_batch(
        sampled_rows(queue, *names), trainer.config.algorithm.rollout_correction
    )
    assert metrics == verls_metrics
    return fields, verls.batch


def test_a_mask_without_rejections_is_not_written_again(queue):
    fields, _ = corrected(queue)
    assert fields == {}


def test_weights_and_rejections_equal_verls_and_demonstrations_keep_all_tokens(queue):
    fields, verls = corrected(queue, rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold="0.7_1.4")
    assert set(fields) == {"response_mask", "rollout_is_weights"}
    masks, weights = (fields[name].unbind() for name in ("response_mask", "rollout_is_weights"))
    kept = [0, 0]
    for i, row in enumerate(queue.rows[key] for key in KEYS):
        if DEMONSTRATIONS[i]:
            assert torch.equal(masks[i], row["response_mask"])
            assert (weights[i] == 1).all()
        else:
            number = SAMPLED.index(i)
            assert torch.equal(masks[i], verls["response_mask"][number, : LENGTHS[i]])
            assert torch.equal(weights[i], verls["rollout_is_weights"][number, : LENGTHS[i]])
            kept[0] += int(masks[i].sum())
            kept[1] += int(row["response_mask"].sum())
    assert 0 < kept[0] < kept[1]


def test_a_step_without_any_reward_ends_the_run_with_what_to_check():
    trainer = object.__new__(HapoTrainerSync)
    trainer.global_steps = 3
    with pytest.raises(RewardError) as error:
        trainer._balance_batch(tq.KVBatchMeta(keys=[], tags=[], partition_id="train"), {})
    assert str(error.value) == (
        "step 3: no rollout has a reward, so there is nothing to train on. Look for the error of the reward function, or of "
        "the agent loop, in the lines of the agent loop worker above."
    )
