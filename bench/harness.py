"""Code that all benches share: machine line, interleaved timing, ceilings of the same run, one table, one JSON file."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).parents[1]
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "quack-kernels", "nvidia-cutlass-dsl", "fla-core")
PATIENCE_S = 60  # limit for a peer's first call, compilation included; there is no second try


def options(
    question: str, more: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """Parse the options of a bench; call it before torch and Triton are imported, since it may set the interpreter."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on whatever is there, seconds; no speed is claimed"
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "bench/results", help="folder for the table and the JSON"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before a case that would start after this")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="a peer that is left out")
    more(parser)
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        if not arguments.smoke:
            parser.error("no GPU: a kernel's speed is measured on one. Use --smoke to see that the bench runs.")
        interpret()
    return arguments


def interpret() -> None:
    """Switch Triton's interpreter on, before Triton is imported, and make it as fast as in the kernels' tests."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(REPOSITORY / "tests" / "kernels"))
    from interpreter import patch_once_per_launch

    patch_once_per_launch()


class Prompts:
    """A data set of `count` prompts that makes each row on access, as verl's data set reads it from disk."""

    def __init__(self, count: int, row: Callable[[int], dict[str, Any]]) -> None:
        self._count, self._row = count, row

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, range(self._count))


def machine() -> dict[str, str]:
    import torch

    device = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if torch.cuda.is_available():
        driver = (
            subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
            if not torch.version.hip
            else f"ROCm {torch.version.hip}"
        )
        device = f"{torch.cuda.get_device_name()} ({driver})"
    return {
        "device": device,
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy", "verl", *PEERS)},
    }


def commit() -> str:
    """The commit of the checkout; in a folder made by `make gpu-bundle` it is in a file."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", REPOSITORY, *command], capture_output=True, text=True, check=False
        ).stdout.strip()

    if (REPOSITORY / "COMMIT").exists():
        return (REPOSITORY / "COMMIT").read_text().strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass
class Contender:
    """An implementation to time: `prepare` imports what it needs and returns the call; its errors go into its row."""

    name: str
    prepare: Callable[[], Callable[[], dict]]
    ours: bool = False


@dataclass
class Measured:
    """One row of the table."""

    name: str
    note: str = ""  # the reason if there is no time
    milliseconds: list[float] = field(default_factory=list)  # on the device
    host_ms: list[float] = field(default_factory=list)
    first_call_s: float = float("nan")
    peak_mib: float = float("nan")
    error: dict[str, float] = field(default_factory=dict)

    @property
    def lead_ms(self) -> float:
        """How long the device is kept busy before a call: longer than the host needs for it, within reason."""
        return min(30.0, 1.5 * max(self.host_ms)) if self.host_ms else 20.0

    def add(self, call: Time) -> None:
        self.milliseconds.append(call.device)
        self.host_ms.append(call.host)

    def at(self, percentile: int) -> float:
        if len(self.milliseconds) < 2:
            return self.milliseconds[0] if self.milliseconds else float("nan")
        return statistics.quantiles(self.milliseconds, n=100, method="inclusive")[percentile - 1]

    @property
    def host(self) -> float:
        """The median of the host's times, ms; of a call that waits for the device, with that wait."""
        return statistics.median(self.host_ms) if self.host_ms else float("nan")


def confidence(shape: tuple[int, ...], **random) -> torch.Tensor:
    """Random logits, from 5 to 20, for the favourite token of LLM-like rows, above noise of deviation 1."""
    import torch

    return 5 + 15 * torch.rand(shape, **random)


