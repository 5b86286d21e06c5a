"""Which gate, which mode and which method learn best? Runs settings and seeds on tasks that a tiny model learns fast.

    python bench/study.py gates                             gates and modes, one line a run; continues where it stopped
    python bench/study.py methods                           GRPO, DAPO, LUFFY, SRFT, REAL, HAPO; three seeds
    python bench/study.py language                          the methods, the losses of a demonstration and SFT on
                                                            SmolLM2-135M-Instruct; 7 to 28 minutes a run on one core
    python bench/study.py gates --task digits4 --seeds 2    a part of it
    python bench/study.py trainer                           the most important ones in verl's trainer, four digits
    python bench/study.py gates --report                    tables, picture and page of the finished runs

All runs but those of `trainer` use the plain loop (`recipes/plain_loop/plain_loop.py`): `hapo_verl.algo` without verl.
The cells of a task differ only in what is compared: model, questions and steps are the same for each seed. The gates
share one learning rate; each method runs at every rate of `RATES`, and for each task its best rate is shown.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "plain_loop"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "quickstart"))
from elsewhere import probe
from harness import machine
from plain_loop import Settings, train
from smollm2 import fast_in_bf16

RESULTS = Path(__file__).parent / "results"
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart" / "quickstart.py"
# Presets that run in verl's trainer as well, on the quickstart's task and learning rate (in the plain loop the
# best of each that learns): the two that tie there, the paper's, LUFFY's, verl's grpo; up to the step that all reach.
TRAINER = ("plus", "real_ssi", "paper", "luffy", "grpo")
SHOWN = 120

TASKS = {
    "digits3": Settings(digits=3, hidden=64, steps=120),
    "digits4": Settings(digits=4, hidden=128, steps=180),
    # The demonstrations start with a dot, which only half of the questions allow.
    "detour3": Settings(digits=3, detour=1, hidden=128, steps=200),
}
GATES = ("paper", "zero", "annealed", "adaptive", "posterior", "always")
# Tasks named by the held-out success of the policy before the run: about none, one in a hundred, one in five.
METHOD_TASKS = {
    "never": Settings(digits=3, hidden=64, steps=200),
    "rarely": Settings(digits=3, hidden=64, steps=200, warm=0.01),
    "sometimes": Settings(digits=3, hidden=64, steps=200, warm=0.2),
}
RATES = (5e-4, 1e-3, 2e-3)
# The presets of `hapo_verl/presets/hapo`, as far as one update a step tells them apart: there no ratio is clipped.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"gate": "never"},
    "dapo": {"gate": "never", "filter_groups": True},
    "luffy": {
        "gate": "always",
        "statistics": "all",
        "scale_by_std": False,
        "clip": False,
        "aggregation": "seq-mean-token-sum-norm",
        "entropy": 0.001,
    },
    "srft": {"gate": "always", "mode": "append", "statistics": "all", "objective": "srft"},
    "real": {"gate": "never", "objective": "real", "aggregation": "seq-mean-token-mean"},
    "real_ssi": {"gate": "paper", "objective": "real", "aggregation": "seq-mean-token-mean"},
    "paper": {"gate": "paper"},
    "plus": {"gate": "annealed", "mode": "append", "exponent": 0.0, "shaping": 1.0},
}
# No presets: `plus` with a gate that knows each prompt's posterior, and with rollouts allocated by these posteriors.
POSTERIOR = METHODS["plus"] | {"gate": "posterior"}
ALLOCATED = {"posterior": POSTERIOR, "posterior, allocated": POSTERIOR | {"allocate": "posterior"}}
# No preset: `plus` without a teacher, where the policy succeeds before the run, but rarely.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "never": ALLOCATED,
    "rarely": {"own": METHODS["plus"] | {"source": "own"}, **ALLOCATED},
    "sometimes": ALLOCATED,
}
# A pretrained language model. words: never right before the run; words_rarely: it has learned the format, not the sums.
LANGUAGE = Settings(
    task="words", prompts=8, rollouts=4, steps=24, lr=1e-4, weight_decay=0.0,
    dtype="bfloat16" if fast_in_bf16() else "float32", heldout=48, test_first=True, test_every=8, deviation=False,
)  # fmt: skip
LANGUAGE_TASKS = {
    "words": LANGUAGE,
    "words_rarely": replace(LANGUAGE, warm=0.03),
    "gsm_symbolic": replace(LANGUAGE, task="gsm_symbolic"),
}
LANGUAGE_TITLES = {
    "words": "word problems, never right before the run",
    "words_rarely": "word problems, right in 3 of 100 rollouts before the run",
    "gsm_symbolic": "gsm_symbolic, never right before the run",
}
LANGUAGE_RATES = (5e-5, 1e-4, 2e-4)
PLUS = METHODS["plus"]
# The methods, what they do with a demonstration's tokens, and imitation alone or first.
LANGUAGE_METHODS: dict[str, dict[str, Any]] = {
    **METHODS,
    "plus κ=1": PLUS | {"exponent": 1.0},
    "plus κ=.5": PLUS | {"exponent": 0.5},
    "plus λ=.01": PLUS | {"shaping": 0.01},
    "plus λ=.1": PLUS | {"shaping": 0.1},
    "plus λ=∞": PLUS | {"shaping": float("inf")},
    "plus trsft": PLUS | {"shape": "trsft"},
    "plus chord": PLUS | {"shape": "chord"},
    "plus without std": PLUS | {"scale_by_std": False},
    "paper κ=0": METHODS["paper"] | {"exponent": 0.0},
    "chord": {"gate": "always", "mode": "append", "objective": "chord", "shape": "chord"},
    "s_grpo": {"gate": "zero", "mode": "append", "statistics": "all", "exponent": 0.0, "shaping": float("inf")},
    "sft": {"gate": "never", "imitate": 1.0},
    "sft, then grpo": {"gate": "never", "imitate": 1 / 3},
    "sft, then plus": PLUS | {"imitate": 1 / 3},
    # Two runs one after the other, as it is usually done: the second has its own optimizer and learning rate.
    **{
        f"sft {name}, grpo at {lr:g}": {"gate": "never", "imitate": share, "lr_after": lr}
        for name, share in (("1/3", 1 / 3), ("2/3", 2 / 3))
        for lr in (1e-5, 3e-5)
    },
}
# All of them on the shortest task; on the others, and without the deviation, those that decide.
EVERY = [(gate, mode) for gate in GATES for mode in ("replace", "append")] + [("never", "replace")]
DECIDING = [cell for cell in EVERY if cell[1] == "append"] + [("paper", "replace"), ("never", "replace")]


class Run(NamedTuple):
    """One training run: its settings, and the row of the report that it belongs to."""

    task: str
    cell: str
    settings: Settings

    @property
    def name(self) -> str:
        """The name of the run, which marks it as done in the results."""
        normalised = "" if self.settings.scale_by_std else "-nostd"
        cell = self.cell.replace("/", "-").replace(", ", "-").replace(" ", "-")
        model = f"-{Path(self.settings.model).name}" if self.settings.model else ""
        device = f"-{self.settings.device}" if self.settings.device != "cpu" else ""
        return f"{self.task}-{cell}{normalised}{model}{device}-seed{self.settings.seed}"


def gate_runs(tasks: Iterable[str], seeds: int) -> list[Run]:
    """Every run of the study of gates."""
    runs = []
    for seed in range(seeds):
        for task in tasks:
            for scale_by_std in (True, False) if task == "digits3" else (True,):
                base = replace(TASKS[task], scale_by_std=scale_by_std, seed=seed)
                for gate, mode in EVERY if task == "digits3" and scale_by_std else DECIDING:
                    runs.append(Run(task, f"{gate}/{mode}", replace(base, gate=gate, mode=mode)))
                # To see why append is faster: replace the worst rollout, but compare the others with each other only.
                runs.append(Run(task, "paper/replace on_policy", replace(base, statistics="on_policy")))
    return runs


def method_runs(tasks: Iterable[str], seeds: int) -> list[Run]:
    """Every run of the comparison of methods."""
    return [
        Run(task, f"{method} {lr:g}", replace(METHOD_TASKS[task], **fields, lr=lr, seed=seed))
        for seed in range(seeds)
        for task in tasks
        for lr in RATES
        for method, fields in {**METHODS, **VARIANTS[task]}.items()
    ]


def language_runs(tasks: Iterable[str], seeds: int, rates: Sequence[float]) -> list[Run]:
    """Every run on the language model; all methods of one seed come before the next seed."""
    return [
        Run(task, f"{method} {lr:g}", replace(LANGUAGE_TASKS[task], **fields, lr=lr, seed=seed))
        for seed in range(seeds)
        for lr in rates
        for task in tasks
        for method, fields in LANGUAGE_METHODS.items()
    ]


def train_one(one: Run) -> dict[str, Any]:
    """The record of a run."""
    torch.set_num_threads(1)
    # CPU time of this process, which has one thread, since other work on the machine would distort the clock time. With
    # another device the clock's time.
    clock = time.process_time if one.settings.device == "cpu" else time.perf_counter
    started = clock()
    history = train(one.settings, probe=probe(one.settings)) if one.task in LANGUAGE_TASKS else train(one.settings)
    return {
        "name": one.name,
        "task": one.task,
        "cell": one.cell,
        "settings": vars(one.settings),
        "history": {
            key: [(record["step"], round(record[key], 5)) for record in history if key in record]
            for key in dict.fromkeys(key for record in history for key in record)
            if key != "step"
        },
        "seconds": round(clock() - started, 1),
        "machine": machine(),
    }


def _first_reaching(points: Sequence[tuple[int, float]], level: float) -> float:
    return next((step for step, value in points if value >= level), float("nan"))


def _tokens_to(record: dict[str, Any], level: float) -> float:
    """Tokens that the policy has generated when held-out success first reaches the level."""
    last = _first_reaching(record["history"]["heldout_success"], level)
    return sum(value for step, value in record["history"]["generated_tokens"] if step <= last) if last == last else last


def _seconds_to(record: dict[str, Any], level: float) -> float:
    """The seconds of the run times the share of its steps until held-out success first reaches the level."""
    step = _first_reaching(record["history"]["heldout_success"], level)
    return record["seconds"] * step / record["settings"]["steps"]


def _late(points: Sequence[tuple[int, float]], share: float = 0.2) -> float:
    """The mean over the last fifth of the run, without steps in which the policy's own rows gave no gradient."""
    finite = [value for _, value in points[-max(1, int(len(points) * share)) :] if value != float("inf")]
    return statistics.fmean(finite) if finite else float("nan")


