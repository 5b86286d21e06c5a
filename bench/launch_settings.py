"""Which launch settings are fastest on this GPU? Measures every candidate of the table for each kernel and dtype.

    python bench/launch_settings.py --out DIR [--minutes 2] [--write] [--smoke]

It writes DIR/launch_settings.json, with all measured times, and DIR/launch_table.json, the table with the fastest
candidates. `--write` also replaces the package's table. Entries that the time does not suffice for are kept, and a
candidate replaces an entry only if it is at least 2 % faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    import torch

    from hapo_kernels.launch import Launch, Settings

GAIN = 0.02  # what a candidate has to be faster by
ROWS, V = 1024, 151936  # a chunk of logits of a real vocabulary
TOKENS = (256, 16384)  # of `policy_loss`: rows, tokens
SCORES = 2**24  # of `segment_norm`, in groups of 4,096

Timer = Callable[[Callable[[], object]], float]


def milliseconds(call: Callable[[], object]) -> float:
    """The median of 20 calls after 3 warm-up calls; the L2 cache is overwritten between calls."""
    import torch

    flush = torch.empty(2**26, dtype=torch.float32, device="cuda") if torch.cuda.is_available() else None
    times = []
    for _ in range(23):
        if flush is not None:
            flush.zero_()
        times.append(harness.milliseconds(call))
    return statistics.median(times[3:])


def calls(device: str, dtype: torch.dtype, *, tiny: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Each kernel of the table with the storage dtype of its entry, and a call that does little beside this kernel."""
    import torch

    from hapo_kernels.launch import DTYPES
    from hapo_kernels.linear_logprob import kernel as head
    from hapo_kernels.policy_head import kernel as policy_head
    from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss
    from hapo_kernels.segment_norm import segment_norm

    rows, vocabulary = (1, 300) if tiny else (ROWS, V)
    row = torch.arange(rows, device=device)
    logits, dlogits = (
        torch.randn(rows, vocabulary, device=device),
        torch.empty(rows, vocabulary, dtype=dtype, device=device),
    )
    label, one = torch.zeros(rows, dtype=torch.int64, device=device), torch.ones(rows, device=device)
    stats = torch.empty(4, rows, device=device)
    name = DTYPES[dtype]
    if name == "bf16":  # once: it reads fp32 logits, whatever the storage dtype
        yield "stats_row", "fp32", lambda: head.row_stats(row, logits, label, one, 0, stats)
    yield "dlogits_row", name, lambda: head.row_dlogits(row, logits, dlogits, label, one, one, one, one, one, None, 0)
    clip, aggregation = Clip(0.2, 0.28, 3.0), Aggregation("token-mean")
    active = torch.ones(1, rows, dtype=torch.bool, device=device)
    loss = policy_head.row_loss(
        label[None],
        one[None],
        one[:1],
        active,
        clip=clip,
        aggregation=aggregation,
        teacher=None,
        importance_weight_BT=None,
        kl=None,
        entropy_coefficient=0.0,
        temperature_N=one,
    )
    into = policy_head.Values.of(one, rows)
    yield "head_row", name, lambda: loss.launch(row, logits, dlogits, into, 0)

    shape = (2, 40) if tiny else TOKENS
    logp = torch.randn(*shape, device=device).to(dtype).requires_grad_()
    mask, advantage = torch.ones(*shape, dtype=torch.bool, device=device), torch.ones(shape[0], device=device)
    terms = (logp, logp.detach(), advantage, mask)
    yield "policy_loss", name, lambda: policy_loss(*terms, clip=clip, aggregation=aggregation, impl="triton")
    scores = torch.randn(128 if tiny else SCORES, device=device).to(dtype)
    bounds = torch.arange(0, len(scores) + 1, 64 if tiny else 4096, device=device)
    yield "segment_norm", name, lambda: segment_norm(scores, scale_by_std=True, offset_S1=bounds, impl="triton")


