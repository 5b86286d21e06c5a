"""Divides the rows of a step into mini-batches: as many as configured, of equal size, and of whole groups if needed.

verl itself pads a batch to whole mini-batches of `ppo_mini_batch_size * n` rows, and distributes rows over ranks and
mini-batches by their length alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions


def grown_mini_batch(
    actor_rollout_ref: Any, rows: int, appended: int, dp_size: int, group_sizes: Sequence[int] | None = None
) -> tuple[int, int]:
    """The number of mini-batches of a step, and the size of each one in prompts (of n rows).

    The number is the same as without the appended rows, so the mini-batches grow to hold these.

    Args:
        actor_rollout_ref: verl's block of that name.
        rows: number of rows of the batch, without padding.
        appended: number of these rows that are appended demonstrations.
        dp_size: number of data-parallel ranks.
        group_sizes: number of rows of each group, if every group must lie within one mini-batch.
    """
    actor, rollout, ref = actor_rollout_ref.actor, actor_rollout_ref.rollout, actor_rollout_ref.ref
    updates = math.ceil((rows - appended) / (actor.ppo_mini_batch_size * rollout.n))
    prompts = math.ceil(rows / (updates * rollout.n))
    # The size of fixed micro-batches must divide the number of a rank's rows.
    of_update = dp_size if actor.use_dynamic_bsz else dp_size * (actor.ppo_micro_batch_size_per_gpu or 1)
    of_forward = [
        dp_size if block.log_prob_use_dynamic_bsz else dp_size * (block.log_prob_micro_batch_size_per_gpu or 1)
        for block in (rollout, ref)
    ]

    def fits(prompts: int) -> bool:
        size = prompts * rollout.n
        divides = size % of_update == 0 and all(updates * size % multiple == 0 for multiple in of_forward)
        return divides and (group_sizes is None or pack(group_sizes, [0] * len(group_sizes), updates, size) is not None)

    while not fits(prompts):
        prompts += 1
    return updates, prompts


def pack(sizes: Sequence[int], loads: Sequence[int], bins: int, capacity: int) -> list[int] | None:
    """Pack items into bins of a given capacity, with about equal loads; returns the bin of each item.

    Items are placed in the order of their size, the largest first, each into the bin with the least load that has room.
    If an item finds no room, all are placed again, each into the first bin with room, whatever the loads. None if they
    do not fit this way either.
    """
    largest_first = sorted(range(len(sizes)), key=lambda item: (-sizes[item], -loads[item], item))
    for balanced in (True, False):
        room, load, bin_of = [capacity] * bins, [0] * bins, [-1] * len(sizes)
        for item in largest_first:
            roomy = [b for b in range(bins) if room[b] >= sizes[item]]
            if not roomy:
                break
            chosen = min(roomy, key=lambda b: load[b]) if balanced else roomy[0]
            room[chosen] -= sizes[item]
            load[chosen] += loads[item]
            bin_of[item] = chosen
        else:
            return bin_of
    return None


def order_of_whole_groups(
    group_of: Sequence[Hashable], load_of: Sequence[int], mini_batches: int, dp_size: int
) -> list[int]:
    """An order of the rows in which every mini-batch, over all ranks together, consists of whole groups.

    verl gives rank r the r-th of `dp_size` equal slices, and cuts each slice into `mini_batches`.

    Args:
        group_of: the group of each row; a padding row is a group of its own.
        load_of: the cost of each row.
        mini_batches: number of mini-batches of the step; times `dp_size` it divides the number of rows.
        dp_size: number of data-parallel ranks.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(group_of):
        members[group].append(row)
    groups = list(members.values())
    loads = [sum(load_of[row] for row in group) for group in groups]
    bin_of = pack([len(group) for group in groups], loads, mini_batches, len(group_of) // mini_batches)
    assert bin_of is not None, "the batch was padded until its groups fit"
    members_of = [
        [row for group, b in zip(groups, bin_of, strict=True) if b == mini_batch for row in group]
        for mini_batch in range(mini_batches)
    ]
    return _order_of(members_of, load_of, dp_size)


class Reduced(NamedTuple):
    """The rows of a step that are trained on.

    Attributes:
        order: row numbers, in the order in which verl assigns them to ranks and mini-batches.
        rows: number of rows of one optimizer step, over all ranks.
        micro_batch: size of a fixed micro-batch that divides the rows of a rank; None for the configured size.
    """

    order: list[int]
    rows: int
    micro_batch: int | None = None


def reduced(
    keep: Sequence[bool], length_of: Sequence[int], mini_batches: int, dp_size: int, micro_batch: int | None = None
) -> Reduced:
    """Keep the rows with a gradient, and as few others as verl needs to divide the batch equally.

    verl's workers divide their rows into mini-batches of equal size, so every mini-batch gets the same number of rows
    on every rank. It is filled up with the shortest of its other rows. A mini-batch without a row to keep gets one such
    row per rank: verl then makes an optimizer step with gradient 0, and moments, weight decay and schedule advance.

    Args:
        keep: whether each row must be kept, in the order of the batch.
        length_of: number of tokens of each row.
        mini_batches: number of mini-batches of the step; times `dp_size` it divides the number of rows.
        dp_size: number of data-parallel ranks.
        micro_batch: largest size of a fixed micro-batch; None if micro-batches are divided by tokens.
    """
    rows = len(keep)
    of_slice = rows // dp_size // mini_batches
    members_of: list[list[int]] = [[] for _ in range(mini_batches)]
    for row, mini_batch in enumerate(mini_batch_of(rows, mini_batches, dp_size)):
        members_of[mini_batch].append(row)
    most = max(1, *(math.ceil(sum(keep[row] for row in members) / dp_size) for members in members_of))
    if micro_batch is not None:
        # The needed number of micro-batches, all of the same smaller size: so fewer rows must be filled in.
        parts = math.ceil(most / micro_batch)
        micro_batch = math.ceil(most / parts)
        most = parts * micro_batch
    if most >= of_slice:
        return Reduced(list(range(rows)), rows // mini_batches)
    chosen = []
    for members in members_of:
        shortest_first = sorted(members, key=lambda row: (not keep[row], length_of[row], row))
        chosen.append(sorted(shortest_first[: most * dp_size]))
    loads = calculate_workload(torch.tensor(length_of, dtype=torch.int64)).tolist()
    return Reduced(_order_of(chosen, loads, dp_size), most * dp_size, micro_batch)


def mini_batch_of(rows: int, mini_batches: int, dp_size: int) -> list[int]:
    """The mini-batch of each row as verl divides a batch: one slice per rank, then mini-batches within each slice."""
    of_rank = rows // dp_size
    return [row % of_rank // (of_rank // mini_batches) for row in range(rows)]


def _order_of(members_of: Sequence[Sequence[int]], load_of: Sequence[int], dp_size: int) -> list[int]:
    """The order of rows in which verl gives each rank the same number of rows, and about the same load."""
    slices: list[list[list[int]]] = []
    for rows in members_of:
        loads_here: Any = [load_of[row] for row in rows]
        parts: Any = get_seqlen_balanced_partitions(loads_here, k_partitions=dp_size, equal_size=True)
        slices.append([[rows[i] for i in part] for part in parts])
    return [row for rank in range(dp_size) for of_ranks in slices for row in of_ranks[rank]]
