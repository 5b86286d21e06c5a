"""Computes the weights of the likelihoods before an optimizer step, for the objectives that have such weights.

A row's weight depends on the policy's log-probabilities or entropy on other rows, which may be in other micro-batches
and on other ranks. So each rank makes one pass without gradients over its rows, the ranks exchange a few numbers per
row, and every rank computes all weights and keeps its own. The weights do not depend on how the step is divided.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from hapo_kernels.segment_norm import segment_ids
from hapo_verl.algo.objectives import Objective, Rows
from hapo_verl.protocol import jagged
from hapo_verl.protocol.rows import (
    LIKELIHOOD_WEIGHT,
    OBJECTIVE_LOSS,
    SINGLE_UPDATE,
    demonstration_flags,
    mini_batch,
    plain_values,
)


def weigh_likelihoods(engine: Any, data: TensorDict, objective: Objective) -> None:
    """Write `hapo_likelihood_weight` and `hapo_objective_loss` into the data of an optimizer step.

    Args:
        engine: verl's engine, about to train on the data.
        data: this rank's rows, one jagged tensor per field.
        objective: an objective that weights likelihoods.
    """
    mask = data["response_mask"]
    tokens_B = jagged.row_sums(mask).cpu()
    log_ratio_B, entropy_B = _policy_means(engine, data, tokens_B, objective.reads)
    score_B = jagged.row_sums(data["rm_scores"]).cpu()
    own = list(
        zip(
            plain_values(data["uid"]),
            score_B.tolist(),
            demonstration_flags(data).tolist(),
            tokens_B.tolist(),
            log_ratio_B.tolist(),
            entropy_B.tolist(),
            strict=True,
        )
    )
    group = engine.get_data_parallel_group()
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    everyone = [row for rank in gathered for row in rank]
    # A row without a token that trains is padding, or was masked out by rollout correction.
    training = [i for i, row in enumerate(everyone) if row[3] > 0]
    weight_B, loss = torch.zeros(len(everyone), dtype=torch.float64), None
    if training:
        uid, score, demonstration, tokens, log_ratio, entropy = zip(*(everyone[i] for i in training), strict=True)
        whole = mini_batch(data)
        rows = Rows(
            torch.tensor(score, dtype=torch.float64),
            segment_ids(uid),
            torch.tensor(demonstration, dtype=torch.bool),
            torch.tensor(tokens),
            torch.tensor(log_ratio, dtype=torch.float64),
            torch.tensor(entropy, dtype=torch.float64),
            batch_size=int(data["global_batch_size"]) if whole is None else whole.rows,
            groups=len(set(uid)) if whole is None else whole.groups,
        )
        weight_B[training], loss = objective.likelihood_weight(rows), objective.loss(rows)
    first = sum(map(len, gathered[: dist.get_rank(group)]))
    data[LIKELIHOOD_WEIGHT] = weight_B[first : first + len(own)].float().to(mask.device)
    tu.assign_non_tensor(data, **{OBJECTIVE_LOSS: None if loss is None else loss.item()})


def _policy_means(engine: Any, data: TensorDict, tokens_B: Tensor, reads: frozenset[str]) -> tuple[Tensor, Tensor]:
    """The mean log π − log π_old and the mean entropy of each of this rank's rows; 0 if `reads` does not name them."""
    nothing_B = torch.zeros(len(data), dtype=torch.float64)
    single_update = tu.get_non_tensor_data(data=data, key=SINGLE_UPDATE, default=False)
    if reads == {"log_ratio"} and single_update:
        return nothing_B, nothing_B
    probe = data.copy()
    tu.assign_non_tensor(probe, calculate_entropy="entropy" in reads)
    output = engine.infer_batch(probe)["model_output"]
    fields = ["response_mask"] + ["old_log_probs"] * ("log_ratio" in reads)
    padded = data.select(*fields).to_padded_tensor()
    active_BT = padded["response_mask"].bool()

    def mean(value_BT: Tensor) -> Tensor:
        total_B = torch.where(active_BT.to(value_BT.device), value_BT, 0.0).double().sum(1).cpu()
        return total_B / tokens_B.clamp(min=1)

    log_ratio_B = entropy_B = nothing_B
    if "log_ratio" in reads:
        logp_BT = no_padding_2_padding(output["log_probs"], data)
        log_ratio_B = mean(logp_BT - padded["old_log_probs"].to(logp_BT.device))
    if "entropy" in reads:
        entropy_B = mean(no_padding_2_padding(output["entropy"], data))
    return log_ratio_B, entropy_B
