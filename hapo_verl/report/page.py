"""Builds the HTML page: one file that loads nothing else, light or dark as the reader's system is set."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hapo_verl.report.examples import BETWEEN, LEVELS
from hapo_verl.report.plots import Picture, thinned, with_own_names
from hapo_verl.report.prompts import Groups, Story
from hapo_verl.report.runs import Points, Run

# Number of prompts of each kind that are listed.
NAMED = 30

_KINDS = {
    "never solved": "no group of it had a success",
    "helped, then solved": "injected while it had no success, and solved in a later step",
    "fell back": "solved once, and its last group had no success",
    "other": "solved without an injection before",
}


def page(
    runs: Sequence[Run],
    pictures: Sequence[Picture],
    groups: Mapping[str, Groups],
    examples: Mapping[str, tuple[Sequence[Mapping[str, Any]], int]],
    notes: Sequence[str],
) -> str:
    """The page as HTML.

    Args:
        runs: the runs to show.
        pictures: the pictures of these runs.
        groups: the groups of each run with a trace, by the run's name.
        examples: the examples of each such run, and the number of prompts left out.
        notes: sentences about what could not be shown, and why.
    """
    shown = [example for of_run, _ in examples.values() for example in of_run]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(', '.join(run.name for run in runs))}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_text(', '.join(run.name for run in runs))}</h1>",
        _summary(runs),
        *(f'<p class="note">{_text(note)}</p>' for note in notes),
        '<div class="pictures">',
        *(_figure(number, picture) for number, picture in enumerate(pictures)),
        "</div>",
    ]
    for run in runs:
        if run.name in groups:
            parts.append(_prompts(run.name, groups[run.name]))
    number = 0
    for name, (of_run, more) in examples.items():
        parts.append(f"<h2>Examples{_text(f', {name}') if len(examples) > 1 else ''}</h2>")
        parts.append(_EXAMPLES_TEXT)
        for example in of_run:
            parts.append(
                f'<details class="example" data-example="{number}"><summary>{_text(example["name"])} '
                f"<i>{_text(example['kind'])}</i> {_text(_short(example['question']))}</summary></details>"
            )
            number += 1
        if more:
            parts.append(f'<p class="note">{more} further prompts did not fit on this page.</p>')
    parts += [
        _numbers(runs),
        _json("curves", _curves(pictures)),
        _json("examples", shown),
        f"<script>const LEVELS = {json.dumps(LEVELS)}, BETWEEN = {json.dumps(BETWEEN)};{_SCRIPT}</script>",
        "</body></html>",
    ]
    return "\n".join(parts)


def _text(value: object) -> str:
    return html.escape(str(value))


def _json(name: str, value: object) -> str:
    """A script element with JSON data, escaped so that no text in it can end the element."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        written = written.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{name}">{written}</script>'


# A control token of a chat template, such as `<|im_start|>` or DeepSeek's `<｜User｜>`.
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>")
# Whose message begins behind one.
_ROLE = re.compile(r"(system|user|assistant)(?:\n|$)")


def _short(text: str, length: int = 90) -> str:
    """The beginning of a question, without what its chat template and the system prompt put around it."""
    role, spoken = "", []
    for part in _CONTROL.split(text):
        if begun := _ROLE.match(part):
            role, part = begun[1], part[begun.end() :]
        if role != "system":
            spoken.append(part)
    words = " ".join(" ".join(spoken).split()) or " ".join(text.split())
    return words if len(words) <= length else words[: length - 1] + "…"


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        facts = ", ".join(f"{name} {run.facts[name]}" for name in ("gate", "mode", "objective") if name in run.facts)
        held_out = [
            f"{name.split('/')[1]} {points[0][1]:.3f} → {points[-1][1]:.3f}"
            for name, points in sorted(run.series.items())
            if name.startswith("val-core/")
        ]
        rows.append(
            f"<tr><th>{_text(run.name)}</th><td>{run.last_step}</td>"
            f'<td class="free">{_text("; ".join(held_out))}</td>'
            f'<td class="free">{_text(facts)}</td><td class="free">{_text(run.metrics)}</td></tr>'
        )
    head = "<tr><th>run</th><th>steps</th><th>held out, first → last</th><th></th><th>file</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _figure(number: int, picture: Picture) -> str:
    note = f"<figcaption>{_text(picture.note)}</figcaption>" if picture.note else ""
    reading = '<p class="reading" aria-live="polite"></p>' if picture.curves else ""
    return (
        f'<figure data-picture="{number}"><h2>{_text(picture.title)}</h2>'
        f"{with_own_names(picture.svg, number)}{reading}{note}</figure>"
    )


