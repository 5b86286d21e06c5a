"""A teacher behind a real server: requests, retries, the kept answers, and no answer is paid for twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from hapo_verl.algo.demonstration import Refusal, Response, demonstration_turns
from hapo_verl.data import teach as teach_
from hapo_verl.data.__main__ import main
from hapo_verl.data.demonstrations import Judge
from hapo_verl.data.journal import Journal, request_key
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet
from hapo_verl.data.teacher import Budget, Teacher
from tests.data.teacher_server import serving
from tests.data.test_demonstrations import message, write_tokenizer

KEY = "sk-never-to-be-seen"


def judge(limit=6):
    """A judge with one token per character; a text is a success if it ends in the row's answer."""

    def respond(value, row):
        turns = demonstration_turns(value)
        if isinstance(turns, Refusal):
            return turns
        tokens = [ord(char) for char in turns[0].text]
        return Response(tokens, [1] * len(tokens), 1) if len(tokens) <= limit else Refusal("overlong")

    return Judge(
        respond=respond,
        decode=lambda tokens: "".join(map(chr, tokens)),
        succeeds=lambda row, text, num_turns: text.endswith(row["answer"]),
    )


def rows_of(questions, answer="4"):
    return [
        {"prompt": [message(q, "user")], "answer": answer, "data_source": "s", "extra_info": {"index": i}}
        for i, q in enumerate(questions)
    ]


def prompts_of(rows, system=None):
    return teach_.prompts_of(
        rows, range(len(rows)), prompt_key="prompt", system=system, count=lambda messages: len(messages[-1]["content"])
    )


def taught(endpoint, rows, journal, **settings):
    """Teach these rows; returns the prompts and the teacher."""
    from openai import AsyncOpenAI

    asked = {"samples": 1, "rule": "shortest", "concurrency": 4, "reward_timeout": 5.0}
    asked |= {name: settings.pop(name) for name in list(settings) if name in asked or name == "thoughts"}
    limit, timeout = settings.pop("budget", None), settings.pop("timeout", 5.0)
    prompts, opened = prompts_of(rows), Journal(journal)

    async def run():
        async with AsyncOpenAI(base_url=endpoint, api_key=KEY, max_retries=0, timeout=timeout) as client:
            teacher = Teacher(
                client,
                opened,
                Budget(limit, opened.tokens),
                {"model": "teacher", "max_tokens": 6},
                6,
                first_wait=settings.pop("first_wait", 0.01),
                secret=KEY,
                **settings,
            )
            with ThreadPoolExecutor(2) as pool:
                await teach_.teach(prompts, rows, teacher, pool, judge().verdict, **asked)
            return teacher

    try:
        return prompts, asyncio.run(run())
    finally:
        opened.close()


def texts(prompts):
    return [[candidate.text for _, candidate in sorted(p.taught[p.rows[0]].items())] for p in prompts]


def misbehave(question, number):
    """A script in which every question gets the right answer after a different error."""
    trouble = {
        "timeout": ("hold", threading.Event()),
        "busy": ("status", 429, {"retry-after": "0.05"}, "slower"),
        "broken": ("status", 500, {}, "oops"),
        "half": ("half", "= 4"),
        "cut": ("cut", "= 4"),
        "no choice": ("choices", []),
        "odd": ("choices", "none"),
    }
    return trouble[question] if question in trouble and number == 0 else "= 4"


def test_after_any_error_the_right_answer_arrives_and_no_prompt_is_lost(tmp_path):
    questions = ["timeout", "busy", "broken", "half", "cut", "no choice", "odd", "fine"]
    with serving(misbehave) as server:
        prompts, teacher = taught(server.endpoint, rows_of(questions), tmp_path / "j", timeout=0.5)
        assert texts(prompts) == [["= 4"]] * len(questions)
        assert server.asked == {question: 1 if question == "fine" else 2 for question in questions}
        assert teacher.counts == {
            "answers": 8, "timeout": 1, "status 429": 1, "status 500": 1, "connection": 1, "half an answer": 3,
        }  # fmt: skip
        assert server.most_waiting <= 4
        # A second run asks nothing.
        before = dict(server.asked)
        again, _ = taught(server.endpoint, rows_of(questions), tmp_path / "j")
        assert texts(again) == texts(prompts)
        assert dict(server.asked) == before


