"""How a step's rows are cut into optimizer steps: as many as configured, of one size, with whole groups where needed.

verl cuts a batch that it has padded to whole mini-batches of `ppo_mini_batch_size * n` rows, and spreads rows over
ranks and mini-batches by their length alone.
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
    members_of = [
        [row for group, b in zip(groups, bin_of, strict=True) if b == mini_batch for row in group]
        for mini_batch in range(mini_batches)
    ]
    return _order_of(members_of, load_of, dp_size)


class Reduced(NamedTuple):
    """The rows of a step that are computed.

    Attributes:
        order: row numbers, as ranks and mini-batches take them.
        rows: of an optimizer step, on all ranks.
        micro_batch: rows of a fixed micro-batch that divides those of a rank; None: as configured.
    """

    order: list[int]
    rows: int
    micro_batch: int | None = None


def reduced(
    keep: Sequence[bool], length_of: Sequence[int], mini_batches: int, dp_size: int, micro_batch: int | None = None
) -> Reduced:
    """Of every mini-batch the rows to keep, and as few others as make all slices of a mini-batch and a rank equal.

    verl's workers cut what they get into mini-batches of one size. The others are the shortest of the same mini-batch.
    A mini-batch without a row to keep is a row of them on every rank: verl makes an optimizer step whose gradient is 0
    of it, in which moments, weight decay and schedule go on.

    Args:
        keep: of each row, in the order of the batch.
        length_of: of each row, its tokens.
        mini_batches: of the step; they and the ranks divide the rows evenly.
        dp_size: data-parallel ranks.
        micro_batch: the most rows in a fixed micro-batch; None where they are cut by tokens.
    """
    rows = len(keep)
    of_slice = rows // dp_size // mini_batches
    members_of: list[list[int]] = [[] for _ in range(mini_batches)]
    for row, mini_batch in enumerate(mini_batch_of(rows, mini_batches, dp_size)):
        members_of[mini_batch].append(row)
    most = max(1, *(math.ceil(sum(keep[row] for row in members) / dp_size) for members in members_of))
    if micro_batch is not None:
        # As many micro-batches as are needed, of one size: fewer rows are filled in than up to the next whole one.
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
    """The mini-batch of each row as verl cuts: a slice a rank, then mini-batches within it."""
    of_rank = rows // dp_size
    return [row % of_rank // (of_rank // mini_batches) for row in range(rows)]


def _order_of(members_of: Sequence[Sequence[int]], load_of: Sequence[int], dp_size: int) -> list[int]:
    """The rows of each mini-batch in the order in which verl hands them out, equal in number and about so in load."""
    slices: list[list[list[int]]] = []
    for rows in members_of:
        loads_here: Any = [load_of[row] for row in rows]
        parts: Any = get_seqlen_balanced_partitions(loads_here, k_partitions=dp_size, equal_size=True)
        slices.append([[rows[i] for i in part] for part in parts])
    return [row for rank in range(dp_size) for of_ranks in slices for row in of_ranks[rank]]
