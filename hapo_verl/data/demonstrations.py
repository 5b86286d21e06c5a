"""Selects one verified demonstration for each prompt from the columns of other projects' data sets.

    target       LUFFY: one demonstration, a list with one message of the assistant
    target_lst   AMPO: several, each a text or a mapping with `content`
    demos        Prefix-RFT: several texts

Of a row's demonstrations the shortest one (in tokens of the run) is taken that a run would inject: it fits the run's
response length, and the run's own reward function scores exactly these tokens as a success. It is written to the column
`demonstration`; the columns above are dropped and all others are unchanged. A row without a usable demonstration is
reported and stays in the data set, since the policy can still learn from its own rollouts. A demonstration may be a
list of messages with tool calls and tools' answers, and then stays a list.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from hapo_verl.algo.demonstration import Refusal, Response, demonstration_turns
from hapo_verl.data.parquet import DataError


def _one(value: Any) -> list[Any]:
    return [value]


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    # A value that is not a list counts as one demonstration; later checks decide whether it is valid.
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    return [_message(item) for item in items]


def _message(item: Any) -> Any:
    """Turn AMPO's mapping, which has a text, a source and a quality score but no role, into a list with one message."""
    return [{"role": "assistant", **item}] if isinstance(item, Mapping) else item


# Column → function that lists the demonstrations in a value of the column.
COLUMNS: dict[str, Callable[[Any], list[Any]]] = {"target": _one, "target_lst": _several, "demos": _several}

# Reasons for a refusal, in the order of the checks. A row whose demonstrations were all refused is reported with the
# latest of their reasons.
PROGRESS = ("missing", "empty", "malformed", "thought", "overlong", "rejected")


@dataclass(frozen=True)
class Judge:
    """Decides whether a run would inject a demonstration.

    Attributes:
        respond: (demonstration, row) → the response row that the run would make of it, or the reason for a refusal.
        decode: tokens → the text that the run passes to its reward function.
        succeeds: (row, text, verl's `num_turns`) → whether the reward function calls it a success.
    """

    respond: Callable[[Any, Mapping[str, Any]], Response | Refusal]
    decode: Callable[[list[int]], str]
    succeeds: Callable[[Mapping[str, Any], str, int], bool]

    def choose(self, row: Mapping[str, Any], column: str) -> Any | Refusal:
        """The row's shortest demonstration that a run would inject, the first of equally short ones; or a refusal.

        A demonstration of one turn is returned as text, one of several turns as the original list of messages.
        """
        fitting: list[tuple[Response, Any]] = []
        reasons = {"missing"}
        for value in COLUMNS[column](row[column]):
            response = self.respond(value, row)
            if isinstance(response, Refusal):
                reasons.add(response.reason)
            else:
                fitting.append((response, value))
        for response, value in sorted(fitting, key=lambda pair: len(pair[0].tokens)):
            if self.succeeds(row, self.decode(response.tokens), response.num_turns):
                return value if response.turns > 1 else _text(value)
            reasons.add("rejected")
        return Refusal(max(reasons, key=PROGRESS.index))

    def verdict(self, row: Mapping[str, Any], value: Any) -> Response | Refusal:
        """The response row that the run would inject, or why it would not; `error` if the reward function raises."""
        response = self.respond(value, row)
        if isinstance(response, Refusal):
            return response
        try:
            succeeded = self.succeeds(row, self.decode(response.tokens), response.num_turns)
        except Exception:
            # As in a run, which then trains the group without a demonstration.
            return Refusal("error")
        return response if succeeded else Refusal("rejected")


def _text(value: Any) -> str:
    turns = demonstration_turns(value)
    assert not isinstance(turns, Refusal)
    return turns[0].text


def judge_of(
    tokenizer: str,
    max_tokens: int,
    reward: str | None,
    reward_name: str,
    threshold: float,
    multi_turn: Sequence[str] | None = None,
) -> Judge:
    """The `Judge` for a run with these settings.

    Args:
        tokenizer: `actor_rollout_ref.model.path`.
        max_tokens: `data.max_response_length`.
        reward: `reward.custom_reward_function.path`, or None for verl's own functions.
        reward_name: `reward.custom_reward_function.name`.
        threshold: `hapo.success_threshold`.
        multi_turn: `key=value` settings of `actor_rollout_ref.rollout.multi_turn` for a run with verl's tool loop; None
            for a run without tools.

    Raises:
        ConfigError: if the reward function cannot be loaded, or `multi_turn` has no such key.
    """
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    from hapo_verl.rollout.reward import reward_of, success_of
    from hapo_verl.rollout.tokens import ChatFormat

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rollout: dict[str, Any] = {"agent": {"default_agent_loop": "single_turn_agent"}}
    if multi_turn is not None:
        rollout = {"agent": {"default_agent_loop": "tool_agent"}, "multi_turn": OmegaConf.from_dotlist([*multi_turn])}
    launch = OmegaConf.create({"actor_rollout_ref": {"model": {"path": tokenizer}, "rollout": rollout}})
    chat = ChatFormat.of_launch(launch, loaded)
    return Judge(
        respond=partial(chat.demonstration, max_tokens=max_tokens),
        decode=partial(loaded.decode, skip_special_tokens=True),
        succeeds=success_of(reward_of(reward, reward_name), threshold),
    )