def _area(record: dict[str, Any]) -> float:
    return statistics.fmean(value for _, value in record["history"]["heldout_success"])


# Column → function that computes it from a run.
CURVE = {
    "held-out, last": lambda r: r["history"]["heldout_success"][-1][1],
    "area under held-out": _area,
    "steps to .5": lambda r: _first_reaching(r["history"]["heldout_success"], 0.5),
    "steps to .9": lambda r: _first_reaching(r["history"]["heldout_success"], 0.9),
    "teacher share": lambda r: statistics.fmean(value for _, value in r["history"]["teacher_share"]),
}
COLUMNS = {
    "gates": CURVE
    | {
        "teacher share, late": lambda r: _late(r["history"]["teacher_share"]),
        "gradient deviation, late": lambda r: _late(r["history"].get("gradient_deviation", [])),
    },
    "methods": CURVE
    | {
        "learning rate": lambda r: r["settings"]["lr"],
        "generated tokens": lambda r: sum(value for _, value in r["history"]["generated_tokens"]),
        "tokens to .9": lambda r: _tokens_to(r, 0.9),
        "CPU seconds": lambda r: r["seconds"],
    },
    "language": CURVE
    | {
        "sampled, last": lambda r: r["history"].get("sampled_success", [(0, float("nan"))])[-1][1],
        "new templates, last": lambda r: r["history"].get("new_templates_success", [(0, float("nan"))])[-1][1],
        "learning rate": lambda r: r["settings"]["lr"],
        "generated tokens": lambda r: sum(value for _, value in r["history"]["generated_tokens"]),
        "tokens to .5": lambda r: _tokens_to(r, 0.5),
        "teacher tokens": lambda r: sum(value for _, value in r["history"]["teacher_tokens"]),
        "KL elsewhere": lambda r: r["history"]["divergence"][-1][1],
        "capitals": lambda r: r["history"]["capitals"][-1][1],
        "seconds": lambda r: r["seconds"],
        "seconds to .5, about": lambda r: _seconds_to(r, 0.5),
    },
    "trainer": CURVE
    | {
        "learning rate": lambda r: r["settings"]["lr"],
        "seconds of the whole run": lambda r: r["seconds"],
        "peak GiB": lambda r: r["peak_memory_gib"],
    },
}


