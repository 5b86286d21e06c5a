"""Makes one table and one picture of the quickstart's runs on word problems, from the `result.json` of each run.

make quickstart PRESET=plus SEED=1  # copy its result.json to bench/results/quickstart_words/plus-20steps-seed1.json
python bench/words.py               # table and picture of all results there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "quickstart"))
from tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "quickstart_words"
STEPS = TASKS["words"].steps[""]
HELD_OUT, NEW = "held-out success", "held-out success, new templates"
# Order and labels of the presets.
LABELS = {
    "plus": "`plus`",
    "paper": "`paper`",
    "grpo": "`grpo`, verl's own",
    "hapo_grpo": "`hapo_grpo`, without idle rows",
}
COLOURS = {"plus": "#00897b", "paper": "#fb8c00", "grpo": "#546e7a", "hapo_grpo": "#90a4ae"}


def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by preset, in the order of the table, seeds ascending."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["preset"], []).append(result)
    order = [*LABELS, *sorted(set(found) - set(LABELS))]
    return {preset: found[preset] for preset in order if preset in found}


def table(found: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """The table, with a row for each preset and number of steps: success before and after for each seed, and costs."""
    lines = [
        "| preset | seeds | steps | held-out success, first | last | new templates | minutes | peak GiB | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset, results in by_steps(found):
        held = [run["curves"][HELD_OUT] for run in results]
        new = [run["curves"][NEW][-1][1] for run in results]
        cells = [
            LABELS.get(preset, f"`{preset}`"),
            _all(str(run["seed"]) for run in results),
            str(results[0]["steps"]),
            _all(f"{curve[0][1]:.2f}" for curve in held),
            f"**{_all(f'{curve[-1][1]:.2f}' for curve in held)}**",
            _all(f"{value:.2f}" for value in new),
            _all(f"{run['seconds'] / 60:.0f}" for run in results),
            _all(f"{memory:.1f}" if (memory := run["peak_memory_gib"]) is not None else "–" for run in results),
            _all(dict.fromkeys(run["commit"] for run in results)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(found: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """What has to be known about single runs, a line each, of the runs whose result has a `note`."""
    noted = [(preset, run) for preset, results in by_steps(found) for run in results if "note" in run]
    return "".join(f"- `{preset}`, seed {run['seed']}, {run['steps']} steps: {run['note']}\n" for preset, run in noted)


def trials(folder: Path) -> str:
    """A table of single runs with other settings, which are in no other table.

    The setting is the end of the file's name: that of `plus-20steps-seed1-without-std.json` is "without std".
    """
    lines = [
        "| setting | command | held-out success, last | new templates | minutes | commit |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*-seed*-*.json"), key=lambda path: (_setting(path), path.stem)):
        run = json.loads(path.read_text())
        held, new = (run["curves"][name][-1][1] for name in (HELD_OUT, NEW))
        cells = [
            _setting(path),
            f"`{run['command']}`",
            *(f"{held:.2f}", f"{new:.2f}", f"{run['seconds'] / 60:.0f}"),
            run["commit"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting(path: Path) -> str:
    """What follows the seed in the name of a trial's file."""
    return path.stem.partition("-seed")[2].partition("-")[2].replace("-", " ")


