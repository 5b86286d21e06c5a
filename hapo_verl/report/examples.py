"""The page's examples: rows of a prompt at its first and its last traced visit, with the probability of each token.

The page stores probability and weight as one letter per token, of 64 levels: p^(1/4) and w/max w. The tokens of a
question have no levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hapo_verl.report.prompts import Groups, Story, Visit

LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
# Separates the tokens of a text; it is removed from tokens that contain it.
BETWEEN = "\x1f"
ORDER = ("helped, then solved", "fell back", "never solved", "other")
# Number of a group's rollouts that are shown: the best and the worst one.
SHOWN = 2

Pieces = Callable[[Sequence[int]], list[str]]


def level(share: float) -> str:
    """The letter for a share in [0, 1]."""
    return LEVELS[min(len(LEVELS) - 1, max(0, int(share * len(LEVELS))))]


def chosen(groups: Groups, limit: int) -> list[Story]:
    """Choose at most `limit` prompts to show, in turn from each kind; of a kind, the most visited ones come first."""
    by_kind = {kind: [] for kind in ORDER}
    for story in groups.stories.values():
        if story.traced:
            by_kind[story.kind].append(story)
    for stories in by_kind.values():
        stories.sort(key=lambda story: (-len(story.traced), -story.injected, str(story.name)))
    turns: list[Story] = []
    while len(turns) < limit and any(by_kind.values()):
        turns += [stories.pop(0) for stories in by_kind.values() if stories]
    return turns[:limit]


def visits(story: Story) -> list[Visit]:
    """The first and the last traced visit of a prompt, or its only one."""
    return [story.traced[0], *story.traced[1:][-1:]]


def examples(
    stories: Sequence[Story],
    rows: Iterable[Mapping[str, Any]],
    losses: Iterable[Mapping[str, Any]],
    *,
    pieces: Pieces,
    weight: Callable[[Sequence[float]], list[float]],
    max_bytes: int,
) -> tuple[list[dict[str, Any]], int]:
    """The data that the page needs of each prompt, and the number of prompts that did not fit.

    Args:
        stories: the prompts to show, in order.
        rows: lines of the trace's rows: step, uid, prompts, responses, score, hapo_demonstration.
        losses: lines of the trace's losses: uid, responses, advantages, logp.
        pieces: tokens → the text of each.
        weight: log-probabilities (nats) of a demonstration's tokens → their weights, divided by the largest possible.
        max_bytes: approximate limit for all examples together.
    """
    wanted = {visit.uid for story in stories for visit in visits(story)}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["uid"] in wanted:
            found.setdefault(row["uid"], []).append(row)
    trained: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for row in losses:
        if row["uid"] in wanted:
            # Keep the row's first update: there the policy is still the one of the step's beginning.
            trained.setdefault((row["uid"], tuple(row["responses"])), row)
    made, size = [], 0
    for number, story in enumerate(stories):
        example = _example(story, found, trained, pieces, weight)
        size += _bytes(example)
        if size > max_bytes:
            return made, len(stories) - number
        made.append(example)
    return made, 0


def _example(
    story: Story,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    trained: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]],
    pieces: Pieces,
    weight: Callable[[Sequence[float]], list[float]],
) -> dict[str, Any]:
    source, index = story.name
    example: dict[str, Any] = {
        "name": f"{source or 'prompt'} {index}",
        "kind": story.kind,
        "question": "",
        "visits": [],
    }
    for visit in visits(story):
        group = found.get(visit.uid, ())
        if group:
            example["question"] = "".join(pieces(group[0]["prompts"]))
        own = sorted((row for row in group if not row["hapo_demonstration"]), key=lambda row: -row["score"])
        shown = own if len(own) <= SHOWN else [own[0], own[-1]]
        shown += [row for row in group if row["hapo_demonstration"]][:1]
        lines = []
        for row in shown:
            lost = trained.get((visit.uid, tuple(row["responses"])))
            lines.append(_row(row, lost, pieces, weight))
        example["visits"].append(
            {
                "step": visit.step,
                "said": f"{visit.successes} of {visit.rollouts} succeeded; {visit.outcome.replace('_', ' ')}",
                "rows": lines,
            }
        )
    return example


def _row(
    row: Mapping[str, Any],
    lost: Mapping[str, Any] | None,
    pieces: Pieces,
    weight: Callable[[Sequence[float]], list[float]],
) -> dict[str, Any]:
    is_demonstration = bool(row["hapo_demonstration"])
    shown: dict[str, Any] = {
        "what": "demonstration" if is_demonstration else "rollout",
        "score": row["score"],
        "text": BETWEEN.join(piece.replace(BETWEEN, "") for piece in pieces(row["responses"])),
    }
    if lost is not None and lost.get("logp"):
        # The fourth root makes probabilities between 1 and 10^-6 distinguishable to the eye.
        shown["p"] = "".join(level(math.exp(value / 4)) for value in lost["logp"])
        shown["advantage"] = next((value for value in lost["advantages"] if value), 0.0)
        if is_demonstration:
            shown["w"] = "".join(map(level, weight(lost["logp"])))
    return shown


def _bytes(example: Mapping[str, Any]) -> int:
    rows = [row for visit in example["visits"] for row in visit["rows"]]
    texts = [example["question"], *(row["text"] for row in rows)]
    return (
        sum(len(text.encode(errors="replace")) for text in texts)
        + sum(len(row["text"]) for row in rows)
        + 200 * len(rows)
        + 400
    )


def pieces_of(tokenizer_path: Path | None) -> Pieces:
    """A function from tokens to their texts; without a tokenizer the texts are the tokens' numbers."""
    if tokenizer_path is None:
        return lambda tokens: [f"{token} " for token in tokens]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    known: dict[int, str] = {}

    def pieces(tokens: Sequence[int]) -> list[str]:
        for token in tokens:
            if token not in known:
                known[token] = tokenizer.decode([token])
        return [known[token] for token in tokens]

    return pieces
