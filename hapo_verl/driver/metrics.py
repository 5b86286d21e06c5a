"""The metrics of a run's groups, logged under `hapo/` by verl's own logger.

verl combines the metrics of the updates of a step by their names. These metrics need its default, the average weighted
by rows, so none of their names contains `max`, `min`, `sum` or `total`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hapo_verl.algo.demonstration import REASONS
from hapo_verl.algo.gate import expected_firing


def group_metrics(
    groups: Mapping[str, Mapping[str, Any]], *, demonstration_B: Tensor, own_B: Tensor, tokens_B: Tensor
) -> dict[str, float]:
    """Metrics of the groups of one update.

    Args:
        groups: uid → `hapo_group`, padding left out.
        demonstration_B: (B,) bool, True on demonstrations, padding left out.
        own_B: (B,) bool, True on demonstrations that the policy itself has written.
        tokens_B: (B,) response tokens of the same rows.

    Returns:
        Shares in [0, 1], of groups unless the name says rows or tokens. `gate/firing_rate_expected` is the firing rate
        expected from the groups' own success rates: the mean over groups of Σ_S P(S) P(fire | S), S ~ Binomial(N, S_g /
        N). `gate/firing_rate_at_S` has a key for every success count that occurred.
    """
    gated = [group for group in groups.values() if group["firing"] is not None]
    fired = [group for group in gated if group["fired"]]
    outcomes = Counter(group["outcome"] for group in groups.values())
    rollouts = sum(len(group["successes"]) for group in gated)

    metrics = {
        "hapo/gate/firing_rate": _share(len(fired), len(gated)),
        "hapo/gate/firing_rate_expected": _share(sum(map(_expected_firing, gated)), len(gated)),
        "hapo/gate/confidence": _share(sum(group["confidence"] for group in gated), len(gated)),
        "hapo/gate/threshold": _share(sum(group["threshold"] for group in gated), len(gated)),
        "hapo/gate/not_admitted": _share(outcomes["not_admitted"], len(groups)),
        "hapo/gate/not_gated": _share(outcomes["not_gated"], len(groups)),
        "hapo/injected/group_share": _share(outcomes["injected"], len(groups)),
        "hapo/injected/row_share": _share(int(demonstration_B.sum()), demonstration_B.numel()),
        "hapo/injected/token_share": _share(int(tokens_B[demonstration_B].sum()), int(tokens_B.sum())),
        # What of the three is the policy's own past.
        "hapo/injected/own_share": _share(
            sum(group.get("own_step") is not None for group in groups.values()), len(groups)
        ),
        "hapo/injected/own_row_share": _share(int(own_B.sum()), own_B.numel()),
        "hapo/injected/own_token_share": _share(int(tokens_B[own_B].sum()), int(tokens_B.sum())),
        "hapo/demonstration/unsteady": _share(
            sum(bool(group.get("unsteady")) for group in groups.values()), len(groups)
        ),
        "hapo/on_policy_success": _share(sum(sum(group["successes"]) for group in gated), rollouts),
        "hapo/without_signal/before_injection": _share(sum(map(_flat, gated)), len(gated)),
        "hapo/without_signal/after_injection": _share(
            sum(_flat(group) and group["outcome"] != "injected" for group in gated), len(gated)
        ),
    }
    metrics |= {f"hapo/refused/{reason}": _share(outcomes[reason], len(groups)) for reason in REASONS}
    by_successes = Counter(sum(group["successes"]) for group in gated)
    fired_by_successes = Counter(sum(group["successes"]) for group in fired)
    metrics |= {
        f"hapo/gate/firing_rate_at_S/{successes}": fired_by_successes[successes] / count
        for successes, count in sorted(by_successes.items())
    }
    return metrics


def silence(groups: Mapping[str, Mapping[str, Any]]) -> str | None:
    """A warning if no group of a step has a signal, so that every advantage is 0 and nothing is learned; else None.

    Args:
        groups: uid → `hapo_group` of the step, padding left out.
    """
    if not groups or not all(_flat(group) and group["outcome"] != "injected" for group in groups.values()):
        return None
    scores = Counter(score for group in groups.values() for score in group["scores"][:1])
    said = ", ".join(f"{score:g} in {count}" for score, count in scores.most_common(3))
    refused = Counter(group["outcome"] for group in groups.values() if group["outcome"] in REASONS)
    text = f"none of {len(groups)} groups has a signal: the rollouts of each got the same reward ({said} of them)"
    if all(all(group["successes"]) for group in groups.values()):
        return f"{text}, a success. The policy solves these prompts already: train on harder ones."
    reasons = ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
    text += f", and no demonstration was injected{f' ({reasons})' if reasons else ''}"
    return (
        f"{text}. Read a few responses beside what the reward function expects of them "
        "(trainer.rollout_data_dir=FOLDER writes them), look whether they end within data.max_response_length, and ask "
        "python -m hapo_verl.doctor about the demonstrations."
    )


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0


def _expected_firing(group: Mapping[str, Any]) -> float:
    return expected_firing(sum(group["successes"]) / len(group["successes"]), group["firing"])


def _flat(group: Mapping[str, Any]) -> bool:
    """Whether all scores of the group are equal, so that its advantages are 0."""
    return len(set(group["scores"])) <= 1