def drawn(logits_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a label from the softmax of each row."""
    return logits_NV.float().softmax(1).multinomial(1, generator=generator)[:, 0]


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Time(NamedTuple):
    """One call, in milliseconds."""

    device: float  # on a CPU the same as host
    host: float  # until the call returns


def timed(call: Callable[[], object], lead_ms: float = 5.0) -> Time:
    """Time a call on a GPU that is busy for `lead_ms` before it, as in a training step, where the host runs ahead.

    So the time on the device has no gaps in which it waits for the next launch, unless the call makes the host wait, or
    takes the host longer than the lead.
    """
    import torch

    cuda = torch.cuda.is_available()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if cuda else (None, None)
    if begin:
        torch.cuda._sleep(int(2e6 * lead_ms))  # cycles of a clock of 2 GHz
        begin.record()
    start = time.perf_counter()
    call()
    host = 1e3 * (time.perf_counter() - start)
    if not (begin and end):
        return Time(host, host)
    end.record()
    end.synchronize()
    return Time(begin.elapsed_time(end), host)


def milliseconds(call: Callable[[], object]) -> float:
    """The time of a call on the device."""
    return timed(call).device


def peak_mib_above_inputs(call: Callable[[], object]) -> float:
    import torch

    if not torch.cuda.is_available():
        return float("nan")
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    name = type(error).__name__
    if "OutOfMemory" in name:
        return "out of memory"
    return f"{name}: {str(error).splitlines()[0][:90] if str(error) else ''}"


def compare(
    contenders: list[Contender],
    *,
    exact: Callable[[], dict],
    baseline: str,
    repeats: int,
    budget_s: float,
    arguments: argparse.Namespace,
) -> list[Measured]:
    """Time the contenders interleaved, after the error of each against fp64 was measured.

    If one of ours is less exact than the bound (twice the baseline's error + 1e-6 of the scale), it gets no time. The
    order is shuffled in every round, so that clocks and temperature favour none. Between calls the L2 cache is
    overwritten, and the device is kept busy until the host has launched the next one (`timed`). A peer that fails gets
    a note in its row; a peer that takes too long is not tried again.
    """
    import torch

    truth = exact()
    rows = [Measured(contender.name) for contender in contenders]
    ready = []
    for contender, row in zip(contenders, rows, strict=True):
        call = first_call(contender, row, truth, arguments)
        if call:
            ready.append((contender, row, call))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    allowed = next((row.error for row in rows if row.name == baseline), {})
    for contender, row, _ in ready:
        wrong = [name for name, error in row.error.items() if not error <= 2 * allowed.get(name, float("inf")) + 1e-6]
        if contender.ours and wrong:
            row.note = f"WRONG: {', '.join(wrong)} less exact than the bound, so not timed"

    flush = torch.empty(2**26, dtype=torch.float32, device="cuda") if torch.cuda.is_available() else None
    for contender, row, call in ready:
        if not row.note:
            with noted(contender, row):
                row.peak_mib = peak_mib_above_inputs(call)
    random.seed(0)
    stop = time.monotonic() + budget_s
    for repeat in range(repeats):
        for contender, row, call in random.sample(ready, len(ready)):
            if row.note:
                continue
            if flush is not None:
                flush.zero_()
            with noted(contender, row):
                row.add(timed(call, row.lead_ms))
        if repeat >= 2 and time.monotonic() > stop:
            break
    return rows


def first_call(
    contender: Contender, row: Measured, truth: dict[str, torch.Tensor], arguments: argparse.Namespace
) -> Callable[[], dict] | None:
    """Make the call to time, and run it once to compile it and measure its error; on failure None, with a note."""
    if contender.name in arguments.without:
        row.note = f"left out: an earlier case died in it, or waited {PATIENCE_S} s for it"
        return None
    # If this call crashes the process, `gpu.py` reads here which peer it was, and starts again without that peer.
    (arguments.out / "running").write_text(contender.name)
    call = None
    with noted(contender, row), patience(contender, arguments):
        start = time.perf_counter()
        call = contender.prepare()
        outputs = call()
        synchronize()
        row.first_call_s = time.perf_counter() - start
        for name in truth.keys() & outputs.keys():
            scale = truth[name].abs().max().item() or 1.0
            row.error[name] = (outputs[name].detach().double() - truth[name]).abs().max().item() / scale
    (arguments.out / "running").unlink()
    return None if row.note else call


@contextlib.contextmanager
def noted(contender: Contender, row: Measured) -> Iterator[None]:
    """Catch an error of a peer and write it as a note into its row; errors of ours or of the device stop the bench."""
    try:
        yield
    except Exception as error:
        if contender.ours:
            raise
        row.note = one_line(error)
        synchronize()  # raises if the device no longer works


@contextlib.contextmanager
def patience(contender: Contender, arguments: argparse.Namespace) -> Iterator[None]:
    """Raise TimeoutError in a peer's first call after PATIENCE_S, and leave the peer out from then on."""

    def stop(*_: object) -> None:
        arguments.without.append(contender.name)
        raise TimeoutError(f"its first call took more than {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(0 if contender.ours else PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ceilings() -> dict[str, float]:
    """Measure the copy bandwidth (GB/s, read + write) and the bf16 GEMM rate (TFLOP/s) in this process."""
    import torch

    cuda = torch.cuda.is_available()
    device, elements, side = ("cuda", 2**28, 8192) if cuda else ("cpu", 2**22, 256)
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    out = torch.empty_like(a)
    copies, products = [], []
    for _ in range(20):
        copies.append(milliseconds(lambda: target.copy_(source)))
        products.append(milliseconds(lambda: torch.mm(a, a, out=out)))
    return {
        "copy_GB_s": 2 * source.nbytes / statistics.median(copies) / 1e6,
        "gemm_TFLOP_s": 2 * side**3 / statistics.median(products) / 1e9,
    }


class Report:
    """Prints a table for each case and writes it at once as text and JSON, so that an interrupted run loses nothing."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        self.smoke = arguments.smoke
        self.path = arguments.out / f"{name}{'-smoke' if arguments.smoke else ''}.json"
        self.content = {"machine": machine(), "smoke": arguments.smoke, "ceilings": ceilings(), "cases": []}
        self.table = self.path.with_suffix(".txt")
        self.table.write_text("")
        self.say(" · ".join(f"{key} {value}" for key, value in self.content["machine"].items()))
        self.say(
            "ceilings of this run: "
            + ", ".join(f"{key} {value:,.0f}" for key, value in self.content["ceilings"].items())
        )
        if arguments.smoke:
            self.say("SMOKE: tiny shapes; the times below say that the bench runs and nothing else")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with self.table.open("a") as table:
            print(line, file=table)

    def case(self, title: str, rows: list[Measured], *, work: float, unit: str, baseline: str) -> None:
        """Add a case; `work` is in flops or bytes, the same for every contender, and `unit` is TFLOP/s or GB/s."""
        ceiling = self.content["ceilings"]["gemm_TFLOP_s" if unit == "TFLOP/s" else "copy_GB_s"]
        base = next((row.at(50) for row in rows if row.name == baseline), float("nan"))
        scale = 1e-9 if unit == "TFLOP/s" else 1e-6
        self.say(f"\n{title}")
        self.say(
            f"{'':34} {'ms p10':>9} {'p50':>9} {'p90':>9} {'host':>7} {unit:>8} {'% ceil':>6} {'peak MiB':>9} "
            f"{'first s':>8} {'x base':>6}  max error / scale"
        )
        for row in rows:
            if row.note:
                self.say(f"{row.name:34} {row.note}")
                continue
            rate = work * scale / row.at(50)
            errors = " ".join(f"{name} {error:.1e}" for name, error in sorted(row.error.items()))
            self.say(
                f"{row.name:34} {row.at(10):9.3f} {row.at(50):9.3f} {row.at(90):9.3f} {row.host:7.3f} "
                f"{rate:8.1f} {100 * rate / ceiling:6.1f} "
                f"{row.peak_mib:9.0f} {row.first_call_s:8.2f} {base / row.at(50):6.2f}  {errors}"
            )
        self.content["cases"].append(
            {
                "case": title,
                "unit": unit,
                "work": work,
                "rows": [
                    {
                        "name": row.name,
                        "note": row.note,
                        "ms": {f"p{percentile}": row.at(percentile) for percentile in (10, 50, 90)},
                        "host_ms": row.host,
                        "calls": len(row.milliseconds),
                        "percent": 100 * work * scale / row.at(50) / ceiling,
                        "x_baseline": base / row.at(50),
                        "peak_mib": row.peak_mib,
                        "first_call_s": row.first_call_s,
                        "error": row.error,
                    }
                    for row in rows
                ],
            }
        )
        self.path.write_text(json.dumps(self.content, indent=1))
