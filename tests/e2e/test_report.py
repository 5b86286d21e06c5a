"""The report of a run of verl's trainer: a trace of some groups, the run's own tokens, and verl's own numbers."""

import json
import re
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo_verl.data.teach import failed_rows
from hapo_verl.protocol.trace import read_lines
from hapo_verl.report.__main__ import report
from hapo_verl.report.examples import BETWEEN
from tests.e2e.conftest import PROMPTS, ROLLOUTS

pytestmark = [pytest.mark.e2e, pytest.mark.long]
STEPS, GROUPS = 3, 2


@pytest.fixture(scope="module")
def run(trainer):
    return trainer(
        "report",
        "+hapo=plus",
        "trainer.v1.trainer_mode=hapo_sync",
        "hapo.poll_interval=0.05",
        "hapo.trace_dir={folder}/trace",
        f"hapo.trace_groups={GROUPS}",
        "hapo.trace_limit=8",
        steps=STEPS,
        whole=False,
    )


@pytest.fixture(scope="module")
def rows(run):
    found = defaultdict(list)
    for row in read_lines(run.folder / "trace", "rows"):
        found[row["uid"]].append(row)
    return found


def test_all_groups_and_the_rows_of_some_are_traced(run, rows):
    assert len(run.groups) == STEPS * PROMPTS
    assert all(group["data_source"] == "reverse_digits" for group in run.groups)
    traced = [group for group in run.groups if group["uid"] in rows]
    assert [sum(group["step"] == step for group in traced) for step in range(1, STEPS + 1)] == [GROUPS] * STEPS
    for group in traced:
        own = [row for row in rows[group["uid"]] if not row["hapo_demonstration"]]
        assert sorted(row["score"] for row in own) == sorted(group["scores"])
        assert len(own) == ROLLOUTS
        assert len(rows[group["uid"]]) - len(own) == (group["outcome"] == "injected")


def test_the_traced_loss_rows_are_of_these_groups_with_the_policys_log_probabilities(run, rows, model):
    assert run.loss_rows
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    compared = 0
    for row in run.loss_rows:
        (found,) = {json.dumps(r) for r in rows[row["uid"]] if r["responses"] == row["responses"]}
        found = json.loads(found)
        assert len(row["logp"]) == len(row["responses"])
        if found["step"] == 1:
            ids = torch.tensor([[*found["prompts"], *found["responses"]]])
            with torch.no_grad():
                logp = loaded(ids).logits[0, :-1].float().log_softmax(-1)
            own = logp.gather(-1, ids[0, 1:, None])[len(found["prompts"]) - 1 :, 0]
            assert row["logp"] == pytest.approx(own.tolist(), abs=2e-2)
            compared += 1
    assert compared


def test_the_reports_numbers_equal_verls_and_its_examples_are_texts_of_the_run(run, rows, model):
    page = report([run.folder])
    for name in ("hapo/on_policy_success", "actor/grad_norm", "hapo/gate/firing_rate"):
        (cells,) = re.findall(rf"<tr><th>{re.escape(name)}</th><td>[^<]*</td>(.*?)</tr>", page)
        values = [step[name] for step in run.steps]
        expected = [STEPS, values[0], values[-1], min(values), max(values)]
        assert [float(cell) for cell in re.findall(r"<td>([^<]*)</td>", cells)] == expected
    (written,) = re.findall(r'<script type="application/json" id="examples">(.*?)</script>', page)
    tokenizer, shown = AutoTokenizer.from_pretrained(model), json.loads(written)
    texts = {tokenizer.decode(row["responses"]) for group in rows.values() for row in group}
    assert shown
    for example in shown:
        for visit in example["visits"]:
            assert {row["text"].replace(BETWEEN, "") for row in visit["rows"]} <= texts
    demonstrations = [r for e in shown for v in e["visits"] for r in v["rows"] if r["what"] == "demonstration"]
    assert demonstrations
    assert all(len(row["p"]) == len(row["w"]) == len(row["text"].split(BETWEEN)) for row in demonstrations)


def test_a_teacher_is_asked_only_the_prompts_that_this_run_failed(run):
    train = run.train.to_dict("records")
    last = {}
    for group in run.groups:
        last[group["index"]] = any(group["successes"])
    failed = {index for index, won in last.items() if not won}
    assert {train[number]["extra_info"]["index"] for number in failed_rows(run.folder, train)} == failed
