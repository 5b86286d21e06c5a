"""A language model behind an OpenAI-compatible server: one question, one answer, and what becomes of it on the way.

    answered                          journaled, whatever it says
    time-out, connection, 429, 5xx,
    half an answer                    asked again after 1, 2, 4, ... seconds; 429 and 503 hold all requests back
    400, 413, 422                     this prompt is refused, and is not asked again in this run
    401, 403, 404, no quota           the run ends: no other request would fare better

Every request may cost its prompt and `max_tokens`: that much of the budget is held until its cost is known. What timed
out or came in halves may have been computed, and counts in full.
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
# Seconds; no wait is longer, unless the server asks for a longer one.
LONGEST_WAIT = 60.0
# So many requests without a single answer, each after all its retries: the server is not there.
HOPELESS = 16


@dataclass(frozen=True)
class Answer:
    """What a server has answered.

    Attributes:
        text: of the assistant; empty where there is none.
        thought: what a server's reasoning parser has taken out of the text.
        finish: the server's `finish_reason`.
        tokens: prompt and completion, as the server counts them, else as they were estimated.
    """

    text: str
    thought: str
    finish: str
    tokens: int


@dataclass(frozen=True)
class Unanswered:
    """Why there is no answer: `refused`, `budget`, `stopped`, or what the last attempt ran into."""

    reason: str


class Budget:
    """Tokens that may be spent, those that requests on their way may cost included."""

    def __init__(self, limit: int | None, spent: int) -> None:
        """A budget of `limit` tokens, None for no limit, of which `spent` are gone."""
        self._limit, self._held, self.spent = limit, 0, spent
        self._settled = asyncio.Condition()

    async def hold(self, tokens: int) -> bool:
        """Hold this much, once requests on their way leave it; False where it will never fit."""
        async with self._settled:
            while self._limit is not None and self.spent + self._held + tokens > self._limit:
                if not self._held:
                    return False
                await self._settled.wait()
            self._held += tokens
            return True

    async def settle(self, held: int, spent: int) -> None:
        """Give back what was held, of which this much was spent."""
        async with self._settled:
            self._held -= held
            self.spent += spent
            self._settled.notify_all()


@dataclass
class Teacher:
    """Asks, waits, asks again, and writes down what it was told.

    Attributes:
        client: `openai.AsyncOpenAI` without retries of its own.
        journal: of the answers.
        budget: of tokens.
        body: what every request says beside its messages: model, max_tokens, temperature, ...
        max_tokens: that an answer may have.
        retries: of a request.
        first_wait: seconds before the first retry.
        secret: never to be repeated, whatever a server writes into its errors.
        counts: of attempts, by what became of them.
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
        """The answer to a prompt, from the journal where it is there.

        Args:
            messages: the prompt.
            sample: the how-manieth answer to it, from 0.
            prompt_tokens: estimated.

        Raises:
            DataError: where no other request would fare better.
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
        """The answer, or what went wrong; seconds that the server asks to wait; whether all requests have to."""
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
        """After the wait that is on all requests; False where none is to be asked any more."""
        while not self.stopped.is_set() and (left := self._not_before - time.monotonic()) > 0:
            # Not all at the same moment.
            await self._sleep(left + random.uniform(0.0, self.first_wait))
        return not self.stopped.is_set()

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopped.wait(), seconds)
        except asyncio.TimeoutError:
            return


async def _to_the_end(awaitable: Any) -> None:
    """Not cut short by a cancellation: what was paid for is written down."""
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


# What the client library takes by name; everything else goes into the body as it is.
_NAMED = ("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")


def _split(body: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in body.items() if name in _NAMED}
    others = {name: value for name, value in body.items() if name not in _NAMED}
    return {**named, "extra_body": others} if others else named


def _answer(completion: Any) -> Answer | None:
    """None where the server's JSON is no answer: the client library does not check its form."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        return None
    message = choices[0].message
    content = getattr(message, "content", None)
    # vLLM and SGLang have written a parsed thought under either name.
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    total = getattr(getattr(completion, "usage", None), "total_tokens", None)
    return Answer(
        text=content if isinstance(content, str) else "",
        thought=thought if isinstance(thought, str) else "",
        finish=str(getattr(choices[0], "finish_reason", None) or "stop"),
        tokens=total if isinstance(total, int) and total > 0 else 0,
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for, as a number or a date; 0 where it asks for none."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return 0.0
