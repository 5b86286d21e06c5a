"""The quickstart without the trainer: task, tokenizer, progress, and the end of all started processes."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import digits  # noqa: E402
import quickstart  # noqa: E402
import smollm2  # noqa: E402
import tiny_model  # noqa: E402
import word_problems  # noqa: E402
from hapo_verl.data.parquet import write_parquet  # noqa: E402
from launch import Launch, TrainingError, name_of  # noqa: E402
from tasks import Prepared, language_settings  # noqa: E402

QUESTION = [{"role": "user", "content": "9012"}]


@pytest.mark.parametrize(
    ("flags", "fast"), [("fma avx512f", False), ("avx512f avx512_bf16 vaes", True), ("amx_bf16", True), (None, False)]
)
def test_bf16_is_used_if_the_cpu_multiplies_in_it(flags, fast, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"model name\t: a CPU\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(smollm2, "CPU_INFO", info)
    assert smollm2.fast_in_bf16() is fast
    dtypes = [value for key, value in language_settings().items() if key.endswith("dtype")]
    assert dtypes == (["bfloat16", "bf16"] if fast else ["float32", "fp32"])


def test_held_out_problems_are_never_trained_on():
    train, heldout = digits.problems(digits=2, train=1000, heldout=20, seed=0)
    assert len(set(heldout)) == 20
    assert set(train).isdisjoint(heldout)
    assert set(train) | set(heldout) == {f"{number:02d}" for number in range(100)}


def test_holding_out_every_problem_is_refused():
    with pytest.raises(ValueError, match="of 10\\^2 strings some must be left to train on"):
        digits.problems(digits=2, train=1, heldout=100, seed=0)


def test_only_the_exact_answer_is_rewarded():
    row = digits.row("0123", 0, "train")
    assert row["demonstration"] == "3210"
    for answer, score in [("3210", 1.0), ("3210 ", 0.0), ("321", 0.0), ("", 0.0)]:
        assert digits.compute_score(row["data_source"], answer, "3210") == {"score": score, "acc": score}


@pytest.mark.parametrize("alphabet", ["0123456789", None])
def test_the_tokenizer_works_with_verls_prompt_builder_also_after_a_reload(tmp_path, alphabet):
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tiny_model.make_tokenizer(alphabet).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    answer = [*tokenizer.encode("2109", add_special_tokens=False), tokenizer.eos_token_id]
    assert len(answer) == 5
    assert tokenizer.decode(answer, skip_special_tokens=True) == "2109"

    built = create_continuous_token_builder(tokenizer, hf_model_type="qwen2").build_initial_tokens(QUESTION)
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert built == tokenizer.encode(rendered, add_special_tokens=False)
    assert tokenizer.decode(built) == rendered


@pytest.fixture(autouse=True)
def _a_lock_of_its_own(monkeypatch, tmp_path):
    """Use a separate lock, since a real trainer on this machine may hold the usual one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def a_launch(tmp_path, body, **settings):
    (tmp_path / "fake_trainer.py").write_text(body)
    return Launch(
        overrides=["a=b"],
        folder=tmp_path / "run",
        time_limit=settings.pop("time_limit", 30),
        environment={"PYTHONPATH": str(tmp_path)},
        module="fake_trainer",
    )


METRICS = """
import json, os, sys, time
def log(step, **data):
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
"""


def test_phases_and_steps_arrive_in_order_and_the_output_is_in_the_log(tmp_path):
    launch = a_launch(
        tmp_path,
        METRICS + "print('Started a local Ray instance', sys.argv, flush=True)\nlog(1, a=1.0)\nlog(2, a=2.0)\n",
    )
    events = list(launch.run())
    assert events[0] == ("phase", "Ray is up")
    assert [value for kind, value in events if kind == "step"] == [
        {"step": 1, "data": {"a": 1.0}},
        {"step": 2, "data": {"a": 2.0}},
    ]
    assert "a=b" in launch.log.read_text()


def test_an_incomplete_line_is_read_when_it_is_complete(tmp_path):
    body = METRICS + (
        "path = os.environ['VERL_FILE_LOGGER_PATH']\n"
        "open(path, 'a').write('{\"step\": 1, ')\ntime.sleep(1.5)\nopen(path, 'a').write('\"data\": {}}\\n')\n"
    )
    assert list(a_launch(tmp_path, body).run()) == [("step", {"step": 1, "data": {}})]


def test_a_trainer_that_fails_is_one_line_with_the_log(tmp_path):
    launch = a_launch(tmp_path, "raise SystemExit(3)")
    with pytest.raises(TrainingError) as error:
        list(launch.run())
    assert str(error.value) == f"the trainer ended with exit code 3; the log is {launch.log}"