def column_of(names: Iterable[str], asked: str | None) -> str:
    """The name of the column with the demonstrations.

    Args:
        names: the columns of the file.
        asked: the column that the user has chosen; None to find it.

    Raises:
        DataError: if the chosen column is missing, or without a choice, if there is none or more than one.
    """
    names = list(names)
    found = [name for name in COLUMNS if name in names]
    if asked is not None:
        if asked not in found:
            raise DataError(f"--column {asked}: no such column. The file has {', '.join(sorted(names))}.")
        return asked
    if len(found) != 1:
        what = f"both {' and '.join(found)}" if found else f"none of {', '.join(COLUMNS)}"
        raise DataError(f"--input: the file has {what}. Name its column of demonstrations: --column.")
    return found[0]


def choices(
    rows: Iterable[dict[str, Any]], column: str, make_judge: Callable[[], Judge], *, workers: int
) -> Iterator[Any | Refusal]:
    """The results of `Judge.choose` for the rows, in order.

    Args:
        rows: the rows of a data set with `column`.
        column: one of `COLUMNS`.
        make_judge: called once in each process, so it must be picklable.
        workers: number of processes; with 1, this process does the work.

    Raises:
        DataError: if the reward function raises; names the row.
    """
    numbered = enumerate(rows)
    if workers == 1:
        judge = make_judge()
        for number, row in numbered:
            yield _choose(judge, number, row, column)
        return
    # Spawned, not forked: the parent has threads by now, and a forked child may wait for their locks for ever.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=enter, initargs=(make_judge,)) as pool:
        yield from pool.map(_choose_here, numbered, repeat(column), chunksize=16)


_judge: Judge | None = None


def verdict_here(row: Mapping[str, Any], value: Any) -> Response | Refusal:
    """`Judge.verdict` in a process that `enter` has prepared."""
    assert _judge is not None
    return _judge.verdict(row, value)


def try_here(row: Mapping[str, Any]) -> None:
    """Call the reward function once, to see that it works on these rows.

    Raises:
        DataError: if it raises.
    """
    assert _judge is not None
    try:
        _judge.succeeds(row, "0", 2)
    except Exception as error:
        raise DataError(
            f"row 0: judging an answer raised {type(error).__name__}: {error}. "
            "Name the reward function of the run, which scores these rows: --reward."
        ) from error


def enter(make_judge: Callable[[], Judge]) -> None:
    """Prepare a process of a pool: make its judge, and let the process end when its parent ends for any reason."""
    global _judge
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A reward function may start processes, as math-verify's in verl does; this process would wait for their end for
    # ever.
    Finalize(None, _end_children, exitpriority=0)
    _judge = make_judge()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        _end_children()
        os._exit(1)


def _end_children() -> None:
    for child in active_children():
        child.terminate()


def _choose_here(numbered: tuple[int, dict[str, Any]], column: str) -> Any | Refusal:
    assert _judge is not None
    return _choose(_judge, *numbered, column)


def _choose(judge: Judge, number: int, row: dict[str, Any], column: str) -> Any | Refusal:
    try:
        return judge.choose(row, column)
    except Exception as error:
        raise DataError(
            f"row {number}: judging its demonstrations raised {type(error).__name__}: {error}. "
            "Name the reward function of the run, which scores these rows: --reward."
        ) from error


def verified(
    rows: Iterable[dict[str, Any]], chosen: Iterable[Any | Refusal], column: str, *, only_verified: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows with their demonstrations, and a report about the rows without: row, index, data_source and reason.

    Args:
        rows: the rows of the data set.
        chosen: for each row its demonstration, or the refusal.
        column: the column that the demonstrations were taken from.
        only_verified: whether to leave out rows without a demonstration; else their demonstration is null.
    """
    kept, rejected = [], []
    for number, (row, choice) in enumerate(zip(rows, chosen, strict=True)):
        if isinstance(choice, Refusal):
            index = (row.get("extra_info") or {}).get("index")
            rejected.append(
                {"row": number, "index": index, "data_source": row.get("data_source"), "reason": choice.reason}
            )
            if only_verified:
                continue
            choice = None
        others = {name: value for name, value in row.items() if name not in COLUMNS}
        kept.append(others | {"demonstration": choice})
    if any(not isinstance(row["demonstration"], str | None) for row in kept):
        # A column of a parquet file has one type: if one demonstration is a list of messages, all must be.
        for row in kept:
            if isinstance(row["demonstration"], str):
                row["demonstration"] = [{"role": "assistant", "content": row["demonstration"]}]
    return kept, rejected


def write_report(rejected: list[dict[str, Any]], path: Path) -> Counter[str]:
    """Write a JSON line for each row without a demonstration, and return the number of rows for each reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rejected))
    return Counter(line["reason"] for line in rejected)
