"""How much does a head cost on a CPU, where the quickstart runs: our reference compared with others that run there?

    python bench/head_cpu.py [--smoke] [--rounds 3] [--out DIR]

Forward and backward pass of the clipped loss from hidden states, with the shape of a small language model, in fp32 and
bf16, with half of the tokens training. Seconds are this process's CPU time, so that other work on the machine does not
count; the contenders take turns in random order. Memory is the peak above the memory of the process before the call.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hapo_kernels.linear_logprob import linear_logprob
from hapo_kernels.policy_head import policy_head
from hapo_kernels.policy_loss import Aggregation, Clip, policy_loss
from harness import REPOSITORY, machine, one_line
from peers import trl_chunked_logprob, verl_kernels

CLIP = Clip(0.2, 0.28, float("inf"))
B = 8
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch:
    """The inputs; half of the tokens train, and every peer gets the mask in its own form."""

    def __init__(self, T: int, H: int, V: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(B, T // B, H, generator=generator).to(dtype)
        self.weight = (torch.randn(V, H, generator=generator) / H**0.5).to(dtype)
        self.label = torch.randint(0, V, (B, T // B), generator=generator)
        self.mask = (torch.arange(T // B) % 2 == 0).expand(B, -1).contiguous()
        self.advantage = torch.randn(B, generator=generator)
        self.behaviour = torch.full((B, T // B), -10.0)
        self.how = Aggregation("token-mean", batch_num_tokens=int(self.mask.sum()))

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.behaviour, self.advantage, self.mask


def from_logp(batch: Batch, head: Head) -> Callable[[], Tensor]:
    """Compute the loss from a head's log-probabilities, and its backward pass; returns ∂hidden."""

    def call() -> Tensor:
        hidden, weight = batch.leaves()
        logp = head(hidden.flatten(0, 1), weight, batch.label.flatten()).view(batch.mask.shape)
        loss = policy_loss(logp.float(), *batch.tokens(), clip=CLIP, aggregation=batch.how, impl="reference").loss
        return torch.autograd.grad(loss, [hidden, weight])[0]

    return call


def hapo_head(batch: Batch) -> Callable[[], Tensor]:
    def call() -> Tensor:
        hidden, weight = batch.leaves()
        given = {"clip": CLIP, "aggregation": batch.how}
        loss = policy_head(hidden, weight, batch.label, *batch.tokens(), **given).loss
        return torch.autograd.grad(loss, [hidden, weight])[0]

    return call


def hapo_logprob(batch: Batch) -> Callable[[], Tensor]:
    return from_logp(batch, lambda h, w, y: linear_logprob(h, w, y, keep_N=batch.mask.flatten()).logp_N)


def eager(batch: Batch) -> Callable[[], Tensor]:
    def head(hidden: Tensor, weight: Tensor, label: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1)

    return from_logp(batch, head)


def verl_torch(batch: Batch) -> Callable[[], Tensor]:
    verl_kernels()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    return from_logp(batch, lambda h, w, y: fused(h, w, y)[0])


def trl_chunked(batch: Batch) -> Callable[[], Tensor]:
    chunked = trl_chunked_logprob()
    return from_logp(batch, lambda h, w, y: chunked.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0])


def liger_scaled(batch: Batch) -> Callable[[], Tensor]:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    ignoring = torch.where(batch.mask, batch.label, -100).flatten()
    return from_logp(batch, lambda h, w, y: -Function.apply(h, w, ignoring, 1.0, -100, 1, False))


def liger_grpo(batch: Batch) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    settings = {"beta": 0.0, "compiled": False, "use_ref_model": False, "loss_type": "bnpo"}
    head = LigerFusedLinearGRPOLoss(epsilon_low=CLIP.low, epsilon_high=CLIP.high, **settings)

    def call() -> Tensor:
        hidden, weight = batch.leaves()
        tokens = (batch.label, batch.mask.float(), batch.advantage)
        loss = head(hidden, weight, *tokens, old_per_token_logps=batch.behaviour)[0]
        return torch.autograd.grad(loss, [hidden, weight])[0]

    return call


EAGER = "torch eager"
CONTENDERS = {
    "hapo policy_head": hapo_head,
    "hapo linear_logprob + loss": hapo_logprob,
    EAGER: eager,
    "verl FusedLinearForPPO (torch)": verl_torch,
    "TRL ChunkedLogProbFunction": trl_chunked,
    "Liger scaled cross entropy": liger_scaled,
    "Liger FusedLinearGRPOLoss": liger_grpo,
}


def resident_mib(peak: bool = False) -> float:
    """The memory of the process in MiB: now, or the peak since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(batch: Batch, rounds: int) -> dict[str, dict]:
    """Seconds, peak and error of each contender; the error is that of ∂hidden, relative to fp32 eager's largest."""
    rows: dict[str, dict] = {name: {"cpu_s": [], "wall_s": []} for name in CONTENDERS}
    calls = {}
    single = Batch.__new__(Batch)
    single.__dict__ = batch.__dict__ | {"hidden": batch.hidden.float(), "weight": batch.weight.float()}
    truth = eager(single)()
    for name, prepare in CONTENDERS.items():
        try:
            call = prepare(batch)
            # The first call is a warm-up and is not counted.
            found = call().float()
        except Exception as error:
            rows[name]["note"] = one_line(error)
            continue
        rows[name]["error"] = ((found - truth).abs().max() / truth.abs().max()).item()
        del found
        before = resident_mib()
        forget_peak()
        call()
        rows[name]["peak_mib"] = resident_mib(peak=True) - before
        calls[name] = call
    random.seed(0)
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            cpu, wall = time.process_time(), time.perf_counter()
            calls[name]()
            rows[name]["cpu_s"].append(time.process_time() - cpu)
            rows[name]["wall_s"].append(time.perf_counter() - wall)
    return rows


def table(content: dict) -> str:
    """The page of the results."""
    lines = [" · ".join(f"{key} {value}" for key, value in content["machine"].items()), "", content["said"]]
    for case in content["cases"]:
        base = statistics.median(case["rows"][EAGER]["cpu_s"])
        lines += ["", case["case"], "", "| head | CPU s | x eager | peak MiB | max error of ∂hidden |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in case["rows"].items():
            if "note" in row:
                lines.append(f"| {name} | {row['note']} | | | |")
                continue
            seconds = statistics.median(row["cpu_s"])
            cells = f"{seconds:.2f} | {seconds / base:.2f} | {row['peak_mib']:.0f} | {row['error']:.1e}"
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write head_cpu.json and head_cpu.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape; no number is a speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results")
    options = parser.parse_args()
    T, H, V = (16, 24, 300) if options.smoke else (1024, 576, 49152)
    name = "head_cpu-smoke" if options.smoke else "head_cpu"
    said = (
        f"Medians of {options.rounds} rounds, {torch.get_num_threads()} thread, CPU time of the process, beside other "
        "work on the machine. The peak counts what the allocator keeps from the system as well."
    )
    content: dict = {"machine": machine(), "smoke": options.smoke, "said": said, "cases": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for dtype in (torch.float32, torch.bfloat16):
        title = f"T = {T}, H = {H}, V = {V}, {dtype}, half of the tokens train, forward + backward"
        content["cases"].append({"case": title, "rows": measure(Batch(T, H, V, dtype), options.rounds)})
        (options.out / f"{name}.json").write_text(json.dumps(content, indent=1))
        (options.out / f"{name}.md").write_text(table(content))
    print(table(content))


if __name__ == "__main__":
    main()
