"""Demonstrations from a teacher: a model behind an OpenAI-compatible server is asked where a prompt has none.

    asked      rows whose demonstration a run would refuse; with a run's trace only those whose group failed at last
    verified   each answer, as the run would: its template, its limits, its reward function
    kept       of a row's verified answers the one that a rule names

    shortest   the fewest tokens of the run; of equally short ones the first
    first      the first one; nothing more is asked behind it
    likeliest  the one whose least likely token is the likeliest under a policy: what a policy would never write decides
               whether it learns to (`hapo_verl.algo.teachability`)

Equal prompts are asked once, and their answers are judged for each row.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hapo_verl.algo.demonstration import Refusal, Response
from hapo_verl.data.demonstrations import Judge, enter, try_here
from hapo_verl.data.parquet import DataError
from hapo_verl.data.teacher import Answer, Messages, Teacher, Unanswered

RULES = ("shortest", "first", "likeliest")

# How far a row came; one with several answers is reported by the one that came farthest.
PROGRESS = (
    "stopped", "budget", "connection", "timeout", "half an answer", "refused",
    "filtered", "missing", "empty", "truncated", "malformed", "thought", "overlong", "error", "rejected",
)  # fmt: skip

Verify = Callable[[Mapping[str, Any], Any], Response | Refusal]


class Candidate(NamedTuple):
    """A verified answer.

    Attributes:
        text: the demonstration.
        response: what a run would train on.
    """

    text: str
    response: Response


@dataclass
class Prompt:
    """A prompt that has to be asked, and what came of it.

    Attributes:
        messages: as they are sent.
        rows: numbers of the rows that have this prompt.
        tokens: of the messages, estimated.
        taught: of each row its verified answers, in the order of the samples.
        reasons: of each row, why the other answers are none.
    """

    messages: Messages
    rows: list[int]
    tokens: int
    taught: dict[int, dict[int, Candidate]] = field(default_factory=lambda: defaultdict(dict))
    reasons: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))


def prompts_of(
    rows: Sequence[Mapping[str, Any]],
    wanted: Sequence[int],
    *,
    prompt_key: str,
    system: str | None,
    count: Callable[[Messages], int],
) -> list[Prompt]:
    """The different prompts of these rows.

    Args:
        rows: of the data set.
        wanted: numbers of those that are asked.
        prompt_key: `data.prompt_key`.
        system: written in front of every prompt, for the teacher alone.
        count: messages → tokens.

    Raises:
        DataError: where a row has no messages.
    """
    found: dict[str, Prompt] = {}
    front = [{"role": "system", "content": system}] if system else []
    for number in wanted:
        messages = rows[number].get(prompt_key)
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) and m.get("role") for m in messages):
            raise DataError(
                f"row {number}: {prompt_key} is no list of messages with role and content. Name the column of the "
                "prompts: --prompt-key."
            )
        plain = [*front, *({k: v for k, v in message.items() if v is not None} for message in messages)]
        prompt = found.setdefault(json.dumps(plain, sort_keys=True), Prompt(plain, [], 0))
        prompt.rows.append(number)
        prompt.tokens = prompt.tokens or count(plain)
    return list(found.values())


async def teach(
    prompts: Sequence[Prompt],
    rows: Sequence[Mapping[str, Any]],
    teacher: Teacher,
    verify: Executor,
    verdict: Verify,
    *,
    samples: int,
    rule: str,
    concurrency: int,
    reward_timeout: float | None,
    thoughts: bool = False,
    progress: Callable[[Prompt], None] = lambda prompt: None,
) -> None:
    """Ask each prompt `samples` times and verify the answers, in place; SIGINT and SIGTERM let what is asked end.

    Args:
        prompts: to be asked.
        rows: of the data set.
        teacher: is asked.
        verify: where answers are judged.
        verdict: (row, demonstration) → the response of the run, or why there is none; called in `verify`.
        samples: answers a prompt, one after the other and no more than needed with the rule `first`.
        rule: one of `RULES`.
        concurrency: requests at a time.
        reward_timeout: seconds for one judgement.
        thoughts: put the thought that a server has parsed out back in front of the text, in `<think>` tags.
        progress: is told of each prompt that is done.

    Raises:
        DataError: where the server or the reward function cannot be worked with.
    """
    loop, left = asyncio.get_running_loop(), {id(prompt): samples for prompt in prompts}

    async def one(prompt: Prompt, sample: int) -> None:
        found = await teacher.ask(prompt.messages, sample, prompt_tokens=prompt.tokens)
        for number in prompt.rows:
            response = await judged(number, found)
            if isinstance(response, Refusal | Unanswered):
                prompt.reasons[number].append(response.reason)
            else:
                prompt.taught[number][sample] = response

    async def judged(number: int, found: Answer | Unanswered) -> Candidate | Refusal | Unanswered:
        if isinstance(found, Unanswered):
            return found
        if found.finish != "stop":
            return Refusal({"length": "truncated", "content_filter": "filtered"}.get(found.finish, "malformed"))
        text = f"<think>\n{found.thought}\n</think>\n\n{found.text}" if thoughts and found.thought else found.text
        try:
            response = await asyncio.wait_for(loop.run_in_executor(verify, verdict, rows[number], text), reward_timeout)
        except asyncio.TimeoutError:
            raise DataError(
                f"--reward-timeout {reward_timeout:g}: row {number}: the reward function has not judged an answer in "
                "this time. Make it faster, or give it longer."
            ) from None
        return response if isinstance(response, Refusal) else Candidate(text, response)

    def work() -> Iterator[tuple[Prompt, Sequence[int]]]:
        for prompt in prompts:
            if rule == "first":
                yield prompt, range(samples)
            else:
                yield from ((prompt, [sample]) for sample in range(samples))

    queue = work()

    async def worker() -> None:
        for prompt, chosen in queue:
            for sample in chosen:
                if rule != "first" or any(number not in prompt.taught for number in prompt.rows):
                    await one(prompt, sample)
                left[id(prompt)] -= 1
            if not left[id(prompt)]:
                progress(prompt)

    workers = [asyncio.ensure_future(worker()) for _ in range(concurrency)]

    def stop() -> None:
        if teacher.stopped.is_set():  # the second time: at once
            for task in workers:
                task.cancel()
        teacher.stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for task in done if not task.cancelled() and (error := task.exception())]
        if errors:
            # What the others have asked is paid for: it is waited for, and written down.
            teacher.stopped.set()
        await asyncio.wait(workers)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    errors += [error for task in workers if not task.cancelled() and (error := task.exception())]
    if errors:
        raise errors[0]


def chosen(
    prompts: Sequence[Prompt], rule: str, likelihood: Callable[[Sequence[tuple[Prompt, Candidate]]], Sequence[float]]
) -> dict[int, Candidate]:
    """Of each row that has verified answers the one that the rule names.

    Args:
        prompts: that were asked.
        rule: one of `RULES`.
        likelihood: answers → of each the log-probability of its least likely token, nats; read by `likeliest` alone.
    """
    several: list[tuple[int, list[Candidate]]] = []
    asked: list[tuple[Prompt, Candidate]] = []
    for prompt in prompts:
        for number, taught in prompt.taught.items():
            candidates = [taught[sample] for sample in sorted(taught)]
            if rule == "shortest":
                candidates.sort(key=lambda candidate: len(candidate.response.tokens))
            if rule == "likeliest" and len({candidate.text for candidate in candidates}) > 1:
                asked += [(prompt, candidate) for candidate in candidates]
            several.append((number, candidates))
    least = {id(of): value for (_, of), value in zip(asked, likelihood(asked) if asked else (), strict=True)}
    return {
        number: max(candidates, key=lambda of: (least[id(of)], -len(of.response.tokens)))
        if id(candidates[0]) in least
        else candidates[0]
        for number, candidates in several
    }


def farthest(reasons: Sequence[str]) -> str:
    """The reason of a row, of those of its answers; a status counts as a failed connection."""
    known = [reason if reason in PROGRESS else "connection" for reason in reasons]
    place = max(range(len(known)), key=lambda i: PROGRESS.index(known[i]))
    return reasons[place]


def failed_rows(run: Path, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows whose group had no success when a run saw it last.

    Args:
        run: folder of a run, or of its trace.
        rows: of the run's data.

    Raises:
        DataError: where there is no trace, or its groups cannot be found among the rows.
    """
    from hapo_verl.protocol.trace import read_groups

    last: dict[Any, Mapping[str, Any]] = {}
    for group in read_groups(run):
        name = (group.get("data_source"), group["index"])
        if group["successes"] and (name not in last or group["step"] >= last[name]["step"]):
            last[name] = group
    if not last:
        raise DataError(f"--only-failed {run}: no groups.jsonl with a group in it. Name a run with hapo.trace_dir.")
    names_source = all(source is not None for source, _ in last)
    numbers: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        index = (row.get("extra_info") or {}).get("index")
        if index is None:
            raise DataError(
                f"--only-failed {run}: row {number} has no extra_info.index, by which a trace names prompts. Add it, "
                "or leave --only-failed out."
            )
        numbers[(row.get("data_source") if names_source else None, index)].append(number)
    shared = next((found for found in numbers.values() if len(found) > 1), None)
    if shared is not None:
        raise DataError(
            f"--only-failed {run}: rows {shared[0]} and {shared[1]} have the same "
            f"{'data_source and ' if names_source else ''}extra_info.index, so a trace does not tell them apart. Give "
            "each row its own."
        )
    failed = [name for name, group in last.items() if not any(group["successes"])]
    found = sorted(numbers[name][0] for name in failed if name in numbers)
    if failed and not found:
        raise DataError(f"--only-failed {run}: none of its {len(failed)} failed prompts is a row of --input.")
    return found


