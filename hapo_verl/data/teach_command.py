"""The command `python -m hapo_verl.data teach`: its arguments and its output."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hapo_verl.algo.demonstration import Refusal
from hapo_verl.config import HapoConfig
from hapo_verl.data import teach as teach_
from hapo_verl.data.demonstrations import judge_of, verdict_here
from hapo_verl.data.journal import Journal
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet
from hapo_verl.data.serve import served
from hapo_verl.data.teacher import Budget, Messages, Teacher

_WIDTH = 13
# Sent as the key if there is none; a server without keys ignores it.
_NO_KEY = "none"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `teach`."""
    hapo = HapoConfig()
    sub.add_argument("--input", type=Path, required=True, help="parquet file")
    sub.add_argument(
        "--output", type=Path, required=True, help="parquet file to write; a .taught.jsonl is written beside it"
    )

    teacher = sub.add_argument_group("the teacher")
    teacher.add_argument("--endpoint", help="address of an OpenAI-compatible API, e.g. http://host:8000/v1")
    teacher.add_argument("--model", help="name of the teacher on the server; default: that of --serve")
    teacher.add_argument(
        "--serve", metavar="MODEL", help="start vLLM with this model on this machine, stop it at the end"
    )
    teacher.add_argument("--serve-args", default="", help="more arguments for the vLLM server, in one string")
    teacher.add_argument("--serve-limit", type=float, default=1800.0, help="seconds that vLLM may take to start")
    teacher.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        help="environment variable with the API key; the key is read only from there",
    )
    teacher.add_argument("--samples", type=_whole, default=4, help="answers per prompt")
    teacher.add_argument("--system", help="a system message only for the teacher, e.g. End with '#### number'.")
    teacher.add_argument("--temperature", type=float, default=0.7)
    teacher.add_argument("--max-tokens", type=_whole, help="limit of an answer; default: --max-response-length")
    teacher.add_argument(
        "--extra-body",
        type=_json,
        default={},
        metavar="JSON",
        help="more fields of each request, e.g. '{\"top_p\": 0.9}'",
    )
    teacher.add_argument(
        "--thoughts",
        action="store_true",
        help="put a thought that the server returns separately in front of the answer, in <think>",
    )

    run = sub.add_argument_group("the run that will learn from the demonstrations")
    run.add_argument("--tokenizer", type=Path, required=True, help="folder of the model that will be trained")
    run.add_argument(
        "--max-response-length", type=_whole, required=True, help="in tokens: its data.max_response_length"
    )
    run.add_argument("--reward", type=Path, help="its reward.custom_reward_function.path; default: verl's own")
    run.add_argument("--reward-name", default="compute_score", help="its reward.custom_reward_function.name")
    run.add_argument(
        "--reward-timeout", type=float, default=hapo.reward_timeout, help="its hapo.reward_timeout, seconds"
    )
    run.add_argument(
        "--success-threshold", type=float, default=hapo.success_threshold, help="its hapo.success_threshold"
    )
    run.add_argument(
        "--multi-turn",
        nargs="*",
        metavar="KEY=VALUE",
        help="if it uses tool_agent: its keys of actor_rollout_ref.rollout.multi_turn, e.g. function_tool_path",
    )
    run.add_argument("--prompt-key", default="prompt", help="its data.prompt_key")
    run.add_argument("--demonstration-key", default=hapo.demonstration_key, help="its hapo.demonstration_key")
    run.add_argument(
        "--only-failed", type=Path, metavar="RUN", help="ask only for prompts whose last group in RUN had no success"
    )

    choice = sub.add_argument_group("what is kept")
    choice.add_argument(
        "--rule", choices=teach_.RULES, default="shortest", help="which of a prompt's verified answers is kept"
    )
    choice.add_argument("--policy", type=Path, metavar="FOLDER", help="the model that --rule likeliest uses")

    limits = sub.add_argument_group("limits")
    limits.add_argument("--journal", type=Path, help="file of all answers; default: a .journal.jsonl beside the output")
    limits.add_argument(
        "--token-budget", type=_whole, help="limit of prompt and answer tokens, over all runs with this journal"
    )
    limits.add_argument("--concurrency", type=_whole, default=32, help="number of requests at a time")
    limits.add_argument("--timeout", type=float, default=600.0, help="seconds that an answer may take")
    limits.add_argument("--retries", type=int, default=8, help="how often a failed request is sent again")
    limits.add_argument(
        "--first-wait", type=float, default=1.0, help="seconds before the first retry; doubled each time"
    )
    limits.add_argument(
        "--workers", type=_whole, default=os.cpu_count(), help="processes that verify; default: one per core"
    )


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a positive number is needed")
    return number


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict) or "messages" in value:
        raise argparse.ArgumentTypeError("a JSON object without messages is needed")
    return value


