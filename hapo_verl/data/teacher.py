"""Sends requests to a language model behind an OpenAI-compatible server, with retries, a budget and a journal.

    an answer                         is written to the journal, whatever it says
    time-out, connection, 429, 5xx,
    half an answer                    the request is repeated after 1, 2, 4, ... seconds; 429 and 503 delay all requests
    400, 413, 422                     the prompt is refused and not sent again in this run
    401, 403, 404, no quota           the run ends, since every other request would fail as well

A request can cost at most its prompt and `max_tokens`; this many tokens of the budget are reserved until its cost is
known. After a time-out or half an answer the server may have computed the rest, so the full amount counts as spent.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hapo_verl.data.journal import Journal, request_key
from hapo_verl.data.parquet import DataError

Messages = Sequence[Mapping[str, Any]]
# Longest wait between retries in seconds, unless the server asks for a longer one.
LONGEST_WAIT = 60.0
# The run ends after this many requests in a row without an answer, each with all its retries.
HOPELESS = 16


@dataclass(frozen=True)
class Answer:
    """An answer of the server.

    Attributes:
        text: the assistant's text; empty if there is none.
        thought: the thought that the server's reasoning parser has removed from the text.
        finish: the server's `finish_reason`.
        tokens: tokens of prompt and completion as counted by the server; if it gives none, an estimate.
    """

    text: str
    thought: str
    finish: str
    tokens: int


@dataclass(frozen=True)
class Unanswered:
    """The result without an answer; `reason` is `refused`, `budget`, `stopped`, or the error of the last attempt."""

    reason: str


class Budget:
    """A token budget that also counts what running requests may still cost."""

    def __init__(self, limit: int | None, spent: int) -> None:
        """Start with a limit in tokens (None for no limit), of which `spent` are already used."""
        self._limit, self._held, self.spent = limit, 0, spent
        self._settled = asyncio.Condition()

    async def hold(self, tokens: int) -> bool:
        """Reserve this many tokens, waiting for running requests if necessary; False if they can never fit."""
        async with self._settled:
            while self._limit is not None and self.spent + self._held + tokens > self._limit:
                if not self._held:
                    return False
                await self._settled.wait()
            self._held += tokens
            return True

    async def settle(self, held: int, spent: int) -> None:
        """Release a reservation of `held` tokens, of which `spent` were used."""
        async with self._settled:
            self._held -= held
            self.spent += spent
            self._settled.notify_all()


@dataclass
class Teacher:
    """A client of the server that retries failed requests and writes every answer to the journal.

    Attributes:
        client: `openai.AsyncOpenAI`, with its own retries switched off.
        journal: journal of the answers.
        budget: budget of tokens.
        body: fields of every request beside its messages: model, max_tokens, temperature, ...
        max_tokens: largest number of tokens of an answer.
        retries: number of retries of a request.
        first_wait: seconds before the first retry.
        secret: the key; it is removed from error texts of the server.
        counts: number of attempts by result.
        stopped: once set, no further request is sent.
    """

    client: Any
    journal: Journal
    budget: Budget
    body: Mapping[str, Any]
    max_tokens: int
    retries: int = 8
    first_wait: float = 1.0
    secret: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _not_before: float = 0.0
    _in_vain: int = 0
    _answered: bool = False
    _refusal: str = ""

    async def ask(self, messages: Messages, sample: int, *, prompt_tokens: int) -> Answer | Unanswered:
        """Get the answer to a prompt, from the journal if it is there.

        Args:
            messages: the prompt.
            sample: number of the answer among those to the same prompt, from 0.
            prompt_tokens: estimated number of tokens of the prompt.

        Raises:
            DataError: if every other request would fail as well.
        """
        key = request_key({**self.body, "messages": messages}, sample)
        if (known := self.journal.answers.get(key)) is not None:
            self.counts["answers in the journal"] += 1
            return Answer(known["text"], known["thought"], known["finish"], known["tokens"])
        reason = "stopped"
        for attempt in range(self.retries + 1):
            if not await self._may_ask():
                return Unanswered(reason)
            most = prompt_tokens + self.max_tokens
            if not await self.budget.hold(most):
                return Unanswered("budget")
            spent = 0
            try:
                found, wait, waits_all = await self._attempt(messages)
                if isinstance(found, Answer):
                    found = found if found.tokens else Answer(found.text, found.thought, found.finish, most)
                    spent = found.tokens
                    line = {"request": key, "sample": sample, **vars(found)}
                elif found in ("timeout", "half an answer"):
                    spent, line = most, {"request": key, "sample": sample, "lost": found, "tokens": most}
                else:
                    line = None
                if line is not None:
                    await _to_the_end(asyncio.to_thread(self.journal.append, line))
            finally:
                await self.budget.settle(most, spent)
            self.counts["answers" if isinstance(found, Answer) else found] += 1
            if isinstance(found, Answer):
                self._in_vain, self._answered = 0, True
                return found
            reason = found
            if found == "refused":
                break
            wait = max(wait, min(self.first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0))
            if waits_all:
                self._not_before = max(self._not_before, time.monotonic() + wait)
            elif attempt < self.retries:
                await self._sleep(wait)
        self._despair(reason)
        return Unanswered(reason)

    async def _attempt(self, messages: Messages) -> tuple[Answer | str, float, bool]:
        """Send one request.

        Returns:
            The answer or the error, the seconds that the server asks to wait, and whether all requests must wait.
        """
        import openai

        try:
            completion = await self.client.chat.completions.create(messages=messages, **_split(self.body))
        except openai.APITimeoutError:
            return "timeout", 0.0, False
        except openai.APIStatusError as error:
            return self._status(error)
        except openai.APIConnectionError:
            return "connection", 0.0, False
        except (ValueError, openai.APIResponseValidationError):
            return "half an answer", 0.0, False
        answer = _answer(completion)
        return ("half an answer" if answer is None else answer), 0.0, False

    def _status(self, error: Any) -> tuple[str, float, bool]:
        status, code = error.status_code, getattr(error, "code", None)
        if status in (401, 403, 404) or code == "insufficient_quota":
            raise DataError(
                f"--endpoint: the server answered {status}: {self._said(error)}. Look at the endpoint's address, the "
                "model's name and the key in the environment."
            ) from None
        if status in (408, 409, 429) or status >= 500:
            return f"status {status}", _retry_after(error.response.headers), status in (429, 503)
        self._refusal = f"{status}: {self._said(error)}"
        return "refused", 0.0, False

    def _despair(self, reason: str) -> None:
        self._in_vain += 1
        if self._in_vain >= HOPELESS and not (self._answered and reason == "refused"):
            said = f" ({self._refusal})" if reason == "refused" else ""
            raise DataError(
                f"--endpoint: {self._in_vain} requests in a row had no answer, the last one: {reason}{said}. "
                "Look at the server; the same command goes on where this one ended."
            )

    def _said(self, error: Any) -> str:
        text = " ".join(str(error).split())[:300]
        return text.replace(self.secret, "(the key)") if self.secret else text

    async def _may_ask(self) -> bool:
        """Wait while all requests are delayed; False if no further request is to be sent."""
        while not self.stopped.is_set() and (left := self._not_before - time.monotonic()) > 0:
            # A random extra, so that the requests do not all start at the same moment.
            await self._sleep(left + random.uniform(0.0, self.first_wait))
        return not self.stopped.is_set()

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except asyncio.TimeoutError:
            return


async def _to_the_end(awaitable: Any) -> None:
    """Await to the end even if cancelled, so that a paid answer is written to the journal."""
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


# Fields that the client library takes as named arguments; all others go into the body unchanged.
_NAMED = ("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")


def _split(body: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in body.items() if name in _NAMED}
    others = {name: value for name, value in body.items() if name not in _NAMED}
    return {**named, "extra_body": others} if others else named


def _answer(completion: Any) -> Answer | None:
    """Convert a completion; None if it is not a valid answer, which the client library does not check."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return None
    message = choices[0].message
    content = getattr(message, "content", None)
    # Versions of vLLM and SGLang use one or the other of these names for a parsed thought.
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    total = getattr(getattr(completion, "usage", None), "total_tokens", None)
    return Answer(
        text=content if isinstance(content, str) else "",
        thought=thought if isinstance(thought, str) else "",
        finish=str(getattr(choices[0], "finish_reason", None) or "stop"),
        tokens=total if isinstance(total, int) and total > 0 else 0,
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds in a Retry-After header, which is a number or a date; 0 without one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return 0.0
