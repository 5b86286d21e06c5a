"""The estimator in verl's registry follows verl's contract if demonstrations are known, and otherwise refuses."""

import numpy as np
import pytest
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

from hapo_verl.config import ConfigError


def a_batch():
    generator = torch.Generator().manual_seed(0)
    reward_BT = torch.zeros(16, 5)
    reward_BT[:, -1] = torch.randint(0, 2, (16,), generator=generator).float()
    mask_BT = (torch.rand(16, 5, generator=generator) < 0.8).float()
    return reward_BT, mask_BT, np.array([f"uid-{i // 8}" for i in range(16)], dtype=object)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_on_verls_own_arguments_it_is_verls_grpo_to_the_last_bit(scale_by_std):
    reward_BT, mask_BT, uid = a_batch()
    verls, _ = compute_grpo_outcome_advantage(reward_BT, mask_BT, uid, norm_adv_by_std_in_grpo=scale_by_std)
    ours, returns = get_adv_estimator_fn("hapo")(
        token_level_rewards=reward_BT,
        response_mask=mask_BT,
        index=uid,
        config={"norm_adv_by_std_in_grpo": scale_by_std},
        demonstration=torch.zeros(16, dtype=torch.bool),
    )
    assert torch.equal(ours, verls)
    assert torch.equal(returns, ours)


def test_a_trainer_that_injects_nothing_is_refused_instead_of_training_grpo():
    reward_BT, mask_BT, uid = a_batch()
    with pytest.raises(ConfigError) as error:
        get_adv_estimator_fn("hapo")(token_level_rewards=reward_BT, response_mask=mask_BT, index=uid, config={})
    assert str(error.value) == (
        "algorithm.adv_estimator=hapo: this trainer injects no demonstrations. "
        "Launch with +hapo=paper trainer.v1.trainer_mode=hapo_sync."
    )