class Section(NamedTuple):
    """A task's table: runs by cell, and the columns that they have."""

    title: str
    cells: dict[str, list[dict[str, Any]]]
    columns: dict[str, Any]


def load(path: Path) -> list[dict[str, Any]]:
    """The records of all finished runs, in the order of their names."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda record: record["name"])


def gate_sections(records: Iterable[dict[str, Any]]) -> list[Section]:
    """One section for each task and normalisation."""
    found: dict[tuple[str, bool], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record["task"], record["settings"]["scale_by_std"]][record["cell"]].append(record)
    keys = sorted(found, key=lambda key: (key[0], not key[1]))
    return [
        Section(f"{task}, {'std' if scaled else 'no std'}", dict(found[task, scaled]), COLUMNS["gates"])
        for task, scaled in keys
    ]


def method_sections(
    records: Iterable[dict[str, Any]], study: str = "methods", titles: Mapping[str, str] | None = None
) -> list[Section]:
    """One section for each task; each method at the learning rate with the largest area under its held-out curve."""
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        method, rate = record["cell"].rsplit(maxsplit=1)
        found[record["task"]][method][rate].append(record)
    return [
        Section(
            (titles or {}).get(task, f"success before the run: {task}"),
            {
                method: max(rates.values(), key=lambda runs: statistics.fmean(map(_area, runs)))
                for method, rates in found[task].items()
            },
            COLUMNS[study],
        )
        for task in found
    ]


def trainer_file(preset: str, seed: int) -> Path:
    """The path of the result of a run in verl's trainer, in the format that `make quickstart` writes."""
    return RESULTS / "quickstart" / f"{preset}-seed{seed}.json"