def measure(candidates: list[Launch], kernel: str, call: Callable[[], object], timer: Timer) -> dict[Launch, float]:
    """The milliseconds of every candidate: the better of two interleaved measurements."""
    from hapo_kernels.launch import trying

    found: dict[Launch, float] = {}
    for _ in range(2):
        for launch in candidates:
            with trying(kernel, launch):
                found[launch] = min(timer(call), found.get(launch, float("inf")))
    return found


def chosen(settings: Settings, kernel: str, dtype: str, times: dict[Launch, float], source: str) -> Settings:
    """The settings with the fastest candidate; the present one is kept unless another is faster by GAIN."""
    from hapo_kernels.launch import Chosen

    present = settings.chosen[kernel][dtype].launch
    fastest = min(times, key=lambda launch: times[launch])
    if times[fastest] > (1 - GAIN) * times.get(present, float("inf")):
        fastest = present
    entries = settings.chosen[kernel] | {dtype: Chosen(fastest, source)}
    return settings._replace(chosen=settings.chosen | {kernel: entries})


def run(
    table: dict[str, Settings],
    name: str,
    device: str,
    source: str,
    *,
    timer: Timer,
    tiny: bool,
    deadline: float,
    report: Callable[[list], None] = lambda rows: None,
) -> tuple[dict[str, Settings], list[dict]]:
    """Measure an architecture's entries; returns the new table and all times, which `report` also gets one by one.

    All kernels are measured for one storage dtype before the next; bf16, which training uses, is first.
    """
    from hapo_kernels.launch import DTYPES

    rows: list[dict] = []
    settings = table[name]
    for dtype in sorted(DTYPES, key=lambda dtype: ("bf16", "fp32", "fp16").index(DTYPES[dtype])):
        for kernel, entry, call in calls(device, dtype, tiny=tiny):
            if time.monotonic() > deadline:
                return table | {name: settings}, rows
            times = measure(settings.candidates[kernel], kernel, call, timer)
            settings = chosen(settings, kernel, entry, times, source)
            best = settings.chosen[kernel][entry].launch
            rows += [
                {"kernel": kernel, "dtype": entry, "launch": launch, "ms": ms, "chosen": launch == best}
                for launch, ms in times.items()
            ]
            report(rows)
    return table | {name: settings}, rows


def source_of(machine: dict[str, str]) -> str:
    """The source of a measured entry, in one line."""
    return (
        f"measured on {machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}, "
        f"commit {machine['commit']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the times and the table")
    parser.add_argument("--minutes", type=float, default=2.0, help="what is not measured by then keeps its entry")
    parser.add_argument("--write", action="store_true", help="put the table in the place of the package's")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, interpreted on a CPU; no speed is claimed")
    arguments = parser.parse_args()
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not arguments.smoke:
        parser.error("no GPU: a kernel's speed is measured on one. Use --smoke to see that the bench runs.")
    if arguments.write and arguments.smoke:
        parser.error("--write with --smoke: a rehearsal measures nothing. Use one of them.")
    if not cuda:
        harness.interpret()
    from hapo_kernels import launch

    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = harness.machine()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    name = launch.architecture_of(device)

    def report(rows: list[dict]) -> None:
        content = {"machine": machine, "smoke": arguments.smoke, "architecture": name, "times": rows}
        (arguments.out / "launch_settings.json").write_text(json.dumps(content, indent=1))

    table, rows = run(
        launch.TABLE,
        name,
        str(device),
        launch.NOT_MEASURED if arguments.smoke else source_of(machine),
        timer=harness.milliseconds if arguments.smoke else milliseconds,
        tiny=arguments.smoke,
        deadline=time.monotonic() + 60 * arguments.minutes,
        report=report,
    )
    for row in rows:
        mark = "  <- chosen" if row["chosen"] else ""
        print(f"{row['kernel']:14} {row['dtype']:5} {tuple(row['launch'])!s:14} {row['ms']:9.4f} ms{mark}")
    if not arguments.smoke:
        launch.write(table, arguments.out / "launch_table.json")
    if arguments.write:
        launch.write(table)
        print(f"written to {launch.PATH}")


if __name__ == "__main__":
    main()
