"""Reads the files of a finished or a running run: the file of verl's `file` logger, and the folder of its trace."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]


class ReportError(ValueError):
    """Raised for a run that cannot be shown; the message is one line: what, the rule, the fix."""


@dataclass
class Run:
    """A run as the report shows it.

    Attributes:
        name: name of the run in legends.
        metrics: the file of verl's file logger.
        series: metric → (step, value), in the order of the steps; values that are not finite numbers are left out.
        trace: folder of the trace; None if there is none.
        unreadable: number of lines of the file that are no record, not counting an unfinished last line.
        facts: content of the trace's `run.json`; empty if there is none.
    """

    name: str
    metrics: Path
    series: dict[str, Points]
    trace: Path | None = None
    unreadable: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step with a record."""
        return max((points[-1][0] for points in self.series.values()), default=0)


def read_run(path: Path, trace: Path | None = None) -> Run:
    """Read a run.

    Args:
        path: a file of verl's `file` logger, a folder with `metrics.jsonl` or a single such file in it, or a folder
            whose trace names that file, such as `trainer.default_local_dir`.
        trace: `hapo.trace_dir`; None for the folder `trace` in this folder or beside the file, if it exists.

    Raises:
        ReportError: if there is no such file, or no record in it.
    """
    metrics = _metrics_file(path)
    series, unreadable = _series(metrics)
    if not series:
        raise ReportError(
            f"{metrics}: no record of verl's file logger in it. Launch with trainer.logger=[console,file]."
        )
    if trace is None:
        trace = next((place / "trace" for place in (path, metrics.parent) if (place / "trace").is_dir()), None)
    elif not trace.is_dir():
        raise ReportError(f"--trace {trace}: no such folder. Name the folder of hapo.trace_dir.")
    return Run(
        name=path.name if path.is_dir() else path.stem,
        metrics=metrics,
        series=series,
        trace=trace,
        unreadable=unreadable,
        facts={} if trace is None else _facts(trace),
    )


def _facts(trace: Path) -> dict[str, Any]:
    facts = trace / "run.json"
    return json.loads(facts.read_text()) if facts.is_file() else {}


def _metrics_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    named = _facts(path / "trace").get("metrics")
    if named and Path(named).is_file():
        return Path(named)
    found = [file for file in sorted(path.glob("*.jsonl")) if next(_records(file), None)] if path.is_dir() else []
    if len(found) != 1:
        what = f"several files of records ({', '.join(f.name for f in found)})" if found else "no metrics.jsonl there"
        raise ReportError(f"{path}: {what}. Name the file of verl's file logger.")
    return found[0]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]] | None]:
    """Step and data of each line; None for a line that is no record."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                yield int(record["step"]), dict(record["data"])
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    yield None


def _series(path: Path) -> tuple[dict[str, Points], int]:
    steps: dict[str, dict[int, float]] = {}
    unreadable = 0
    for record in _records(path):
        if record is None:
            unreadable += 1
            continue
        step, data = record
        for name, value in data.items():
            if isinstance(value, int | float) and math.isfinite(value):
                # If a step was repeated after a resumption, its last values count.
                steps.setdefault(name, {})[step] = float(value)
    return {name: sorted(values.items()) for name, values in steps.items()}, unreadable


def told_apart(runs: list[Run]) -> None:
    """Make the names of runs unique: runs with the same name get their parent folder's name in front, and a number."""
    for name in {run.name for run in runs}:
        same = [run for run in runs if run.name == name]
        if len(same) > 1:
            for number, run in enumerate(same, start=1):
                run.name = f"{run.metrics.parent.parent.name}/{run.name} ({number})"