def _curves(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    return [
        {
            "box": picture.box,
            "curves": [
                {"run": c.run, "metric": c.metric, "label": c.label, "points": thinned(c.points)}
                for c in picture.curves
            ],
        }
        for picture in pictures
    ]


def _prompts(name: str, groups: Groups) -> str:
    counts = Counter(story.kind for story in groups.stories.values())
    parts = [f"<h2>Prompts, {_text(name)}</h2><p>{len(groups.stories)} prompts were seen.</p>"]
    for kind, meaning in _KINDS.items():
        stories = sorted(
            (story for story in groups.stories.values() if story.kind == kind),
            key=lambda story: (-story.visits, -story.injected, str(story.name)),
        )
        title = f"<summary><b>{counts[kind]}</b> {_text(kind)} <i>{_text(meaning)}</i></summary>"
        head = (
            "<tr><th>prompt</th><th>groups</th><th>steps</th><th>injected</th><th>first success</th>"
            "<th>success: first, best, last</th></tr>"
        )
        more = f"<p>and {len(stories) - NAMED} more</p>" if len(stories) > NAMED else ""
        rows = "".join(map(_story, stories[:NAMED]))
        parts.append(f'<details>{title}<div class="wide"><table>{head}{rows}</table></div>{more}</details>')
    return "".join(parts)


def _story(story: Story) -> str:
    source, index = story.name
    cells = [
        f"{source or ''} {index}",
        story.visits,
        f"{story.first} to {story.last}",
        story.injected,
        story.solved_at if story.solved_at is not None else "",
        ", ".join(f"{rate:.2f}" for rate in story.rates),
    ]
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _numbers(runs: Sequence[Run]) -> str:
    """The table of all metrics in the files, with unrounded values."""
    names = sorted({name for run in runs for name in run.series})
    rows = []
    for name in names:
        for run in runs:
            points: Points = run.series.get(name, [])
            if points:
                values = [value for _, value in points]
                cells = [len(points), points[0][1], points[-1][1], min(values), max(values)]
                written = "".join(f"<td>{cell!r}</td>" for cell in cells)
                rows.append(f"<tr><th>{_text(name)}</th><td>{_text(run.name)}</td>{written}</tr>")
    head = (
        "<tr><th>metric</th><th>run</th><th>records</th><th>first</th><th>last</th><th>least</th><th>greatest</th></tr>"
    )
    return (
        f'<h2>All metrics</h2><details id="numbers"><summary>{len(names)} metrics</summary>'
        f'<div class="wide"><table>{head}{"".join(rows)}</table></div></details>'
    )


_EXAMPLES_TEXT = """<p>A prompt when it was traced first and when it was traced last. The darker a token, the higher its
probability under the policy when it was trained on; of a demonstration also the weight that the loss gave it, of the
largest that it gives any token. Where a row has no shade, it was not trained on.</p>"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --page: #ffffff; --line: #d5d9de; --faint: #667;
  --shade: 18, 163, 127; --weight: 232, 113, 10; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --page: #15181c; --line: #3a4048; --faint: #9aa3ad; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figure h2 { margin: .4rem 0; }
svg { width: 100%; height: auto; stroke-linejoin: round;
  display: block; font-family: system-ui, sans-serif; touch-action: pan-y; }
.reading { min-height: 1.4em; margin: 0; font-size: .8rem; color: var(--faint); }
figcaption, .note, i { color: var(--faint); font-style: normal; font-size: .85rem; }
.wide { overflow-x: auto; }
.wide .free { white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top; } th { font-weight: 600; }
details { margin: .3rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
.question, .tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0 .6rem; }
.question { border-left: 3px solid var(--line); padding-left: .6rem; }
.tokens { font: 13px/1.7 ui-monospace, monospace; } .tokens span { border-radius: 2px; }
.visits { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.visits > div { min-width: 0; } h3 { font-size: .9rem; margin: .3rem 0; }
h4 { font-size: .8rem; margin: .2rem 0; font-weight: 500; }
"""

_SCRIPT = """
"use strict";
const read = name => JSON.parse(document.getElementById(name).textContent);
function add(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}
function shaded(parent, text, levels, colour, say) {
  const box = add(parent, "div", undefined, "tokens");
  text.split(BETWEEN).forEach((piece, i) => {
    const token = add(box, "span", piece);
    if (levels === undefined) return;
    const share = LEVELS.indexOf(levels[i]) / (LEVELS.length - 1);
    token.style.backgroundColor = `rgba(var(${colour}), ${(0.75 * share).toFixed(3)})`;
    token.title = say(share);
  });
}
const probability = share => `probability about ${Math.pow(share, 4).toPrecision(2)}`;
const weight = share => `weight about ${share.toPrecision(2)} of the largest`;
let examples;
function open(details) {
  if (!details.open || details.dataset.drawn) return;
  details.dataset.drawn = "1";
  examples = examples || read("examples");
  const example = examples[Number(details.dataset.example)];
  add(details, "div", example.question, "question");
  const visits = add(details, "div", undefined, "visits");
  for (const visit of example.visits) {
    const column = add(visits, "div");
    add(column, "h3", `step ${visit.step}: ${visit.said}`);
    for (const row of visit.rows) {
      const trained = row.p === undefined ? ", not trained on" : `, advantage ${row.advantage.toFixed(2)}`;
      add(column, "h4", `${row.what}, score ${row.score}${trained}`);
      shaded(column, row.text, row.p, "--shade", probability);
      if (row.w !== undefined) {
        add(column, "h4", "its weight in the loss");
        shaded(column, row.text, row.w, "--weight", weight);
      }
    }
  }
}
for (const details of document.querySelectorAll("details.example"))
  details.addEventListener("toggle", () => open(details));

let pictures;
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] > step) high = middle; else low = middle;
  }
  return step - points[low][0] < points[high][0] - step ? points[low] : points[high];
}
function reading(picture, share) {
  const [left, right, first, last] = picture.box;
  const step = first + (share - left) / (right - left) * (last - first);
  return picture.curves.map(curve => {
    const [at, value] = nearest(curve.points, step);
    return `${curve.run ? curve.run + ", " : ""}${curve.label}: ${Number(value.toPrecision(4))} at ${at}`;
  }).join("; ");
}
for (const figure of document.querySelectorAll("figure")) {
  const line = figure.querySelector(".reading"), svg = figure.querySelector("svg");
  if (!line) continue;
  const show = event => {
    pictures = pictures || read("curves");
    const box = svg.getBoundingClientRect();
    line.textContent = reading(pictures[Number(figure.dataset.picture)], (event.clientX - box.left) / box.width);
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
}
"""