def run(args: argparse.Namespace) -> None:
    """Ask the teacher, verify its answers, choose one per row, and write the data set.

    Raises:
        DataError, ConfigError: with one line for the user; the journal keeps the answers so far.
    """
    _check(args)
    rows = list(read_parquet(args.input))
    tokenizer = _tokenizer(args.tokenizer)
    judge = partial(
        judge_of,
        str(args.tokenizer),
        args.max_response_length,
        args.reward and str(args.reward),
        args.reward_name,
        args.success_threshold,
        args.multi_turn,
    )
    # Spawned, for the same reason as in `choices`.
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=teach_.enter_quietly, initargs=(judge,))
    journal: Journal | None = None
    try:
        pool.submit(teach_.ready, rows[0] if rows else None).result()
        wanted = _wanted(args, rows, pool)
        journal = Journal(args.journal or args.output.with_suffix(".journal.jsonl"))
        prompts = teach_.prompts_of(
            rows, wanted, prompt_key=args.prompt_key, system=args.system, count=partial(_count, tokenizer)
        )
        _say("asked", len(prompts), f"prompts, of {len(wanted)} rows without a demonstration among {len(rows)}")
        if journal.cut:
            _say("journal", journal.cut, "lines that were cut off and count as never written")
        teacher, seconds = asyncio.run(_teach(args, prompts, rows, journal, pool))
        spent = journal.tokens
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if journal is not None:
            journal.close()
    reasons = Counter(reason for prompt in prompts for of in prompt.reasons.values() for reason in of)
    verified = sum(len(taught) for prompt in prompts for taught in prompt.taught.values())
    _say("answers", verified, "verified")
    for reason, count in reasons.most_common():
        _say("answers", count, reason)
    for what, count in teacher.counts.most_common():
        _say("requests", count, what)
    _say("tokens", spent, f"by the journal; {seconds:.0f} s this time")
    if teacher.stopped.is_set():
        raise DataError(f"{args.output}: stopped before the end, nothing is written. The same command goes on.")

    kept = teach_.chosen(prompts, args.rule, partial(_likelihoods, args, tokenizer))
    report = args.output.with_suffix(".taught.jsonl")
    lines = teach_.report_lines(prompts, rows, kept)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for reason, count in Counter(line["reason"] for line in lines if "reason" in line).most_common():
        _say("without one", count, reason)
    _say("taught", len(kept), f"of {len(wanted)} rows, each in {report}")
    key = args.demonstration_key
    taught = [row | {key: kept[i].text if i in kept else row.get(key)} for i, row in enumerate(rows)]
    write_parquet(_of_one_type(taught, key), args.output)
    _say("kept", len(rows), f"of {len(rows)}, written to {args.output}")


def _say(what: str, count: int, text: str) -> None:
    print(f"{what:<{_WIDTH}}{count:7}  {text}", flush=True)


def _check(args: argparse.Namespace) -> None:
    if bool(args.endpoint) == bool(args.serve):
        raise DataError("--endpoint: either the address of a server or --serve is needed, not both. Name one of them.")
    if args.endpoint and not args.model:
        raise DataError("--model: the server has to be told which of its models is asked. Name it.")
    if args.endpoint and not args.endpoint.startswith(("http://", "https://")):
        raise DataError("--endpoint: an address begins with http:// or https://. Write it in front.")
    if "@" in (args.endpoint or ""):
        raise DataError("--endpoint: an address does not hold a key here. Put it into the environment: --key-variable.")
    if args.rule == "likeliest" and args.policy is None:
        raise DataError("--rule likeliest: the policy's folder is needed. Name a model or a checkpoint: --policy.")
    try:
        import openai  # noqa: F401
    except ImportError:
        raise DataError("teach: the client library is not installed. pip install openai") from None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"--tokenizer {folder}: cannot be loaded ({first_line}). Name a model's folder.") from None


