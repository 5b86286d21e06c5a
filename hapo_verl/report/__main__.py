"""`python -m hapo_verl.report RUN [RUN ...] --output report.html`; exit code 0 when the page was written."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hapo_verl.report.examples import chosen, examples, pieces_of
from hapo_verl.report.page import page
from hapo_verl.report.plots import pictures
from hapo_verl.report.prompts import Groups, of_groups
from hapo_verl.report.runs import ReportError, Run, read_run, told_apart

MIB = 2**20
# Limit for the examples of all runs together; the whole page should stay below 20 MiB.
EXAMPLES_BYTES = 14 * MIB


def report(
    paths: Sequence[Path],
    *,
    traces: Sequence[Path] = (),
    tokenizer: Path | None = None,
    limit: int = 1000,
) -> str:
    """The HTML page about these runs.

    Args:
        paths: of each run its folder, or the file of verl's file logger.
        traces: the folders of the runs' traces, in the same order; if empty, the folders `trace` beside the files.
        tokenizer: folder of the model; None for the model that each trace names.
        limit: largest number of examples of all runs together.

    Raises:
        ReportError: if a run cannot be read.
    """
    if traces and len(traces) != len(paths):
        raise ReportError(
            f"--trace: {len(traces)} folders for {len(paths)} runs. Name one for each run, in their order."
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError("matplotlib is not installed, which draws the pictures. pip install matplotlib") from None
    runs = [read_run(path, traces[i] if traces else None) for i, path in enumerate(paths)]
    told_apart(runs)
    groups: dict[str, Groups] = {}
    shown: dict[str, tuple[list[dict[str, Any]], int]] = {}
    notes = [
        f"{run.metrics}: {run.unreadable} lines are no record of verl's file logger and are left out"
        for run in runs
        if run.unreadable
    ]
    traced = [run for run in runs if run.trace is not None]
    notes += [
        f"{run.name}: no trace, so there are neither prompts nor examples. Launch with hapo.trace_dir=FOLDER."
        for run in runs
        if run.trace is None
    ]
    for run in traced:
        groups[run.name], found, note = _trace(run, tokenizer, limit // len(traced), EXAMPLES_BYTES // len(traced))
        if found[0]:
            shown[run.name] = found
        notes += note
    return page(runs, pictures(runs, groups), groups, shown, notes)


def _trace(
    run: Run, tokenizer: Path | None, limit: int, max_bytes: int
) -> tuple[Groups, tuple[list[dict[str, Any]], int], list[str]]:
    from hapo_verl.protocol.trace import read_lines

    assert run.trace is not None
    read = partial(read_lines, run.trace)
    groups = of_groups(read("groups"), {row["uid"] for row in read("rows")})
    stories = chosen(groups, limit)
    if not stories:
        return groups, ([], 0), [f"{run.name}: its trace has no rows, so there are no examples."]
    pieces, notes = _pieces(run, tokenizer)
    return (
        groups,
        examples(stories, read("rows"), read("loss-*"), pieces=pieces, weight=_weight(run.facts), max_bytes=max_bytes),
        notes,
    )


def _pieces(run: Run, tokenizer: Path | None) -> tuple[Callable[[Sequence[int]], list[str]], list[str]]:
    path = tokenizer or (Path(run.facts["model"]) if run.facts.get("model") else None)
    if path is not None and path.is_dir():
        return pieces_of(path), []
    if tokenizer is not None:
        raise ReportError(f"--tokenizer {tokenizer}: no such folder. Name the folder of the run's model.")
    note = f"{run.name}: tokens are numbers, since there is no folder {path} here. Name the run's model: --tokenizer."
    return pieces_of(None), [note]


def _weight(facts: dict[str, Any]) -> Callable[[Sequence[float]], list[float]]:
    """The weight of a demonstration's token in the run's loss, divided by the largest one; 0 if the trace has no loss.

    The result is a function from log-probabilities (nats) to such weights.
    """
    loss = facts.get("loss")
    if loss is None:
        return lambda logp: [0.0] * len(logp)
    import torch

    from hapo_verl.algo.policy_loss import DemonstrationShape

    shape = DemonstrationShape(loss["shape"], float(loss["shaping"]), loss["exponent"])
    largest = shape.largest_weight
    return lambda logp: (shape.weight(torch.tensor(logp, dtype=torch.float64)) / largest).tolist()


def write(text: str, output: Path) -> None:
    """Write the page atomically; characters that UTF-8 cannot encode (half a surrogate pair) become `?`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    unfinished.replace(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hapo_verl.report", description="One page about runs: curves, the gate, prompts, examples."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or the file of verl's file logger"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], help="the run's hapo.trace_dir; default: RUN/trace"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the model; default: the one that the trace names")
    parser.add_argument(
        "--examples", type=int, default=1000, help="largest number of prompts that are shown with their rows"
    )
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help="write the page again after so many seconds, until you stop it"
    )
    args = parser.parse_args(argv)
    try:
        while True:
            text = report(args.runs, traces=args.trace, tokenizer=args.tokenizer, limit=args.examples)
            write(text, args.output)
            print(f"{args.output}  {args.output.stat().st_size / MIB:.1f} MiB", flush=True)
            if args.every is None:
                return 0
            time.sleep(args.every)
    except (ReportError, json.JSONDecodeError) as error:
        print(f"hapo_verl.report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
