"""Sizes that do not fit together are named before anything is started; sizes that fit are described."""

import pytest

from hapo_verl.config import ConfigError
from hapo_verl.launch.sizes import check_sizes, tokens_at_a_time

FITS = ("data.train_batch_size=128", "actor_rollout_ref.actor.ppo_mini_batch_size=64", "trainer.nnodes=2")
DYNAMIC = (*FITS, "actor_rollout_ref.actor.use_dynamic_bsz=True")
FIXED = (
    *FITS,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
)


def test_the_rows_of_a_step_are_described(launch):
    assert check_sizes(launch(*DYNAMIC)) == (
        "128 prompts x 8 rollouts = 1024 rows a step, 2 update(s) of 32 rows on each of 16 rank(s)"
    )
    sequence_parallel = launch(*FIXED, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2")
    assert check_sizes(sequence_parallel).endswith("2 update(s) of 64 rows on each of 8 rank(s)")


def test_the_tokens_of_a_micro_batch(launch):
    assert tokens_at_a_time(launch(*DYNAMIC)) == 16384
    assert tokens_at_a_time(launch(*FIXED, "data.max_prompt_length=100", "data.max_response_length=200")) == 1200


SEPARATE = (*DYNAMIC, "trainer.v1.trainer_mode=hapo_separate_async", "data.train_batch_size=256")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*DYNAMIC, "data.train_batch_size=null"),
            "data.train_batch_size=None: a count is a positive integer. Use a whole number of at least 1.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.rollout.tensor_model_parallel_size=0"),
            "actor_rollout_ref.rollout.tensor_model_parallel_size=0: a count is a positive integer. Use a whole number of at least 1.",
        ),
        (
            (*FIXED, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1.5"),
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1.5: a count is a positive integer. Use a whole number of at least 1.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=null"),
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=None: a number of tokens is needed. Use actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024 or more.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.actor.ppo_mini_batch_size=96"),
            "actor_rollout_ref.actor.ppo_mini_batch_size=96: data.train_batch_size=128 is no multiple of it, and the last "
            "update of a step would be filled with copies. Use actor_rollout_ref.actor.ppo_mini_batch_size=64.",
        ),
        (
            (*DYNAMIC, "trainer.v1.trainer_mode=hapo_separate_async"),
            "data.train_batch_size=128: separate_async makes trainer.v1.separate_async.parameter_sync_step=4 updates of "
            "actor_rollout_ref.actor.ppo_mini_batch_size=64. Use data.train_batch_size=256.",
        ),
        (
            SEPARATE,
            "actor_rollout_ref.rollout.nnodes=0: separate_async needs nodes that generate. Use 1.",
        ),
        (
            (*SEPARATE, "actor_rollout_ref.rollout.nnodes=1"),
            "actor_rollout_ref.rollout.checkpoint_engine.backend=naive: this backend sends no weights to other nodes. Use nccl.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"),
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=3: 16 GPUs train. Use a divisor of 16.",
        ),
        (
            (*DYNAMIC, "trainer.nnodes=3", "actor_rollout_ref.actor.ppo_mini_batch_size=32"),
            "actor_rollout_ref.actor.ppo_mini_batch_size=32: its 32 x 8 rows cannot be divided evenly among 24 "
            "data-parallel ranks. Use a size whose product with actor_rollout_ref.rollout.n=8 can.",
        ),
        (
            FITS,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=None: a number of rows is needed. "
            "Use actor_rollout_ref.actor.use_dynamic_bsz=true.",
        ),
        (
            (*FIXED, "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=5"),
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=5: a rank has 32 rows of a mini-batch. "
            "Use a divisor of 32, or actor_rollout_ref.actor.use_dynamic_bsz=true.",
        ),
        (
            (*FIXED, "actor_rollout_ref.actor.use_kl_loss=True"),
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=None: a number of rows is needed. "
            "Use actor_rollout_ref.actor.use_dynamic_bsz=true.",
        ),
        (
            (*DYNAMIC, "data.max_response_length=16384", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1"),
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384: a row may have data.max_prompt_length + "
            "data.max_response_length = 16896 tokens. Use actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16896 or more.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.rollout.max_model_len=1000"),
            "actor_rollout_ref.rollout.max_model_len=1000: prompts and responses may have 1024 tokens together. "
            "Use actor_rollout_ref.rollout.max_model_len=1024.",
        ),
        (
            (*DYNAMIC, "actor_rollout_ref.rollout.tensor_model_parallel_size=6"),
            "actor_rollout_ref.rollout.tensor_model_parallel_size=6: a server takes 6 GPUs and there are 16. "
            "Use a divisor of 16.",
        ),
    ],
)
def test_each_number_that_does_not_fit_gets_its_own_line(launch, overrides, message):
    with pytest.raises(ConfigError) as error:
        check_sizes(launch(*overrides))
    assert str(error.value) == message