def test_unusable_answers_are_reported_with_a_reason_and_not_kept(tmp_path):
    answers = {
        "wrong": "= 5",
        "long": "it is = 4",
        "empty": "  ",
        "nothing": None,
        "cut": ("finish", "= 4", "length"),
        "filtered": ("finish", "= 4", "content_filter"),
        "calls": ("finish", "= 4", "tool_calls"),
        "refused": ("status", 400, {}, "too long"),
        "right": "= 4",
    }
    rows = rows_of(answers)
    with serving(lambda question, number: answers[question]) as server:
        prompts, _ = taught(server.endpoint, rows, tmp_path / "j", retries=1)
    found = {
        line["row"]: line.get("reason")
        for line in teach_.report_lines(prompts, rows, teach_.chosen(prompts, "shortest", None))
    }
    assert dict(zip(answers, found.values(), strict=True)) == {
        "wrong": "rejected",
        "long": "overlong",
        "empty": "empty",
        "nothing": "empty",
        "cut": "truncated",
        "filtered": "filtered",
        "calls": "malformed",
        "refused": "refused",
        "right": None,
    }
    assert all(server.asked[question] == 1 for question in answers)


def test_a_reward_that_raises_is_an_error_of_that_answer_only():
    verdict = judge().verdict({}, "= 4")
    assert verdict == Refusal("error")
    assert judge().verdict({"answer": "4"}, "= 4") == Response([ord(c) for c in "= 4"], [1] * 3, 1)


def test_the_shortest_the_first_or_the_most_likely_verified_answer_is_kept(tmp_path):
    answers = ["so = 4", "= 5", "= 4", "~ 4", "is 4"]

    def script(question, number):
        return answers[number]

    rows = rows_of(["?"])
    with serving(script) as server:
        prompts, _ = taught(server.endpoint, rows, tmp_path / "a", samples=5, concurrency=1)
        assert texts(prompts) == [["so = 4", "= 4", "~ 4", "is 4"]]
        assert teach_.chosen(prompts, "shortest", None)[0].text == "= 4"
        assert teach_.chosen(prompts, "first", None)[0].text == "so = 4"

        def least(asked):
            return [{"so = 4": -3.0, "= 4": -9.0, "~ 4": -2.0, "is 4": -2.0}[of.text] for _, of in asked]

        assert (
            teach_.chosen(prompts, "likeliest", lambda asked: [-len(of.text) == -4 for _, of in asked])[0].text
            == "is 4"
        )
        # The shorter of two equally likely answers is chosen.
        assert teach_.chosen(prompts, "likeliest", least)[0].text == "~ 4"
        server.asked.clear()
        taught(server.endpoint, rows, tmp_path / "b", samples=5, rule="first")
        assert server.asked == {"?": 1}


def test_equal_prompts_are_asked_once_and_judged_for_each_row(tmp_path):
    rows = [*rows_of(["?"], answer="4"), *rows_of(["?"], answer="5")]
    with serving(lambda question, number: ["= 4", "= 5"][number]) as server:
        prompts, _ = taught(server.endpoint, rows, tmp_path / "j", samples=2, rule="first")
    assert server.asked == {"?": 2}
    assert {n: c.text for n, c in teach_.chosen(prompts, "first", None).items()} == {0: "= 4", 1: "= 5"}


def test_only_the_teacher_gets_the_system_message_and_nulls_are_not_sent():
    rows = [{"prompt": [{"role": "user", "content": "?", "tool_calls": None}]}]
    (prompt,) = prompts_of(rows, system="Be brief.")
    assert prompt.messages == [message("Be brief.", "system"), message("?", "user")]
    with pytest.raises(DataError, match="row 0: prompt is no list of messages with role and content"):
        prompts_of([{"prompt": "?"}])


def test_a_thought_that_the_server_parsed_out_is_put_back_if_requested(tmp_path):
    choices = [{"index": 0, "finish_reason": "stop", "message": {"content": "4", "reasoning_content": "2 + 2"}}]
    rows = rows_of(["?"])
    with serving(lambda question, number: ("choices", choices)) as server:
        plain, _ = taught(server.endpoint, rows, tmp_path / "j")
        thoughtful, _ = taught(server.endpoint, rows, tmp_path / "j", thoughts=True)
    assert texts(plain) == [["4"]]
    assert thoughtful[0].reasons == {0: ["overlong"]}
    assert server.asked == {"?": 1}


