"""One verified demonstration a prompt, out of the columns of other projects' data sets.

    target       LUFFY: one demonstration, a list with one message of the assistant
    target_lst   AMPO: several, each a text or a mapping with `content`
    demos        Prefix-RFT: several texts

Of a row's demonstrations the shortest is taken, in the run's tokens, that fits the run's response length and that the
run's own reward function calls a success, token for token what a run would inject. It becomes the column
`demonstration`; the columns it came from are left out, all others stay as they are. A row without one is counted and
named, and stays, for the policy learns from its own rollouts there. Each demonstration may be a list of messages with
calls of tools and their answers, and then stays one.
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
    # What is no list is one demonstration, if it is one at all.
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    return [_message(item) for item in items]


def _message(item: Any) -> Any:
    """AMPO's mappings carry a source and a quality score beside the text, and no role."""
    return [{"role": "assistant", **item}] if isinstance(item, Mapping) else item


# Column → the demonstrations in a value of it.
COLUMNS: dict[str, Callable[[Any], list[Any]]] = {"target": _one, "target_lst": _several, "demos": _several}

# How far a demonstration came; a row with several is reported by the one that came farthest.
PROGRESS = ("missing", "empty", "malformed", "thought", "overlong", "rejected")


@dataclass(frozen=True)
class Judge:
    """What a run would make of a demonstration.

    Attributes:
        respond: (demonstration, row) → the response of the run, or why there is none.
        decode: tokens → the text that the run's reward function is given.
        succeeds: (row, text, verl's `num_turns`) → success.
    """

    respond: Callable[[Any, Mapping[str, Any]], Response | Refusal]
    decode: Callable[[list[int]], str]
    succeeds: Callable[[Mapping[str, Any], str, int], bool]

    def choose(self, row: Mapping[str, Any], column: str) -> Any | Refusal:
        """The row's shortest demonstration that a run would inject; of equally short ones the first.

        One of a single turn is its text, one of several the list of messages as it was.
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
        """A demonstration as the run would inject it, or why it would not; `error` where the reward function raises."""
        response = self.respond(value, row)
        if isinstance(response, Refusal):
            return response
        try:
            succeeded = self.succeeds(row, self.decode(response.tokens), response.num_turns)
        except Exception:
            # As in a run, where the group is then trained without it.
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
    """The judge of a run.

    Args:
        tokenizer: `actor_rollout_ref.model.path`.
        max_tokens: `data.max_response_length`.
        reward: `reward.custom_reward_function.path`, or None for verl's own functions.
        reward_name: `reward.custom_reward_function.name`.
        threshold: `hapo.success_threshold`.
        multi_turn: `key=value` of `actor_rollout_ref.rollout.multi_turn` in a run of verl's tool loop; None in another.

    Raises:
        ConfigError: where the reward function cannot be loaded, or `multi_turn` has no such key.
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
    """The column with the demonstrations.

    Raises:
        DataError: where there is none, more than one, or not the one that was asked for.
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
    """`Judge.choose` of each row, in order.

    Args:
        rows: of a data set with `column`.
        column: one of `COLUMNS`.
        make_judge: called once in each process; it travels there, so it can be pickled.
        workers: processes; 1 judges in this one.

    Raises:
        DataError: where the reward function raises, naming the row.
    """
    numbered = enumerate(rows)
    if workers == 1:
        judge = make_judge()
        for number, row in numbered:
            yield _choose(judge, number, row, column)
        return
    # Spawned: the parent has threads of its own by now, and a forked child may wait for their locks for ever.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=enter, initargs=(make_judge,)) as pool:
        yield from pool.map(_choose_here, numbered, repeat(column), chunksize=16)


_judge: Judge | None = None


def verdict_here(row: Mapping[str, Any], value: Any) -> Response | Refusal:
    """`Judge.verdict` in a process that `enter` has prepared."""
    assert _judge is not None
    return _judge.verdict(row, value)


def try_here(row: Mapping[str, Any]) -> None:
    """Ask the reward function once.

    Raises:
        DataError: where it raises.
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
    """Prepare a process of a pool for its judge; it ends with its parent, however that ends."""
    global _judge
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A reward function may have processes of its own, as math-verify's in verl has, and this one would wait for their
    # end for ever.
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
    """The rows with their demonstration, and a report of those that have none: row, index, data_source and reason.

    Args:
        rows: of the data set.
        chosen: of each row its demonstration, or why there is none.
        column: that the demonstrations were taken from.
        only_verified: leave out the rows that have none; else their demonstration is null.
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
        # A column of a parquet file has one type.
        for row in kept:
            if isinstance(row["demonstration"], str):
                row["demonstration"] = [{"role": "assistant", "content": row["demonstration"]}]
    return kept, rejected


def write_report(rejected: list[dict[str, Any]], path: Path) -> Counter[str]:
    """Write a JSON line for each row that has no demonstration; how many for which reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rejected))
    return Counter(line["reason"] for line in rejected)
