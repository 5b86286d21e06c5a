"""How a step's rows are cut into optimizer steps: as many as configured, of one size, with whole groups where needed,
and how many of them it is left with where others have no gradient.

verl cuts a batch that it has padded to whole mini-batches of `ppo_mini_batch_size * n` rows, and spreads rows over
ranks and mini-batches by their length alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
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
    actor, rollout = actor_rollout_ref.actor, actor_rollout_ref.rollout
    updates = math.ceil((rows - appended) / (actor.ppo_mini_batch_size * rollout.n))
    prompts = math.ceil(rows / (updates * rollout.n))

    def fits(prompts: int) -> bool:
        size = prompts * rollout.n
        divides = size % dp_size == 0 and micro_batches_fit(actor_rollout_ref, updates, size // dp_size)
        return divides and (group_sizes is None or pack(group_sizes, [0] * len(group_sizes), updates, size) is not None)

    while not fits(prompts):
        prompts += 1
    return updates, prompts


def micro_batches_fit(actor_rollout_ref: Any, mini_batches: int, rows: int, *, forward: bool = True) -> bool:
    """Whether fixed micro-batches divide what a rank gets.

    Args:
        actor_rollout_ref: verl's block of that name.
        mini_batches: of a step.
        rows: of a rank in each of them.
        forward: there are also passes over the rows of all mini-batches at once, for log-probs.
    """
    actor, rollout, ref = actor_rollout_ref.actor, actor_rollout_ref.rollout, actor_rollout_ref.ref
    of_update = 1 if actor.use_dynamic_bsz else actor.ppo_micro_batch_size_per_gpu or 1
    of_forward = [
        1 if block.log_prob_use_dynamic_bsz else block.log_prob_micro_batch_size_per_gpu or 1
        for block in (rollout, ref)
    ]
    return rows % of_update == 0 and (not forward or all(mini_batches * rows % size == 0 for size in of_forward))


def mini_batch_of_rows(rows: int, mini_batches: int, dp_size: int) -> list[int]:
    """The mini-batch of each row as verl cuts: rank r has the r-th of `dp_size` slices, cut into `mini_batches`."""
    of_rank = rows // dp_size
    return [row % of_rank // (of_rank // mini_batches) for row in range(rows)]


def order_of_trained_rows(
    trains: Sequence[bool],
    length_of: Sequence[int],
    load_of: Sequence[int],
    mini_batches: int,
    dp_size: int,
    fits: Callable[[int], bool],
) -> list[int]:
    """The rows that a step is left with, in an order in which verl cuts them into the mini-batches they were in.

    All slices of a rank and mini-batch have to be of one size: rows that do not train fill them up, the shortest of
    their mini-batch first. No slice is empty, so an optimizer step in which nothing trains is the one verl makes of it,
    with gradient 0.

    Args:
        trains: of each row, in verl's order, padding included.
        length_of: of each row, its tokens.
        load_of: of each row, its cost.
        mini_batches: of the step; they and the ranks divide the rows evenly.
        dp_size: data-parallel ranks.
        fits: whether a slice may have so many rows; the present size does.
    """
    mini_batch_of = mini_batch_of_rows(len(trains), mini_batches, dp_size)
    members = [[row for row, of in enumerate(mini_batch_of) if of == number] for number in range(mini_batches)]
    whole = len(trains) // dp_size // mini_batches
    most = max(sum(trains[row] for row in rows) for rows in members)
    size = max(1, math.ceil(most / dp_size))
    while size < whole and not fits(size):
        size += 1
    slices = []
    for rows in members:
        shortest_first = sorted((row for row in rows if not trains[row]), key=lambda row: length_of[row])
        kept = {row for row in rows if trains[row]}
        kept |= set(shortest_first[: size * dp_size - len(kept)])
        slices.append(_balanced([row for row in rows if row in kept], load_of, dp_size))
    return [row for rank in range(dp_size) for of_ranks in slices for row in of_ranks[rank]]


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
    slices = [
        _balanced(
            [row for group, b in zip(groups, bin_of, strict=True) if b == mini_batch for row in group], load_of, dp_size
        )
        for mini_batch in range(mini_batches)
    ]
    return [row for rank in range(dp_size) for of_ranks in slices for row in of_ranks[rank]]


def _balanced(rows: list[int], load_of: Sequence[int], dp_size: int) -> list[list[int]]:
    """The rows in equal numbers for each rank, about equal in load."""
    loads: Any = [load_of[row] for row in rows]
    parts: Any = get_seqlen_balanced_partitions(loads, k_partitions=dp_size, equal_size=True)
    return [[rows[i] for i in part] for part in parts]