def _count(tokenizer: Any, messages: Messages) -> int:
    return len(_prompt_ids(tokenizer, messages))


def _prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _wanted(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], pool: Executor) -> list[int]:
    """Numbers of the rows that need a demonstration: a run would not inject the one they have, if any."""
    from tqdm import tqdm

    numbers = range(len(rows)) if args.only_failed is None else teach_.failed_rows(args.only_failed, rows)
    with_one = [i for i in numbers if rows[i].get(args.demonstration_key) is not None]
    verdicts = pool.map(
        verdict_here, [rows[i] for i in with_one], [rows[i][args.demonstration_key] for i in with_one], chunksize=16
    )
    has = {
        i
        for i, verdict in zip(with_one, tqdm(verdicts, total=len(with_one), desc="verifying", unit="row"), strict=True)
        if not isinstance(verdict, Refusal)
    }
    return [i for i in numbers if i not in has]


async def _teach(
    args: argparse.Namespace,
    prompts: Sequence[teach_.Prompt],
    rows: Sequence[Mapping[str, Any]],
    journal: Journal,
    pool: Executor,
) -> tuple[Teacher, float]:
    import time

    from openai import AsyncOpenAI
    from tqdm import tqdm

    begun, before = time.monotonic(), journal.tokens
    body = {"model": args.model or args.serve, "temperature": args.temperature, **args.extra_body}
    max_tokens = args.max_tokens or args.max_response_length
    if "max_completion_tokens" in body:
        max_tokens = int(body["max_completion_tokens"])
    else:
        body.setdefault("max_tokens", max_tokens)
    secret = os.environ.get(args.key_variable, "")
    log = args.output.with_suffix(".vllm.log")
    name = ["--served-model-name", args.model] if args.model else []
    server = (
        nullcontext(args.endpoint)
        if args.endpoint
        else served(args.serve, [*name, *shlex.split(args.serve_args)], log, limit=args.serve_limit)
    )
    with server as endpoint:
        async with AsyncOpenAI(
            base_url=endpoint, api_key=secret or _NO_KEY, max_retries=0, timeout=args.timeout
        ) as client:
            teacher = Teacher(
                client,
                journal,
                Budget(args.token_budget, journal.tokens),
                body,
                int(body.get("max_tokens", max_tokens)),
                retries=args.retries,
                first_wait=args.first_wait,
                secret=secret,
            )
            with tqdm(total=len(prompts), desc="teaching", unit="prompt") as bar:
                taught = 0

                def done(prompt: teach_.Prompt) -> None:
                    nonlocal taught
                    taught += bool(prompt.taught)
                    tokens = journal.tokens - before
                    rate = tokens / max(time.monotonic() - begun, 1e-3)
                    bar.set_postfix_str(f"{taught} taught, {journal.tokens} tokens, {rate:.0f} tokens/s", refresh=False)
                    bar.update()

                await teach_.teach(
                    prompts,
                    rows,
                    teacher,
                    pool,
                    verdict_here,
                    samples=args.samples,
                    rule=args.rule,
                    concurrency=args.concurrency,
                    reward_timeout=args.reward_timeout,
                    thoughts=args.thoughts,
                    progress=done,
                )
    return teacher, time.monotonic() - begun


def _likelihoods(
    args: argparse.Namespace, tokenizer: Any, asked: Sequence[tuple[teach_.Prompt, teach_.Candidate]]
) -> list[float]:
    """The log-probability (nats) of each answer's least likely token under `--policy`."""
    from hapo_verl.launch.teachable import Asked, score

    front = 1 if args.system else 0
    demonstrations = [
        Asked(_prompt_ids(tokenizer, prompt.messages[front:]), of.response.tokens, of.response.mask)
        for prompt, of in asked
    ]
    scored = score(args.policy, demonstrations, temperature=1.0, seconds=float("inf"), trust_remote_code=False)
    return [of.logp.min().item() for of in scored]


def _of_one_type(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Give the column one type, as parquet requires: if some demonstrations are lists of messages, make all so."""
    if all(isinstance(row[key], str | None) for row in rows):
        return rows
    return [
        row | {key: [{"role": "assistant", "content": row[key]}]} if isinstance(row[key], str) else row for row in rows
    ]