def report_lines(
    prompts: Sequence[Prompt], rows: Sequence[Mapping[str, Any]], kept: Mapping[int, Candidate]
) -> list[dict[str, Any]]:
    """Of each row that was asked: what came of every answer, and the tokens of the one that was kept."""
    lines = []
    for prompt in prompts:
        for number in prompt.rows:
            reasons, verified = prompt.reasons[number], len(prompt.taught.get(number, ()))
            line: dict[str, Any] = {
                "row": number,
                "index": (rows[number].get("extra_info") or {}).get("index"),
                "data_source": rows[number].get("data_source"),
                "verified": verified,
                "others": dict(Counter(reasons)),
            }
            if number in kept:
                line["tokens"] = len(kept[number].response.tokens)
            else:
                line["reason"] = farthest(reasons)
            lines.append(line)
    return sorted(lines, key=lambda line: line["row"])


_failure: Exception | None = None


def enter_quietly(make_judge: Callable[[], Judge]) -> None:
    """`enter`, in a process that leaves it to its parent what an interrupt means; `ready` says what went wrong."""
    global _failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        enter(make_judge)
    except Exception as error:
        _failure = error


def ready(row: Mapping[str, Any] | None) -> None:
    """Before anything is paid for, in a process of the pool: there is a judge, and it knows these rows.

    Raises:
        ConfigError: where the judge cannot be made.
        DataError: where its reward function raises.
    """
    if _failure is not None:
        raise _failure
    if row is not None:
        try_here(row)
