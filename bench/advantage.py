"""How much does the group advantage cost on verl's driver, a CPU process, and how much of it is the (B, T) tensor?

    python bench/advantage.py [--smoke]

Each variant runs in a separate process on the same scores. Peak memory is measured above the memory of the inputs. The
inputs of verl's estimators have shape (B, T): rewards in fp32, and a bool mask.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

from harness import REPOSITORY, machine

WAYS = {
    "verl grpo": "verl's interface: rewards (B, T) in, advantages (B, T) out",
    "verl grpo_vectorized": "the same, verl's own vectorised version",
    "segment_norm, (B, T) product": "ours inside the same interface: one sum over T, one product with the mask",
    "segment_norm, (B, T) view": "ours, returning a view of one number a row; verl's interface still has (B, T) read",
    "segment_norm, (B,)": "ours from one score a row to one advantage a row: what policy_loss takes",
    "HAPO's trainer, jagged": "rewards and mask in, advantages out as verl's v1 trainer stores them: without padding",
}


def measure(way: str, B: int, T: int, repeats: int) -> dict:
    import numpy
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    group_B = torch.arange(B) // 8
    score_B = (torch.rand(B, generator=generator) < 0.5).float()
    uid_B = numpy.array([f"{number:032x}" for number in group_B.tolist()], dtype=object)
    length_B = torch.randint(1, T + 1, (B,), generator=generator)
    jagged_reward, jagged_mask = jagged_rows(score_B, length_B)
    mask_BT = torch.arange(T) < length_B[:, None]
    reward_BT = torch.zeros(B, T).fill_(0.0)
    reward_BT[torch.arange(B), length_B - 1] = score_B

    from verl.trainer.ppo.core_algos import (
        compute_grpo_outcome_advantage,
        compute_grpo_vectorized_outcome_advantage,
    )

    from hapo_kernels.segment_norm import segment_ids, segment_norm
    from hapo_verl.algo.advantage import session_advantage
    from hapo_verl.protocol import jagged

    def ours(score_B):
        return segment_norm(score_B, segment_ids(uid_B), scale_by_std=True)

    def trainer():
        row_B = torch.arange(B)
        advantage_B = session_advantage(
            jagged.row_sums(jagged_reward), segment_ids(uid_B), row_B, torch.zeros_like(row_B), scale_by_std=True
        )
        return jagged.spread(advantage_B, jagged_mask)

    call = {
        "verl grpo": lambda: compute_grpo_outcome_advantage(reward_BT, mask_BT, uid_B)[0],
        "verl grpo_vectorized": lambda: compute_grpo_vectorized_outcome_advantage(reward_BT, mask_BT, uid_B)[0],
        "segment_norm, (B, T) product": lambda: ours(reward_BT.sum(-1))[:, None] * mask_BT,
        "segment_norm, (B, T) view": lambda: ours(reward_BT.sum(-1))[:, None].expand(B, T),
        "segment_norm, (B,)": lambda: ours(score_B),
        "HAPO's trainer, jagged": trainer,
    }[way]
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = peak_kib()
    seconds, cpu_seconds, peak, digest = [], [], 0, 0.0
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        advantage = call()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        peak = peak_kib() - before
        if advantage.is_nested:
            column = advantage.values()[advantage.offsets()[:-1]]
        else:
            column = advantage if advantage.ndim == 1 else advantage[:, 0]
        digest = column.double().abs().sum().item()
        del advantage, column
    return {"wall_s": seconds, "cpu_s": cpu_seconds, "peak_mib": peak / 1024, "abs_sum": digest}


def jagged_rows(score_B, length_B):
    """Rewards (the score on the last token) and masks of rows of these lengths, in the form of TransferQueue."""
    import torch

    offset_B1 = torch.nn.functional.pad(length_B.cumsum(0), (1, 0))
    reward, mask = torch.zeros(int(offset_B1[-1])).fill_(0.0), torch.ones(int(offset_B1[-1]), dtype=torch.int64)
    reward[offset_B1[1:] - 1] = score_B
    return tuple(torch.nested.nested_tensor_from_jagged(values, offsets=offset_B1) for values in (reward, mask))


def cpu(row: dict) -> float:
    return statistics.median(row["cpu_s"])


def wall(row: dict) -> float:
    return statistics.median(row["wall_s"])


def peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="64 x 128; no claim")
    parser.add_argument("--rows", type=int, default=65_536, help="B")
    parser.add_argument("--tokens", type=int, default=8_192, help="T")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results")
    arguments = parser.parse_args()
    B, T = (64, 128) if arguments.smoke else (arguments.rows, arguments.tokens)
    import verl.trainer.ppo.core_algos  # noqa: F401  once, for every way's process

    found = {}
    content = {
        "machine": machine(),
        "smoke": arguments.smoke,
        "B": B,
        "T": T,
        "threads": 1,
        "load": os.getloadavg()[0],
        "ways": found,
    }
    print(" · ".join(f"{key} {value}" for key, value in content["machine"].items()))
    print(f"B = {B}, T = {T}, groups of 8, one thread, median of {arguments.repeats}; a process a way")
    print(
        f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
        "where it is busy, believe the CPU seconds"
    )
    print(f"{'':32} {'CPU s':>9} {'x grpo':>8} {'wall s':>9} {'peak MiB above inputs':>22}")
    for way in WAYS:
        # Each variant runs in a fresh child process, so that it does not see the heap that another one left.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[way] = pool.apply(measure, (way, B, T, arguments.repeats)) | {"what": WAYS[way]}
        row, grpo = found[way], found["verl grpo"]
        print(
            f"{way:32} {cpu(row):9.4f} {cpu(grpo) / cpu(row):8.1f} {wall(row):9.4f} {row['peak_mib']:22.1f}",
            flush=True,
        )
        assert abs(row["abs_sum"] - grpo["abs_sum"]) <= 1e-2 * grpo["abs_sum"], f"{way} computes something else"
        path = arguments.out / f"advantage{'-smoke' if arguments.smoke else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