def trainer_sections() -> list[Section]:
    """The runs in verl's trainer, up to the last step that all presets have reached."""
    cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for preset in TRAINER:
        for path in sorted((RESULTS / "quickstart").glob(f"{preset}-seed*.json")):
            result = json.loads(path.read_text())
            curves = {name: [point for point in of if point[0] <= SHOWN] for name, of in result["curves"].items()}
            shares = curves.get("teacher share of rows") or [(0, 0.0)]
            cells[preset].append(
                result
                | {
                    "settings": {"steps": SHOWN, "lr": result.get("lr", 0.002)},
                    "history": {"heldout_success": curves["held-out success"], "teacher_share": shares},
                    "machine": {"commit": result["commit"], "device": result["machine"]},
                }
            )
    return [Section("verl's trainer, four digits, never", dict(cells), COLUMNS["trainer"])] if cells else []


def train_in_verl(seeds: int) -> None:
    """Run the missing runs in verl's trainer, one at a time."""
    jobs = [(preset, seed) for seed in range(1, seeds + 1) for preset in TRAINER]
    missing = [job for job in jobs if not trainer_file(*job).exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are done", flush=True)
    for preset, seed in missing:
        with tempfile.TemporaryDirectory() as folder:
            run = ["--task", "digits", "--preset", preset, "--seed", str(seed), "--output", folder]
            subprocess.run([sys.executable, QUICKSTART, *run], check=True)
            (result,) = Path(folder).glob("*/result.json")
            shutil.copy(result, trainer_file(preset, seed))


def summary(values: Sequence[float]) -> str:
    """Mean and deviation over seeds; if some seeds have no value, the number of those that have one."""
    there = [value for value in values if value == value]
    if not there:
        return "–"
    mean, spread = statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else 0.0
    form = ".0f" if mean >= 10 else ".3f" if mean >= 0.01 or mean == 0 else ".2g"
    text = f"{mean:{form}} ± {spread:{form}}" if spread else f"{mean:{form}}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def table(section: Section) -> list[list[str]]:
    """A table, with the cells in the order of the area under their held-out curve."""
    order = sorted(section.cells, key=lambda cell: -statistics.fmean(map(_area, section.cells[cell])))
    return [["", *section.columns]] + [
        [cell, *(summary([measure(run) for run in section.cells[cell]]) for measure in section.columns.values())]
        for cell in order
    ]


def heading(section: Section) -> str:
    """Title, steps and seeds of a section."""
    seeds = sorted({len(runs) for runs in section.cells.values()})
    steps = next(iter(section.cells.values()))[0]["settings"]["steps"]
    return f"{section.title}: {steps} steps, {'/'.join(map(str, seeds))} seeds"


def panels(study: str, sections: Sequence[Section]) -> list[list[Section]]:
    """The rows of the picture; for the gates one row per mode, with GRPO in both."""
    if study != "gates":
        return [list(sections)]
    scaled = [section for section in sections if section.title.endswith(", std")]
    return [
        [
            Section(
                f"{section.title}, {mode}",
                {
                    cell.partition("/")[0]: runs
                    for cell, runs in section.cells.items()
                    if cell.endswith(f"/{mode}") or cell == "never/replace"
                },
                section.columns,
            )
            for section in scaled
        ]
        for mode in ("replace", "append")
    ]


def draw(rows: Sequence[Sequence[Section]], labels: Sequence[str], path: Path) -> None:
    """Draw the held-out success: the mean over seeds with its 95 % band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5 * len(rows[0]), 3.5 * len(rows))
    figure, grid = pyplot.subplots(
        len(rows), len(rows[0]), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, panel in zip(grid.flat, (panel for row in rows for panel in row), strict=True):
        for number, label in enumerate(labels):
            runs = panel.cells.get(label, [])
            points = zip(*(run["history"]["heldout_success"] for run in runs), strict=True)
            steps, mean, band = [], [], []
            for at_step in points:
                values = [value for _, value in at_step]
                steps.append(at_step[0][0])
                mean.append(statistics.fmean(values))
                band.append(1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0)
            if steps:
                axes.plot(steps, mean, label=label, color=f"C{number}")
                low = [max(0.0, m - b) for m, b in zip(mean, band, strict=True)]
                high = [min(1.0, m + b) for m, b in zip(mean, band, strict=True)]
                axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.set(title=panel.title, xlabel="step", ylim=(-0.02, 1.02))
    shown = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", fontsize="small")
    grid[0][0].set_ylabel("held-out success")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(study: str, out: Path) -> None:
    """Write `<study>.md`, `.png` and `.html` from the curves in `<study>.jsonl`."""
    records = load(out / f"{study}.jsonl")
    sections = {
        "gates": lambda: gate_sections(records),
        "methods": lambda: [*method_sections(records), *trainer_sections()],
        "language": lambda: method_sections(records, "language", LANGUAGE_TITLES),
    }[study]()
    commits = sorted({record["machine"]["commit"] for record in records})
    head = (
        f"{len(records)} runs of the plain loop, commit {', '.join(commits)}, {records[0]['machine']['device']}; "
        f"mean ± deviation over seeds. Commit and command of each run are in `{study}.jsonl`."
    )
    if study == "language":
        head += " Seconds are CPU seconds of one thread; those to .5 are the share of the steps until then."
    if study == "methods":
        head += " The runs of verl's trainer are those of `bench/results/quickstart`, each with its commit and command."
    tables = [(heading(section), table(section)) for section in sections]
    labels = {
        "gates": (*GATES, "never"),
        "methods": (*METHODS, "own", *ALLOCATED),
        "language": tuple(LANGUAGE_METHODS),
    }[study]
    draw(panels(study, sections), labels, out / f"{study}.png")
    markdown = [head]
    for title, (header, *rows) in tables:
        lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
        markdown.append(f"### {title}\n\n" + "\n".join(lines))
    text = "\n\n".join(markdown) + "\n"
    (out / f"{study}.md").write_text(text)
    (out / f"{study}.html").write_text(page(study, head, tables, out / f"{study}.png"))
    print(text)


def page(study: str, head: str, tables: Sequence[tuple[str, list[list[str]]]], picture: Path) -> str:
    """One self-contained HTML page."""
    parts = [f"<h1>{study}</h1><p>{html.escape(head)}</p>"]
    parts.append(f'<img src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">')
    for title, rows in tables:
        cells = ["".join(f"<td>{html.escape(value)}</td>" for value in row) for row in rows]
        parts.append(f"<h2>{html.escape(title)}</h2><table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    style = "body{font:15px sans-serif;max-width:70em;margin:auto}img{width:100%}td{padding:.2em .7em}"
    return f'<!doctype html><meta charset="utf-8"><title>{study}</title><style>{style}</style>' + "".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("gates", "methods", "language", "trainer"))
    parser.add_argument("--out", type=Path, default=RESULTS / "study")
    parser.add_argument("--task", nargs="+", help="some of the study's tasks")
    parser.add_argument("--method", nargs="+", help="some of the methods of language")
    parser.add_argument("--rates", nargs="+", type=float, default=LANGUAGE_RATES, help="learning rates of language")
    parser.add_argument("--seeds", type=int, help="5 for gates, 3 for the others")
    parser.add_argument("--device", default="cpu", help="of the runs of language")
    parser.add_argument("--model", default="", help="an instruct model of Hugging Face for language, folder or name")
    parser.add_argument("--processes", type=int, help="one thread each; one for each core, and one for another device")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--smoke", action="store_true", help="two short runs, no claim")
    args = parser.parse_args(argv)

    if args.study == "trainer":
        train_in_verl(args.seeds or 3)
        return 0
    known, of, seeds = {
        "gates": (TASKS, gate_runs, 5),
        "methods": (METHOD_TASKS, method_runs, 3),
        "language": (LANGUAGE_TASKS, partial(language_runs, rates=args.rates), 3),
    }[args.study]
    unknown = set(args.task or ()) - set(known)
    if unknown:
        parser.error(
            f"--task {', '.join(sorted(unknown))}: not a task of {args.study}. Use some of {', '.join(known)}."
        )
    jobs = of(args.task or known, args.seeds or seeds)
    if args.method:
        jobs = [job for job in jobs if job.cell.rsplit(maxsplit=1)[0] in args.method]
    if args.study == "language":
        jobs = [job._replace(settings=replace(job.settings, device=args.device, model=args.model)) for job in jobs]
    if args.smoke:
        jobs = [job._replace(settings=replace(job.settings, steps=2, prompts=2, test_every=2)) for job in jobs[:2]]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.study}.jsonl"
    done = {record["name"] for record in load(path)}
    missing = [job for job in jobs if job.name not in done]
    if not args.report:
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are done", flush=True)
        processes = args.processes or (1 if args.device != "cpu" else os.cpu_count())
        with multiprocessing.get_context("spawn").Pool(processes) as pool, path.open("a") as file:
            for number, record in enumerate(pool.imap_unordered(train_one, missing), start=1):
                file.write(json.dumps(record) + "\n")
                file.flush()
                last = record["history"]["heldout_success"][-1][1]
                print(f"{number}/{len(missing)}  {record['name']}: {last:.2f}, {record['seconds']} s", flush=True)
    report(args.study, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
