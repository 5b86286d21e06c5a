"""How a step's rows are cut into optimizer steps: as many as configured, of one size, with whole groups where needed.

verl cuts a batch that it has padded to whole mini-batches of `ppo_mini_batch_size * n` rows, and spreads rows over
ranks and mini-batches by their length alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions


def grown_mini_batch(
    actor_rollout_ref: Any, rows: int, appended: int, dp_size: int, group_sizes: Sequence[int] | None = None
) -> tuple[int, int]:
    """Mini-batches a step, as many as without the appended rows, and prompts' worth of rows (of n) in each.

    Args:
        actor_rollout_ref: verl's block of that name.
        rows: rows of the batch, without padding.
        appended: those of them that are appended demonstrations.
        dp_size: data-parallel ranks.
        group_sizes: rows of each group, where no mini-batch may cut one.
    """
    actor, rollout, ref = actor_rollout_ref.actor, actor_rollout_ref.rollout, actor_rollout_ref.ref
    updates = math.ceil((rows - appended) / (actor.ppo_mini_batch_size * rollout.n))
    prompts = math.ceil(rows / (updates * rollout.n))
    # Fixed micro-batches have to divide what a rank gets.
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
    """The bin of each item, at most `capacity` in size in each, and about equal in load where sizes leave a choice.

    The largest first, into the bin of the least load that has room; where that ends badly, into the first that has
    room, which depends on the sizes alone. None where they do not fit so either.
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
    """An order of rows in which every mini-batch, taken over all ranks, holds whole groups.

    verl gives rank r the r-th of `dp_size` equal slices, and cuts each slice into `mini_batches`.

    Args:
        group_of: of each row, padding included (a group of its own).
        load_of: of each row, its cost.
        mini_batches: of the step; they and the ranks divide the rows evenly.
        dp_size: data-parallel ranks.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(group_of):
        members[group].append(row)
    groups = list(members.values())
    loads = [sum(load_of[row] for row in group) for group in groups]
    bin_of = pack([len(group) for group in groups], loads, mini_batches, len(group_of) // mini_batches)
    assert bin_of is not None, "the batch was padded until its groups fit"
    slices: list[list[list[int]]] = []
    for mini_batch in range(mini_batches):
        rows = [row for group, b in zip(groups, bin_of, strict=True) if b == mini_batch for row in group]
        loads_here: Any = [load_of[row] for row in rows]
        parts: Any = get_seqlen_balanced_partitions(loads_here, k_partitions=dp_size, equal_size=True)
        slices.append([[rows[i] for i in part] for part in parts])
    return [row for rank in range(dp_size) for of_ranks in slices for row in of_ranks[rank]]
