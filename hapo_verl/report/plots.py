"""Draws the page's pictures as SVG: curves of several runs in one plot, heat maps of the gate, outcomes of groups.

Text and axes take the page's text colour, so that a picture works on a light and on a dark page. Of a curve with many
points only the lowest and the highest point of each stretch are drawn, so every drawn point is a real one.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hapo_verl.report.prompts import Groups
from hapo_verl.report.runs import Points, Run

COLOURS = ("#4c8bf5", "#e8710a", "#12a37f", "#c94f7c", "#9a6df2", "#b59a00", "#00a3b4", "#8a8a8a")
STYLES = ("-", "--", ":", "-.")
# Number of stretches of a curve; the lowest and the highest point of each are drawn.
STRETCHES = 500
# Largest number of columns of a heat map.
COLUMNS = 160
_INK = "#010203"  # placeholder, replaced by the page's text colour


class Panel(NamedTuple):
    """Curves in one plot: metric → label. `{}` in a metric matches any text, which replaces `{}` in the label."""

    title: str
    metrics: Mapping[str, str]
    share: bool = False
    log: bool = False


PANELS = (
    Panel(
        "Success",
        {
            "val-core/{}/acc/mean@{}": "held out: {}",
            "hapo/on_policy_success": "on policy",
        },
        share=True,
    ),
    Panel(
        "The gate",
        {
            "hapo/gate/firing_rate": "fired",
            "hapo/gate/firing_rate_expected": "expected to fire",
            "hapo/gate/confidence": "mean posterior",
            "hapo/gate/threshold": "threshold γ",
        },
        share=True,
    ),
    Panel(
        "Demonstrations among what was trained on",
        {
            "hapo/injected/group_share": "groups",
            "hapo/injected/row_share": "rows",
            "hapo/injected/token_share": "tokens",
        },
        share=True,
    ),
    Panel(
        "Work that trained",
        {"hapo/trained/row_share": "rows", "hapo/trained/token_share": "tokens"},
        share=True,
    ),
    Panel(
        "Groups without a signal",
        {
            "hapo/without_signal/before_injection": "before injection",
            "hapo/without_signal/after_injection": "after it",
        },
        share=True,
    ),
    Panel(
        "Demonstrations under the policy",
        {
            "hapo/trained/demonstration_probability": "probability of a token, mean",
            "hapo/demonstration/probability": "probability of a token, mean",
            "hapo/demonstration/least_probability_median": "of the least likely token, median",
            "hapo/demonstration/least_probability_q05": "of the least likely token, 5 % quantile",
        },
        log=True,
    ),
    Panel("Loss", {"hapo/loss/demonstration": "demonstrations", "hapo/loss/on_policy": "own rollouts"}),
    Panel("Norm of the gradient", {"actor/grad_norm": "before clipping"}),
    Panel(
        "Length of responses",
        {"response_length/mean": "mean, tokens", "response_length/max": "longest, tokens"},
    ),
    Panel(
        "Seconds a step",
        {"timing_s/step": "all", "timing_s/gen": "rollouts", "timing_s/update_actor": "update"},
    ),
)
REFUSALS = "hapo/refused/"


@dataclass
class Curve:
    """A curve of a panel."""

    run: str
    metric: str
    label: str
    points: Points


@dataclass
class Picture:
    """A picture of the page.

    Attributes:
        title: text above the picture.
        svg: the picture.
        curves: the curves in it, so that the page can show their values.
        box: left and right end of the axes, as shares of the width, and the steps at these ends.
        note: text below the picture.
    """

    title: str
    svg: str
    curves: Sequence[Curve] = ()
    box: tuple[float, float, float, float] | None = None
    note: str = ""


def curves(panel: Panel, runs: Sequence[Run]) -> list[Curve]:
    """The curves of a panel for which these runs have metrics."""
    found = []
    for run in runs:
        for pattern, label in panel.metrics.items():
            regex = re.compile("(.+)".join(map(re.escape, pattern.split("{}"))))
            for metric in sorted(run.series):
                if match := regex.fullmatch(metric):
                    named = label.format(*match.groups())
                    found.append(Curve(run.name, metric, named, run.series[metric]))
        # verl's own score is the policy's success only if nothing is injected.
        if panel.title == "Success" and "hapo/on_policy_success" not in run.series:
            points = run.series.get("critic/score/mean")
            if points:
                found.append(Curve(run.name, "critic/score/mean", "on policy: verl's mean score", points))
    return found


def thinned(points: Points) -> Points:
    """Reduce a curve to the lowest and the highest point of each stretch, in order; keeps the first and last point."""
    if len(points) <= 2 * STRETCHES:
        return points
    kept: Points = []
    for i in range(STRETCHES):
        part = points[i * len(points) // STRETCHES : (i + 1) * len(points) // STRETCHES]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({low, high})
    if kept[0] != points[0]:
        kept.insert(0, points[0])
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def pictures(runs: Sequence[Run], groups: Mapping[str, Groups]) -> list[Picture]:
    """All pictures of these runs; `groups` maps the name of each run with a trace to its groups."""
    made = []
    for panel in PANELS:
        drawn = curves(panel, runs)
        if drawn:
            made.append(_curves(panel, drawn, [run.name for run in runs]))
    for run in runs:
        title = f", {run.name}" if len(runs) > 1 else ""
        refused = {
            name.removeprefix(REFUSALS): points
            for name, points in run.series.items()
            if name.startswith(REFUSALS) and any(value for _, value in points)
        }
        if refused:
            made.append(_stacked(f"Refused demonstrations, by reason{title}", refused))
        if run.name in groups and groups[run.name].successes:
            made += _gate(groups[run.name], title)
    return made


def _axes(size: tuple[float, float] = (5.6, 3.0)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.80))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    return figure, axes


def _curves(panel: Panel, drawn: Sequence[Curve], runs: Sequence[str]) -> Picture:
    with _look():
        figure, axes = _axes()
        labels = list(dict.fromkeys(curve.label for curve in drawn))
        several = len(runs) > 1
        for curve in drawn:
            place = labels.index(curve.label)
            colour = runs.index(curve.run) if several else place
            steps, values = zip(*thinned(curve.points), strict=True)
            axes.plot(
                steps,
                values,
                color=COLOURS[colour % len(COLOURS)],
                linestyle=STYLES[place % len(STYLES)] if several else "-",
                linewidth=1.4,
                marker="o" if len(steps) == 1 else None,
                markersize=3,
                label=f"{curve.run}: {curve.label}" if several else curve.label,
            )
        if panel.share:
            axes.set_ylim(-0.03, 1.03)
        if panel.log and all(value > 0 for curve in drawn for _, value in curve.points):
            axes.set_yscale("log")
        axes.legend(fontsize=7, frameon=False)
        return _picture(panel.title, figure, axes, drawn)


def _stacked(title: str, parts: Mapping[str, Points]) -> Picture:
    with _look():
        figure, axes = _axes()
        steps = sorted({step for points in parts.values() for step, _ in points})
        columns = _columns(steps)
        means = [[_mean(dict(points), column) for column in columns] for points in parts.values()]
        axes.stackplot(
            [column[0] for column in columns],
            means,
            labels=list(parts),
            colors=[COLOURS[i % len(COLOURS)] for i in range(len(parts))],
            step="post",
        )
        axes.set_ylim(0, None)
        # The legend goes above the areas, since they fill the axes.
        axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        drawn = [Curve("", name, name, points) for name, points in parts.items()]
        return _picture(title, figure, axes, drawn)


def _gate(groups: Groups, title: str) -> list[Picture]:
    steps = sorted({step for step, _ in groups.outcomes})
    columns = _columns(steps)
    seen, fired = (_matrix(counts, columns, groups.rollouts) for counts in (groups.successes, groups.fired))
    shares = [[_share(row[c], sum(seen_row[c] for seen_row in seen)) for c in range(len(columns))] for row in seen]
    rates = [
        [_share(f, s) if s else float("nan") for f, s in zip(fired_row, seen_row, strict=True)]
        for fired_row, seen_row in zip(fired, seen, strict=True)
    ]
    outcomes = sorted({outcome for _, outcome in groups.outcomes})
    parts = {
        outcome.replace("_", " "): [
            (step, _share(groups.outcomes[step, outcome], sum(groups.outcomes[step, other] for other in outcomes)))
            for step in steps
        ]
        for outcome in outcomes
    }
    return [
        _heat(f"Groups by successes{title}", shares, columns, "share of the step's groups"),
        _heat(f"Where the gate fired{title}", rates, columns, "share of the groups with so many successes"),
        _stacked(f"What became of the groups{title}", parts),
    ]


def _heat(title: str, rows: Sequence[Sequence[float]], columns: Sequence[range | Sequence[int]], note: str) -> Picture:
    with _look():
        figure, axes = _axes()
        first, last = columns[0][0], columns[-1][-1]
        image = axes.imshow(
            rows,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=1,
            extent=(first - 0.5, last + 0.5, -0.5, len(rows) - 0.5),
        )
        axes.set_ylabel("successes in the group")
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        return _picture(title, figure, axes, (), note)


def _columns(steps: Sequence[int]) -> list[Sequence[int]]:
    """The steps of each column: one step, or if there are too many steps, an equal share of them."""
    count = min(len(steps), COLUMNS)
    return [steps[i * len(steps) // count : (i + 1) * len(steps) // count] for i in range(count)]


def _matrix(counts: Mapping[tuple[int, int], int], columns: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    column_of = {step: c for c, steps in enumerate(columns) for step in steps}
    rows = [[0] * len(columns) for _ in range(most + 1)]
    for (step, successes), count in counts.items():
        rows[successes][column_of[step]] += count
    return rows


def _mean(values: Mapping[int, float], steps: Sequence[int]) -> float:
    found = [values[step] for step in steps if step in values]
    return sum(found) / len(found) if found else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _look() -> Any:
    import matplotlib

    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), _INK
    )
    return matplotlib.rc_context(
        {
            **ink,
            "svg.fonttype": "none",
            "svg.hashsalt": "hapo",
            "path.simplify": False,
            "font.size": 8,
            "font.family": "sans-serif",
        }
    )


def _picture(title: str, figure: Any, axes: Any, drawn: Sequence[Curve], note: str = "") -> Picture:
    box, (low, high) = axes.get_position(), axes.get_xlim()
    return Picture(title, _svg(figure), drawn, (box.x0, box.x1, low, high), note)


def _svg(figure: Any) -> str:
    """The `<svg>` element of a figure: no prolog, no metadata, transparent, in the page's colour and font."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    # In HTML, SVG needs no namespace declarations; the page has its own style and font.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"<style.*?</style>|font-family: [^;\"]*;? ?", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return text.replace(_INK, "currentColor").strip()


def with_own_names(svg: str, number: int) -> str:
    """Make the ids in an SVG unique on the page by adding the picture's number."""
    svg = re.sub(r'\bid="', f'id="p{number}-', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>p{number}-", svg)
