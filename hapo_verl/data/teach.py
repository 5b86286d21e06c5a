"""Gets demonstrations from a teacher, a model behind an OpenAI-compatible server, for prompts without one.

The teacher is asked for every row without a demonstration that a run would inject; if the trace of a run is given, only
for those whose last group in that run failed. Each answer is verified as the run would do it: with its template, its
limits and its reward function. Of a row's verified answers one is kept, by one of these rules:

    shortest   the one with the fewest tokens of the run; of equally short ones the first
    first      the first one; then the teacher is not asked again
    likeliest  the one whose least likely token is most likely under a policy, since the least likely token decides
               whether the policy can learn a demonstration (`hapo_verl.algo.teachability`)

For rows with equal prompts the teacher is asked once, and the answers are verified for each row.
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

# Reasons why an answer was not used, in the order of the steps. A row without a demonstration is reported with the
# latest of its answers' reasons.
PROGRESS = (
    "stopped", "budget", "connection", "timeout", "half an answer", "refused",
    "filtered", "missing", "empty", "truncated", "malformed", "thought", "overlong", "error", "rejected",
)  # fmt: skip

Verify = Callable[[Mapping[str, Any], Any], Response | Refusal]


class Candidate(NamedTuple):
    """A verified answer.

    Attributes:
        text: the demonstration.
        response: the response row that a run would train on.
    """

    text: str
    response: Response


@dataclass
class Prompt:
    """A prompt for the teacher, and its answers.

    Attributes:
        messages: the messages that are sent.
        rows: numbers of the rows with this prompt.
        tokens: estimated number of tokens of the messages.
        taught: row number → sample number → verified answer.
        reasons: row number → the reasons why other answers were not used.
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
    """The distinct prompts of the wanted rows.

    Args:
        rows: the rows of the data set.
        wanted: numbers of the rows that need a demonstration.
        prompt_key: `data.prompt_key`.
        system: system message before every prompt, for the teacher only; None for none.
        count: messages → number of tokens.

    Raises:
        DataError: if a row has no messages.
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
    """Ask the teacher for `samples` answers to each prompt, verify them, and store the results in the prompts.

    After SIGINT or SIGTERM no further request is sent, and running requests are awaited; a second signal cancels them.

    Args:
        prompts: the prompts; their `taught` and `reasons` are filled.
        rows: the rows of the data set.
        teacher: sends the requests.
        verify: executor in which answers are verified.
        verdict: (row, demonstration) → the response of the run, or the reason for a refusal; called in `verify`.
        samples: number of answers per prompt; with the rule `first`, requests are sent one after the other and only
            until an answer is verified.
        rule: one of `RULES`.
        concurrency: number of requests at a time.
        reward_timeout: seconds for one verification.
        thoughts: whether to put a thought that the server has separated back before the text, in `<think>` tags.
        progress: called with each prompt that is finished.

    Raises:
        DataError: if the server or the reward function cannot be used.
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
        if teacher.stopped.is_set():  # the second signal: cancel at once
            for task in workers:
                task.cancel()
        teacher.stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for task in done if not task.cancelled() and (error := task.exception())]
        if errors:
            # Running requests are already paid for, so their answers are awaited and written to the journal.
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
    """Choose one verified answer by a rule for each row that has any; returns row number → answer.

    Args:
        prompts: the prompts with their answers.
        rule: one of `RULES`.
        likelihood: answers → for each the log-probability (nats) of its least likely token; used by `likeliest` only.
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
    """The reason to report for a row: the latest in `PROGRESS`. An HTTP status counts as a failed connection."""
    known = [reason if reason in PROGRESS else "connection" for reason in reasons]
    place = max(range(len(known)), key=lambda i: PROGRESS.index(known[i]))
    return reasons[place]


def failed_rows(run: Path, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows whose last group in a run had no success.

    Args:
        run: folder of the run, or of its trace.
        rows: rows of the run's training data.

    Raises:
        DataError: if there is no trace, or its groups cannot be matched with the rows.
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
    """A report with one mapping for each row that needed a demonstration, in the order of the rows.

    It counts the row's answers by result, and has the tokens of the kept one, or the reason why there is none.
    """
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
    """Run `enter` in a process that ignores interrupts, since its parent handles them; `ready` raises its error."""
    global _failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        enter(make_judge)
    except Exception as error:
        _failure = error


def ready(row: Mapping[str, Any] | None) -> None:
    """Check in a process of the pool, before the first request, that the judge exists and can score these rows.

    Raises:
        ConfigError: if the judge could not be made.
        DataError: if its reward function raises.
    """
    if _failure is not None:
        raise _failure
    if row is not None:
        try_here(row)