@pytest.mark.parametrize("budget", [0, 15, 16, 39, 40, 100])
def test_a_budget_is_never_exceeded_and_is_used_as_far_as_requests_fit(tmp_path, budget):
    # A request may cost up to 1 + 6 tokens, and costs 5.
    rows = rows_of("abcdefgh")
    with serving(lambda question, number: "= 4", tokens=5) as server:
        prompts, teacher = taught(server.endpoint, rows, tmp_path / "j", budget=budget)
        expected = min(8, max(0, (budget - 7) // 5 + 1))
        assert sum(server.asked.values()) == expected
        assert teacher.budget.spent == 5 * expected <= budget
        assert [reason for p in prompts for of in p.reasons.values() for reason in of] == ["budget"] * (8 - expected)
        # The journal records the spent tokens.
        taught(server.endpoint, rows, tmp_path / "j", budget=budget)
        assert sum(server.asked.values()) == expected


def test_a_request_that_timed_out_counts_in_full_since_it_may_have_been_computed(tmp_path):
    with serving(lambda question, number: ("hold", threading.Event())) as server:
        prompts, teacher = taught(server.endpoint, rows_of("a"), tmp_path / "j", timeout=0.2, retries=2, budget=15)
    assert teacher.budget.spent == 14
    assert server.asked == {"a": 2}
    assert prompts[0].reasons == {0: ["budget"]}


def test_no_worker_asks_before_the_time_that_the_server_requested(tmp_path):
    times = []

    def script(question, number):
        times.append(time.monotonic())
        return ("status", 429, {"retry-after": "0.8"}, "slower") if len(times) == 1 else "= 4"

    with serving(script) as server:
        taught(server.endpoint, rows_of("abcdefghijkl"), tmp_path / "j", concurrency=2, first_wait=0.01)
    assert len(times) == 13
    # The other worker may have asked once or twice before the answer arrived.
    assert sum(at - times[0] >= 0.8 for at in times) >= 10


def test_waits_between_retries_grow(tmp_path):
    times = []

    def script(question, number):
        times.append(time.monotonic())
        return ("status", 500, {}, "oops") if number < 3 else "= 4"

    with serving(script) as server:
        taught(server.endpoint, rows_of("a"), tmp_path / "j", first_wait=0.2)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2
    assert waits[2] >= 0.4


@pytest.mark.parametrize(("code", "headers"), [(401, {}), (403, {}), (404, {}), (429, {"code": "insufficient_quota"})])
def test_a_permanent_error_ends_the_run_with_a_line_without_the_key(tmp_path, code, headers):
    with (
        serving(lambda question, number: ("status", code, dict(headers), f"no such key {KEY}")) as server,
        pytest.raises(DataError) as error,
    ):
        taught(server.endpoint, rows_of("abcd"), tmp_path / "j", concurrency=1)
    assert str(error.value).startswith(f"--endpoint: the server answered {code}: ")
    assert KEY not in str(error.value)
    assert "(the key)" in str(error.value)
    assert sum(server.asked.values()) == 1


def test_a_server_that_is_not_there_ends_the_run(tmp_path, unused_port):
    with pytest.raises(DataError, match=r"1\d requests in a row had no answer, the last one: connection\."):
        taught(f"http://127.0.0.1:{unused_port}/v1", rows_of(map(str, range(99))), tmp_path / "j", retries=0)


def test_the_error_of_a_server_that_refuses_everything_is_quoted(tmp_path):
    with (
        serving(lambda question, number: ("status", 400, {}, f"max_tokens is too large {KEY}")) as server,
        pytest.raises(DataError, match=r"refused \(400: .*max_tokens is too large \(the key\)"),
    ):
        taught(server.endpoint, rows_of(map(str, range(99))), tmp_path / "j")


def test_if_one_request_ends_the_run_pending_answers_are_still_waited_for(tmp_path):
    # Both requests have arrived before the first one is answered.
    both = threading.Barrier(2, timeout=30)

    def script(question, number):
        both.wait()
        if question == "bad":
            return ("status", 401, {}, "no")
        time.sleep(0.5)
        return "= 4"

    with serving(script) as server, pytest.raises(DataError):
        taught(server.endpoint, rows_of(["bad", "good"]), tmp_path / "j")
    assert [line["text"] for line in lines(tmp_path / "j")] == ["= 4"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_journal_line_cut_off_by_a_kill_is_ignored_and_harms_no_other(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append({"request": "a", "text": "1", "tokens": 3})
    journal.append({"request": "b", "lost": "timeout", "tokens": 4})
    journal.close()
    with path.open("a") as file:
        file.write('{"request": "c", "te')
    journal = Journal(path)
    assert (set(journal.answers), journal.tokens, journal.cut) == ({"a"}, 7, 1)
    journal.append({"request": "c", "text": "2", "tokens": 1})
    with pytest.raises(DataError, match="another process writes it"):
        Journal(path)
    journal.close()
    journal = Journal(path)
    assert (set(journal.answers), journal.tokens, journal.cut) == ({"a", "c"}, 8, 1)
    journal.close()


def test_requests_differ_if_anything_that_is_sent_differs():
    body = {"model": "m", "temperature": 0.7, "messages": [message("?", "user")]}
    keys = [
        request_key(body, 0),
        request_key(body, 1),
        request_key(body | {"temperature": 0.8}, 0),
        request_key(body | {"messages": [message("!", "user")]}, 0),
    ]
    assert len(set(keys)) == 4
    assert request_key(dict(reversed(body.items())), 0) == keys[0]


def test_only_prompts_whose_latest_group_failed_are_asked(tmp_path):
    trace = tmp_path / "run" / "trace"
    trace.mkdir(parents=True)
    visits = [
        (1, 0, "s", [False]), (2, 0, "s", [True]),  # It succeeded at the last visit.
        (1, 1, "s", [True]), (2, 1, "s", [False, False]),  # It failed at the last visit.
        (1, 2, "s", []),  # It was not judged.
        (1, 0, "t", [False]),
        (1, 9, "s", [False]),  # This row is not in the file.
    ]  # fmt: skip
    written = [{"step": s, "index": i, "data_source": d, "successes": w} for s, i, d, w in visits]
    (trace / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written) + '{"step": 3, "ind')
    rows = [{"data_source": d, "extra_info": {"index": i}} for d, i in [("s", 0), ("s", 1), ("s", 2), ("t", 0)]]
    assert teach_.failed_rows(tmp_path / "run", rows) == [1, 3]
    assert teach_.failed_rows(trace, rows) == [1, 3]
    for bad, text in [
        ([{"data_source": "s"}], "row 0 has no extra_info.index"),
        ([rows[0], rows[0]], "rows 0 and 1 have the same data_source and extra_info.index"),
        (rows[2:3], "none of its 3 failed prompts is a row of --input."),
    ]:
        with pytest.raises(DataError, match=text):
            teach_.failed_rows(tmp_path / "run", bad)
    with pytest.raises(DataError, match=r"no groups\.jsonl with a group in it"):
        teach_.failed_rows(tmp_path, rows)


REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)
"""


def prepared(folder, count):
    """Write the files of a run whose answers are the question's digits backwards, and return its command."""
    rows = [
        {
            "data_source": "digits",
            "prompt": [message(f"{number:03}", "user")],
            "reward_model": {"style": "rule", "ground_truth": f"{number:03}"[::-1]},
            "extra_info": {"index": number},
            "demonstration": f"{number:03}"[::-1] if number % 5 == 0 else "" if number % 5 == 1 else None,
        }
        for number in range(count)
    ]
    write_parquet(rows, folder / "in.parquet")
    write_tokenizer(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    command = ["teach", "--input", folder / "in.parquet", "--output", folder / "out" / "taught.parquet"]
    command += ["--tokenizer", folder / "model", "--max-response-length", 6, "--reward", folder / "reward.py"]
    command += ["--model", "teacher", "--workers", 1, "--samples", 2, "--first-wait", 0.01]
    return rows, [str(part) for part in command]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.long
def test_a_killed_run_resumes_without_losing_a_prompt_or_paying_for_one_twice(tmp_path, key):
    rows, command = prepared(tmp_path, 40)
    journal, output = tmp_path / "out" / "taught.journal.jsonl", tmp_path / "out" / "taught.parquet"
    release, concurrency = threading.Event(), 4
    seen = []

    def script(question, number):
        seen.append(question)
        # During the first launch request 21 and all later ones are held until the client is killed.
        return question[::-1] if len(seen) <= 20 or release.is_set() else ("hold", threading.Event())

    def start():
        call = [sys.executable, "-m", "hapo_verl.data", *command, "--endpoint", server.endpoint]
        return subprocess.Popen(
            [*call, "--concurrency", str(concurrency)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    with serving(script) as server:
        first = start()
        until(lambda: journal.exists() and len(lines(journal)) == 20 and server.waiting == concurrency, first)
        first.kill()
        first.communicate()
        answered = {line["request"] for line in lines(journal)}
        assert len(answered) == 20
        assert not output.exists()
        asked_before, release_at = dict(server.asked), sum(server.answered.values())
        assert release_at == 20
        release.set()
        second = start()
        said, _ = second.communicate(timeout=300)
        assert second.returncode == 0, said
        # Every fifth of 40 rows has a demonstration, so 32 rows are asked for two answers each.
        wanted = [row["prompt"][0]["content"] for i, row in enumerate(rows) if i % 5]
        assert {question: server.answered[question] for question in wanted} == dict.fromkeys(wanted, 2)
        # Only the requests without an answer at the time of the kill were sent again.
        assert sum(server.asked.values()) == 2 * len(wanted) + concurrency
        assert sum(asked_before.values()) == 20 + concurrency
    assert {
        value for header in server.headers for name, value in header.items() if name.lower() == "authorization"
    } == {f"Bearer {KEY}"}
    assert [row["demonstration"] for row in read_parquet(output)] == [row["prompt"][0]["content"][::-1] for row in rows]
    others = [{name: value for name, value in row.items() if name != "demonstration"} for row in rows]
    assert [
        {name: value for name, value in row.items() if name != "demonstration"} for row in read_parquet(output)
    ] == others
    assert "taught            32  of 32 rows" in said
    assert "requests          20  answers in the journal" in said
    assert "requests          44  answers" in said
    assert KEY not in said
    assert KEY.encode() not in everything_written(tmp_path)


def until(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_an_interrupted_run_waits_for_pending_answers_and_asks_nothing_twice(tmp_path, key):
    _, command = prepared(tmp_path, 40)
    release, concurrency = threading.Event(), 4
    seen = []

    def script(question, number):
        seen.append(question)
        if len(seen) > 10 and not release.is_set():
            release.wait(60)
        return question[::-1]

    with serving(script) as server:
        call = [sys.executable, "-m", "hapo_verl.data", *command, "--endpoint", server.endpoint, "--concurrency", "4"]
        first = subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        until(lambda: server.waiting == concurrency and len(seen) == 14, first)
        # Like a terminal, send the signal to the whole process group.
        os.killpg(first.pid, signal.SIGINT)
        time.sleep(0.5)
        release.set()
        said, _ = first.communicate(timeout=120)
        assert first.returncode == 1
        assert "stopped before the end, nothing is written. The same command goes on." in said
        assert not (tmp_path / "out" / "taught.parquet").exists()
        assert len(lines(tmp_path / "out" / "taught.journal.jsonl")) == 14
        assert main([*command, "--endpoint", server.endpoint]) == 0
    assert set(server.asked.values()) == {2}
    assert len(server.asked) == 32


def test_wrong_arguments_are_refused_in_one_line_before_anything_is_asked(tmp_path, key, capsys):
    _, command = prepared(tmp_path, 5)
    endpoint = ["--endpoint", "http://127.0.0.1:1/v1"]
    (tmp_path / "raising.py").write_text("def compute_score(**kwargs):\n    raise KeyError('entry')\n")
    for arguments, text in [
        ([], "--endpoint: either the address of a server or --serve is needed, not both. Name one of them."),
        ([*endpoint, "--serve", "m"], "--endpoint: either the address of a server or --serve is needed, not both. Name one of them."),
        (["--endpoint", "host:1"], "--endpoint: an address begins with http:// or https://. Write it in front."),
        (["--endpoint", f"http://me:{KEY}@host/v1"], "--endpoint: an address does not hold a key here. Put it into the environment: --key-variable."),
        ([*endpoint, "--rule", "likeliest"], "--rule likeliest: the policy's folder is needed. Name a model or a checkpoint: --policy."),
        ([*endpoint, "--reward", str(tmp_path / "raising.py")], "row 0: judging an answer raised KeyError: 'entry'. Name the reward function of the run, which scores these rows: --reward."),
    ]:  # fmt: skip
        assert main([*command, *arguments]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"hapo_verl.data: {text}"
    assert not (tmp_path / "out").exists()


def test_the_likelihood_of_an_answer_is_computed_by_the_policy_itself(tmp_path):
    """It is compared with log-probabilities by transformers, on the quickstart's tiny model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tiny_model
    from hapo_verl.data.teach_command import _likelihoods

    tiny_model.write(tmp_path / "model", alphabet="0123456789", hidden=64, layers=2, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = teach_.Prompt([message("Backwards.", "system"), message("123", "user")], [0], 3)
    answers = [teach_.Candidate(text, Response(tokenizer.encode(text), [1] * len(text), 1)) for text in ("321", "32")]

    class Arguments:
        system, policy = "Backwards.", tmp_path / "model"

    found = _likelihoods(Arguments, tokenizer, [(prompt, answer) for answer in answers])
    front = tokenizer.apply_chat_template([message("123", "user")], add_generation_prompt=True, return_dict=False)
    for answer, value in zip(answers, found, strict=True):
        ids = torch.tensor([[*front, *answer.response.tokens]])
        with torch.no_grad():
            logp = model(ids).logits[0].float().log_softmax(-1)
        tokens = [logp[len(front) - 1 + i, token].item() for i, token in enumerate(answer.response.tokens)]
        assert value == pytest.approx(min(tokens), abs=1e-4)