@pytest.mark.parametrize(("slow", "launches"), [(1, 2), (5, 3)])
def test_a_ray_that_is_too_slow_to_start_is_restarted_at_most_three_times(tmp_path, slow, launches):
    count = tmp_path / "count"
    body = METRICS + (
        f"open({str(count)!r}, 'a').write('x')\n"
        f"if len(open({str(count)!r}).read()) <= {slow}:\n"
        "    raise SystemExit('Exception: The current node timed out during startup. This could happen because')\n"
        "log(1)\n"
    )
    launch = a_launch(tmp_path, body)
    if slow < launches:
        assert [record["step"] for _, record in launch.run()] == [1]
    else:
        with pytest.raises(TrainingError, match="the trainer ended with exit code 1"):
            list(launch.run())
    assert len(count.read_text()) == launches


def test_the_time_limit_ends_the_trainer_and_everything_it_started(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = METRICS + (
        f"import subprocess\nchild = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)\n"
        "log(child.pid)\ntime.sleep(600)\n"
    )
    launch = a_launch(tmp_path, body, time_limit=8)
    with pytest.raises(TrainingError, match="stopped after 8 s without an end; the log is"):
        list(launch.run())
    (pid,) = [json.loads(line)["step"] for line in launch.metrics.read_text().splitlines()]
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


RECORDS = [
    {"step": 0, "data": {"val-core/reverse_digits/acc/mean@1": 0.0}},
    {"step": 1, "data": {"hapo/on_policy_success": 0.25, "critic/score/mean": 0.5, "hapo/gate/firing_rate": 1.0}},
    {"step": 2, "data": {"hapo/on_policy_success": 0.75, "val-core/reverse_digits/acc/mean@1": 0.9}},
]


def test_a_process_is_named_by_its_title_or_its_program_and_file(tmp_path):
    (tmp_path / "monitor.py").write_text("import time; time.sleep(60)")
    sleep = ["-c", "import time; time.sleep(60)"]
    program = Path(sys.executable).name
    for command, title, name in [
        (["-u", str(tmp_path / "monitor.py"), "--port=1"], None, f"{program} monitor.py"),
        (sleep, None, program),
        (sleep, "ray::Worker.run", "ray::Worker"),
    ]:
        process = psutil.Popen([title or sys.executable, *command], executable=sys.executable)
        deadline = time.monotonic() + 30
        # A process that has just started another program has no arguments yet.
        while not process.cmdline() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert name_of(process) == name
        process.kill()
        process.wait()
        assert name_of(process) == ""


def test_curves_show_hapos_on_policy_success_or_the_score_without_hapo():
    assert quickstart.curves(RECORDS, "reverse_digits") == {
        "held-out success": [(0, 0.0), (2, 0.9)],
        "on-policy success": [(1, 0.25), (2, 0.75)],
        "gate firing rate": [(1, 1.0)],
    }
    grpo = [{"step": 1, "data": {"critic/score/mean": 0.5}}]
    assert quickstart.curves(grpo, "reverse_digits") == {"on-policy success": [(1, 0.5)]}


def test_the_seconds_of_a_step_are_means_of_what_verl_logged_in_training_steps(tmp_path):
    logged = [(0, {"timing_s/step": 90}), (1, {"timing_s/step": 1, "timing_s/gen": 0.5}), (2, {"timing_s/step": 2})]
    lines = [json.dumps({"step": step, "data": data}) for step, data in logged]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert quickstart.parts(tmp_path / "metrics.jsonl") == {"step": 1.5, "gen": 0.5}


def test_the_table_shows_the_first_and_the_last_value():
    lines = quickstart.table(quickstart.curves(RECORDS, "reverse_digits")).splitlines()
    assert lines[1].split() == ["held-out", "success", "0.000", "0.900"]


def test_both_presets_differ_only_in_what_the_preset_names(tmp_path):
    task = Prepared("a task", "source", {}, {"data.train_files": "train.parquet"}, {}, {})
    paper, grpo = (quickstart.overrides(preset, tmp_path, task, steps=5, seed=1) for preset in ("paper", "grpo"))
    only_paper = set(paper) - set(grpo) - {"trainer.experiment_name=paper"}
    only_grpo = set(grpo) - set(paper) - {"trainer.experiment_name=grpo"}
    trace = {f"hapo.trace_dir={tmp_path / 'trace'}", *quickstart.TRACE}
    assert only_paper == set(quickstart.PRESETS["paper"]) | trace
    assert only_grpo == set(quickstart.PRESETS["grpo"])


def test_the_picture_is_drawn(tmp_path):
    quickstart.draw(quickstart.curves(RECORDS, "reverse_digits"), "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_file_and_a_network_gsm8k_is_refused_in_one_line(monkeypatch, tmp_path, capsys):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(smollm2, "write", lambda folder: folder)
    assert quickstart.main(["--task", "gsm8k", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "quickstart: openai/gsm8k: cannot be fetched (ConnectionError). Give its JSON lines: "
        "--input train.jsonl, or GSM8K=train.jsonl to make.\n"
    )


def test_word_problem_demonstrations_are_right_and_exclude_held_out_questions():
    splits = word_problems.splits(train=2000, heldout=100, seed=3)
    assert {name: len(problems) for name, problems in splits.items()} == {
        "train": 2000,
        "heldout": 100,
        "new_templates": 100,
    }
    for problems in splits.values():
        assert len({problem.question for problem in problems}) == len(problems)
        for problem in problems:
            assert word_problems.compute_score("", problem.demonstration, problem.answer)["score"] == 1.0
            # The last result of the calculation is the answer, and each of its lines is true.
            *lines, last = problem.demonstration.splitlines()
            assert last == f"#### {problem.answer}"
            for line in lines:
                calculation, _, result = line.partition(" = ")
                assert eval(calculation.replace("x", "*")) == int(result)
            assert lines[-1].endswith(f"= {problem.answer}")
            assert 1 <= len(lines) <= 3
    trained = {problem.question for problem in splits["train"]}
    assert trained.isdisjoint(problem.question for name in ("heldout", "new_templates") for problem in splits[name])
    assert splits["heldout"] == word_problems.splits(train=10, heldout=100, seed=4)["heldout"]
    assert splits["train"] != word_problems.splits(train=2000, heldout=100, seed=4)["train"]


def test_a_solution_follows_the_story_step_by_step():
    splits = word_problems.splits(train=3000, heldout=10, seed=0)
    numbers = [list(map(int, re.findall(r"\d+", problem.question))) for problem in splits["train"]]
    for problem, of in zip(splits["train"], numbers, strict=True):
        if "chests" in problem.question:
            assert int(problem.answer) == of[0] * of[1] * of[2]
        elif "blue" in problem.question:
            assert int(problem.answer) == (of[0] + of[1]) * of[2]
        elif "green" in problem.question:
            assert int(problem.answer) == (of[0] + of[1]) * of[2] + of[3]
        elif "loses" in problem.question:
            assert int(problem.answer) == (of[0] - of[2]) * of[1]
        elif "a day" in problem.question:
            assert int(problem.answer) == of[0] + of[1] * of[2]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("5 + 7 = 12\n#### 12", 1.0),
        ("#### 12", 1.0),
        ("5 + 7 = 12\n#### 12\n", 1.0),
        ("5 + 7 = 12", 0.0),
        ("#### 12\nThat is all.", 0.0),
        ("#### 12.", 0.0),
        ("#### 112", 0.0),
        ("The answer is #### 12", 0.0),
        ("", 0.0),
    ],
)
def test_only_a_last_line_with_the_right_number_is_rewarded(text, score):
    assert word_problems.compute_score("word_problems", text, "12") == {"score": score, "acc": score}


def test_the_answers_before_and_after_are_those_of_the_first_and_the_last_validation(tmp_path):
    (tmp_path / "validation").mkdir()
    for step, outputs in ((0, ["twelve", "dunno"]), (6, ["12?", "x"]), (24, ["5 + 7 = 12\n#### 12", "1\n#### 3"])):
        rows = [
            {"input": f"user\nQuestion {i}?\nassistant\n", "output": text, "gts": "12", "score": 0.0}
            for i, text in enumerate(outputs)
        ]
        # verl writes the rows in any order.
        lines = [json.dumps(row) for row in (rows if step else rows[::-1])]
        (tmp_path / "validation" / f"{step}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [{"prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in (2, 0, 1)]
    write_parquet(rows, tmp_path / "data" / "heldout.parquet")
    found = quickstart.answers(tmp_path)
    assert found == [
        ("Question 0?", "12", "twelve", "5 + 7 = 12\n#### 12"),
        ("Question 1?", "12", "dunno", "1\n#### 3"),
    ]
    assert quickstart.transcript(found[:1]) == (
        "Question 0?  [12]\n  before  twelve\n  after   5 + 7 = 12\n          #### 12\n"
    )
    assert quickstart.answers(tmp_path / "nothing") == []