def by_steps(found: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """A preset's runs grouped by their number of steps, on which the schedules depend; the shortest come first."""
    return [
        (preset, [run for run in results if run["steps"] == steps])
        for preset, results in found.items()
        for steps in sorted({run["steps"] for run in results})
    ]


def _all(values: Iterable[str]) -> str:
    return ", ".join(values)


def draw(found: Mapping[str, Iterable[Mapping[str, Any]]], path: Path) -> None:
    """Draw the held-out success over the steps, one line per run that has the quickstart's number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for preset, results in found.items():
        for number, run in enumerate([run for run in results if run["steps"] == STEPS]):
            steps, success = zip(*run["curves"][HELD_OUT], strict=True)
            label = preset if number == 0 else None
            axes.plot(steps, success, color=COLOURS.get(preset), label=label, linewidth=2, marker="o", markersize=3)
    axes.set(xlabel="step of 8 x 4 rollouts", ylabel="held-out success", ylim=(-0.03, 1.0))
    axes.set_title("SmolLM2-135M-Instruct learns word problems in verl's trainer", fontsize=11)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def transcript(run: Mapping[str, Any]) -> str:
    """The held-out problems of a run with the answers before and after training."""
    parts = [
        f"{question}  [{right}]\n--- before\n{before.strip()}\n--- after\n{after.strip()}\n"
        for question, right, before, after in run.get("answers", [])
    ]
    return "\n".join(parts)


def before(path: Path) -> str:
    """What the model can do before training, in words, from the result of `words_before.py`; empty without one."""
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    strict, lenient, sums = (
        " and ".join(f"{found[kind]:.2f}" for found in result["success"].values())
        for kind in ("strict", "lenient", "sums")
    )
    commit, tokens = result["machine"]["commit"], result["tokens"]
    return f"""## Before training

`python bench/words_before.py`, commit {commit}, 50 held-out problems and 50 of new templates. Of the model's greedy
answers {strict} are right as the reward reads them, and {lenient} if the last number of {tokens} tokens
counts, in whatever words. If the demonstration's lines up to `a + b =` are given, {sums} of the results
are its own. So it can calculate; what it lacks is to write down the right sums, and the last line.

"""


def main() -> int:
    """Write `README.md` and `curves.png` beside the results."""
    found = runs(RESULTS)
    if not found:
        print(f"{RESULTS}: no result of a run. make quickstart makes one.", file=sys.stderr)
        return 2
    draw(found, RESULTS / "curves.png")
    machines = dict.fromkeys(run["machine"] for results in found.values() for run in results)
    first = next(iter(found.values()))[0]
    (RESULTS / "README.md").write_text(
        f"""# Word problems in verl's trainer

Made by `python bench/words.py` from the JSON files here, each with its command, commit and machine: {_all(machines)}.

{table(found)}

Values in a cell are the seeds', in order. 50 held-out problems of the trained templates with other numbers, 48 or 50 of
templates that are never trained on; greedy, so that a success of 0.7 has a standard error of 0.06. Runs of 20 steps are
the quickstart as it is now: 8 prompts x 4 rollouts a step, gradients clipped at 10, and `plus` with λ = 1. Where the
quickstart had verl's clip of 1 at a run's commit, its command has the clip. `hapo_grpo` was run with 1, which makes no
difference to a gradient of 0. Runs of 24 and 28 steps had 8 x 8 rollouts, micro-batches of 512 to 768 tokens, a clip of
1, and `plus` with λ = .1. A seed does not fix a run: seed 1 of `plus` was run twice. Minutes are the trainer's,
start-up included; the one of .64 was alone on the machine, nearly all others had other work beside them. A
commit with a `+` had changes that were not committed.

{notes(found)}
## Other settings, one run each

{trials(RESULTS / "trials")}

With verl's gradient clip of 1 `plus` ends at 0.72, 0.80 and 0.46 and with 10 at 0.64, 0.70, 0.72 and 0.62. In the
`metrics.jsonl` of the runs that end at 0.70, 0.72 and 0.62 the norms before clipping are 5.7 to 10.1 in the first two
steps and 0.7 to 3.9 later, above 1 in 46 of 54 steps, so a clip of 1 shortens nearly every step. The larger clip was
chosen after the runs with a clip of 1, on the same problems and seeds; the means, 0.66 and 0.67, do not differ by more
than chance. `paper` ends at 0.16, 0.00 and 0.24 with the larger clip, and at 0.32 and 0.16 with verl's. That is no
difference that so few runs can show, and far below `plus` with either. With the larger clip the first of its rollouts
that succeeds comes in step 6, 7 or 8, and no step has more successes than 5 of 32.

{before(RESULTS / "before.json")}## The same problems before and after

Preset `{first["preset"]}`, seed {first["seed"]}.

```text
{transcript(first)}```
"""
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
